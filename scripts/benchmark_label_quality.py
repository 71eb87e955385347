"""How good each mask source's proposals are, against true instances: nothing is trained, every source sees the same
images.

Commands:

    python scripts/benchmark_label_quality.py photos/animals7:train photos/balloon:train --images 100 \
        --backbone timm:mobilenetv2_100 --backbone-weights mobilenetv2.safetensors --pad-type same
    python scripts/benchmark_label_quality.py --clip --scenes 100
    python scripts/benchmark_label_quality.py --clip --only clearclip naclip --output rows.jsonl
    python scripts/benchmark_label_quality.py --clip --variants-of identity --only "without PAMR" --seed 1
    python scripts/benchmark_label_quality.py --examples photos/animals7:train:val photos/nuts scenes \
        --backbone timm:mobilenetv2_100 --backbone-weights mobilenetv2.safetensors --pad-type same

Images: COCO-style folders, as FOLDER or FOLDER:SPLIT, each labeled without classes by the saliency labeler (every
variant), the foreground labeler, a MaskCut-style normalized cut on the same backbone, and two sources that do not look
(center box, whole image).

--clip: synthetic scenes with the small CLIP that ships with the package: every last-block recipe, with calibrated
evidence and with a background name, then what options of cutting and naming change for the recipes of --variants-of.
All other settings are the defaults of the library; those of the windows are what this CLIP's folder recommends. A real
CLIP may rank the recipes differently (see `labeling.attention`).

--examples: true masks named after K examples a class of the first split, drawn --draws times, on the second one (of a
folder without splits: on every other image). "scenes" are synthetic scenes, looked at by the CLIP that ships with the
package. Shares of the true masks: `right` is named rightly when every mask is named; `right_by_default` when masks like
no example stay unnamed and count as wrong; `kept` has a confidence of .5 or more, and `right_of_kept` is right among
these. Shares of places without an object, in the objects' shapes: `ground_unnamed` by default, `ground_dropped` by
that confidence. In a set of one class every named mask is right: there `right_by_default` is the share of objects that
stay, and `right` and `right_of_kept` are null. Mean and standard deviation over the draws. What the network makes of
the masks is computed once a set, and kept in --features; rows that --output has already are not measured again.

Columns of the others: mean best IoU of the true instances, recall and precision at IoU .5 whatever the class (several
proposals may cover an instance), COCO's AP at IoU .5 (which counts repetitions as wrong), proposals an image; with
--clip also the share of the covering proposals that carry the right class, recall and AP at IoU .5 with the class. Then
images a second with labels written. Images are drawn, and scenes made, with --seed. --output appends each row to a
file.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "vanilla": {"attention": "vanilla"},
    "maskclip": {"attention": "maskclip"},
    "sclip": {"attention": "sclip"},
    "clearclip": {"attention": "clearclip"},
    "gem": {"attention": "gem"},
    "naclip": {"attention": "naclip", "sigma": 5.0, "scale": 1.0},
    "naclip-local": {"attention": "naclip", "sigma": 1.5, "scale": 5.0},
    "identity": {"attention": "identity"},
    "proxy": {"attention": "proxy"},
}
# Changes to the calibrated defaults. "namer" is no option of the labeler: names by zero-shot on crops.
CUTTING: dict[str, dict[str, Any]] = {
    "without PAMR": {"refine": None},
    "PAMR at 336 px": {"refine_size": 336},
    "overlapping classes": {"exclusive": False},
    "without PAMR, overlapping": {"refine": None, "exclusive": False},
    "overlapping, matrix NMS": {"exclusive": False, "nms_kind": "matrix"},
    "holes filled": {"fill_holes": True},
    "split by ncut": {"split": "ncut"},
    "threshold .75": {"threshold": 0.75},
    "threshold 1.25": {"threshold": 1.25},
    "peak 1.5": {"peak": 1.5},
    "peak 2.5": {"peak": 2.5},
    "areas from .5 %": {"min_area": 0.005},
    "named on crops": {"namer": True},
    "without PAMR, named on crops": {"refine": None, "namer": True},
    "overlapping, named on crops": {"exclusive": False, "namer": True},
    "peak 1.5, named on crops": {"peak": 1.5, "namer": True},
}
KEYS = ("mean_best_iou", "recall", "precision", "ap50", "proposals_per_image")
NAMED_KEYS = ("class_accuracy", "recall_named", "ap50_named")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", nargs="*", metavar="FOLDER[:SPLIT]", help="COCO-style folders for the sources without text")
    add("--backbone", help="of the sources without text, see `load_encoder`")
    add("--backbone-weights", help="safetensors file of a timm backbone")
    add("--pad-type", help="'same' for networks trained with TensorFlow's padding")
    add("--images", type=int, default=100, help="most a dataset, drawn with --seed (default: 100)")
    add("--clip", action="store_true", help="the recipes of dense CLIP on synthetic scenes")
    add("--scenes", type=int, default=100, help="for --clip (default: 100)")
    add("--proxy-backbone", help="a vision transformer such as DINO, for recipe proxy (default: it is left out)")
    add("--variants-of", nargs="+", default=["naclip"], help="recipes that the options are tried on (default: naclip)")
    add("--examples", nargs="+", metavar="FOLDER[:POOL:TEST]", default=[], help="sets whose masks are named; scenes")
    add("--shots", type=int, nargs="+", default=[1, 3, 5, 10], help="examples a class (default: 1 3 5 10)")
    add("--draws", type=int, default=10, help="of the examples (default: 10)")
    add("--every", type=int, default=1, help="of the images of --examples take every Nth (default: 1, all)")
    add("--features", help="folder that keeps what the networks of --examples make of the masks")
    add("--only", nargs="+", help="names of sources, recipes or options (default: all)")
    add("--output", help="append a line of JSON for every row of the tables to this file")
    add("--batch-size", type=int, default=8)
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    return parser


def measure(dataset, labeler, namer, batch_size: int, **options: Any) -> dict[str, float | None]:
    """Label the images into a store that is thrown away, and compare it with the truth."""
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.labeling import label_images, proposal_quality

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "labels"
        summary = label_images(
            dataset.unlabeled(), labeler, namer, output, batch_size=batch_size, progress=False, **options
        )
        quality = proposal_quality(load_dataset_rows(output), dataset, average_precision=True)
    keys = (*KEYS, *(NAMED_KEYS if labeler.vocabulary or namer is not None else ()))
    speed = summary.done / summary.seconds
    values = {key: None if math.isnan(quality[key]) else round(quality[key], 4) for key in keys}
    return values | {"images_per_second": round(speed, 2)}


def keep_row(
    arguments: argparse.Namespace, where: dict[str, Any], source: str, values: dict[str, float | None]
) -> None:
    """Print a row, and append it to --output. What only says how fast this machine is stays out of the file."""
    print_line(source, values)
    if arguments.output is not None:
        row = {**where, "seed": arguments.seed, "source": source}
        row |= {key: value for key, value in values.items() if key != "images_per_second"}
        with open(arguments.output, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def image_sources(encoder) -> dict[str, Callable[[], Any]]:
    """Name -> labeler, built when its turn comes."""
    from uplvp_hf.labeling.labelers.baselines import CenterBoxLabeler, WholeImageLabeler
    from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler
    from uplvp_hf.labeling.labelers.maskcut import NcutLabeler
    from uplvp_hf.labeling.labelers.saliency import VARIANTS, SaliencyLabeler

    sources: dict[str, Callable[[], Any]] = {
        "whole image": WholeImageLabeler,
        "center box": CenterBoxLabeler,
    }
    for variant in VARIANTS:
        sources[f"saliency {variant}"] = lambda variant=variant: SaliencyLabeler(encoder, variant=variant)
    sources["saliency offline, 256 px"] = lambda: SaliencyLabeler(encoder, image_size=256)
    sources["saliency online, score .5"] = lambda: SaliencyLabeler(encoder, variant="online", min_score=0.5)
    # MaskCut's own numbers, and what suited a convolutional map of stride 32 best of those tried.
    sources["ncut 480 px, tau .15"] = lambda: NcutLabeler(encoder)
    sources["ncut 768 px, tau .3"] = lambda: NcutLabeler(encoder, image_size=768, tau=0.3)
    sources["ncut 768 px, tau .3, PAMR"] = lambda: NcutLabeler(encoder, image_size=768, tau=0.3, refine="pamr")
    sources["foreground"] = lambda: ForegroundLabeler(encoder)
    return sources


def measure_images(arguments: argparse.Namespace, encoder) -> dict[str, Any]:
    """{dataset: {source: numbers}}."""
    from uplvp_hf.data import load_dataset_rows

    results: dict[str, Any] = {}
    for place in arguments.data:
        folder, _, split = place.partition(":")
        dataset = load_dataset_rows(folder, split=split or None)
        chosen = sorted(random.Random(arguments.seed).sample(range(len(dataset)), min(arguments.images, len(dataset))))
        dataset = dataset.subset(chosen)
        name = Path(folder).name
        print_head(f"{name}, {len(dataset)} images", ())
        results[name] = {"images": len(dataset)}
        where = {"set": name, "split": split or None, "images": len(dataset), "backbone": arguments.backbone}
        for source, build in image_sources(encoder).items():
            if arguments.only is None or source in arguments.only:
                results[name][source] = measure(dataset, build(), None, arguments.batch_size)
                keep_row(arguments, where, source, results[name][source])
    return results


def measure_clip(arguments: argparse.Namespace) -> dict[str, Any]:
    """{recipe, evidence: numbers} on synthetic scenes, and {option: numbers} for one recipe."""
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.data.synthetic import BACKGROUND, CLASSES, write_scenes
    from uplvp_hf.demo.pipeline import synthetic_clip_path
    from uplvp_hf.labeling import ClipZeroShotNamer, DenseClipLabeler, load_clip, load_encoder

    clip = load_clip(synthetic_clip_path(), device=arguments.device)
    guide = None
    if arguments.proxy_backbone is not None:
        guide = load_encoder(arguments.proxy_backbone, device=arguments.device)
    evidence: dict[str, dict[str, Any]] = {
        "calibrated": {},
        "background": {"calibration": None, "background": [BACKGROUND]},
    }
    results: dict[str, Any] = {"scenes": arguments.scenes}
    where = {"set": "synthetic scenes", "images": arguments.scenes}
    with tempfile.TemporaryDirectory() as folder:
        scenes = load_dataset_rows(write_scenes(Path(folder) / "scenes", arguments.scenes, arguments.seed))

        def run(name: str, options: dict[str, Any]) -> None:
            options, namer, floor = dict(options), None, {}
            if options.pop("namer", False):
                namer = ClipZeroShotNamer(clip, CLASSES, background=[BACKGROUND])
                floor = {"min_confidence": 0.7}
            if options["attention"] == "proxy":
                options["guide"] = guide
            labeler = DenseClipLabeler(clip, CLASSES, **options)
            results[name] = measure(scenes, labeler, namer, arguments.batch_size, **floor)
            keep_row(arguments, where, name, results[name])

        print_head(f"synthetic scenes, {arguments.scenes} images", NAMED_KEYS)
        for recipe, options in RECIPES.items():
            if (arguments.only is not None and recipe not in arguments.only) or (recipe == "proxy" and guide is None):
                continue
            for kind, extra in evidence.items():
                run(f"{recipe}, {kind}", options | extra)
        for recipe in arguments.variants_of:
            for name, extra in CUTTING.items():
                if arguments.only is None or name in arguments.only:
                    run(f"{recipe}, {name}", RECIPES[recipe] | extra)
    return results


def example_sets(arguments: argparse.Namespace, place: str, folder: str) -> list[Any]:
    """The images that examples are drawn from, and those whose masks they name."""
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.data.synthetic import write_scenes

    if place == "scenes":
        paths = [Path(folder) / str(seed) for seed in (arguments.seed, arguments.seed + 1)]
        return [load_dataset_rows(write_scenes(path, arguments.scenes, int(path.name))) for path in paths]
    path, *splits = place.split(":")
    if splits:
        parts = [load_dataset_rows(path, split=split) for split in splits]
    else:
        every = load_dataset_rows(path)
        parts = [every.subset(range(start, len(every), 2)) for start in (0, 1)]
    return [part.subset(range(0, len(part), arguments.every)) for part in parts]


def described_sets(arguments: argparse.Namespace, place: str, name: str) -> list[Any]:
    """`Described` of the masks to draw from, and of those to name, computed or as --features has them."""
    import torch

    from uplvp_hf.demo.pipeline import synthetic_clip_path
    from uplvp_hf.labeling import load_clip, load_encoder
    from uplvp_hf.labeling.naming.examples import Described, describe, read_examples
    from uplvp_hf.labeling.naming.mask_features import MaskFeatures

    every = [f"every_{arguments.every}"] if arguments.every > 1 else []
    stem = f"scenes_{arguments.seed}" if place == "scenes" else "_".join([name, *place.split(":")[1:], *every])
    kept = None if arguments.features is None else Path(arguments.features) / f"{stem}.pt"
    if kept is not None and kept.is_file():
        return [Described(**values) for values in torch.load(kept, weights_only=True)]
    if place == "scenes":
        network: Any = load_clip(synthetic_clip_path(), device=arguments.device)
    else:
        backbone = (arguments.backbone, arguments.backbone_weights, arguments.pad_type)
        network = load_encoder(*backbone, device=arguments.device)
    features = MaskFeatures(network)
    with tempfile.TemporaryDirectory() as folder:
        found = [describe(read_examples(part), features) for part in example_sets(arguments, place, folder)]
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save([vars(part) for part in found], kept)
    return found


def naming_quality(pool, test, count: int, seed: int, confidence: float = 0.5) -> dict[str, float]:
    """What `count` examples a class (or all, of a class that has fewer) of `pool` make of the masks of `test`."""
    import torch

    from uplvp_hf.labeling.naming.prototypes import Prototypes

    generator = torch.Generator().manual_seed(seed)
    members = [(pool.labels == label).nonzero()[:, 0] for label in range(len(pool.names))]
    chosen = torch.cat([own[torch.randperm(len(own), generator=generator)[:count]] for own in members])
    around = torch.isin(pool.ground_groups, pool.groups[chosen])  # the ground of the drawn images alone
    prototypes = Prototypes(
        *(values[chosen] for values in (pool.vectors, pool.labels, pool.groups)),
        pool.ground[around],
        pool.ground_groups[around],
    )
    calibration = prototypes.calibrate()
    truth = torch.tensor([pool.names.index(test.names[label]) for label in test.labels.tolist()])
    every, _ = prototypes.name(test.vectors, replace(calibration, floor=-1.0, most_ground=1.0))
    labels, confidences = prototypes.name(test.vectors, calibration)
    kept = (labels >= 0) & (confidences >= confidence)
    ground, sure = prototypes.name(test.ground, calibration)
    shares = {
        "right": every == truth,
        "right_by_default": labels == truth,
        "kept": kept,
        "right_of_kept": (labels == truth)[kept],
        "ground_unnamed": ground < 0,
        "ground_dropped": (ground < 0) | (sure < confidence),
    }
    if len(pool.names) == 1:
        shares |= {"right": kept[:0], "right_of_kept": kept[:0]}
    return {name: float(values.float().mean()) for name, values in shares.items()}  # nan of nothing


def mean_and_deviation(draws: list[dict[str, float]]) -> dict[str, float | None]:
    """{name: mean, name_sd: standard deviation} of the draws that have a number."""
    result: dict[str, float | None] = {}
    for name in draws[0]:
        values = [draw[name] for draw in draws if not math.isnan(draw[name])]
        result[name] = round(statistics.mean(values), 4) if values else None
        result[f"{name}_sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return result


def measure_examples(arguments: argparse.Namespace) -> dict[str, Any]:
    """{set: {examples a class: numbers}}."""
    output, done = arguments.output and Path(arguments.output), []
    if output and output.is_file():
        done = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    results: dict[str, Any] = {}
    for place in arguments.examples:
        name = "synthetic scenes" if place == "scenes" else Path(place.split(":")[0]).name
        where = {"set": name, "split": place.partition(":")[2] or None}
        where |= {"every": arguments.every} if arguments.every > 1 else {}
        where["network"] = "the package's CLIP" if place == "scenes" else arguments.backbone
        pool, test = described_sets(arguments, place, name)
        where |= {"classes": len(pool.names), "pool": len(pool.labels), "masks": len(test.labels)}
        print(f"\n{name}: {len(pool.labels)} masks to draw from, {len(test.labels)} to name", flush=True)
        for shots in arguments.shots:
            key = {**where, "examples": shots, "draws": arguments.draws, "seed": arguments.seed}
            row = next((row for row in done if row | key == row), None)
            if row is None:
                draws = [naming_quality(pool, test, shots, arguments.seed + draw) for draw in range(arguments.draws)]
                row = key | mean_and_deviation(draws)
                if output:
                    with open(output, "a", encoding="utf-8") as stream:
                        stream.write(json.dumps(row) + "\n")
            values = {name: value for name, value in row.items() if name not in key}
            results.setdefault(name, {})[shots] = values
            print_line(f"{shots} examples a class", values)
    return results


def print_head(title: str, named: tuple[str, ...]) -> None:
    words = {"class_accuracy": "class acc.", "recall_named": "class R@.5", "ap50_named": "class AP50"}
    columns = ["mean IoU", "recall@.5", "prec.@.5", "AP50", "masks/pic", *(words[key] for key in named), "pics/s"]
    print(f"\n{title:42}" + "".join(f"{column:>11}" for column in columns), flush=True)


def print_line(name: str, values: dict[str, float | None]) -> None:
    cells = ["-" if value is None else f"{value:.3f}" for value in values.values()]  # no precision without proposals
    print(f"{name:42}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments that go together; ends the program with a message where they do not."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if (arguments.data or set(arguments.examples) - {"scenes"}) and arguments.backbone is None:
        parser.error("images need a --backbone")
    if not arguments.data and not arguments.clip and not arguments.examples:
        parser.error("nothing to measure: give data folders, --clip, or --examples")
    if wrong := [place for place in arguments.examples if place.count(":") not in (0, 2)]:
        parser.error(f"--examples {wrong[0]}: write FOLDER:POOL:TEST with two splits, or FOLDER")
    if arguments.draws < 2 or min(arguments.shots) < 1:
        parser.error("--draws must be at least 2, --shots at least 1")
    unknown = sorted(set(arguments.variants_of) - set(RECIPES))
    if unknown:
        parser.error(f"--variants-of: no recipe {unknown[0]!r}; there are {', '.join(RECIPES)}")
    return arguments


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """All tables that the arguments ask for."""
    results: dict[str, Any] = {"seed": arguments.seed, "backbone": arguments.backbone}
    if arguments.data:
        from uplvp_hf.labeling import load_encoder

        backbone = (arguments.backbone, arguments.backbone_weights, arguments.pad_type)
        results["images"] = measure_images(arguments, load_encoder(*backbone, device=arguments.device))
    if arguments.clip:
        results["clip"] = measure_clip(arguments)
    if arguments.examples:
        results["examples"] = measure_examples(arguments)
    return results


def main(argv: list[str] | None = None) -> int:
    print(json.dumps(measure_all(parse(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
