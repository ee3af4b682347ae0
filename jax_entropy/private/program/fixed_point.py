"""What fixed point can hold: values of a forward pass that would leave its range are found before anything is shared.

With f fraction bits of 64, a product carries 2f of them, and the exponential's Taylor form only holds above −2ⁿ⁺¹.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.program.export import Export
from jax_entropy.private.program.forward import forward
from jax_entropy.private.program.stage import PUBLIC, TOKENS, Stage

_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")  # of functions, whose operations count


def largest_value(setting: Setting) -> float:
    """Largest magnitude whose products stay in the ring, one bit left for their sums."""
    return 2.0 ** (62 - 2 * setting.fraction_bits)


def lowest_exponent(exponent: str, squarings: int) -> float:
    """The lowest argument that a form of the exponential takes to 0."""
    return {"quadratic": -1.7, "taylor": -1.9, "pade": -np.inf}[exponent] * 2.0**squarings


def check_range(exported: Export, tokens: Sequence[int], setting: Setting, *, steps: bool = False) -> None:
    """Runs a model in float32 on tokens, and looks at every value that an operation of a stage leaves.

    Args:
      steps: whether more tokens follow, whose exponentials have less room where they are `shifted`.
    Raises:
      UserError: names the layer and the value that fixed point would not hold.
    """
    known = exported.weights | {TOKENS: exported.enter(tokens)}
    for name, value in exported.weights.items():
        _check(f"the weight {name}", value, setting)
    bent = exported.blueprint.squarings
    for stage in forward(exported.blueprint, len(tokens)):
        squarings = setting.squarings if stage.layer is None or not bent else bent[stage.layer]
        limit = lowest_exponent(setting.exponent, squarings)
        form = f"the exponential with exponent_iterations={squarings} holds"
        advice = "raise them, or take exponent=pade"
        if steps and exported.blueprint.shifted and stage.layer is not None:
            limit, form = -exported.blueprint.reach(stage.layer), "a step that takes several shifts holds"
            advice = f"{'raise exponent_iterations, or ' if bent else ''}leave out the rewrite shifts"
        where = stage.kind if stage.layer is None else f"{stage.kind} of layer {stage.layer}"

        def look(
            operation: str, arguments: list[Any], results: list[Any], where: str = where, limit: float = limit,
            otherwise: str = f"{form} down to {limit:.4g}; {advice}",
        ) -> None:  # fmt: skip
            if operation == ("bent" if bent else "exp") and (lowest := float(jnp.min(arguments[0]))) < limit:
                raise UserError(f"an exponent in the {where} is {lowest:.4g}, and {otherwise}")
            for value in results:
                _check(f"a value in {where}", value, setting)

        known |= zip(stage.outputs, _run_watched(stage, known, look), strict=True)


def lowest_exponents(exported: Export, tokens: Sequence[int]) -> list[float]:
    """Of each layer the lowest argument of its exponential, in float32."""
    known, lowest = exported.weights | {TOKENS: exported.enter(tokens)}, [0.0] * exported.blueprint.config.num_layers
    for stage in forward(exported.blueprint, len(tokens)):

        def look(operation: str, arguments: list[Any], results: list[Any], layer: int | None = stage.layer) -> None:
            if operation == ("bent" if exported.blueprint.squarings else "exp"):
                lowest[layer] = min(lowest[layer], float(jnp.min(arguments[0])))

        known |= zip(stage.outputs, _run_watched(stage, known, look), strict=True)
    return lowest


def _run_watched(stage: Stage, known: dict[str, Any], look: Callable[[str, list, list], None]) -> list[Any]:
    """The stage's outputs; `look` is shown every operation on secrets: its name, what goes in and what comes out."""
    inputs = [jnp.asarray(known[name]) for name in stage.inputs]
    closed = jax.make_jaxpr(stage.function)(*inputs)
    secret = [name not in PUBLIC for name in stage.inputs]
    return [value for value, _ in _evaluate(closed.jaxpr, closed.consts, zip(inputs, secret, strict=True), look)]


def _evaluate(
    jaxpr: Any, constants: Sequence[Any], inputs: Iterable[tuple[Any, bool]], look: Callable[[str, list, list], None]
) -> list[tuple[Any, bool]]:
    """The values of a jaxpr's outputs, each with whether a secret went into it."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {var: (value, False) for var, value in zip(jaxpr.constvars, constants, strict=True)}

    def read(atom: Any) -> tuple[Any, bool]:
        return (atom.val, False) if isinstance(atom, jax.extend.core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        arguments = [read(atom) for atom in equation.invars]
        if equation.primitive.name in _CALLS:
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if any(secret for _, secret in arguments):
                look(equation.params.get("name", ""), [value for value, _ in arguments], [])
            results = _evaluate(inner.jaxpr, inner.consts, arguments, look)
        else:
            values = [value for value, _ in arguments]
            found = equation.primitive.bind(*values, **equation.params)
            found = found if equation.primitive.multiple_results else [found]
            secret = any(secret for _, secret in arguments)
            if secret:
                look(equation.primitive.name, values, found)
            results = [(value, secret) for value in found]
        known |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _check(what: str, value: Any, setting: Setting) -> None:
    if jnp.issubdtype(jnp.result_type(value), jnp.floating):
        size, limit = float(jnp.abs(value).max()), largest_value(setting)
        if not size <= limit:
            raise UserError(
                f"{what} reaches {size:.4g}, and with fraction_bits={setting.fraction_bits} fixed point holds "
                f"{limit:.4g}; fewer fraction bits hold more"
            )


def random_tokens(vocab_size: int, num_tokens: int) -> list[int]:
    """Tokens to try a model on where there is no text."""
    return jax.device_get(jax.random.randint(jax.random.key(0), (num_tokens,), 0, vocab_size)).tolist()
