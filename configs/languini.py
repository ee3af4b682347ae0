"""The paper's Languini-books runs (Table 4): GPT-2 12L, T=512, 1.2 B tokens of books.

    jax-entropy train --config='configs/languini.py:EReg(SM(t)+ScFuFFN)' --workdir=runs/languini-ereg
    … --config.train.num_steps=36529                                        2.4 B tokens
    … --config.train.num_steps=36529 --config.optimizer.accumulate=8        4.8 B tokens

Data: the Languini books as local shards (text, JSON-lines or Parquet) in --config.data.files, and Languini's own
tokenizer if you have it (--config.data.tokenizer=…); without it a BPE of the same size is trained on the corpus.
Run time: 18,265 steps of 65,536 tokens; we have not measured it on an accelerator. Expected perplexity (the paper's,
1.2 B tokens): SM+LN+G 25.71, SM+LN+R 26.06, SM+ScFuFFN 33.77, EReg(SM(t)+ScFuFFN) 31.54.
The model follows Languini's recipe, not CodeParrot's: embeddings × √D, untied head, biases everywhere, residual output
at 0.02/√(2L), Adam without decay or clipping.
"""

from jax_entropy.config import default_config

_LAYERS, _WIDTH = 12, 768


def get_config(architecture: str = "EReg(SM(t)+ScFuFFN)"):
    config = default_config(architecture)
    config.model.update(
        num_layers=_LAYERS, model_dim=_WIDTH, context_length=512, temperature_init=1e-1, tied_head=False, bias="all",
        embedding_scale=_WIDTH**0.5, residual_init_std=0.02 / (2 * _LAYERS) ** 0.5,
    )  # fmt: skip
    config.data.update(source="languini", vocab_size=16_384)
    config.train.update(
        num_steps=18_265, batch_size=32, dtype="bfloat16", log_every=100, evaluate_every=1_000, checkpoint_every=500
    )
    config.optimizer.update(
        learning_rate=6e-4, end_learning_rate=6e-6, schedule="cosine", warmup=200.0, beta2=0.95, weight_decay=0.0,
        clip_norm=0.0, accumulate=4,
    )  # fmt: skip
    config.penalty.update(weight=5e-5, tolerance=0.2)
    return config
