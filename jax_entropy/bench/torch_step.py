"""The program that a PyTorch user would run: Hugging Face GPT-2, eager attention, the penalty on its matrices.

With the argument "compiled", what a user without entropies would run: fused attention under `torch.compile`. A script
of its own process (it needs torch and transformers, not jax): see `jax_entropy.bench.step` for the protocol.
"""

import json
import math
import resource
import sys
import time


def main(shape: dict, compiled: bool) -> None:
    """Trains one step for each line on stdin and answers with its seconds; at the end, peak memory in MB."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = GPT2Config(
        vocab_size=shape["vocab_size"], n_positions=shape["context"], n_embd=shape["width"], n_layer=shape["layers"],
        n_head=shape["heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa" if compiled else "eager"
    model = GPT2LMHeadModel(config).train().to(device)
    run = torch.compile(model) if compiled else model
    thresholds = torch.nn.Parameter(torch.full((shape["layers"], shape["heads"]), 0.5, device=device))
    optimizer = torch.optim.AdamW([*model.parameters(), thresholds], lr=1e-3, weight_decay=0.1)
    ids = torch.randint(0, shape["vocab_size"], (shape["batch"], shape["context"]), device=device)
    maximum = math.log(shape["context"])

    def penalty(attentions):
        """Per row, summed over batch and rows, averaged over heads and layers: the paper's listing."""
        total = 0.0
        for weights, theta in zip(attentions, thresholds, strict=True):
            weights = weights.float()
            entropy = -(weights * torch.log(weights + 1e-9)).sum(-1)
            deviation = entropy - (theta * maximum)[None, :, None]
            outside = deviation.abs() > 0.2 * maximum
            total = total + torch.where(outside, deviation, 0.0).square().sum() / weights.shape[1]
        return total / len(attentions)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=shape["dtype"] == "bfloat16"):
            out = run(ids, labels=ids, output_attentions=not compiled)
        loss = out.loss if compiled else out.loss + 1e-5 * penalty(out.attentions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), thresholds], 1.0)
        optimizer.step()
        return out.loss.item()  # waits for the device

    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # modules beside this one have names that transformers tries to import
    main(json.loads(sys.argv[-1]), compiled="compiled" in sys.argv)
