"""`uplvp evaluate`: mask AP of a model on a labeled dataset, or mIoU of a semantic segmenter."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.errors import UserError
from ..models.thresholds import MASK_THRESHOLD, SCORE_THRESHOLD, score_threshold
from . import _semantic
from ._terminal import check_device, verb
from .data import add_source, load_source

if TYPE_CHECKING:
    from uplvp_hf.data import InstanceDataset
    from uplvp_hf.evaluation.examples import Examples
    from uplvp_hf.labeling.processes import Processes

# Written here so that --help does not load the library; a test compares them with uplvp_hf.evaluation.
BACKENDS = ("streaming", "pycocotools", "hotcoco", "fastest")
METRICS = ("coco", "cityscapes")
ASKS = ("open", "present", "episodes")
MIN_SCORE = 0.001  # what is below hardly moves AP, and fills most of a file of results
_INSTANCE_FLAGS = (
    "batch_size", "class_agnostic", "metric", "backend", "mask_threshold", "threshold", "crowds_as_objects",
    "ask", "ways", "episodes_seed", "max_detections", "min_score",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp evaluate",
        description="Mask AP of a model on a labeled dataset, or mIoU of a semantic segmenter. With --output DIR: "
        "metrics.json and per_class.csv, for mask AP also results.json (COCO results) and report.html, a page with "
        "scores, neighbors that are told apart, and the best and worst images.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder of a trained model, or USER/NAME on the Hub")
    add_source(parser)
    add("--output", metavar="DIR", help="write the files there")
    add("--batch-size", type=int, default=8, help="images per forward pass (default: 8)")
    add("--class-agnostic", action="store_true", help="compare masks only, whatever their classes")
    add("--metric", choices=METRICS, default="coco", help="coco, or the Cityscapes benchmark's AP")
    add(
        "--backend",
        choices=BACKENDS,
        default="streaming",
        help="who computes COCO's numbers, which are the same (default: streaming, which forgets the masks)",
    )
    add(
        "--mask-threshold",
        type=float,
        default=MASK_THRESHOLD,
        help="least probability of a pixel (default: %(default)s)",
    )
    add("--max-detections", type=int, default=100, metavar="N", help="best of an image (default: 100, as COCO's)")
    add(
        "--min-score",
        type=float,
        default=MIN_SCORE,
        help="detections of a lower score are left out of files and numbers (default: %(default)s)",
    )
    add("--report", action=argparse.BooleanOptionalAction, help="the page (default: with --output)")
    add(
        "--threshold",
        type=float,
        help="least score of what the page shows and rates, and of the printed recalls; AP has none (default: what was "
        f"measured for the model, else {SCORE_THRESHOLD})",
    )
    add(
        "--store-threshold", action="store_true",
        help="write the score of best F1, and --duplicates where given, into config.json of MODEL_DIR: what `predict`, "
        "pipelines, endpoint, page and card then start from",
    )  # fmt: skip
    add(
        "--duplicates", type=float, metavar="IOU",
        help="of two instances of a class that overlap more, leave out the worse one (default: the model's, else none)",
    )  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add("--ask", choices=ASKS, default="open", help="of a few-shot model: every class on every image (default), the "
        "classes present on an image, or N-way episodes; see docs/few_shot.md")  # fmt: skip
    add("--ways", type=int, default=1, metavar="N", help="classes of an episode (default: 1)")
    add("--episodes-seed", type=int, default=0, help="of the other classes of an episode (default: 0)")
    _semantic.add_semantic_arguments(parser, evaluates=True)
    return parser


def _evaluate(arguments: argparse.Namespace) -> None:
    from uplvp_hf.evaluation import evaluated_classes, load_segmenter, make_evaluator
    from uplvp_hf.evaluation.backends import resolve_backend
    from uplvp_hf.labeling.processes import Processes

    _check(arguments)
    processes = Processes()
    if _semantic.refuse_flags(arguments, make_parser(), _INSTANCE_FLAGS):
        with _alone(arguments.output, processes.rank):
            return _semantic.evaluate(arguments, load_source(arguments), processes)
    make_evaluator(arguments.backend, arguments.metric)  # refused now, not after loading everything
    arguments.backend = resolve_backend(arguments.backend) if arguments.metric == "coco" else "streaming"
    dataset = load_source(arguments)
    model, processor = load_segmenter(arguments.model, arguments.device)
    dataset, views = _asked(arguments, model, dataset)
    if arguments.threshold is None:
        arguments.threshold = score_threshold(model.config)
    category_ids = evaluated_classes(model.config, dataset, arguments.class_agnostic)
    with _alone(arguments.output, processes.rank):
        _score(arguments, processes, dataset, (model, processor), category_ids, views)


def _asked(arguments: argparse.Namespace, model: Any, dataset: InstanceDataset) -> tuple[InstanceDataset, dict]:
    """For a few-shot model, the rows with its classes, and options of `evaluate_model` that say what is asked where."""
    from uplvp_hf.evaluation.few_shot import Asking, asked_rows, is_few_shot, keep_every_class

    if not is_few_shot(model):
        if arguments.ask != "open":
            raise UserError("--ask is for few-shot models (`uplvp fewshot`), which this is not")
        return dataset, {}
    asking = Asking(arguments.ask, arguments.ways, arguments.episodes_seed)
    rows, ids = asked_rows(model, dataset)
    if asking.ask == "open":
        return rows, {}
    if asking.ask == "episodes" and arguments.output:
        raise UserError("--output has no place for episodes: `uplvp fewshot table --ask episodes` writes rows of them")
    return rows, {"views": asking.views(ids), "top_k": keep_every_class(model)}


def _alone(output: str | None, rank: int) -> contextlib.AbstractContextManager[None]:
    """Makes the output folder, so that one that cannot be written is known now, and keeps other runs out of it."""
    from uplvp_hf.files import only_run

    if not output:
        return contextlib.nullcontext()
    Path(output).mkdir(parents=True, exist_ok=True)
    return only_run(output, "name another --output") if rank == 0 else contextlib.nullcontext()


def _score(
    arguments: argparse.Namespace,
    processes: Processes,
    dataset: InstanceDataset,
    segmenter: tuple[Any, Any],
    category_ids: list[int],
    views: dict[str, Any],
) -> None:
    from uplvp_hf.evaluation import evaluate_model

    model, processor = segmenter
    kept = _Kept(arguments, category_ids) if arguments.output else None
    metrics = evaluate_model(
        model,
        processor,
        dataset,
        batch_size=arguments.batch_size,
        class_agnostic=arguments.class_agnostic,
        progress=not arguments.quiet,
        on_result=kept and kept.add,
        mask_threshold=arguments.mask_threshold,
        backend=arguments.backend,
        distributed=True,
        metric=arguments.metric,
        details=True,
        threshold=arguments.min_score,
        at_score=arguments.threshold,
        duplicates=arguments.duplicates,
        **{"top_k": arguments.max_detections, **views},
    )
    if kept is not None:
        kept.gather(processes, dataset)
    if processes.rank != 0:
        return
    metrics["failures"] = [*dataset.failures, *metrics["failures"]]
    print(format_metrics(metrics))
    if arguments.store_threshold:
        print(_store(arguments, metrics["findings"]))
    if kept is not None:
        names = {category_id: model.config.id2label[label] for label, category_id in enumerate(category_ids)}
        _write(arguments, metrics, kept, dataset, names)


def _check(arguments: argparse.Namespace) -> None:
    for name in ("batch_size", "max_detections"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("threshold", "mask_threshold", "min_score", "duplicates"):
        if not 0 <= (getattr(arguments, name) or 0) <= 1:
            raise UserError(f"--{name.replace('_', '-')} must be from 0 to 1")
    if arguments.report and not arguments.output:
        raise UserError("--report needs --output DIR to write the page to")
    if arguments.store_threshold and not (Path(arguments.model) / "config.json").is_file():
        raise UserError(f"--store-threshold writes into the folder of a model; {arguments.model} is none here")
    check_device(arguments.device)


def _store(arguments: argparse.Namespace, findings: dict[str, Any]) -> str:
    """Writes the score of best F1 into the model's configuration; says what was done."""
    from uplvp_hf.evaluation.findings import LEAST_ANNOTATIONS, storable_threshold
    from uplvp_hf.files import write_json

    best = storable_threshold(findings)
    if best is None:
        return (
            f"No threshold is stored: nothing was found, or fewer than {LEAST_ANNOTATIONS} objects are annotated "
            f"({findings['annotations']})."
        )
    file = Path(arguments.model) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["default_threshold"] = best
    if arguments.duplicates is not None:
        config["duplicate_iou"] = arguments.duplicates
    write_json(file, config)
    return f"Stored in {file}: instances are shown from a score of {best:.2f} on."


