"""`uplvp data`: check a dataset, convert it to COCO JSON, draw low-data splits, look at augmented samples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..models.errors import UserError
from ._data_preview import add_preview
from ._terminal import add_verbosity, run

if TYPE_CHECKING:
    from uplvp_hf.data import InstanceDataset, RowStream

_EPILOG = """
PATH is anything that training reads: a COCO JSON file or folder, the root of Cityscapes, CTW1500 or Pascal VOC as
published, a pseudo-label store, a folder or a list of images, a dataset of the `datasets` library.
docs/data.md shows the trees."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp data",
        description="Check, convert, split and preview datasets.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    add_check(subparsers)
    add_convert(subparsers)
    add_split(subparsers)
    add_preview(subparsers)
    usages = [task.format_usage().removeprefix("usage: ") for task in subparsers.choices.values()]
    parser.epilog = "\n".join(["what the tasks take:", *usages, _EPILOG.lstrip()])
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; the settings of `preview` may also follow its options, where argparse stops looking for them."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.task != "preview" or any("=" not in word or word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings += rest
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the task; returns 0, 1 where `check` found broken rows, or 2 with one line on stderr for wrong input."""
    arguments = parse(argv)
    outcome: list[int | None] = []
    uses = arguments.task == "preview"
    code = run(
        f"data {arguments.task}",
        lambda: outcome.append(arguments.work(arguments)),
        arguments.verbose,
        transformers=uses,
    )
    return code or next(iter(outcome), None) or 0


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments that say where the rows come from; `load_source` reads them."""
    parser.add_argument("path", metavar="PATH", help="the dataset")
    parser.add_argument("--split", help="picks annotations/SPLIT.json, or a split of a published layout")
    parser.add_argument("--images", metavar="DIR", help="folder that the file names of a COCO file are relative to")
    parser.add_argument(
        "--format",
        help="coco, cityscapes, ctw1500, voc, labelme, yolo, cvat, coco_stuff, ade20k_full, label_maps, store, images, "
        "list or datasets; by its looks if not given",
    )
    parser.add_argument(
        "--crowds-as-objects", action="store_true", help="take objects with iscrowd = 1 for single objects"
    )
    parser.add_argument("--config", help="configuration of a dataset of the `datasets` library")
    add_verbosity(parser)


def load_source(arguments: argparse.Namespace, **options: Any) -> InstanceDataset | RowStream:
    """The rows that the arguments of `add_source` mean."""
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.data.usage import crowds_as_objects

    given = {name: getattr(arguments, name) for name in ("images", "split", "format", "config")}
    dataset = load_dataset_rows(arguments.path, **given, **options)
    return crowds_as_objects(dataset) if arguments.crowds_as_objects else dataset


def _bar(arguments: argparse.Namespace) -> Callable[[Any], Any]:
    from uplvp_hf.progress import with_progress

    return lambda rows: with_progress(rows, arguments.task, not arguments.quiet)


def add_check(subparsers: Any) -> None:
    """`uplvp data check`"""
    parser = subparsers.add_parser(
        "check",
        help="validate every row, and print classes, sizes and broken rows",
        description="Validate every row and print what is in a dataset. Exit code 1 when something is broken.",
    )
    add_source(parser)
    parser.add_argument("--images-too", action="store_true", help="also open every image")
    parser.add_argument("--json", metavar="FILE", help="write the whole report there")
    parser.set_defaults(work=_check)


def _check(arguments: argparse.Namespace) -> int:
    from uplvp_hf.data.check import check_dataset, format_report
    from uplvp_hf.files import write_json

    load = partial(load_source, arguments, strict=False)
    report = check_dataset(load, arguments.images_too, _bar(arguments), arguments.path, arguments.split)
    print(format_report(report))
    if arguments.json:
        write_json(arguments.json, report)
    return int(bool(report["broken"]))


