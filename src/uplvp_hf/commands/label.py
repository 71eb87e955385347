"""`uplvp label`: images and class names in, a pseudo-label store out. See docs/labeling.md for a guide."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from typing import Any

from ..models.errors import UserError
from ._terminal import add_verbosity, check_device, is_main_process
from ._terminal import run as run_command

LABELERS = ("clip", "saliency", "foreground", "ncut", "file", "sam", "segmenter")
NAMERS = ("none", "clip", "classifier", "map")
EPILOG = """
Every other setting of the labeler and the namer is --set NAME=VALUE; `uplvp label --list-settings --labeler NAME
--namer NAME` lists them. Recommended with CLIP: --background sky,grass,wall,background --min-confidence 0.5. Masks of
what is no object then lose their probability to the background names and are dropped; without, every mask is named
after a class. An existing store alone, `uplvp label STORE --report`, is reported on or exported, not labeled.
"""

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The arguments; imports nothing heavy."""
    parser = argparse.ArgumentParser(prog="uplvp label", description=__doc__, epilog=EPILOG)
    _add_input(parser.add_argument_group("images"))
    _add_labeler(parser.add_argument_group("mask source"))
    _add_namer(parser.add_argument_group("names"))
    _add_clip(parser.add_argument_group("of the clip labeler, and others that have them"))
    _add_run(parser.add_argument_group("run"))
    _add_output(parser.add_argument_group("output"))
    add_verbosity(parser)
    return parser


def _add_input(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    images = (
        "folder of images (recursive), COCO json, folder with annotations/ and images/, text file of paths, dataset "
        "of the datasets library (name on the Hub, saved folder, Parquet)"
    )
    add("images", nargs="?", help=images)
    add("--split", help="annotations/{SPLIT}.json of a COCO folder, or a split of a datasets dataset")
    add("--config", help="configuration of a datasets dataset")
    add("--image-column", help="of a datasets dataset")
    add("--id-column", help="of a datasets dataset")
    add("--streaming", action="store_true", help="read a datasets dataset as a stream, without downloading all of it")
    add("--limit", type=int, help="only the first images")


def _add_labeler(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--labeler",
        help=f"{', '.join(LABELERS)}, or your own as my_package.my_module:factory (default: clip)",
    )
    add("--set", action="append", metavar="NAME=VALUE", help="a setting of labeler or namer; repeatable")
    add("--options", metavar="JSON", help="many settings at once: a JSON or YAML mapping, or a file with one")
    add("--list-settings", action="store_true", help="list the settings of --labeler and --namer, and stop")
    add("--backbone", help="timm:NAME, timm:hf-hub:REPO or a transformers backbone, for saliency, foreground and ncut")
    add("--backbone-weights", help="safetensors file for timm:NAME")
    add("--pad-type", choices=("same", ""), help="'same' for networks trained with TensorFlow's padding")
    add("--masks", help="for file: COCO json, COCO results list, pseudo-label store or Parquet file")
    add("--model", help="for sam: a mask generator of transformers; for segmenter: a trained model. Folder or hub id")


def _add_namer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--namer",
        choices=NAMERS,
        help="clip: zero-shot on each mask's crop; classifier; map: the labeler's own classes; none: one class. "
        "Default: clip for clip, map for file, segmenter and your own, none for the others",
    )
    add("--vocabulary", help="file with one class a line (synonyms after commas), or bear,deer,otter")
    add("--clip", help="CLIP, SigLIP or SigLIP 2: folder or hub id, for the clip labeler or namer")
    add("--class-map", help="YAML or JSON, {class name: [classifier classes, by index, range or name]}")
    add("--classify", choices=("image", "crop"), help="what the classifier sees (default: image)")
    add("--classifier", help="timm:NAME or an image classifier of transformers (default: that of --backbone)")
    add("--classifier-weights", help="safetensors file for timm:NAME")
    add("--min-confidence", type=float, default=0.0, help="of the namer; what becomes of masks below: --unnamed")
    add(
        "--unnamed",
        choices=("drop", "keep"),
        default="drop",
        help="masks without a sure name are dropped, or kept as class 'object' (default: drop)",
    )


