"""Few-label fine-tuning with and without pre-training on pseudo labels: the same steps, splits and seeds in every arm.

Commands (the label store comes from `uplvp label`, see docs/results.md):

    python scripts/compare_pretraining.py --data photos --labels runs/labels --backbone-weights m.safetensors
    python scripts/compare_pretraining.py ... --seeds 1        # in a second process: the table collects what is there

Arms: `scratch` (fine-tuning only), `named` (pre-trained on the pseudo labels with their classes, class head kept) and
`agnostic` (pre-trained on the same masks without classes). Finished runs are not repeated, interrupted ones resume.
`rows.jsonl` in the output holds one line a run, the table is printed from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

ARMS = ("scratch", "agnostic", "named")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with images/, annotations/train.json and val.json")
    parser.add_argument("--labels", required=True, help="pseudo-label store of the training pictures")
    parser.add_argument("--backbone-weights", required=True, help="safetensors of the frozen backbone")
    parser.add_argument("--output", default="runs/compare", help="default: runs/compare")
    parser.add_argument("--labels-per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 250, 500], help="fine-tuning steps to report")
    parser.add_argument("--pretrain-steps", type=int, default=500)
    parser.add_argument("--pretrain-seed", type=int, help="one pre-training for all seeds (default: one a seed)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    output = Path(arguments.output)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            run_arm(arm, seed, arguments, output)
            print_table(collect(output), arguments.steps)
    return 0


def run_arm(arm: str, seed: int, arguments: argparse.Namespace, output: Path) -> None:
    """Pre-trains (unless from scratch) and fine-tunes; both are skipped when finished, resumed when interrupted."""
    weights = {"model.backbone_weights": arguments.backbone_weights}
    start = {}
    if arm != "scratch":
        pretrain_seed = seed if arguments.pretrain_seed is None else arguments.pretrain_seed
        folder = output / f"pretrain_{arm}_seed{pretrain_seed}"
        settings = {"data.train": arguments.labels, "model.class_agnostic": arm == "agnostic", **weights}
        run("small_pretrain", folder, pretrain_seed, settings | {"optim.steps": arguments.pretrain_steps})
        start = {"model.init": folder}
    data = {"data.train": arguments.data, "data.train_split": "train", "data.val": arguments.data}
    split = {"data.val_split": "val", "data.labels_per_class": arguments.labels_per_class, "data.split_seed": seed}
    steps = {"optim.steps": max(arguments.steps), "evaluation.at": sorted(arguments.steps)}
    run("small_finetune", output / f"{arm}_seed{seed}", seed, data | split | steps | weights | start)


def run(recipe: str, folder: Path, seed: int, settings: dict) -> None:
    from uplvp_hf.training.config import load_settings
    from uplvp_hf.training.loop import train

    if (folder / "training_summary.json").is_file():
        return
    print(f"{folder} ...", flush=True)
    words = [f"{key}={value}" for key, value in settings.items()] + [f"seed={seed}"]
    train(load_settings(recipe, words, output=str(folder)), resume=(folder / "settings.json").is_file())


def collect(output: Path) -> list[dict]:
    """One row a finished fine-tuning run, also written to `rows.jsonl`."""
    rows = []
    for path in sorted(output.glob("*_seed*/training_summary.json")):
        arm, _, seed = path.parent.name.rpartition("_seed")
        summary = json.loads(path.read_text())
        if arm in ARMS:
            numbers = {
                step: {key: round(metrics[key], 4) for key in ("AP", "AP50", "AP75")}
                for step, metrics in summary["evaluations"].items()
            }
            rows.append({"arm": arm, "seed": int(seed), "evaluations": numbers, "seconds": summary["seconds"]})
    (output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def print_table(rows: list[dict], steps: list[int]) -> None:
    """AP / AP50 in percent: mean over seeds, standard deviation in brackets with two or more seeds."""
    print(f"\n{'arm':10}" + "".join(f"{f'{step} steps':>28}" for step in steps) + "  seeds")
    for arm in ARMS:
        runs = [row["evaluations"] for row in rows if row["arm"] == arm]
        if runs:
            cells = [f"{_mean(runs, step, 'AP')} / {_mean(runs, step, 'AP50')}" for step in steps]
            print(f"{arm:10}" + "".join(f"{cell:>28}" for cell in cells) + f"  {len(runs)}")


def _mean(runs: list[dict], step: int, key: str) -> str:
    from uplvp_hf.evaluation.compare import Point
    from uplvp_hf.evaluation.compare_page import percent

    values = [run[str(step)][key] for run in runs if str(step) in run]
    return percent(Point(step, step, values) if values else None)


if __name__ == "__main__":
    sys.exit(main())
