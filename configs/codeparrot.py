"""The paper's CodeParrot runs (Tables 2, 3, 7 and 8): GPT-2 12L, T=128, 2.1 B tokens of Python.

    jax-entropy train --config='configs/codeparrot.py:EReg(SM(t)+ScFuFFN)' --workdir=runs/codeparrot-ereg
    … --config.model.context_length=256      Table 7
    … --config.model.num_layers=18           Table 8

Data: the filtered CodeParrot set of the Hugging Face course through the hub, or local shards in --config.data.files.
Run time: one epoch is 32,621 steps of 65,536 tokens; we have not measured it on an accelerator. Expected perplexity
(the paper's, T=128): SM+LN+G 2.69, SM+LN+R 2.76, SM+LN 3.38, SM+G 3.20, SM+R 2.94, SM diverges, SM+ScFuFFN 3.48,
EReg(SM(t)+ScFuFFN) 3.21. Ours is yet to be measured: the paper tokenises with a 50 K BPE made for CodeSearchNet
(--config.data.tokenizer=…/tokenizer.json); without it one of the same size is trained on the corpus.
"""

from jax_entropy.config import default_config


def get_config(architecture: str = "EReg(SM(t)+ScFuFFN)"):
    config = default_config(architecture)
    config.model.update(temperature_init=1e-2, embedding_dropout=0.1)
    config.data.update(
        source="codeparrot", vocab_size=50_000, max_documents=600_000, validation_fraction=2_000 / 600_000
    )
    config.train.update(
        num_steps=32_621, batch_size=128, dtype="bfloat16", log_every=100, evaluate_every=2_000, checkpoint_every=1_000
    )
    config.optimizer.update(learning_rate=1e-3, accumulate=4)
    config.penalty.update(weight=1e-5, tolerance=0.2)
    return config