class _Kept:
    """What the files in `--output` need of the results of this process: COCO results, the best and worst images."""

    def __init__(self, arguments: argparse.Namespace, category_ids: list[int]) -> None:
        from uplvp_hf.evaluation.examples import Examples
        from uplvp_hf.evaluation.results_file import ResultsFile

        self.category_ids = category_ids
        self.results = ResultsFile(Path(arguments.output) / "results.json")
        wanted = arguments.report is not False
        self.examples: Examples | None = (
            Examples(threshold=arguments.threshold, class_agnostic=arguments.class_agnostic) if wanted else None
        )

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        from uplvp_hf.evaluation import as_prediction, as_reference, to_coco_results

        entries = to_coco_results(row, result, self.category_ids)
        for entry in entries:
            # With a box in it, pycocotools would sort a mask into small, medium and large by the area of the box.
            del entry["bbox"]
        self.results.add(row["image_id"], entries)
        if self.examples is not None:
            self.examples.add(as_prediction(row, result, self.category_ids), as_reference(row))

    def gather(self, processes: Processes, dataset: InstanceDataset) -> None:
        """Adds what the other processes kept; results in the order of the images."""
        if processes.size == 1:
            return
        every = processes.gather((list(self.results.images()), self.examples))
        if processes.rank != 0:
            return
        order = {dataset.image_id(index): index for index in range(len(dataset))}
        self.results.merge((image for images, _ in every[1:] for image in images), order)
        if self.examples is not None:
            for _, examples in every[1:]:
                self.examples.merge(examples)