def _add_clip(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--attention", help="last block: vanilla, maskclip, sclip, clearclip, naclip (default), gem, proxy, identity")
    add("--sigma", type=float, help="width of naclip's gaussian, patches (default: 5)")
    add("--scale", type=float, help="height of naclip's gaussian (default: 1)")
    add("--guide", help="second backbone of --attention proxy, such as a DINO")
    add("--calibration", choices=("zscore", "none"))
    add(
        "--template",
        action="append",
        help="prompt such as 'a photo of a {}', repeatable; or bare, openai7, openai80, or a file",
    )
    add("--background", help="names of what is no object (sky,wall,grass), or stuff; for the clip namer and labeler")
    add("--features", help="precomputed dense features in place of CLIP's: a folder, .safetensors or .npz")
    add("--features-layout", choices=("dhw", "hwd"), help="axes of the features (default: dhw)")
    add("--text-embeddings", help="safetensors file with embeddings of the class names, in place of a text tower")
    add("--threshold", type=float, help="evidence or similarity that a pixel needs")
    add("--image-size", type=int, help="pixels")
    add("--window", type=int, help="pixels")
    add("--stride", type=int, help="pixels")
    add("--min-area", type=float, help="share of the image; of file and segmenter: pixels")
    add("--max-area", type=float, help="share of the image")


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--batch-size", type=int, default=8)
    add("--device", help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("fp32", "bf16"), help="of the networks (default: fp32)")
    add("--workers", type=int, help="threads that decode images (default: this process's share of the cores)")
    add("--calibration-images", type=int, default=200, help="to calibrate the clip labeler on (default: 200)")
    add("--max-failed", type=float, default=0.5, help="share of failed images that is an error (default: 0.5)")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", help="folder of the pseudo-label store; an unfinished one is continued")
    add("--image-root", help="write image paths relative to this folder")
    add("--no-resume", action="store_true", help="refuse an output folder that holds labels already")
    add("--report", nargs="?", const="", metavar="PATH", help="write an HTML page (default: report.html in the store)")
    add("--truth", help="true instances of the same images, for the report: COCO json or folder, store")
    add("--export-coco", metavar="PATH", help="also write the labels as a COCO json")
    add("--export-parquet", metavar="PATH", help="also write the labels as a Parquet file")


# What goes with a store that is only reported on or exported.
AFTERWARDS = ("images", "report", "truth", "export_coco", "export_parquet", "quiet", "verbose", "list_settings")


def _check(args: argparse.Namespace) -> None:
    if args.labeler not in LABELERS and ":" not in args.labeler:
        known = ", ".join(LABELERS)
        raise UserError(f"--labeler {args.labeler} is unknown; use {known}, or your own as my_package.module:factory")
    if args.truth is not None and args.report is None:
        raise UserError("--truth is for the report; add --report")
    if not 0 <= args.min_confidence <= 1:
        raise UserError(f"--min-confidence must be from 0 to 1, got {args.min_confidence}")
    for name in ("batch_size", "limit", "workers", "calibration_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.classifier_weights is not None and args.classifier is None:
        raise UserError("--classifier-weights has no effect without --classifier; use --backbone-weights")
    if args.truth is not None and not os.path.exists(args.truth):
        raise UserError(f"--truth {args.truth}: no such file or folder")
    if args.images is None:
        swallowed = " (--report takes the next word as its path: write it last)" if args.report else ""
        raise UserError(f"no images are named{swallowed}")


def _default_namer(labeler: str) -> str:
    from ._label_build import DEFAULT_NAMERS

    return "map" if ":" in labeler else DEFAULT_NAMERS.get(labeler, "none")


def _afterwards_only(args: argparse.Namespace) -> bool:
    """Whether an existing store is to be reported on or exported. Raises UserError for what then has no effect."""
    if args.output is not None:
        return False
    asked = args.report is not None or args.export_coco is not None or args.export_parquet is not None
    if not asked or not os.path.isfile(os.path.join(args.images or "", "header.json")):
        store = " (without it, only a pseudo-label store can be reported on or exported)" if asked else ""
        raise UserError(f"--output is needed: the folder that the labels are written to{store}")
    defaults = vars(build_parser().parse_args([]))
    for name, value in vars(args).items():
        if name not in AFTERWARDS and value != defaults[name]:
            raise UserError(f"--{name.replace('_', '-')} has no effect on a finished store; name an --output to label")
    return True


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Label, report, export; returns the summary. Raises UserError and OSError for what the user can put right."""
    if args.images is not None and _afterwards_only(args):
        if args.truth is not None and args.report is None:
            raise UserError("--truth is for the report; add --report")
        return {"output": args.images} | _write_more(args, args.images)
    args.labeler = args.labeler or "clip"
    args.namer = args.namer or ("map" if args.features and not args.clip else _default_namer(args.labeler))
    _check(args)
    check_device(args.device)
    from ..data import load_dataset_rows
    from ..labeling import label_images
    from ._label_build import Builder, check_needs, describe_labeler, describe_namer, read_settings

    labeler_part, namer_part = describe_labeler(args.labeler), describe_namer(args.namer)
    settings, names = read_settings(args, labeler_part, namer_part)
    check_needs(args, settings)
    names |= _classify(args, names)
    columns = {"config": args.config, "image_column": args.image_column, "id_column": args.id_column}
    dataset = load_dataset_rows(args.images, split=args.split, streaming=args.streaming, unlabeled=True, **columns)
    builder = Builder(args)
    namer = builder.namer(namer_part, names)
    labeler = builder.labeler(labeler_part, settings)
    licenses = _licenses(labeler, namer)
    recommended = getattr(labeler, "recommended", {})
    if is_main_process() and not args.quiet:
        if recommended:
            words = ", ".join(f"{name}={value}" for name, value in recommended.items())
            print(f"Settings that {labeler.encoder_name} recommends: {words}", flush=True)
        for name, license in licenses.items():
            print(f"License of the weights of {name}: {license}", flush=True)
    summary = label_images(
        dataset,
        labeler,
        namer,
        args.output,
        batch_size=args.batch_size,
        resume=not args.no_resume,
        progress=not args.quiet,
        limit=args.limit,
        min_confidence=args.min_confidence,
        unnamed=args.unnamed,
        calibration_images=args.calibration_images,
        image_root=args.image_root,
        workers=args.workers,
        max_failed=args.max_failed,
    ).as_dict()
    for note in getattr(labeler, "notes", ()):
        logger.warning("%s", note)
    summary["licenses"] = licenses
    return summary | (_write_more(args, args.output) if is_main_process() else {})


def _classify(args: argparse.Namespace, names: dict[str, Any]) -> dict[str, Any]:
    if args.classify is None:
        return {}
    if args.namer != "classifier":
        raise UserError(f"--classify has no effect with --namer {args.namer}; leave it out")
    if "mode" in names:
        raise UserError("--classify and --set namer.mode say the same; give one")
    return {"mode": args.classify}


def _licenses(labeler: Any, namer: Any) -> dict[str, str]:
    """{network: license of its weights}, whose terms the labels may come under, as far as the model cards say."""
    used = {labeler.encoder_name: getattr(labeler, "license", None)}
    network = getattr(namer, "clip", None) or getattr(namer, "encoder", None)
    if network is not None:
        used[network.name] = getattr(network, "license", None)
    return {name: license for name, license in used.items() if license is not None}


def _write_more(args: argparse.Namespace, store: str) -> dict[str, Any]:
    """Report and exports, as far as they are asked for; {what: path}."""
    from ..labeling import export_coco, export_parquet, write_report

    written: dict[str, Any] = {}
    for name, export in (("export_coco", export_coco), ("export_parquet", export_parquet)):
        path = getattr(args, name)
        if path is not None:
            export(store, path)
            written[name] = path
    if args.report is not None:
        written["report"] = args.report or os.path.join(store, "report.html")
        numbers = write_report(store, written["report"], args.truth)
        if numbers["quality"] is not None:
            written["quality"] = numbers["quality"]
    return written


def _list_settings(args: argparse.Namespace) -> None:
    from ._label_build import describe_labeler, describe_namer
    from ._settings import describe

    args.labeler = args.labeler or "clip"
    if args.labeler not in LABELERS and ":" not in args.labeler:
        raise UserError(f"--labeler {args.labeler} is unknown; use {', '.join(LABELERS)}, or module:factory")
    parts = [describe_labeler(args.labeler), describe_namer(args.namer or _default_namer(args.labeler))]
    for part in parts:
        print(describe(f"Settings of the {part.title}, for --set NAME=VALUE:", part.settings))


def _label(args: argparse.Namespace) -> None:
    if args.list_settings:
        _list_settings(args)
        return
    summary = run(args)
    if not is_main_process():
        return  # the summary is of all processes
    if summary.get("failed"):
        # On stderr, because the last line of stdout is for programs.
        where = os.path.join(args.output, "failures.jsonl")
        print(f"{summary['failed']} images could not be labeled: {where}", file=sys.stderr)
    print(json.dumps(summary))


def main(argv: list[str] | None = None) -> int:
    """Entry point. 0: done; 2: the arguments or files are at fault, said in one line."""
    args = build_parser().parse_args(argv)
    again = "run the same command again to go on"
    return run_command("label", lambda: _label(args), args.verbose, again)
