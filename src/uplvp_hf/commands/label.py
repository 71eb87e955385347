"""`uplvp label`: images and class names in, a pseudo-label store out. See docs/labeling.md for a guide."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from typing import Any

from ..labeling.catalog import LABELERS, NAMERS, label_settings, labeler_entry
from ..models.errors import UserError
from ..settings import build_settings, describe, merge_words
from ._label_stores import check_output, finished_store, merge, write_more
from ._terminal import add_verbosity, check_device, is_main_process, run as run_command

EPILOG = """
Recommended with CLIP: --background sky,grass,wall,background --min-confidence 0.5. Masks of what is no object then lose
their probability to the background names and are dropped; without, every mask is named after a class. An existing store
alone, `uplvp label STORE --report`, is reported on or exported, not labeled.

settings of labeler {labeler} and namer {namer}, as section.name=value words; `--labeler NAME --namer NAME --help` shows
those of others:
{settings}
"""
# Flags that are settings by another name, and the sections that may have them.
SHORTCUTS = {
    "image_size": ("labeler",),
    "window": ("labeler",),
    "stride": ("labeler",),
    "template": ("labeler", "namer"),
    "background": ("labeler", "namer"),
}
_WORD = re.compile(r"[a-z_]+(\.\w+)+=", re.ASCII)

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The arguments; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="uplvp label", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "images",
        nargs="?",
        help="folder of images (recursive), COCO json, folder with annotations/ and images/, text file of paths, "
        "dataset of the datasets library (name on the Hub, saved folder, Parquet)",
    )
    add("settings", nargs="*", metavar="section.name=value", help="settings, see below")
    add("--output", help="folder of the pseudo-label store; an unfinished one is continued")
    add("--labeler", help=f"{', '.join(LABELERS)}, or your own as my_package.my_module:factory (default: clip)")
    add(
        "--namer",
        choices=tuple(NAMERS),
        help="clip: zero-shot on each mask's crop; classifier; examples: after the --examples; map: the labeler's own "
        "classes; none: one class. Default: examples where there are any, clip for clip, map for file, segmenter, "
        "concept, boxes and your own, none for the others",
    )
    add("--vocabulary", help="file with one class a line (synonyms after commas), or bear,deer,otter")
    add("--clip", help="CLIP, SigLIP or SigLIP 2: folder or hub id, for the clip labeler or namer")
    add("--backbone", help="timm:NAME, timm:hf-hub:REPO or a transformers backbone, for saliency, foreground and ncut")
    add("--backbone-weights", help="safetensors file for timm:NAME")
    add(
        "--model",
        help="for sam and boxes: a SAM of transformers; for concept: a SAM 3; for segmenter: a trained model. Folder "
        "or hub id",
    )
    add("--masks", help="for file and boxes: COCO json, COCO results list, pseudo-label store or Parquet file")
    add("--detector", help="for boxes: a zero-shot detector of transformers, such as IDEA-Research/grounding-dino-tiny")
    add(
        "--examples",
        help="a few annotated images, as COCO json or anything else that is read: their classes name the masks. "
        "Without --labeler, masks come from sam where there is a --model, from foreground where there is a "
        "--backbone, else from clip, which then looks for what the examples show",
    )
    add("--background", help="names of what is no object (sky,wall,grass), or stuff; for the clip namer and labeler")
    add("--template", action="append", help="prompt such as 'a photo of a {}', repeatable; or a preset, or a file")
    add("--min-confidence", type=float, default=0.0, help="of the namer; what becomes of masks below: run.unnamed")
    add("--image-size", help="pixels that the labeler looks at")
    add("--window", help="pixels of the clip labeler's sliding window")
    add("--stride", help="pixels between its windows")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--limit", type=int, help="only the first images")
    _add_parts(parser)
    add("--split", help="annotations/{SPLIT}.json of a COCO folder, or a split of a datasets dataset")
    add("--report", nargs="?", const="", metavar="PATH", help="write an HTML page (default: report.html in the store)")
    add(
        "--features",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="with a finished store alone: let --clip or --backbone look at its masks, and keep a vector of each in "
        "the store, or in FOLDER, for model.kernel_target",
    )
    add_verbosity(parser)
    return parser


def _add_parts(parser: argparse.ArgumentParser) -> None:
    """Labeling on several machines."""
    add = parser.add_argument
    add(
        "--shard",
        metavar="K/N",
        help="label the K-th of N parts of the images, such as 3/16, on machines without a shared disk; --merge joins "
        "the stores",
    )
    add(
        "--merge",
        nargs="+",
        metavar="STORE",
        help="make one store, --output, of the stores of all parts; goes with run.image_root, output.* and --report",
    )
    add("--force", action="store_true", help="with --merge: also stores that are not finished, or not all parts")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments with words and flags in any order; `--help` shows the settings of the labeler and the namer."""
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        asked.add_argument("--labeler", default="clip")
        asked.add_argument("--namer", choices=tuple(NAMERS))
        known, _ = asked.parse_known_args(words)
        namer = known.namer or labeler_entry(known.labeler).namer
        text = describe(label_settings(known.labeler, namer))
        parser.epilog = EPILOG.format(labeler=known.labeler, namer=namer, settings=text)
    args = parser.parse_intermixed_args(words)
    given = [args.images, *args.settings] if args.images is not None else []
    if args.merge is not None:  # it takes all words behind it
        given += [word for word in args.merge if _WORD.match(word) and not os.path.exists(word)]
        args.merge = [word for word in args.merge if word not in given]
    if args.report and _WORD.match(args.report):  # its path may be left out: this is a word behind it
        given, args.report = [*given, args.report], ""
    args.settings = [word for word in given if _WORD.match(word) and not os.path.exists(word)]
    images = [word for word in given if word not in args.settings]
    if len(images) > 1:
        raise UserError(f"`{images[1]}` is not of the form section.name=value, and {images[0]} are the images already")
    args.images = images[0] if images else None
    return args


