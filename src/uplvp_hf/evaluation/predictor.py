"""A model over a whole dataset: results image by image as run lengths, and their mask AP."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from uplvp_hf.data import DataError, InstanceDataset, Row
from uplvp_hf.files import check_model_name

from ..models.thresholds import MASK_THRESHOLD, duplicate_iou, score_threshold
from ..progress import Progress
from .backends import make_evaluator
from .classes import evaluated_classes
from .coco_map import NAMES, CocoMaskMap, compare
from .entries import as_prediction, as_reference
from .failing import failure_of, together_or_alone
from .findings import Findings
from .processes import gather, gather_errors, place
from .records import ImageRecords

METRICS = NAMES
Pairs = Iterable[tuple[Row, dict[str, Any]]]


def load_segmenter(
    name_or_dir: str, device: str | torch.device | None = None, further: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its image processor, from a folder or a Hub repository.

    Args:
        name_or_dir: a folder written by `save_pretrained`, or a repository such as `user/name`.
        device: default: the first GPU if there is one, else the CPU.
        further: model type to class, of models that the caller can use besides trained ones.

    Raises:
        FileNotFoundError: if it is neither, or the folder has no `config.json` or `preprocessor_config.json`.
        DataError: if it holds another kind of model, or weights that lack tensors or do not fit `config.json`.
    """
    from uplvp_hf.models.configuration_uplvp import UplvpConfig
    from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
    from uplvp_hf.models.modeling_few_shot import UplvpForFewShotSegmentation
    from uplvp_hf.models.modeling_mask_rcnn import MaskRcnnForInstanceSegmentation
    from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation

    models: dict[str, Any] = {"uplvp": UplvpForInstanceSegmentation, "uplvp_few_shot": UplvpForFewShotSegmentation}
    models |= {"mask_rcnn": MaskRcnnForInstanceSegmentation, **(further or {})}
    if os.path.isdir(name_or_dir):
        for needed in ("config.json", "preprocessor_config.json"):
            if not os.path.isfile(os.path.join(name_or_dir, needed)):
                raise FileNotFoundError(f"{name_or_dir}: no {needed}; not the folder of a trained model.")
    check_model_name(name_or_dir)
    try:
        kind = UplvpConfig.get_config_dict(name_or_dir)[0].get("model_type")
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name_or_dir}: no such folder, and no model of the Hub: {reason}") from error
    if kind not in models:
        raise DataError(
            f"holds a `{kind}` model",
            file=name_or_dir,
            remedy="Models of `uplvp pretrain` and `uplvp finetune` are read here; others are a start (`model.init`).",
        )
    model, info = models[kind].from_pretrained(
        name_or_dir, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
    )
    # Left alone, such tensors would keep random values and the results would be noise.
    faults = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if faults:
        raise DataError(
            f"{len(faults)} tensors are missing or do not fit config.json, such as {faults[0]}",
            file=name_or_dir,
            remedy="Is the folder complete, and its number of classes the one that was trained?",
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), UplvpImageProcessor.from_pretrained(name_or_dir)


