"""COCO mask average precision as an `evaluate` metric that forgets the masks as soon as it has seen them.

Pictures are added one at a time, masks as COCO run lengths. What is kept of a picture is the matrix of mask IoUs of
its detections and annotations (a few kilobytes), so that a data set never has to fit into memory. The numbers are
those of pycocotools' `COCOeval`, to the last digit.

Self-contained: `evaluate.load("path/to/coco_map.py")` works offline and without the rest of this library.
"""

from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
from pycocotools import mask as coco_mask

_DESCRIPTION = "COCO mask average precision and recall (12 numbers and AP per class), streaming."

_CITATION = """\
@inproceedings{lin2014microsoft,
  title={Microsoft COCO: Common Objects in Context},
  author={Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and Ramanan, Deva and
          Doll{\\'a}r, Piotr and Zitnick, C Lawrence},
  booktitle={ECCV},
  year={2014}
}
"""

_INPUTS = """
Args:
    predictions: one dict a picture: `image_id`, `scores` (N floats), `labels` (N category ids), `rle` (N COCO RLEs).
    references: one dict a picture: `image_id`, `category_id` (M category ids), `segmentation` (M COCO RLEs), and
        optionally `iscrowd` (M of 0 or 1) and `area` (M square pixels; the area of the mask if missing).
    class_agnostic: ignore the classes, as for proposals (`useCats=0` of pycocotools).
Returns:
    AP, AP50, AP75, AP_S, AP_M, AP_L, AR1, AR10, AR100, AR_S, AR_M, AR_L: 0 to 1, or None where no annotation counts;
    per_class: {category id: AP or None}, empty if class agnostic.
Examples:
    >>> metric = evaluate.load("src/uplvp_hf/evaluation/coco_map.py")
    >>> for prediction, reference in pairs:
    ...     metric.add(prediction=prediction, reference=reference)
    >>> metric.compute()["AP"]
"""

# As pycocotools has them; the second point of the IoU grid and the recall grid are built in the same way to the bit.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100
AREA_RANGES = {"all": (0, 1e10), "S": (0, 32**2), "M": (32**2, 96**2), "L": (96**2, 1e10)}


@dataclass
class _Picture:
    """What is left of a picture: D detections by N annotations."""

    scores: np.ndarray  # (D,)
    labels: np.ndarray  # (D,)
    areas: np.ndarray  # (D,)
    gt_labels: np.ndarray  # (N,)
    gt_areas: np.ndarray  # (N,)
    gt_crowd: np.ndarray  # (N,) bool
    ious: np.ndarray  # (D, N); to a crowd: intersection over the area of the detection


@dataclass
class _Matches:
    """Detections of one class in one picture, best first, against the T thresholds, for one range of areas."""

    scores: np.ndarray  # (D,)
    matched: np.ndarray  # (T, D) bool
    ignored: np.ndarray  # (T, D) bool
    num_annotations: int  # that count


