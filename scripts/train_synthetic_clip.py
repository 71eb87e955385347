"""Train the small CLIP that ships with the package, from scratch, on synthetic crops only.

Commands:

    python scripts/train_synthetic_clip.py --output src/uplvp_hf/assets/synthetic_clip
    python scripts/train_synthetic_clip.py --output runs/clip --steps 50        # a quick try

Writes a folder that `CLIPModel`, `AutoTokenizer` and `CLIPImageProcessor` load offline, with `training.json` (settings
and measured accuracy) and a model card. About six minutes on one CPU core; set OMP_NUM_THREADS to the cores that are
free, two processes that share cores stall each other.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from uplvp_hf.data.synthetic import BACKGROUND, CLASSES, make_object_crop, make_scene

NAMES = (*CLASSES, BACKGROUND)  # a crop's label indexes it: -1 is the background
TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a picture of a {}",
    "a photo of a {}",
    "a photo of the {}",
    "an image of a {}",
    "a cropped photo of a {} .",
    "a {} in the scene .",
)
UNKNOWN_WORD_TEMPLATES = ("a nice {}", "itap of my {}")  # teach the text tower to read past words it does not know
EVALUATION_TEMPLATE = "a picture of a {}"
PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<|startoftext|>", "<|endoftext|>"
IMAGE_SIZE, MAX_LENGTH = 64, 16
HELD_OUT_SEED = 2_000_000_000  # training crops have smaller seeds


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, lower case. The end token's id is 3: with id 2 CLIPTextModel pools at the largest id instead."""
    words = dict.fromkeys(word for text in (*NAMES, *TEMPLATES) for word in text.replace("{}", "").split())
    vocabulary = {word: index for index, word in enumerate((PAD, UNKNOWN, START, END, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """About 0.7 M parameters. Widths and depth of the image tower as measured to suffice."""
    config = CLIPConfig(
        vision_config={
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_LENGTH,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=64,
    )
    return CLIPModel(config)


def build_image_processor() -> CLIPImageProcessor:
    half = [0.5, 0.5, 0.5]
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=half, image_std=half)


def training_crop(seed: int) -> tuple[Image.Image, int]:
    """A crop at the model's resolution; one in three was drawn smaller or larger, as boxes of masks are."""
    rng = np.random.default_rng([seed, 2])
    if rng.random() < 2 / 3:
        crop = make_object_crop(seed, IMAGE_SIZE)
        return crop["image"], crop["label"]
    crop = make_object_crop(seed, int(rng.integers(32, 97)))
    return crop["image"].resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), crop["label"]


def contrastive_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy over (B, B) image-text logits; all pairs of equal names share the target mass."""
    positives = (labels[:, None] == labels[None]).float()
    targets = positives / positives.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def train(model: CLIPModel, tokenizer, image_processor, steps: int, batch_size: int, lr: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    templates = TEMPLATES + UNKNOWN_WORD_TEMPLATES
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = min(50, steps // 4 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, s - warmup) / steps))
    )
    model.train()
    for step in range(steps):
        crops = [training_crop(int(crop_seed)) for crop_seed in rng.integers(HELD_OUT_SEED, size=batch_size)]
        texts = [templates[rng.integers(len(templates))].format(NAMES[label]) for _, label in crops]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        inputs["pixel_values"] = image_processor([image for image, _ in crops], return_tensors="pt")["pixel_values"]
        logits = model(**inputs).logits_per_image  # (B, B)
        loss = contrastive_loss(logits, torch.tensor([label for _, label in crops]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  scale {model.logit_scale.exp().item():.1f}", flush=True)


@torch.no_grad()
def zero_shot(model: CLIPModel, tokenizer, image_processor, images: Sequence, names: Sequence[str]) -> torch.Tensor:
    """(N,) index of the name closest to each image."""
    model.eval()
    texts = tokenizer([EVALUATION_TEMPLATE.format(name) for name in names], padding=True, return_tensors="pt")
    predictions = []
    for start in range(0, len(images), 256):
        pixels = image_processor(list(images[start : start + 256]), return_tensors="pt")["pixel_values"]
        predictions.append(model(**texts, pixel_values=pixels).logits_per_image.argmax(dim=1))
    return torch.cat(predictions)


def evaluate(model: CLIPModel, tokenizer, image_processor, count: int = 1000) -> dict[str, float]:
    """Zero-shot accuracy, as shares of 1, on images that training never saw.

    `objects`: `count` crops of one object, among the class names. `objects_and_background`: crops with the training
    share of backgrounds, "background" being one more name. `scene_boxes`: boxes cut from `count // 4` scenes and
    stretched to a square, neighbors and occlusion included, among the class names.
    """
    crops, seed = [], HELD_OUT_SEED
    while sum(crop["label"] >= 0 for crop in crops) < count:
        crops.append(make_object_crop(seed, IMAGE_SIZE))
        seed += 1
    labels = torch.tensor([crop["label"] for crop in crops])
    images = [crop["image"] for crop in crops]
    objects = [crop["image"] for crop in crops if crop["label"] >= 0]
    boxes, box_labels = [], []
    for index in range(count // 4):
        scene = make_scene(HELD_OUT_SEED + index)
        for mask, label in zip(scene["masks"], scene["labels"]):
            (top, bottom), (left, right) = ((np.flatnonzero(mask.any(axis))[[0, -1]]) for axis in (1, 0))
            box = scene["image"].crop((left, top, right + 1, bottom + 1))
            boxes.append(box.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
            box_labels.append(label)
    parts = (model, tokenizer, image_processor)
    right_names = zero_shot(*parts, images, NAMES) == labels % len(NAMES)
    return {
        "objects": (zero_shot(*parts, objects, CLASSES) == labels[labels >= 0]).float().mean().item(),
        "objects_and_background": right_names.float().mean().item(),
        "scene_boxes": (zero_shot(*parts, boxes, CLASSES) == torch.tensor(box_labels)).float().mean().item(),
    }


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, synthetic, uplvp_hf]
---

# A small CLIP for synthetic scenes

A `CLIPModel` of {parameters:,} parameters ({image_size} px images, patches of 8 px, whole-word tokenizer). It knows
"background", the {classes} classes of `uplvp_hf.data.synthetic`, and nothing else. It lets the language-vision labeler
run offline in seconds, in tests and in the quick start. The classes:

{names}.

Trained from scratch on synthetic crops, no other data or weights, with

    {command}

({seconds:.0f} s, CPU threads: {threads}). Zero-shot accuracy printed by that script, on crops and scenes that training
never saw, prompt "{template}":

| images | accuracy |
|---|---|
| 1,000 crops of one object, {classes} names | {objects:.1%} |
| the same with backgrounds, "background" as one more name | {objects_and_background:.1%} |
| boxes cut from 250 scenes, {classes} names | {scene_boxes:.1%} |

`labeling.json` holds what the labeler takes for this encoder where it is given nothing: small windows, close together.

Limits: toy images only. It cannot read words outside its {vocabulary} tokens (they become `<unk>`), nor count, nor
name anything in photographs. Do not use it on real images.

License: Apache-2.0.
"""


def save(output: Path, model: CLIPModel, tokenizer, image_processor, record: dict) -> None:
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(output)
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    recommended = {"templates": ["a photo of a {}"], "image_size": 2 * IMAGE_SIZE, "stride": IMAGE_SIZE // 4}
    (output / "labeling.json").write_text(json.dumps(recommended, indent=2) + "\n", encoding="utf-8")
    card = CARD.format(
        parameters=record["parameters"],
        image_size=IMAGE_SIZE,
        classes=len(CLASSES),
        names=", ".join(CLASSES),
        command=record["command"],
        seconds=record["seconds"],
        threads=record["threads"],
        template=EVALUATION_TEMPLATE,
        vocabulary=len(tokenizer),
        **record["accuracy"],
    )
    (output / "README.md").write_text(card, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    tokenizer, image_processor = build_tokenizer(), build_image_processor()
    model = build_model(tokenizer)
    started = time.perf_counter()
    train(model, tokenizer, image_processor, args.steps, args.batch_size, args.lr, args.seed)
    seconds = time.perf_counter() - started
    accuracy = evaluate(model, tokenizer, image_processor)
    for name, value in accuracy.items():
        print(f"zero-shot accuracy, {name}: {value:.1%}")
    settings = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    options = " ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in settings.items())
    record = {
        "script": "scripts/train_synthetic_clip.py",
        "command": f"python scripts/train_synthetic_clip.py {options} --output FOLDER",
        "settings": settings,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
    }
    save(args.output, model, tokenizer, image_processor, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
