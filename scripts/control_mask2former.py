"""The control: our Mask2Former and transformers' own, trained the same way, must end with the same quality.

Both start from the same weights and see the same images with the same augmentation in the same order, with the same
optimizer, schedule and clipping; on the first batch, taken without its padding mask, their losses are compared
(scripts/benchmark_train_step.py compares them on the same points, at several sizes). What differs is the code of
forward, matching and loss, the random points of the loss, and that ours keeps padding out. If both merge neighbors
here, it is not for a fault of ours.

Commands:

    OMP_NUM_THREADS=1 python scripts/control_mask2former.py --output runs/control                  # crowded scenes
    python scripts/control_mask2former.py --recipe small_tf_finetune data.train=photos/ data.train_split=train \\
        data.val=photos/ data.val_split=val data.labels_per_class=10 model.backbone_weights=WEIGHTS

Columns: AP and AP50, F1 at a score of .5 and at the best one, and of the images with two or more objects the share of
objects found and of those lost in merges, at the best score (docs/evaluation.md says how they are counted).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = ["model", "seed", "steps", "AP", "AP50", "F1 at .5", "best F1", "found, 2+", "merged, 2+", "seconds"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="section.key=value", help="settings of the training")
    parser.add_argument("--recipe", default="scenes_finetune", help="of a Mask2Former (default: scenes_finetune)")
    parser.add_argument("--scenes", type=int, nargs=2, default=(80, 60), help="crowded scenes to train and to test on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", default="runs/control", help="folder of the scenes")
    arguments = parser.parse_args(argv)
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("| " + " | ".join(HEAD) + " |\n|---" + "|---:" * (len(HEAD) - 1) + "|", flush=True)
    for seed in arguments.seeds:
        for name in ("ours", "transformers"):
            cells = run(name, read_settings(arguments, seed))
            print("| " + " | ".join([name, str(seed), *cells]) + " |", flush=True)
    return 0


def read_settings(arguments: argparse.Namespace, seed: int) -> Any:
    from uplvp_hf.data.synthetic import write_scenes
    from uplvp_hf.training.build import with_image_settings
    from uplvp_hf.training.config import load_settings

    words = ["data.extra=null", f"seed={seed}", *arguments.words]
    if not any(word.startswith("data.train=") for word in words):
        for number, (name, count) in enumerate(zip(("train", "val"), arguments.scenes)):
            folder = Path(arguments.output) / f"{name}_{count}"
            if not (folder / "annotations" / "instances.json").is_file():
                write_scenes(folder, count, seed=number, crowded=True)
            words.append(f"data.{name}={folder}")
    return with_image_settings(load_settings(arguments.recipe, words, output=arguments.output))


def run(name: str, settings: Any) -> list[str]:
    """Trains one of the two and evaluates it: the cells of its line after the seed."""
    import torch
    from accelerate.utils import set_seed

    from uplvp_hf.evaluation import evaluate_model
    from uplvp_hf.training.batch import model_inputs
    from uplvp_hf.training.build import build_data, build_model, build_processor, build_samples
    from uplvp_hf.training.freezing import training_mode
    from uplvp_hf.training.optim import learning_rate_factor, make_optimizer
    from uplvp_hf.training.stream import make_loader
    from uplvp_hf.training.task import evaluates_agnostic

    set_seed(settings.seed)
    train, val = build_data(settings)
    ours = build_model(settings, train)
    model = ours if name == "ours" else theirs(ours)
    optimizer, optim = make_optimizer(model, settings.optim), settings.optim
    loader = iter(make_loader(build_samples(settings, train), settings, 0, 0, 1))
    began = time.process_time()
    for step in range(optim.steps):
        training_mode(model, settings.model.freeze_backbone_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(step, optim)
        inputs = model_inputs(next(loader), torch.device("cpu"), "finetune")
        if step == 0 and name != "ours":
            check_losses(ours, model, inputs)
        optimizer.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip or float("inf"))
        optimizer.step()
    seconds, processor = time.process_time() - began, build_processor(settings.data)
    metrics = evaluate_model(model, processor, val, class_agnostic=evaluates_agnostic(settings), progress=False)
    first, best = metrics["findings"]["at"][0], metrics["findings"]["at"][-1]
    several = next((row for row in best["by_objects"] if row["objects"] == "2 or more"), {"found": 0, "merged": 0})
    numbers = (metrics["AP"], metrics["AP50"], first["f1"], best["f1"], several["found"], several["merged"])
    return [str(optim.steps), *(f"{100 * (number or 0):.1f}" for number in numbers), f"{seconds:.0f}"]


def theirs(ours: Any) -> Any:
    """transformers' Mask2Former with our weights, called as our loop calls a model."""
    import copy

    from torch import nn
    from transformers import Mask2FormerForUniversalSegmentation

    class Control(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, segmenter = ours.config, ours.segmenter
            self.inner = Mask2FormerForUniversalSegmentation(segmenter.config)
            encoder = self.inner.model.pixel_level_module
            encoder.encoder = copy.deepcopy(segmenter.backbone)  # timm's padding, which transformers does not pass on
            self.inner.load_state_dict(segmenter.state_dict())

        @property
        def segmenter(self) -> Control:
            return self

        @property
        def backbone(self) -> nn.Module:
            return self.inner.model.pixel_level_module.encoder

        def forward(self, pixel_values: Any, pixel_mask: Any, mask_labels: Any = None, class_labels: Any = None) -> Any:
            masks = None if mask_labels is None else [mask.float() for mask in mask_labels]
            return self.inner(pixel_values, mask_labels=masks, class_labels=class_labels, pixel_mask=pixel_mask)

    return Control()


def check_losses(ours: Any, control: Any, inputs: dict[str, Any]) -> None:
    """Losses are means over random points: those of the two must agree as well as those of several draws do."""
    import copy

    import torch

    inputs = {**inputs, "pixel_mask": torch.ones_like(inputs["pixel_mask"])}
    with torch.no_grad(), torch.random.fork_rng():
        pair = [copy.deepcopy(model).train() for model in (ours, control)]
        draws = [[float(model(**inputs).loss) for _ in range(8)] for model in pair]
    means = [sum(own) / len(own) for own in draws]
    spread = max(max(own) - min(own) for own in draws)
    print(f"First loss: {means[0]:.3f} and {means[1]:.3f}; draws differ by {spread:.3f}", file=sys.stderr)
    if abs(means[0] - means[1]) > spread:
        raise SystemExit("The losses of equal weights differ by more than the random points explain.")


if __name__ == "__main__":
    sys.exit(main())