class CocoMaskMap(evaluate.Metric):
    """Streaming COCO mask AP. See `inputs_description` for what it takes and gives."""

    def _info(self) -> evaluate.MetricInfo:
        rle = {"size": datasets.Sequence(datasets.Value("int64")), "counts": datasets.Value("string")}
        features = datasets.Features(
            {
                "predictions": {
                    "image_id": datasets.Value("int64"),
                    "scores": datasets.Sequence(datasets.Value("float64")),
                    "labels": datasets.Sequence(datasets.Value("int64")),
                    "rle": [rle],
                },
                "references": {
                    "image_id": datasets.Value("int64"),
                    "category_id": datasets.Sequence(datasets.Value("int64")),
                    "segmentation": [rle],
                    "iscrowd": datasets.Sequence(datasets.Value("int64")),
                    "area": datasets.Sequence(datasets.Value("float64")),
                },
            }
        )
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation=_CITATION, inputs_description=_INPUTS, features=features
        )

    def __len__(self) -> int:
        """Pictures added since the last `compute`."""
        return len(self._added())

    def _added(self) -> dict[Any, _Picture]:
        if self.num_process != 1:
            raise ValueError(f"num_process={self.num_process}: gather the results and add them all in one process.")
        return self.__dict__.setdefault("_pictures", {})

    def add(self, *, prediction: dict, reference: dict, **kwargs) -> None:
        """Adds one picture. Masks are compared at once and not kept."""
        if kwargs:
            raise ValueError(f"Unknown inputs {sorted(kwargs)}; a picture is a prediction and a reference.")
        image_id = reference["image_id"]
        if prediction["image_id"] != image_id:
            raise ValueError(f"A prediction for picture {prediction['image_id']!r}, but a reference for {image_id!r}.")
        if image_id in self._added():
            raise ValueError(f"Picture {image_id!r} was added before. Call compute() between two runs.")
        self._added()[image_id] = _compare(prediction, reference)

    def add_batch(self, *, predictions: list[dict], references: list[dict], **kwargs) -> None:
        """Adds several pictures."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references.")
        for prediction, reference in zip(predictions, references):
            self.add(prediction=prediction, reference=reference, **kwargs)

    def compute(
        self,
        *,
        predictions: list[dict] | None = None,
        references: list[dict] | None = None,
        class_agnostic: bool = False,
    ) -> dict[str, Any]:
        """The numbers over all pictures added so far, which are then forgotten."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions or [], references=references or [])
        pictures = self._added()
        if not pictures:
            raise ValueError("No picture was added: nothing to compute.")
        self._pictures = {}
        return self._compute(pictures, class_agnostic)

    def _compute(self, pictures: dict[Any, _Picture], class_agnostic: bool) -> dict[str, Any]:
        ordered = [pictures[image_id] for image_id in sorted(pictures)]  # the order decides between equal scores
        categories = sorted({label for picture in ordered for label in picture.gt_labels.tolist()})
        groups = [None] if class_agnostic or not categories else categories
        shape = (len(IOU_THRESHOLDS), len(RECALL_POINTS), len(groups))
        precision = {name: np.full(shape, -1.0) for name in AREA_RANGES}
        recall = {name: np.full(shape[::2], -1.0) for name in (*AREA_RANGES, 1, 10)}
        for position, category in enumerate(groups):
            subsets = [_select(picture, category) for picture in ordered]
            subsets = [subset for subset in subsets if len(subset.scores) or len(subset.gt_labels)]
            for name, area_range in AREA_RANGES.items():
                matches = [_match(subset, area_range) for subset in subsets]
                curve = _accumulate(matches, MAX_DETECTIONS)
                if curve is None:
                    continue
                precision[name][:, :, position], recall[name][:, position] = curve
                if name == "all":
                    for limit in (1, 10):
                        recall[limit][:, position] = _accumulate(matches, limit)[1]
        result = {
            "AP": _mean(precision["all"]),
            "AP50": _mean(precision["all"][0]),
            "AP75": _mean(precision["all"][5]),
            **{f"AP_{name}": _mean(precision[name]) for name in "SML"},
            "AR1": _mean(recall[1]),
            "AR10": _mean(recall[10]),
            "AR100": _mean(recall["all"]),
            **{f"AR_{name}": _mean(recall[name]) for name in "SML"},
        }
        per_class = {} if class_agnostic else {c: _mean(precision["all"][:, :, k]) for k, c in enumerate(categories)}
        return {**result, "per_class": per_class}


def _compare(prediction: dict, reference: dict) -> _Picture:
    image_id, found, truth = reference["image_id"], prediction["rle"], reference["segmentation"]
    crowd = reference.get("iscrowd")
    crowd = np.zeros(len(truth), dtype=bool) if crowd is None else np.asarray(crowd, dtype=bool)
    areas = reference.get("area")
    lengths = {
        "scores": (prediction["scores"], found),
        "labels": (prediction["labels"], found),
        "category_id": (reference["category_id"], truth),
        "iscrowd": (crowd, truth),
        "area": (truth if areas is None else areas, truth),
    }
    for name, (values, masks) in lengths.items():
        if len(values) != len(masks):
            raise ValueError(f"Picture {image_id!r}: {len(values)} {name} for {len(masks)} masks.")
    found, truth = [_compressed(rle, image_id) for rle in found], [_compressed(rle, image_id) for rle in truth]
    sizes = {tuple(int(side) for side in rle["size"]) for rle in (*found, *truth)}
    if len(sizes) > 1:
        raise ValueError(f"Picture {image_id!r}: masks of different sizes {sorted(sizes)} (height, width).")
    both = found and truth
    ious = np.asarray(coco_mask.iou(found, truth, crowd.astype(np.uint8).tolist())) if both else np.zeros((0, 0))
    return _Picture(
        scores=np.asarray(prediction["scores"], dtype=np.float64),
        labels=np.asarray(prediction["labels"]),
        areas=_areas(found),
        gt_labels=np.asarray(reference["category_id"]),
        gt_areas=_areas(truth) if areas is None else np.asarray(areas, dtype=np.float64),
        gt_crowd=crowd,
        ious=ious.reshape(len(found), len(truth)),
    )


