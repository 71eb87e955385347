"""`uplvp label`: pictures and class names in, a pseudo-label store out. See scripts/label.py for command lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ._terminal import add_verbosity, check_device
from ._terminal import run as run_command

ATTENTIONS = ("vanilla", "maskclip", "clearclip", "naclip", "identity")

RECOMMENDED = (
    "Recommended with CLIP: --background sky,grass,wall,background --min-confidence 0.5. Masks of what is no object "
    "then lose their probability to the background names and are dropped; without, every mask is named after a class."
)


def build_parser() -> argparse.ArgumentParser:
    """The arguments; imports nothing heavy."""
    parser = argparse.ArgumentParser(prog="uplvp label", description=__doc__, epilog=RECOMMENDED)
    add = parser.add_argument
    add("images", help="folder of pictures (recursive), COCO json, or folder with annotations/ and images/")
    add("--output", required=True, help="folder of the pseudo-label store; an unfinished one is continued")
    add("--split", help="annotations/{SPLIT}.json of a COCO folder")
    add("--labeler", choices=("clip", "saliency", "foreground"), default="clip", help="mask source (default: clip)")
    add(
        "--namer",
        choices=("none", "clip", "classifier", "map"),
        help="default: clip for the clip labeler, none for the others",
    )
    add("--vocabulary", help="file with one class a line (synonyms after commas), or bear,deer,otter")
    add("--clip", help="CLIPModel: folder or hub id, for the clip labeler or namer")
    add("--backbone", help="timm:NAME, timm:hf-hub:REPO or a transformers backbone, for saliency and foreground")
    add("--backbone-weights", help="safetensors file for timm:NAME")
    add("--pad-type", choices=("same", ""), help="'same' for networks trained with TensorFlow's padding")
    add("--class-map", help="YAML or JSON, {class name: [classifier classes]}, for the classifier namer")
    add("--classify", choices=("picture", "crop"), default="picture", help="what the classifier sees")
    add("--min-confidence", type=float, default=0.0, help="drop masks that the namer is less sure of (default: 0)")
    add("--attention", choices=ATTENTIONS, help="last block of the clip labeler (default: naclip)")
    add("--sigma", type=float, help="width of naclip's gaussian, patches (default: 5)")
    add("--scale", type=float, help="height of naclip's gaussian (default: 1)")
    add("--calibration", choices=("zscore", "none"), help="of the clip labeler")
    add(
        "--template",
        action="append",
        help="CLIP prompt such as 'a photo of a {}'; repeatable. Default: seven of CLIP's",
    )
    add("--background", help="names of what is no object (sky,wall,grass), for the clip namer and labeler")
    add("--threshold", type=float, help="of the clip or saliency labeler")
    add("--image-size", type=int, help="of the clip or saliency labeler, pixels")
    add("--window", type=int, help="of the clip labeler, pixels")
    add("--stride", type=int, help="of the clip labeler, pixels")
    add("--min-area", type=float, help="of the clip or foreground labeler, share of the picture")
    add("--max-area", type=float, help="of the clip or foreground labeler, share of the picture")
    add("--batch-size", type=int, default=8)
    add("--limit", type=int, help="only the first pictures")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--image-root", help="write picture paths relative to this folder")
    add("--no-resume", action="store_true", help="refuse an output folder that holds labels already")
    add_verbosity(parser)
    return parser


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


# Options that only some labelers read; anything else that was given is an error, not silence.
OPTIONS = {
    "clip": ("attention", "sigma", "scale", "threshold", "image_size", "window", "stride", "min_area", "max_area"),
    "saliency": ("threshold", "image_size"),
    "foreground": ("min_area", "max_area"),
}


def _check(args: argparse.Namespace) -> None:
    read = {*OPTIONS[args.labeler], *(("calibration",) if args.labeler == "clip" else ())}
    if args.attention not in (None, "naclip"):
        read -= {"sigma", "scale"}
    if "clip" in (args.labeler, args.namer):
        read.add("template")
    if args.namer == "clip" or (args.labeler == "clip" and args.calibration == "none"):
        read.add("background")
    for name in sorted(
        {name for names in OPTIONS.values() for name in names} | {"calibration", "background", "template"}
    ):
        if getattr(args, name) is not None and name not in read:
            option = name.replace("_", "-")
            chosen = f"--labeler {args.labeler} --namer {args.namer}"
            if name in ("sigma", "scale") and args.labeler == "clip":
                chosen = f"--attention {args.attention}"
            raise ValueError(f"--{option} has no effect with {chosen}; leave it out")
    uses_clip = "clip" in (args.labeler, args.namer)
    uses_backbone = args.labeler != "clip" or args.namer == "classifier"
    needs = {
        "clip": uses_clip,
        "vocabulary": uses_clip,
        "backbone": uses_backbone,
        "class_map": args.namer == "classifier",
    }
    for name, needed in needs.items():
        if needed and getattr(args, name) is None:
            raise ValueError(f"--labeler {args.labeler} with --namer {args.namer} needs --{name.replace('_', '-')}")
    if args.namer == "map" and args.labeler != "clip":
        raise ValueError(
            f"--namer map: the {args.labeler} labeler has no classes of its own; use clip, classifier or none"
        )
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError("--batch-size and --limit must be at least 1")


def _build(args: argparse.Namespace):
    """The labeler and the namer that the arguments describe."""
    import torch

    from ..labeling import class_map as class_maps
    from ..labeling import encoders, namers, text

    device = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    entries = text.read_vocabulary(args.vocabulary) if args.vocabulary is not None else []
    class_map = class_maps.read_class_map(args.class_map) if args.class_map is not None else {}
    if class_map and entries:
        names = [text.split_synonyms(entry)[0] for entry in entries]
        lacking = [name for name in names if name not in class_map]
        if lacking:
            raise ValueError(f"class map {args.class_map} has no entry for {lacking[0]!r} of the vocabulary")
        class_map = {name: class_map[name] for name in names}
    background = text.split_synonyms(args.background or "")
    clip = encoder = None
    if args.clip is not None:
        from ..labeling.dense_clip import load_clip

        clip = load_clip(args.clip, device=device)
    if args.backbone is not None:
        encoder = encoders.load_encoder(args.backbone, args.backbone_weights, args.pad_type or None, device=device)
    namer = {
        "none": namers.AgnosticNamer,
        "clip": lambda: namers.ClipZeroShotNamer(clip, entries, background=background, **_templates(args)),
        "classifier": lambda: namers.ClassifierNamer(encoder, class_map, args.classify),
        "map": lambda: None,
    }[args.namer]()
    return _build_labeler(args, clip, encoder, entries), namer


def _templates(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.template is None else {"templates": args.template}


def _build_labeler(args: argparse.Namespace, clip, encoder, entries: list[str]):
    options = _given(args, *OPTIONS[args.labeler])
    if args.labeler == "clip":
        from ..labeling.language_vision import DenseClipLabeler
        from ..labeling.text import split_synonyms

        if args.calibration is not None:
            options["calibration"] = None if args.calibration == "none" else args.calibration
        if args.background is not None and args.calibration == "none":
            options["background"] = split_synonyms(args.background)
        return DenseClipLabeler(clip, entries, **options, **_templates(args))
    if args.labeler == "saliency":
        from ..labeling.saliency import SaliencyLabeler

        return SaliencyLabeler(encoder, **options)
    from ..labeling.foreground import ForegroundLabeler

    return ForegroundLabeler(encoder, **options)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Label; returns the summary. Raises ValueError and OSError for whatever the user can put right."""
    args.namer = args.namer or ("clip" if args.labeler == "clip" else "none")
    _check(args)
    check_device(args.device)
    from ..data import load_dataset_rows
    from ..labeling import label_images

    dataset = load_dataset_rows(args.images, split=args.split)
    labeler, namer = _build(args)
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
        image_root=args.image_root,
    )
    return summary.as_dict()


def _label(args: argparse.Namespace) -> None:
    summary = run(args)
    if summary["failed"]:
        # On stderr, because the last line of stdout is for programs.
        where = os.path.join(args.output, "failures*.jsonl" if "RANK" in os.environ else "failures.jsonl")
        print(f"{summary['failed']} pictures could not be labelled: {where}", file=sys.stderr)
    print(json.dumps(summary))


def main(argv: list[str] | None = None) -> int:
    """Entry point. 0: done; 2: the arguments or files are at fault, said in one line."""
    args = build_parser().parse_args(argv)
    again = "run the same command again to go on"
    return run_command("label", lambda: _label(args), args.verbose, again)
