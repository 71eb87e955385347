"""How good each mask source's proposals are, against true instances: nothing is trained, every source sees the same
pictures.

Commands:

    python scripts/benchmark_label_quality.py photos/animals7:train photos/balloon:train --pictures 100 \
        --backbone timm:mobilenetv2_100 --backbone-weights mobilenetv2.safetensors --pad-type same
    python scripts/benchmark_label_quality.py --clip --scenes 60
    python scripts/benchmark_label_quality.py --clip --only clearclip naclip-local

Pictures: COCO-style folders, as FOLDER or FOLDER:SPLIT, each labelled without classes by the saliency labeler (every
variant), the foreground labeler, a MaskCut-style normalised cut on the same backbone, and two sources that do not look
(centre box, whole picture).

--clip: synthetic scenes with the small CLIP that ships with the package: every last-block recipe, with calibrated
evidence and with a background name, then what the options of cutting and naming add to one recipe. Settings of windows
are the demo's, chosen for this CLIP; a real CLIP may rank the recipes differently (see `labeling.attention`).

Columns: mean best IoU of the true instances, recall and precision at IoU .5 whatever the class, share of the covering
proposals that carry the right class (--clip), class-aware recall (--clip), proposals a picture, pictures a second with
labels written. One seed gives one table: pictures are drawn, and scenes made, with --seed.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "vanilla": {"attention": "vanilla"},
    "maskclip": {"attention": "maskclip"},
    "sclip": {"attention": "sclip"},
    "clearclip": {"attention": "clearclip"},
    "gem": {"attention": "gem"},
    "naclip": {"attention": "naclip"},
    "naclip-local": {"attention": "naclip", "sigma": 1.5, "scale": 5.0},
    "identity": {"attention": "identity"},
    "proxy": {"attention": "proxy"},
}
# On top of the recipe of --variants-of, calibrated. "namer" is no option of the labeler: names by zero-shot on crops.
CUTTING: dict[str, dict[str, Any]] = {
    "split by ncut": {"split": "ncut"},
    "PAMR": {"refine": "pamr"},
    "holes filled": {"fill_holes": True},
    "overlapping classes": {"exclusive": False},
    "overlapping, matrix NMS": {"exclusive": False, "nms_kind": "matrix"},
    "named on crops": {"namer": True},
}
KEYS = ("mean_best_iou", "recall", "precision", "proposals_per_picture")
NAMED_KEYS = ("class_accuracy", "recall_named")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", nargs="*", metavar="FOLDER[:SPLIT]", help="COCO-style folders for the sources without text")
    add("--backbone", help="of the sources without text, see `load_encoder`")
    add("--backbone-weights", help="safetensors file of a timm backbone")
    add("--pad-type", help="'same' for networks trained with TensorFlow's padding")
    add("--pictures", type=int, default=100, help="most a data set, drawn with --seed (default: 100)")
    add("--clip", action="store_true", help="the recipes of dense CLIP on synthetic scenes")
    add("--scenes", type=int, default=60, help="for --clip (default: 60)")
    add("--proxy-backbone", help="a vision transformer such as DINO, for recipe proxy (default: it is left out)")
    add("--variants-of", default="naclip-local", help="recipe that the options are added to (default: naclip-local)")
    add("--only", nargs="+", help="names of sources or recipes (default: all)")
    add("--batch-size", type=int, default=8)
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    return parser


def measure(dataset, labeler, namer, batch_size: int, **options: Any) -> dict[str, float]:
    """Label the pictures into a store that is thrown away, and compare it with the truth."""
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.labeling import label_images, proposal_quality

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "labels"
        summary = label_images(
            dataset.unlabelled(), labeler, namer, output, batch_size=batch_size, progress=False, **options
        )
        quality = proposal_quality(load_dataset_rows(output), dataset)
    keys = (*KEYS, *(NAMED_KEYS if labeler.vocabulary or namer is not None else ()))
    speed = summary.done / summary.seconds
    return {key: round(quality[key], 4) for key in keys} | {"pictures_per_second": round(speed, 2)}


def image_sources(encoder) -> dict[str, Callable[[], Any]]:
    """Name -> labeler, built when its turn comes."""
    from uplvp_hf.labeling.baselines import CentreBoxLabeler, WholePictureLabeler
    from uplvp_hf.labeling.foreground import ForegroundLabeler
    from uplvp_hf.labeling.ncut import NcutLabeler
    from uplvp_hf.labeling.saliency import VARIANTS, SaliencyLabeler

    sources: dict[str, Callable[[], Any]] = {
        "whole picture": WholePictureLabeler,
        "centre box": CentreBoxLabeler,
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


def measure_pictures(arguments: argparse.Namespace, encoder) -> dict[str, Any]:
    """{data set: {source: numbers}}."""
    from uplvp_hf.data import load_dataset_rows

    results: dict[str, Any] = {}
    for place in arguments.data:
        folder, _, split = place.partition(":")
        dataset = load_dataset_rows(folder, split=split or None)
        chosen = sorted(
            random.Random(arguments.seed).sample(range(len(dataset)), min(arguments.pictures, len(dataset)))
        )
        dataset = dataset.subset(chosen)
        name = Path(folder).name
        print_head(f"{name}, {len(dataset)} pictures", ())
        results[name] = {"pictures": len(dataset)}
        for source, build in image_sources(encoder).items():
            if arguments.only is None or source in arguments.only:
                results[name][source] = measure(dataset, build(), None, arguments.batch_size)
                print_line(source, results[name][source])
    return results


def measure_clip(arguments: argparse.Namespace) -> dict[str, Any]:
    """{recipe, evidence: numbers} on synthetic scenes, and {option: numbers} for one recipe."""
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.data.synthetic import BACKGROUND, CLASSES, write_scenes
    from uplvp_hf.demo.pipeline import TEMPLATES, synthetic_clip_path
    from uplvp_hf.labeling import ClipZeroShotNamer, DenseClipLabeler, load_clip, load_encoder

    clip = load_clip(synthetic_clip_path(), device=arguments.device)
    guide = None
    if arguments.proxy_backbone is not None:
        guide = load_encoder(arguments.proxy_backbone, device=arguments.device)
    view = {"templates": TEMPLATES, "image_size": 128, "stride": 16, "min_area": 0.01}
    evidence: dict[str, dict[str, Any]] = {
        "calibrated": {},
        "background": {"calibration": None, "background": [BACKGROUND]},
    }
    results: dict[str, Any] = {"scenes": arguments.scenes}
    with tempfile.TemporaryDirectory() as folder:
        scenes = load_dataset_rows(write_scenes(Path(folder) / "scenes", arguments.scenes, arguments.seed))

        def run(name: str, options: dict[str, Any]) -> None:
            options, namer, floor = dict(options), None, {}
            if options.pop("namer", False):
                namer = ClipZeroShotNamer(clip, CLASSES, templates=TEMPLATES, background=[BACKGROUND])
                floor = {"min_confidence": 0.7}
            if options["attention"] == "proxy":
                options["guide"] = guide
            labeler = DenseClipLabeler(clip, CLASSES, **view, **options)
            results[name] = measure(scenes, labeler, namer, arguments.batch_size, **floor)
            print_line(name, results[name])

        print_head(f"synthetic scenes, {arguments.scenes} pictures", NAMED_KEYS)
        for recipe, options in RECIPES.items():
            if (arguments.only is not None and recipe not in arguments.only) or (recipe == "proxy" and guide is None):
                continue
            for kind, extra in evidence.items():
                run(f"{recipe}, {kind}", options | extra)
        for name, extra in CUTTING.items():
            if arguments.only is None or name in arguments.only:
                run(f"{arguments.variants_of}, {name}", RECIPES[arguments.variants_of] | extra)
    return results


def print_head(title: str, named: tuple[str, ...]) -> None:
    words = {"class_accuracy": "class acc.", "recall_named": "class R@.5"}
    columns = ["mean IoU", "recall@.5", "prec.@.5", "masks/pic", *(words[key] for key in named), "pics/s"]
    print(f"\n{title:36}" + "".join(f"{column:>11}" for column in columns), flush=True)


def print_line(name: str, values: dict[str, float]) -> None:
    print(f"{name:36}" + "".join(f"{value:11.3f}" for value in values.values()), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.data and arguments.backbone is None:
        parser.error("pictures need a --backbone")
    if not arguments.data and not arguments.clip:
        parser.error("nothing to measure: give data folders, --clip, or both")
    if arguments.variants_of not in RECIPES:
        parser.error(f"--variants-of: no recipe {arguments.variants_of!r}; there are {', '.join(RECIPES)}")
    results: dict[str, Any] = {"seed": arguments.seed, "backbone": arguments.backbone}
    if arguments.data:
        from uplvp_hf.labeling import load_encoder

        backbone = (arguments.backbone, arguments.backbone_weights, arguments.pad_type)
        results["pictures"] = measure_pictures(arguments, load_encoder(*backbone, device=arguments.device))
    if arguments.clip:
        results["clip"] = measure_clip(arguments)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