def add_convert(subparsers: Any) -> None:
    """`uplvp data convert`"""
    parser = subparsers.add_parser(
        "convert", help="write a dataset as COCO JSON", description="Write a dataset as a COCO instance file."
    )
    add_source(parser)
    parser.add_argument("--output", metavar="FILE.json", required=True, help="the file to write")
    parser.add_argument("--unlabeled", action="store_true", help="the images alone, without their objects")
    parser.add_argument(
        "--subset", metavar="NAME", help="a low-data split: a manifest, or a name such as 1@10 or 5shot"
    )
    parser.set_defaults(work=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from uplvp_hf.data import write_coco
    from uplvp_hf.data.manifest import take_split

    if arguments.unlabeled and arguments.subset:
        raise UserError("--subset needs the objects that --unlabeled leaves out; convert without one of them")
    dataset = load_source(arguments, unlabeled=arguments.unlabeled)
    if arguments.subset:
        dataset = take_split(dataset, arguments.subset)
    elif arguments.unlabeled:
        dataset = dataset.unlabeled()
    bar = _bar(arguments)
    images, instances = write_coco(dataset, arguments.output, bar)
    print(f"{arguments.output}: {images} images, {instances} objects, {len(dataset.categories)} classes")
    if dataset.failures:
        print(f"{len(dataset.failures)} files or objects were left out; `uplvp data check` lists them.")
    root = image_root(dataset)
    if root:
        print(f"Its file names are relative to {root}: give that as `--images` or `data.train_images`.")


def image_root(dataset: InstanceDataset) -> str | None:
    """The folder that the file names of the rows are relative to, where they are files below one."""
    row = dataset[0]
    if isinstance(row["image"], str) and row["image"].endswith("/" + row["file_name"]):
        return row["image"].removesuffix(row["file_name"])
    return None


def add_split(subparsers: Any) -> None:
    """`uplvp data split`"""
    parser = subparsers.add_parser(
        "split",
        help="draw a low-data split and write its manifest",
        description="Draw a low-data split and write its manifest, which `data.subset` and `--subset` take.",
    )
    add_source(parser)
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--name", help="such as 1@10 (seed 1, 10 %% of the images), 10%%strat, 5images or 2@5shot")
    for flag, kind, number, meaning in (
        ("--percent", "percent", float, "this share of the images, in %%"),
        ("--images-per-class", "images", int, "every class in at least K images"),
        ("--instances", "instances", int, "at least K instances of every class, whole images"),
        ("--shot", "shot", int, "exactly K instances of every class; others are dropped"),
    ):
        rule.add_argument(flag, dest=f"rule_{kind}", type=number, metavar="K", help=meaning)
    parser.add_argument("--seed", type=int, default=0, help="of the draw, where --name has none (default: 0)")
    parser.add_argument("--stratified", action="store_true", help="with --percent: keep the shares of the classes")
    parser.add_argument("--allow-fewer", action="store_true", help="take all of a class that has less than K")
    parser.add_argument("--output", metavar="FILE.json", required=True, help="the manifest to write")
    parser.set_defaults(work=_split)


def _split(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from uplvp_hf.data.manifest import draw_split, write_manifest
    from uplvp_hf.data.splits import KINDS, SplitSpec, parse_split

    if not arguments.output.endswith(".json"):
        raise UserError(f"--output {arguments.output}: the name of a manifest ends in .json")
    if arguments.name:
        spec = parse_split(arguments.name, arguments.seed)
        spec = replace(spec, stratified=spec.stratified or arguments.stratified, allow_fewer=arguments.allow_fewer)
    else:
        kind = next(kind for kind in KINDS if getattr(arguments, f"rule_{kind}") is not None)
        amount = getattr(arguments, f"rule_{kind}")
        spec = SplitSpec(kind, amount, arguments.seed, arguments.stratified, arguments.allow_fewer)
    manifest = draw_split(load_source(arguments), spec)
    write_manifest(manifest, arguments.output)
    width = max((len(entry["name"]) for entry in manifest["per_class"]), default=5)
    print(f"{'class':<{width}} {'images':>9} {'instances':>10}")
    for entry in manifest["per_class"]:
        print(f"{entry['name']:<{width}} {entry['images']:>9} {entry['instances']:>10}")
    counts, source = manifest["counts"], manifest["source"]
    print(f"{manifest['name']}: {counts['images']} of {source['rows']} images, {counts['instances']} instances")
    print(f"{arguments.output}: sha256 {manifest['hash']}")