def _compressed(rle: Any, image_id: Any) -> dict:
    if not isinstance(rle, dict) or "counts" not in rle or "size" not in rle:
        raise ValueError(f"Picture {image_id!r}: masks must be COCO RLE with 'size' and 'counts', not {type(rle)}.")
    if isinstance(rle["counts"], (str, bytes)):
        return rle
    return coco_mask.frPyObjects({"size": list(rle["size"]), "counts": list(rle["counts"])}, *rle["size"])


def _areas(rles: list[dict]) -> np.ndarray:
    # One by one: pycocotools 2.0.11 with numpy 2 raises OverflowError for a list of more than 255.
    return np.array([coco_mask.area(rle) for rle in rles], dtype=np.float64)


def _select(picture: _Picture, category: Any) -> _Picture:
    """The annotations and the best 100 detections of one category, or of all, best first."""
    if category is None:  # by category, as pycocotools concatenates them: decides between equal scores and overlaps
        chosen = np.argsort(picture.labels, kind="mergesort")
        annotations = np.argsort(picture.gt_labels, kind="mergesort")
    else:
        chosen = np.flatnonzero(picture.labels == category)
        annotations = np.flatnonzero(picture.gt_labels == category)
    chosen = chosen[np.argsort(-picture.scores[chosen], kind="mergesort")][:MAX_DETECTIONS]
    return _Picture(
        picture.scores[chosen],
        picture.labels[chosen],
        picture.areas[chosen],
        picture.gt_labels[annotations],
        picture.gt_areas[annotations],
        picture.gt_crowd[annotations],
        picture.ious[np.ix_(chosen, annotations)],
    )


def _match(picture: _Picture, area_range: tuple[float, float]) -> _Matches:
    """Greedy matching at every IoU threshold: best detection first, each to its best annotation still free.

    Annotations outside the range of areas and crowds are ignored: they are matched only if no other fits, and a crowd
    any number of times. Of equal IoUs the last annotation wins.
    """
    low, high = area_range
    gt_ignored = picture.gt_crowd | (picture.gt_areas < low) | (picture.gt_areas > high)
    num_thresholds, num_detections = len(IOU_THRESHOLDS), len(picture.scores)
    matched = np.zeros((num_thresholds, num_detections), dtype=bool)
    ignored = np.zeros((num_thresholds, num_detections), dtype=bool)
    taken = np.zeros((num_thresholds, len(gt_ignored)), dtype=bool)
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    rows = np.arange(num_thresholds)
    hopeful = np.flatnonzero((picture.ious >= thresholds[0]).any(1)) if len(gt_ignored) else []
    for detection in hopeful:
        iou = picture.ious[detection]
        fits = (iou >= thresholds) & (~taken | picture.gt_crowd)  # (T, N)
        counted = fits & ~gt_ignored
        fits = np.where(counted.any(1, keepdims=True), counted, fits)
        ranked = np.where(fits, iou, -1.0)
        best = ranked.shape[1] - 1 - ranked[:, ::-1].argmax(1)  # the last of the maxima
        hit = fits[rows, best]
        matched[:, detection] = hit
        ignored[:, detection] = hit & gt_ignored[best]
        taken[rows[hit], best[hit]] = True
    outside = (picture.areas < low) | (picture.areas > high)
    ignored |= ~matched & outside
    return _Matches(picture.scores, matched, ignored, int((~gt_ignored).sum()))


def _accumulate(matches: list[_Matches], limit: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Precision (T, R) at the recall points and final recall (T,), or None where no annotation counts."""
    total = sum(match.num_annotations for match in matches)
    if total == 0:
        return None
    scores = np.concatenate([match.scores[:limit] for match in matches])
    order = np.argsort(-scores, kind="mergesort")
    matched = np.concatenate([match.matched[:, :limit] for match in matches], axis=1)[:, order]
    ignored = np.concatenate([match.ignored[:, :limit] for match in matches], axis=1)[:, order]
    true_positives = np.cumsum(matched & ~ignored, axis=1).astype(float)
    false_positives = np.cumsum(~matched & ~ignored, axis=1).astype(float)
    precision = np.zeros((len(IOU_THRESHOLDS), len(RECALL_POINTS)))
    recall = np.zeros(len(IOU_THRESHOLDS))
    if not len(scores):
        return precision, recall
    for index, (hits, misses) in enumerate(zip(true_positives, false_positives)):
        recalls = hits / total
        recall[index] = recalls[-1]
        envelope = np.maximum.accumulate((hits / (misses + hits + np.spacing(1)))[::-1])[::-1]
        at = np.searchsorted(recalls, RECALL_POINTS, side="left")
        reached = at < len(envelope)
        precision[index, reached] = envelope[at[reached]]
    return precision, recall


def _mean(values: np.ndarray) -> float | None:
    values = values[values > -1]
    return float(np.mean(values)) if len(values) else None
