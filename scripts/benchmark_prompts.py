"""Time and memory of text features for B images x K classes with shared prefixes, against encoding all B * K prompts.

Commands:

    python scripts/benchmark_prompts.py                 # CLIP ViT-B's text tower, random weights, B = 4, K = 150
    python scripts/benchmark_prompts.py --width 128 --layers 3 --classes 40   # quick

Forward and backward to prompts and image tokens, the tower frozen. Memory: bytes that the backward pass keeps, every
storage counted once. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from uplvp_hf.models.configuration_icpc import IcpcConfig
from uplvp_hf.models.icpc_prompts import ClassPrompts
from uplvp_hf.models.losses_icpc import on_grid, pixel_cross_entropy

NAME_LENGTHS = [1] * 82 + [2] * 13 + [3] * 5  # of ADE20K's 150 names in BPE tokens: mean 1.23, at most 3


def plain_features(
    tower: CLIPTextModelWithProjection, prompts: ClassPrompts, pooled: torch.Tensor, names: list
) -> torch.Tensor:
    """Every prompt of every image as a sequence of its own, padded to one length: (B, K, D)."""
    embed = tower.text_model.embeddings
    start, end = embed.token_embedding(prompts.ends.tokens)
    image, rows, ends = prompts.image(pooled, None), [], []
    longest = max(map(len, names))
    for token in image:
        for ids in names:
            name = embed.token_embedding(torch.tensor(ids))
            parts = (
                [prompts.contexts, token, name] if prompts.form == "dynamic_concat" else [prompts.contexts, name, token]
            )
            row = torch.cat([start[None], *parts, end[None]])
            ends.append(len(row) - 1)
            rows.append(F.pad(row, (0, 0, 0, longest - len(ids))))
    x = torch.stack(rows)
    x = x + embed.position_embedding.weight[: x.shape[1]]
    mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    for block in tower.text_model.encoder.layers:
        x = block(x, attention_mask=mask)
    x = tower.text_model.final_layer_norm(x[torch.arange(len(x)), torch.tensor(ends)])
    return tower.text_projection(x).unflatten(0, (len(pooled), -1))


def measure(run, repeats: int) -> tuple[float, int]:
    """Median seconds of forward and backward, and bytes kept in between, every storage once."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run().backward()
        seconds.append(time.perf_counter() - began)
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run()
    kept = sum(seen.values())
    loss.backward()
    return statistics.median(seconds), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 4), ("classes", 150), ("width", 512), ("layers", 12), ("repeats", 3), ("size", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    width, classes = arguments.width, arguments.classes
    text = CLIPTextConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=arguments.layers,
        num_attention_heads=max(width // 64, 1), projection_dim=width, hidden_act="quick_gelu", bos_token_id=998,
        eos_token_id=999,
    )  # fmt: skip
    tower = CLIPTextModelWithProjection(text).requires_grad_(False)
    lengths = [NAME_LENGTHS[index % len(NAME_LENGTHS)] for index in range(classes)]
    names = [torch.randint(1, 990, (length,)).tolist() for length in lengths]
    pooled = torch.randn(arguments.images, width)
    result: dict[str, float] = {}
    for form in ("dynamic_concat", "dynamic_last"):
        config = IcpcConfig(
            text_config=text.to_dict(), projection_dim=width, class_token_ids=names, num_labels=classes, prompt=form,
        )  # fmt: skip
        prompts = ClassPrompts(config)
        torch.nn.init.normal_(prompts.contexts, std=0.02)
        cotangent = torch.randn(arguments.images, classes, width)

        def shared(prompts=prompts, cotangent=cotangent):
            return (prompts(tower, pooled, pooled[:, None]) * cotangent).sum()

        def plain(prompts=prompts, cotangent=cotangent):
            return (plain_features(tower, prompts, pooled, names) * cotangent).sum()

        with torch.no_grad():
            difference = (shared() - plain()).abs().item() / plain().abs().item()
        (ours, kept), (theirs, their_kept) = measure(shared, arguments.repeats), measure(plain, arguments.repeats)
        short = form.removeprefix("dynamic_")
        print(f"{short}: {ours:.2f} s, {kept / 1e6:.0f} MB; plain {theirs:.2f} s, {their_kept / 1e6:.0f} MB")
        print(f"{short}: sums of features differ by {difference:.0e} of their size")
        result |= {f"time_ratio_{short}": ours / theirs, f"memory_ratio_{short}": kept / their_kept}
    side = arguments.size // 4
    logits = torch.randn(1, classes, side, side, requires_grad=True)
    labels = torch.randint(0, classes, (1, arguments.size, arguments.size))
    kept = [
        measure(lambda targets=targets: pixel_cross_entropy(logits, targets, 65535), 1)[1]
        for targets in (on_grid(labels, 4), labels)
    ]
    result["loss_memory_ratio"] = kept[0] / kept[1]
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