def predict_dataset(
    model: torch.nn.Module,
    processor: Any,
    dataset: InstanceDataset,
    batch_size: int = 8,
    threshold: float = 0.0,
    top_k: int = 100,
    device: str | torch.device | None = None,
    progress: bool = True,
    failures: list[dict[str, Any]] | None = None,
    mask_threshold: float = MASK_THRESHOLD,
    share: tuple[int, int] = (0, 1),
    duplicates: float | None = None,
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Instances of every image, in the order of the dataset, with overlaps, masks as run lengths.

    Images are decoded ahead in a thread. The masks of an image are encoded before those of the next are upsampled.
    The model is put into evaluation mode, and back when the iterator ends.

    Args:
        model: any model whose outputs have `class_queries_logits` and `masks_queries_logits`.
        batch_size: most images per forward pass; only images of equal padded size go together.
        threshold: least score, 0 to 1. Mask AP wants 0.
        top_k: most instances an image; COCO looks at 100.
        device: the model is moved there; default: where it is.
        failures: {"file", "row", "reason"} of images that cannot be decoded or need too much memory are appended here.
        mask_threshold: a pixel belongs to a mask when its probability is above this.
        share: (number of this process, number of processes) that share the rows, each row in one of them. Windows of
            two batches take turns, so that the batches are those of a single process.
        duplicates: IoU of two instances of a class above which the worse one is left out; default: the model's own.

    Yields:
        (row, {"scores": (N,) float32, "labels": (N,) int64 class indices, "boxes": (N, 4) float32 x1, y1, x2, y2 in
        pixels of the original image, "rle": N COCO run lengths}), best first, on the CPU.
    """
    if device is not None:
        model.to(device)
    duplicates = duplicate_iou(getattr(model, "config", None)) if duplicates is None else duplicates
    options = {"threshold": threshold, "mask_threshold": mask_threshold, "top_k": top_k, "duplicates": duplicates}
    was_training = model.training
    model.eval()
    total = sum(len(rows) for rows in _own_windows(len(dataset), batch_size, share))
    bar = Progress("predicting", total, progress)
    failures = failures if failures is not None else []

    def fail(error: Exception, index: int) -> None:
        failures.append(failure_of(error, dataset[index]["file_name"], index))

    try:
        for groups, attempted in _ahead(_windows(processor, dataset, batch_size, failures, share)):
            found: dict[int, dict[str, Any]] = {}
            for indices, sizes, inputs in groups:
                predict = partial(_instances, model, processor, inputs, sizes, options)
                found |= together_or_alone(indices, predict, fail)
            for index in sorted(found):
                yield dataset[index], found.pop(index)
            bar.update(attempted)
    finally:
        bar.close()
        model.train(was_training)


def _instances(
    model: torch.nn.Module, processor: Any, inputs: dict[str, torch.Tensor], sizes: list[tuple[int, int]],
    options: dict[str, float], places: list[int],
)  -> list[dict[str, Any]]:  # fmt: skip
    """The results of the images at `places` of a batch, on the CPU."""
    parameter = next(model.parameters())
    pixels, mask = (inputs[key][places] for key in ("pixel_values", "pixel_mask"))
    with torch.inference_mode():
        outputs = model(pixel_values=pixels.to(parameter.device, parameter.dtype), pixel_mask=mask.to(parameter.device))
    results = processor.post_process_instance_segmentation(
        outputs,
        target_sizes=[sizes[place] for place in places],
        input_sizes=processor.get_input_sizes(mask),
        return_rle=True,
        return_segmentation=False,
        **options,
    )
    return [{key: value if key == "rle" else value.cpu() for key, value in one.items()} for one in results]


_Group = tuple[list[int], list[tuple[int, int]], dict[str, torch.Tensor]]


def _own_windows(count: int, batch_size: int, share: tuple[int, int]) -> list[range]:
    """Row indices of every window of this process."""
    rank, processes = share
    window = 2 * batch_size  # wide enough to fill batches with images of both orientations
    return [range(start, min(start + window, count)) for start in range(0, count, window)][rank::processes]


def _windows(
    processor: Any,
    dataset: InstanceDataset,
    batch_size: int,
    failures: list[dict[str, Any]],
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[list[_Group], int]]:
    """Batches (row indices, (height, width) of the images, model inputs), and how many rows they came from.

    Every image is padded by itself, and only images of equal padded size share a batch. So a result does not depend
    on the other images, whatever the backbone: window attention sees padding.
    """
    for indices in _own_windows(len(dataset), batch_size, share):
        alike: dict[tuple[int, ...], list[tuple[int, tuple[int, int], Any]]] = {}
        for index in indices:
            try:
                image = dataset.load_image(index)
                inputs = processor(image, return_tensors="pt")
            except Exception as error:
                failures.append(failure_of(error, dataset[index]["file_name"], index))
                continue
            shape = tuple(inputs["pixel_values"].shape)
            alike.setdefault(shape, []).append((index, (image.height, image.width), inputs))
        yield (
            [
                _merge(group[at : at + batch_size])
                for group in alike.values()
                for at in range(0, len(group), batch_size)
            ],
            len(indices),
        )


def _merge(images: list[tuple[int, tuple[int, int], Any]]) -> _Group:
    indices, sizes, inputs = zip(*images)
    return list(indices), list(sizes), {key: torch.cat([one[key] for one in inputs]) for key in inputs[0]}


def _ahead(iterator: Iterator) -> Iterator:
    """The items of `iterator`, the next one being made in a thread while the caller works on one."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield item


def evaluate_model(
    model: torch.nn.Module,
    processor: Any,
    dataset: InstanceDataset,
    batch_size: int = 8,
    class_agnostic: bool = False,
    progress: bool = True,
    device: str | torch.device | None = None,
    on_result: Callable[[Row, dict[str, Any]], None] | None = None,
    mask_threshold: float = MASK_THRESHOLD,
    backend: str = "streaming",
    distributed: bool = False,
    metric: str = "coco",
    details: bool = False,
    threshold: float = 0.0,
    top_k: int = 100,
    views: Callable[[Row, dict[str, Any]], Pairs] | None = None,
    pairs: Pairs | None = None,
    at_score: float | None = None,
    duplicates: float | None = None,
) -> dict[str, Any]:
    """Mask AP of a model on a labeled dataset.

    Args:
        model, processor, dataset, batch_size, mask_threshold, threshold, top_k, duplicates: of `predict_dataset`.
        class_agnostic: compare masks only, as for proposals; the classes need not agree then.
        on_result: called with every (row, result) that is compared; with `distributed`, with the own ones.
        backend, metric: see `make_evaluator`. Cityscapes also reads `void` of a row, regions that are not judged.
        distributed: every process of the group calls this, with the whole model, and gets the numbers of all images.
        details: add `details`, see `CocoMaskMap`; its `classes` is a list with `id` and `name`, one a category.
        views: what is compared in place of a row and its result: such pairs, each an image of its own.
        pairs: of `predict_dataset`, where they are known; nothing is predicted then.
        at_score: a score at which findings are told, beside the best one; default: the model's own.

    Returns the 12 COCO numbers (0 to 1, None where nothing counts), or AP and AP50 of Cityscapes, `per_class` {name: AP
    or None}, `findings` (`Findings.compute`), `num_images`, `num_instances`, `seconds` and `failures`. Raises DataError
    if classes disagree, nothing is annotated or decoded; UserError as `make_evaluator`; RuntimeError if another fails.
    """
    category_ids = evaluated_classes(model.config, dataset, class_agnostic)
    across, started = class_agnostic or details, time.perf_counter()
    failures: list[dict[str, Any]] = []
    evaluator, findings = make_evaluator(backend, metric, across_classes=across), Findings(class_agnostic)
    rank, processes = share = place() if distributed else (0, 1)
    options: dict[str, Any] = {"device": device, "progress": progress and rank == 0, "share": share}
    options |= {"mask_threshold": mask_threshold, "threshold": threshold, "top_k": top_k}
    options |= {"duplicates": duplicates, "failures": failures}
    pairs = predict_dataset(model, processor, dataset, batch_size, **options) if pairs is None else pairs
    with gather_errors(processes):
        counts = _compare(evaluator, findings, across, pairs, views, category_ids, on_result)
    failures, counts = _collect(evaluator, findings, failures, counts, rank)
    _check_judged(dataset, failures, metric == "cityscapes" and not counts["void"] and rank == 0)
    computed = evaluator.compute(class_agnostic=class_agnostic, details=details)
    return {
        **_named(computed, [] if class_agnostic else dataset.categories),
        "findings": findings.compute(score_threshold(model.config) if at_score is None else at_score),
        "num_images": len(dataset) - len(failures),
        "num_instances": counts["num_instances"],
        "seconds": time.perf_counter() - started,
        "failures": failures,
    }


def _compare(evaluator, findings, across, pairs: Pairs, views, category_ids: list[int], on_result) -> dict[str, int]:
    """Gives evaluator and findings every pair, or its views, and counts annotations and rows with a `void`."""
    counts = {"num_instances": 0, "void": 0}
    for row, result in pairs:
        counts["void"] += "void" in row
        for seen, found in [(row, result)] if views is None else views(row, result):
            prediction, reference = as_prediction(seen, found, category_ids), as_reference(seen)
            image = compare(prediction, reference, across)
            findings.add(image, prediction, reference)
            if isinstance(evaluator, CocoMaskMap):
                evaluator.extend({seen["image_id"]: image})  # it would compare the masks once more
            else:
                evaluator.add(prediction=prediction, reference=reference)
            counts["num_instances"] += len(seen["objects"]["category_id"])
            if on_result is not None:
                on_result(seen, found)
    return counts


def _check_judged(dataset: InstanceDataset, failures: list[dict[str, Any]], lacks_void: bool) -> None:
    """Raises DataError where no image could be decoded, and warns of Cityscapes rows without their void."""
    if len(failures) == len(dataset):
        raise DataError(f"none of the {len(dataset)} images can be decoded; the first: {failures[0]['reason']}")
    if lacks_void:
        warnings.warn("No row has a `void`: detections on regions without labels count as false.", stacklevel=3)


def _collect(
    evaluator: CocoMaskMap | ImageRecords,
    findings: Findings,
    failures: list[dict[str, Any]],
    counts: dict[str, int],
    rank: int,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Adds the records of the other processes; gives the failures, in the order of the rows, and counts of all."""
    every = gather((evaluator.records(), findings.images, failures, counts))
    for number, (records, images, _, _) in enumerate(every):
        if number != rank:
            evaluator.extend(records)
            findings.extend(images)
    failures = sorted((entry for *_, own, _ in every for entry in own), key=lambda entry: int(entry["row"].split()[-1]))
    return failures, {name: sum(own[name] for *_, own in every) for name in counts}


def _named(metrics: dict[str, Any], categories: list[dict[str, Any]]) -> dict[str, Any]:
    """Category ids replaced by names, one entry a category of the dataset."""
    by_id = metrics["per_class"]
    metrics["per_class"] = {category["name"]: by_id.get(category["id"]) for category in categories}
    if "details" in metrics:
        found = metrics["details"]["classes"]
        nothing = dict.fromkeys(("AP", "AP50", "AP75", "AR100")) | {"annotations": 0, "crowds": 0, "detections": 0}
        metrics["details"]["classes"] = [
            {"id": category["id"], "name": category["name"], **nothing, **found.get(category["id"], {})}
            for category in categories
        ]
    return metrics