def read_settings(args: argparse.Namespace) -> Any:
    """The settings of the run, checked: words, and flags that are settings by another name.

    Raises UserError for unknown names, wrong values, a setting that is given twice, and a flag without effect.
    """
    kind = label_settings(args.labeler, args.namer)
    values: dict[str, Any] = {name: {} for name in ("labeler", "namer")}
    merge_words(values, args.settings)
    sections = {} if ":" in args.labeler else {name: getattr(kind(), name) for name in ("labeler", "namer")}
    for flag, owners in SHORTCUTS.items():
        value = getattr(args, flag)
        if value is None:
            continue
        name = {"template": "templates"}.get(flag, flag)
        takers = [owner for owner in owners if hasattr(sections.get(owner), name)]
        if flag == "background" and "labeler" in takers:
            text = getattr(values["labeler"].get("calibration"), "text", "zscore")
            if text.lower() not in ("none", "null", "~", ""):
                takers.remove("labeler")  # a calibrated labeler needs none
        if not takers:
            option = f"--{flag.replace('_', '-')}"
            raise UserError(f"{option} has no effect with --labeler {args.labeler} --namer {args.namer}; leave it out")
        for owner in takers:
            if name in values[owner]:
                raise UserError(f"--{flag.replace('_', '-')} and {owner}.{name} say the same; give one")
            values[owner][name] = value[0] if isinstance(value, list) and len(value) == 1 else value
    return build_settings(kind, values)


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.min_confidence <= 1:
        raise UserError(f"--min-confidence must be from 0 to 1, got {args.min_confidence}")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    if args.images is None:
        swallowed = " (--report takes the next word as its path: write it last)" if args.report else ""
        raise UserError(f"no images are named{swallowed}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Label, report, export; returns the summary. Raises UserError and OSError for what the user can put right."""
    if args.merge is not None:
        return merge(args, build_parser())
    if args.force:
        raise UserError("--force goes with --merge")
    if args.images is not None and args.output is None:
        return finished_store(args, build_parser())
    if args.features is not None:
        raise UserError("--features is for a finished store, without --output; labeling keeps features by itself")
    args.labeler = args.labeler or _default_labeler(args)
    entry = labeler_entry(args.labeler)
    # Features that are precomputed come without an image tower that could name crops.
    alone = entry.names and args.clip is None and any(word.startswith("networks.features=") for word in args.settings)
    args.namer = args.namer or ("map" if alone else _default_namer(args, entry.namer))
    _check(args)
    settings = read_settings(args)
    if settings.run.calibration is not None and not os.path.isfile(
        os.path.join(settings.run.calibration, "header.json")
    ):
        raise UserError(f"run.calibration={settings.run.calibration} is no pseudo-label store")
    check_output(settings.output, args.report)
    check_device(args.device)
    from ..data import load_dataset_rows, stream_dataset_rows
    from ..labeling import Part, label_images
    from ..labeling.build import Builder, Names
    from ..labeling.encoders.weights import licenses_of

    flags = ("labeler", "namer", "vocabulary", "clip", "backbone", "backbone_weights", "model", "masks", "device")
    flags += ("examples", "detector")
    builder = Builder(Names(**{flag: getattr(args, flag) for flag in flags}), settings)
    part = None if args.shard is None else Part.parse(args.shard)
    columns = settings.images.options
    if columns.pop("streaming", False):
        dataset: Any = stream_dataset_rows(args.images, args.split, **columns)
    else:
        dataset = load_dataset_rows(args.images, split=args.split, unlabeled=True, **columns)
    namer, labeler = builder.namer(), builder.labeler()
    licenses = licenses_of(labeler, namer)
    if is_main_process() and not args.quiet:
        _introduce(labeler, namer, licenses)
        _introduce_examples(builder.examples, dataset)
    summary = label_images(
        dataset,
        labeler,
        namer,
        args.output,
        settings.run,
        progress=not args.quiet,
        limit=args.limit,
        min_confidence=args.min_confidence,
        part=part,
    ).as_dict()
    for note in getattr(labeler, "notes", ()):
        logger.warning("%s", note)
    summary["licenses"] = licenses
    return summary | (write_more(args.report, settings.output, args.output) if is_main_process() else {})


def _default_labeler(args: argparse.Namespace) -> str:
    """Examples alone need masks of anything: a SAM's, else those of the best labeler of our own."""
    if args.examples is None:
        return "clip"
    if args.model is not None:
        return "sam"
    return "clip" if args.backbone is None else "foreground"


def _default_namer(args: argparse.Namespace, usual: str) -> str:
    if args.examples is None or (args.labeler == "boxes" and args.detector is not None):
        return usual  # a detector is told by the examples what to find, and knows the names
    return "examples"


def _introduce(labeler: Any, namer: Any, licenses: dict[str, str]) -> None:
    recommended = getattr(labeler, "recommended", {})
    if recommended:
        words = ", ".join(f"{name}={value}" for name, value in recommended.items())
        print(f"Settings that {labeler.encoder_name} recommends: {words}", flush=True)
    for name, license in licenses.items():
        print(f"License of the weights of {name}: {license}", flush=True)
    for note in getattr(namer, "notes", ()):
        print(note[:1].upper() + note[1:], flush=True)


def _introduce_examples(examples: Any, dataset: Any) -> None:
    from ..labeling.naming.examples import shared_images

    if examples is not None and (shared := shared_images(examples.dataset, dataset)):
        print(f"{shared} of the images to label are examples too: they get pseudo labels like the others", flush=True)


def _label(args: argparse.Namespace) -> None:
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
    try:
        args = parse(argv)  # outside of `run`, which loads transformers: --help is to be quick
    except UserError as error:
        print(f"uplvp label: error: {error}", file=sys.stderr)
        return 2
    return run_command("label", lambda: _label(args), args.verbose, "run the same command again to go on")
