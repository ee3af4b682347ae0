"""What each part without a nonlinearity brings, alone and together, to the softmax-only model and to the baseline.

    jax-entropy sweep parts --jobs=2

Perplexities are divided by that of the plain baseline and by those of the baselines with the same parts. The aim: a
softmax-only model at 1.00 of the plain one, for at most what EReg(SM(t)+ScFuFFN) costs privately, and at 1.05 of the
baseline with its parts. Fewer and wider heads are in heads.py, stabilisers in stabilisers.py.
"""

from jax_entropy.sweep import SCALES, Sweep, product

ALONE = ["SM(log)", "Conv4", "RoPE", "VRes", "VEmb", "Mem8", "Win(SSSL,32)"]
SOME, ALL = ["Conv4", "RoPE", "VRes"], ALONE
CHEAPER = [*SOME, "Win(SSSL,64)"]  # sends less than the model without parts
BODIES = ["SM+ScFuFFN", "SM+LN+G"]
OTHER_NONLINEARITIES = ["SM+BiFFN", "PSM(4)+ScFuFFN", "SM+FN+ScFuFFN", "SM+FN+BiFFN"]


def get_sweep(scale: str) -> Sweep:
    free = [_with(body, parts) for body in BODIES for parts in (*([part] for part in ALONE), SOME, CHEAPER, ALL)]
    # SM(t) scales by position already
    among = [[], SOME, CHEAPER, [part for part in ALL if part != "SM(log)"]]
    penalised = [f"EReg({_with('SM(t)+ScFuFFN', parts)})" for parts in among]
    penalised += [f"EReg({_with(body, SOME)})" for body in ("SM(t)+BiFFN", "SM(t)+LN+G")]
    others = [_with(body, parts) for body in OTHER_NONLINEARITIES for parts in ([], SOME)]
    return Sweep(
        title="Parts without a nonlinearity",
        points=product({"architecture": ["SM+LN+G", "SM+ScFuFFN", *free, *penalised, *others]}),
        baselines=["SM+LN+G", *(_with("SM+LN+G", parts) for parts in (SOME, CHEAPER, ALL))],
        **SCALES[scale],
    )


def _with(body: str, parts: list[str]) -> str:
    """An architecture with parts added; SM(log) takes the place of its SM."""
    added = [part for part in parts if part != "SM(log)"]
    return "+".join([body.replace("SM", "SM(log)", 1) if "SM(log)" in parts else body, *added])
