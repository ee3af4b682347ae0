"""Workdirs like those of real runs, of any shape and fate, for the tests of the report."""

import json
import math

import numpy as np

CONTEXT = 128
CAUSAL = math.lgamma(CONTEXT + 1) / CONTEXT


def bands(entropy_LxN, maximum):
    """Quarters one by one, half-open but for the last (paper.md §4): the definition that the report must agree with."""
    quarter = maximum / 4
    inside = [(entropy_LxN >= i * quarter) & (entropy_LxN < (i + 1) * quarter) for i in range(3)]
    return [float(np.mean(x)) for x in (*inside, entropy_LxN >= 3 * quarter)]


def as_json(tree):
    """What the metrics writer makes of arrays: lists, with null for what is not finite."""
    if isinstance(tree, dict):
        return {name: as_json(value) for name, value in tree.items()}
    if isinstance(tree, (list, np.ndarray)):
        return [as_json(value) for value in tree]
    return None if tree is None or not math.isfinite(tree) else float(tree)


def write_run(
    workdir,
    *,
    L=12,
    N=12,
    steps=40,
    ereg=True,
    nan_from=None,
    incidents=(),
    architecture="EReg(SM(t)+ScFuFFN)",
    seed=0,
):
    """Writes a workdir like that of a real run, logged `steps` times; from the `nan_from`-th on it diverges upwards.

    The guard sent it back at the steps of `incidents`.
    """
    rng = np.random.default_rng(seed)
    depth_L = np.linspace(0, 1, L)
    final_LxN = CAUSAL * np.clip(0.7 - 0.5 * depth_L[:, None] + 0.1 * rng.standard_normal((L, N)), 0.01, 1)
    theta_LxN = np.clip(0.4 + 0.07 * rng.standard_normal((L, N)), 0.1, 0.9)
    lines = []
    for i in range(steps):
        done = (i + 1) / steps
        learned = 1 - math.exp(-6 * done)
        entropy_LxN = CAUSAL * 0.98 * (1 - learned) + final_LxN * learned
        cross_entropy = 1.2 + 7 * math.exp(-9 * done) + 0.03 * rng.standard_normal()
        max_logit_L = 2 + 40 * learned * (0.3 + depth_L)
        lost = 0 if nan_from is None else max(0, min(L, i - nan_from + 1))
        nan_count_L = np.where(np.arange(L) >= L - lost, 1000 * N, 0)
        if lost:
            entropy_LxN[L - lost :] = max_logit_L[L - lost :] = cross_entropy = np.nan
        known = entropy_LxN[np.isfinite(entropy_LxN)]
        norms = dict(embedding=0.5, attention=0.8, feed_forward=0.3, norm=0.05, scale=0.02)
        line = dict(
            step=50 * (i + 1),
            loss=cross_entropy + 0.01,
            cross_entropy=cross_entropy,
            penalty=900 * (1.1 - learned) if ereg else 0.0,
            tokens_per_second=20000.0 + i if i else None,  # the first step compiles
            gradient_norm=1.1 * (1.1 - done),
            gradient_norms={name: value * (1.1 - done) for name, value in norms.items()},
            head_entropy=entropy_LxN,
            layer_entropy=entropy_LxN.mean(axis=1),
            bands_observed=bands(entropy_LxN, known.max(initial=0)),
            bands_context=bands(entropy_LxN, math.log(CONTEXT)),
            bands_causal=bands(entropy_LxN, CAUSAL),
            threshold=0.5 + (theta_LxN - 0.5) * learned if ereg else None,
            temperature={
                name: x * (1 + 9 * learned * (1 + depth_L))
                for name, x in zip(("mean", "min", "max"), (1, 0.3, 4), strict=True)
            }
            if ereg
            else None,
            max_logit=max_logit_L,
            head_max_logit=max_logit_L[:, None] * np.linspace(0.5, 1, N),
            nan_count=nan_count_L,
            inf_count=np.zeros(L),
        )
        lines.append(as_json(line) | dict(kind="train", step=line["step"]))
        if (i + 1) % 5 == 0 or i + 1 == steps:
            validation = dict(validation_loss=cross_entropy + 0.05, bits_per_byte=0.6, head_entropy=entropy_LxN)
            lines.append(as_json(validation) | dict(kind="evaluate", step=line["step"]))
    config = dict(
        architecture=architecture,
        model=dict(num_layers=L, num_heads=N, model_dim=64 * N, context_length=CONTEXT),
        data=dict(source="stdlib", files=""),
    )
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if incidents:
        seen = [dict(step=step, what=f"the loss is not finite at step {step}", back_to=step // 2) for step in incidents]
        (workdir / "guard.jsonl").write_text("".join(json.dumps(incident) + "\n" for incident in seen))
    return workdir


CASES = dict(
    paper=dict(),
    deep=dict(L=18, N=12),
    very_deep=dict(L=48, N=25),
    smallest=dict(L=1, N=1, steps=1, ereg=False, architecture="SM"),
    single_step=dict(L=6, N=2, steps=1),
    two_steps=dict(L=4, N=4, steps=2),
    plain=dict(L=4, N=4, ereg=False, architecture="SM+LN+G"),
    diverged=dict(L=6, N=8, ereg=False, architecture="SM", nan_from=30),
    sent_back=dict(L=4, N=4, incidents=(3, 700, 2500)),
    never_finite=dict(L=3, N=2, nan_from=-9, architecture="SM"),
)