def _write(
    arguments: argparse.Namespace, metrics: dict[str, Any], kept: _Kept, dataset: InstanceDataset, names: dict[int, str]
) -> None:
    from uplvp_hf.evaluation.report import write_class_table, write_evaluation_page
    from uplvp_hf.files import write_json, write_json_lines

    output = Path(arguments.output)
    source = {
        "command": shlex.join(["uplvp", "evaluate", *_words(arguments)]),
        "data": str(arguments.path),
        "split": arguments.split,
        "model": arguments.model,
        "class_agnostic": arguments.class_agnostic,
        "crowds_as_objects": arguments.crowds_as_objects,
        "metric": arguments.metric,
        "backend": arguments.backend,
        "protocol": arguments.ask,
        "mask_threshold": arguments.mask_threshold,
        "max_detections": arguments.max_detections,
        "min_score": arguments.min_score,
        "duplicates": arguments.duplicates,
    }
    written = [output / "metrics.json", output / "results.json"]
    kept.results.write()
    write_json(written[0], {**source, **metrics})
    if metrics["failures"]:
        written.append(output / "failures.jsonl")
        write_json_lines(written[-1], metrics["failures"])
    if metrics["details"]["classes"]:
        written.append(output / "per_class.csv")
        write_class_table(written[-1], metrics)
    if kept.examples is not None:
        written.append(output / "report.html")
        write_evaluation_page(written[-1], metrics, kept.examples, dataset, names, source)
    print(
        f"Counted and written: at most {arguments.max_detections} detections an image, of scores from "
        f"{arguments.min_score:g} on (--max-detections, --min-score)."
    )
    print("Written: " + ", ".join(map(str, written)))


def _words(arguments: argparse.Namespace) -> list[str]:
    """Those of the command that its numbers depend on."""
    words = [arguments.model, arguments.path]
    usual = {"mask_threshold": MASK_THRESHOLD, "metric": "coco", "ask": "open"}
    usual |= {"max_detections": 100, "min_score": MIN_SCORE, "duplicates": None}
    for name in ("split", "images", "format", "config", *usual):
        value = getattr(arguments, name)
        if value != usual.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    flags = ("crowds_as_objects", "class_agnostic")
    return words + [f"--{name.replace('_', '-')}" for name in flags if getattr(arguments, name)]


def format_metrics(metrics: dict[str, Any]) -> str:
    """A table of the numbers and of AP by class, in per cent."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    agnostic = metrics["details"]["class_agnostic"]
    lines = ["".join(f"{name:>7}" for name in agnostic), "".join(f"{percent(metrics[name]):>7}" for name in agnostic)]
    if metrics["per_class"]:
        lines += ["".join(f"{percent(value):>7}" for value in agnostic.values()) + "  whatever the class"]
        width = max(len(name) for name in metrics["per_class"])
        lines += ["", f"{'class':<{width}}     AP   AP50  annotations"]
        for row in metrics["details"]["classes"]:
            numbers = f"{percent(row['AP']):>6} {percent(row['AP50']):>6} {row['annotations']:>12}"
            lines.append(f"{row['name']:<{width}} {numbers}")
    lines += ["", *format_findings(metrics["findings"])]
    lines += ["", f"{metrics['num_images']} images, {metrics['num_instances']} instances, {metrics['seconds']:.1f} s."]
    shown = 10
    for failure in metrics["failures"][:shown]:
        lines.append(f"Left out: {failure['file']}, {failure['row']}: {failure['reason']}")
    if len(metrics["failures"]) > shown:
        lines.append(f"... and {len(metrics['failures']) - shown} more; --output DIR lists them all.")
    return "\n".join(lines)


def format_findings(findings: dict[str, Any]) -> list[str]:
    """What is true at a score threshold and at the best one: a line each, and one for every number of objects."""
    lines = []
    for at in findings["at"]:
        lines.append(
            f"score {at['threshold']:.2f}: precision {at['precision']:.2f}, recall {at['recall']:.2f}, "
            f"F1 {at['f1']:.2f}; {at['merges']} merges, {at['repeats']} repeats"
        )
    if findings["best_threshold"] is not None:
        lines[-1] += "  <- best F1"
    lines.append("objects an image    images  objects" + "".join(f"{name:>8}" for name in ("found", "merged", "split")))
    for row in findings["at"][-1]["by_objects"]:
        shares = "".join(f"{row[name]:>8.2f}" for name in ("found", "merged", "split"))
        lines.append(f"{row['objects']:<18} {row['images']:>7} {row['annotations']:>8}{shares}")
    return lines


main = verb("evaluate", make_parser, _evaluate)
