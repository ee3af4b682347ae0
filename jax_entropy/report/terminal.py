"""Head entropies [L, N] on the terminal: numbers on a colour scale, or shades where there is no room for numbers."""

import functools

import numpy as np
from rich.console import Console
from rich.text import Text

from jax_entropy.entropy import head_bands
from jax_entropy.report.drawing import HEAT_MAP, text_color

# Columns of the screen and decimals of one head; the first that fits is taken.
_CELLS = ((6, 2), (5, 2), (4, 1), (2, None), (1, None))
_SHADES = "░▒▓█"


def print_head_entropy(head_entropy_LxN: np.ndarray, maximum: float, console: Console) -> None:
    """Prints one row a layer with its mean at the end, and the shares of heads by quarter of the largest entropy.

    Args:
      head_entropy_LxN: nats; what is not finite is printed as NaN.
      maximum: end of the colour scale in nats.
      console: its width decides how much is printed of each head; without colours the numbers (or shades) remain.
    """
    entropy_LxN = np.asarray(head_entropy_LxN, dtype=float)
    N = entropy_LxN.shape[1]
    fits = [cell for cell in _CELLS if 6 + N * cell[0] + 7 <= console.width]
    width, decimals = fits[0] if fits else _CELLS[-1]
    say = functools.partial(console.print, markup=False, highlight=False)
    say(f"Head entropy in nats, one row a layer, one column a head; the scale ends at {maximum:.2f}.")
    if decimals is not None:
        heads = "".join(f"{head:>{width - 1}} " for head in range(N))
        say(Text(f"layer {heads}  mean", style="dim"), no_wrap=True, overflow="crop")
    for layer, entropy_N in enumerate(entropy_LxN):
        row = Text.assemble((f"{layer:>5} ", "dim"))
        for value in entropy_N:
            row.append(*_cell(value, maximum, width, decimals))
        row.append(f"  {entropy_N.mean():.2f}".replace("nan", " NaN"))
        say(row, no_wrap=True, overflow="crop")
    if np.isfinite(entropy_LxN).any():
        shares = " / ".join(f"{100 * float(share):z.1f}" for share in head_bands(entropy_LxN))
        largest = entropy_LxN[np.isfinite(entropy_LxN)].max()
        say(f"Heads by quarter of the largest ({largest:.2f} nats): {shares} %, from collapse to overload.")


def _cell(value: float, maximum: float, width: int, decimals: int | None) -> tuple[str, str]:
    if not np.isfinite(value):
        return ("NaN" if decimals is not None else "?").rjust(width - 1) + " "[: width > 1], "bold red"
    fraction = min(max(value / maximum, 0.0), 1.0) if maximum > 0 else 0.0
    red, green, blue, _ = HEAT_MAP(fraction, bytes=True)
    if decimals is None:
        return _SHADES[min(int(4 * fraction), 3)] * width, f"rgb({red},{green},{blue})"
    style = f"{text_color(HEAT_MAP(fraction))} on rgb({red},{green},{blue})"
    return f"{value:.{decimals}f}".rjust(width - 1) + " ", style
