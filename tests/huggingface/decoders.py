"""Small decoders of every family: their settings, weights from a seed, and what transformers computes with them.

    python -m tests.huggingface.decoders

writes tests/golden/hf_decoders.npz anew; it needs torch and transformers, the tests that read the file do not.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests import GOLDEN

FILE = GOLDEN / "hf_decoders.npz"
TOKENS = np.random.RandomState(0).randint(0, 37, (1, 12))
_LLAMA = dict(
    vocab_size=37, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
_NEOX = dict(
    model_type="gpt_neox", vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=16, rotary_pct=0.5,
)  # fmt: skip
_SCALED = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CASES = {
    "gpt2": dict(
        model_type="gpt2", vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=16,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt_neo": dict(
        model_type="gpt_neo", vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=16,
        attention_types=[[["global", "local"], 1]], window_size=4,
    ),
    "gpt_neox": _NEOX,
    "gpt_neox_sequential": _NEOX | dict(use_parallel_residual=False),
    "llama": _LLAMA | dict(
        model_type="llama", head_dim=16, rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **_SCALED)
    ),
    "mistral": _LLAMA | dict(model_type="mistral", sliding_window=4),
    "qwen2": _LLAMA | dict(model_type="qwen2", tie_word_embeddings=True, rms_norm_eps=1e-3),
    "qwen2_windows": _LLAMA | dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
}  # fmt: skip


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """The same numbers for the same names, everywhere."""
    return {
        name: (0.3 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_folder(directory: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """A folder as Hugging Face has it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def transformers_model(config: dict):
    """The model of transformers that a config.json describes, with `weights`."""
    import torch
    import transformers

    settings = dict(config)
    settings = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    tied = "lm_head.weight" if settings.tie_word_embeddings else None
    shapes = {name: list(tensor.shape) for name, tensor in model.named_parameters() if name != tied}
    tensors = weights(shapes)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, strict=False)
    return model, shapes


def compute(model) -> dict[str, np.ndarray]:
    """For TOKENS: logits [B, T, V]; entropy of the weights and weight on the first token, [L, B, N, T]."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(TOKENS), output_attentions=True)
    weights_LxBxNxTxT = np.stack([layer.numpy() for layer in out.attentions]).astype(np.float64)
    entropy = -np.sum(weights_LxBxNxTxT * np.log(np.maximum(weights_LxBxNxTxT, 1e-300)), axis=-1)
    found = dict(logits=out.logits.numpy(), entropy=entropy, sink=weights_LxBxNxTxT[..., 0])
    return {name: array.astype(np.float32) for name, array in found.items()}


def main() -> None:
    """Writes FILE."""
    golden = {}
    for case, config in CASES.items():
        model, shapes = transformers_model(config)
        golden[f"{case}/shapes"] = np.array(json.dumps(shapes))
        golden |= {f"{case}/{name}": array for name, array in compute(model).items()}
    np.savez_compressed(FILE, **golden)


if __name__ == "__main__":
    main()
