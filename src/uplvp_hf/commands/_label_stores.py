"""What `uplvp label` does with stores that are there: reports, exports, features of the masks, merging."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from ..models.errors import UserError
from ..settings import build_settings, merge_words
from ._terminal import check_device

# What goes with a store that is only reported on or exported.
AFTERWARDS = ("images", "settings", "report", "features", "quiet", "verbose")
# What else goes with --features.
NETWORKS = ("clip", "backbone", "backbone_weights", "device")
MERGING = ("merge", "output", "force", "settings", "report", "quiet", "verbose")

logger = logging.getLogger(__name__)


def check_output(output: Any, report: str | None) -> None:
    for name in ("truth", "other"):
        path = getattr(output, name)
        if path is not None and report is None:
            raise UserError(f"output.{name} is for the report; add --report")
        if path is not None and not os.path.exists(path):
            raise UserError(f"output.{name}={path}: no such file or folder")


def finished_store(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Reports on or exports an existing store. Raises UserError for what then has no effect."""
    from ..labeling.settings import OutputSettings

    values: dict[str, Any] = {"output": {}}
    merge_words(values, args.settings)
    asked = args.report is not None or bool(values["output"].keys() & {"coco", "parquet"}) or args.features is not None
    if not asked or not os.path.isfile(os.path.join(args.images or "", "header.json")):
        store = " (without it, only a pseudo-label store can be reported on or exported)" if asked else ""
        raise UserError(f"--output is needed: the folder that the labels are written to{store}")
    useless = _useless(args, parser, AFTERWARDS if args.features is None else AFTERWARDS + NETWORKS)
    useless += [name for name in values if name != "output" and (name != "networks" or args.features is None)]
    if useless:
        raise UserError(f"{useless[0]} has no effect on a finished store; name an --output to label")
    output = build_settings(OutputSettings, values["output"], "output.")
    check_output(output, args.report)
    summary = {"output": args.images}
    if args.features is not None:
        summary["features"] = _describe(args, values.get("networks", {}))
    return summary | write_more(args.report, output, args.images)


def _useless(args: argparse.Namespace, parser: argparse.ArgumentParser, allowed: tuple[str, ...]) -> list[str]:
    """The options that were given and are not `allowed`."""
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    return [f"--{name.replace('_', '-')}" for name in given if name not in allowed]


def merge(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """One store of several, with report and exports. Raises UserError for what then has no effect, and as
    `merge_stores` does."""
    from ..labeling.merge import merge_stores
    from ..labeling.settings import OutputSettings, RunSettings

    values: dict[str, Any] = {"output": {}, "run": {}}
    merge_words(values, args.settings)
    if args.images is not None:
        raise UserError(f"--merge labels no images: {args.images} is one too many, or a store to write behind --merge")
    if args.output is None:
        raise UserError("--merge needs an --output: the folder of the merged store")
    run = build_settings(RunSettings, values["run"], "run.")
    useless = _useless(args, parser, MERGING)
    useless += [f"run.{name}" for name in sorted(run.given - {"image_root"})]
    useless += [name for name in values if name not in ("output", "run")]
    if useless:
        raise UserError(f"{useless[0]} has no effect with --merge; leave it out")
    output = build_settings(OutputSettings, values["output"], "output.")
    check_output(output, args.report)
    done = merge_stores(args.merge, args.output, run.image_root, args.force, progress=not args.quiet)
    return done.as_dict() | write_more(args.report, output, args.output)


def _describe(args: argparse.Namespace, words: dict[str, Any]) -> dict[str, Any]:
    """Vectors of the masks of a finished store. words: of `networks`. Raises UserError unless one network is named."""
    if (args.clip is None) == (args.backbone is None):
        raise UserError("--features needs the network that looks at the masks: --clip or --backbone, one of the two")
    from ..labeling.settings import NetworkSettings

    networks = build_settings(NetworkSettings, words, "networks.")
    if useless := sorted(networks.given - {"pad_type"}):
        raise UserError(f"networks.{useless[0]} has no effect with --features")
    check_device(args.device)
    import torch

    from ..labeling.encoders.backbone import load_encoder
    from ..labeling.encoders.clip import load_clip
    from ..labeling.features import CropDescriber, MapDescriber, describe_store

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.clip is not None:
        describer: Any = CropDescriber(load_clip(args.clip, device=device, text_tower=False))
    else:
        describer = MapDescriber(load_encoder(args.backbone, args.backbone_weights, networks.pad_type, device=device))
    return describe_store(args.images, describer, args.features or None, progress=not args.quiet)


def write_more(report: str | None, output: Any, store: str) -> dict[str, Any]:
    """Report and exports, as far as they are asked for; {what: path}."""
    from ..labeling import export_coco, export_parquet, write_report

    written: dict[str, Any] = {}
    for name, export in (("coco", export_coco), ("parquet", export_parquet)):
        path = getattr(output, name)
        if path is not None:
            export(store, path)
            written[f"export_{name}"] = path
    if report is not None:
        written["report"] = report or os.path.join(store, "report.html")
        numbers = write_report(store, written["report"], output.truth, other=output.other)
        for sign in numbers["signs"]:
            logger.warning("Look closely at the masks: %s", sign)
        if numbers["quality"] is not None:
            written["quality"] = numbers["quality"]
    return written
