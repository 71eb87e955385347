"""`uplvp fewshot`: classes from a few outlined examples, without training.

    uplvp fewshot train data.train=coco/ classes=coco2voc fewshot.conditioning=prototype --output runs/prototype
    uplvp fewshot train data.train=coco/ classes=coco2voc model.init=runs/prototype \\
        fewshot.conditioning=prompt --output runs/fewshot
    uplvp fewshot draw few/ --shots 5 --seed 3 --classes coco2voc --output supports.json
    uplvp fewshot add runs/fewshot --supports supports.json --output runs/model
    uplvp fewshot table runs/fewshot runs/prototype --pool few/ --data voc/ --classes coco2voc --seeds 0 1 2

docs/few_shot.md says more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.errors import UserError
from ._terminal import AGAIN, add_verbosity, run
from .training import run_training

ASKS = ("open", "present", "episodes")  # written here so that --help does not load the library; a test compares them


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp fewshot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    tasks.add_parser("train", help="base classes -> a model that takes supports", add_help=False)
    _add_draw(tasks)
    _add_add(tasks)
    _add_table(tasks)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        words = [f"fewshot.{word}" if word.startswith("classes=") else word for word in words[1:]]
        return run_training("fewshot", "Train a segmenter that takes supports on base classes.", words)
    arguments = make_parser().parse_args(words)
    return run(f"fewshot {arguments.task}", lambda: arguments.work(arguments), arguments.verbose, AGAIN)


def _add_draw(tasks: Any) -> None:
    parser = tasks.add_parser("draw", help="choose supports by seed and write their manifest")
    add = parser.add_argument
    add("path", metavar="PATH", help="the dataset with outlined objects")
    add("--split", help="picks annotations/SPLIT.json, or a split of a published layout")
    add("--shots", type=int, required=True, metavar="K", help="objects of every class")
    add("--seed", type=int, default=0, help="of the draw (default: 0)")
    add("--classes", default="all", help="class split, of which the novel classes are taken; all: every class")
    add("--base", action="store_true", help="take the base classes instead")
    add("--least-share", type=float, default=0.005, help="least share of its image that a support covers")
    add("--from-tfa", metavar="DIR", help="import the objects of a folder cocosplit/seedN in place of a draw")
    add("-o", "--output", metavar="FILE.json", required=True, help="the manifest to write")
    add_verbosity(parser)
    parser.set_defaults(work=_draw)


def _draw(arguments: argparse.Namespace) -> None:
    from ..data import load_dataset_rows
    from ..data.supports import draw_supports, write_supports

    if not arguments.output.endswith(".json"):
        raise UserError(f"--output {arguments.output}: the name of a manifest ends in .json")
    dataset = load_dataset_rows(arguments.path, split=arguments.split)
    names = _names(dataset, arguments.classes, arguments.base)
    if arguments.from_tfa:
        from ..data.tfa_seeds import read_tfa_seed

        supports = read_tfa_seed(arguments.from_tfa, arguments.shots, dataset, names)
    else:
        supports = draw_supports(dataset, names, arguments.shots, arguments.seed, arguments.least_share)
    supports = type(supports)(supports.dataset, supports.entries, supports.shots, supports.seed, arguments.split)
    write_supports(supports, arguments.output)
    width = max(map(len, supports.names))
    for name, found in supports.entries.items():
        print(f"{name:<{width}}  {', '.join(f'{dataset.image_id(row)}[{k}]' for row, k in found)}")
    print(f"{len(supports.names)} classes, {sum(map(len, supports.entries.values()))} objects: {arguments.output}")


def _names(dataset: Any, classes: str, base: bool) -> list[str]:
    """The novel or base classes of a split, or all classes."""
    from ..data.class_splits import class_split

    split = class_split(classes, [category["name"] for category in dataset.categories], dataset.name)
    names = split.base if base or classes == "all" else split.novel
    if not names:
        raise UserError(f"{dataset.name} has no {'base' if base else 'novel'} class of {classes}.")
    return list(names)


def _add_add(tasks: Any) -> None:
    parser = tasks.add_parser("add", help="a model and supports -> a model with these classes")
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder that `fewshot train` or `fewshot add` wrote, or USER/NAME")
    add("--supports", metavar="FILE.json", required=True, help="manifest of `fewshot draw`")
    add("--data", metavar="PATH", help="the dataset of the manifest, if it is not where it was")
    add("--remove", nargs="+", default=[], metavar="NAME", help="classes to take out first")
    add("--output", metavar="DIR", required=True, help="folder to write, new or empty")
    add_verbosity(parser)
    parser.set_defaults(work=_add)


def _add(arguments: argparse.Namespace) -> None:
    from ..data import load_dataset_rows
    from ..data.supports import apply_supports, read_supports
    from ..evaluation.few_shot import add_supports, load_few_shot
    from ..files import new_folder, write_json

    manifest = read_supports(arguments.supports)
    source = manifest["source"]
    path = arguments.data or os.path.join(os.path.dirname(os.path.abspath(arguments.supports)), source["path"] or "")
    dataset = load_dataset_rows(path, split=source.get("split"))
    model, processor = load_few_shot(arguments.model)
    for name in arguments.remove:
        model.remove_class(name)
    supports = apply_supports(dataset, manifest, arguments.supports)
    add_supports(model, processor, supports)
    with new_folder(Path(arguments.output)) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        source["path"] = os.path.relpath(path, arguments.output)  # of which the hash says nothing
        write_json(folder / "supports.json", manifest)
    counts = zip(model.config.id2label.values(), model.config.support_counts, strict=True)
    print(f"{arguments.output}: {', '.join(f'{name} ({count})' for name, count in counts)}")


def _add_table(tasks: Any) -> None:
    parser = tasks.add_parser(
        "table", help="models x draws of supports -> mean and deviation, right and wrong supports"
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL_DIR", help="models of `fewshot train`")
    add("--pool", metavar="PATH", required=True, help="dataset that supports are drawn from")
    add("--pool-split", metavar="SPLIT")
    add("--data", metavar="PATH", required=True, help="dataset that is evaluated")
    add("--data-split", metavar="SPLIT")
    add("--classes", default="all", help="class split, of which the novel classes are asked for; all: every class")
    add("--base", action="store_true", help="ask for the base classes instead")
    add("--shots", type=int, nargs="+", default=[1, 5], metavar="K")
    add("--seeds", type=int, nargs="+", default=list(range(10)), metavar="N", help="of the supports (default: 0 to 9)")
    add("--ask", nargs="+", choices=ASKS, default=["open", "present"], help="protocols (default: open present)")
    add("--ways", type=int, default=1, help="classes of an episode (default: 1)")
    add("--output", metavar="DIR", help="also write rows.jsonl and table.md there")
    add_verbosity(parser)
    parser.set_defaults(work=_table)


def _table(arguments: argparse.Namespace) -> None:
    from ..data import load_dataset_rows
    from ..evaluation.few_shot import Asking, load_few_shot
    from ..evaluation.few_shot_table import Questions, few_shot_rows, few_shot_table
    from ..files import write_json_lines, write_text

    pool = load_dataset_rows(arguments.pool, split=arguments.pool_split)
    dataset = load_dataset_rows(arguments.data, split=arguments.data_split)
    names, rows = _names(pool, arguments.classes, arguments.base), []
    askings = [Asking(ask, arguments.ways if ask == "episodes" else 1) for ask in arguments.ask]
    part = "base" if arguments.base else "all" if arguments.classes == "all" else "novel"
    for path in arguments.models:
        record = {"model": Path(path).name, "split": arguments.classes}
        questions = Questions(names, part, arguments.shots, arguments.seeds, askings, record=record)
        for row in few_shot_rows(*load_few_shot(path), pool, dataset, questions):
            rows.append(row)
            if arguments.output:
                write_json_lines(Path(arguments.output) / "rows.jsonl", rows)
    table = few_shot_table(rows)
    if arguments.output:
        write_text(Path(arguments.output) / "table.md", table + "\n")
    print(f"Mask AP / AP50 in per cent, mean (deviation) over {len(arguments.seeds)} draws of supports.\n\n{table}")
