"""COCO mask average precision as an `evaluate` metric that forgets the masks as soon as it has seen them.

Images are added one at a time, masks as COCO run lengths. What is kept of an image is the matrix of mask IoUs of
its detections and annotations (a few kilobytes), so that a dataset never has to fit into memory, and the processes of
a distributed evaluation exchange numbers, not masks. That is why the accumulation is done here and not by a library:
`COCOeval` and its faster replacements want all masks of the dataset at once (`backends.py` runs them). Run lengths and
their IoUs are pycocotools'. The numbers are those of pycocotools' `COCOeval`, to the last digit.

Self-contained: `evaluate.load("path/to/coco_map.py")` works offline and without the rest of this library,
and so raises plain ValueErrors, which only a program that calls the metric in a wrong way sees.
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
  title={Microsoft COCO: Common Objects in Context}, booktitle={ECCV}, year={2014},
  author={Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and Ramanan, Deva and
          Doll{\\'a}r, Piotr and Zitnick, C Lawrence}
}
"""

_INPUTS = """
Args:
    predictions: one dict an image: `image_id`, `scores` (N floats), `labels` (N category ids), `rle` (N COCO RLEs).
    references: one dict an image: `image_id`, `category_id` (M category ids), `segmentation` (M COCO RLEs), and
        optionally `iscrowd` (M of 0 or 1) and `area` (M square pixels; the area of the mask if missing).
    class_agnostic: ignore the classes, as for proposals (`useCats=0` of pycocotools).
    details: add `details`, see below.
Returns:
    AP, AP50, AP75, AP_S, AP_M, AP_L, AR1, AR10, AR100, AR_S, AR_M, AR_L: 0 to 1, or None where no annotation counts;
    per_class: {category id: AP or None}, empty if class agnostic;
    details: `classes` {category id: {AP, AP50, AP75, AR100, annotations, crowds, detections}}, empty if class agnostic;
        `class_agnostic`, the 12 numbers without classes; `curves` {"recall": R points, "precision": {"mean", "0.50",
        "0.75": R values, mean over the classes}} or None.
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
_CODES = bytes(range(48, 112))  # characters of compressed run lengths; from 80 on another one follows
AREA_RANGES = {"all": (0, 1e10), "S": (0, 32**2), "M": (32**2, 96**2), "L": (96**2, 1e10)}


NAMES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")


@dataclass
class Image:
    """What is left of an image: D detections by N annotations. Scores are finite."""

    scores: np.ndarray  # (D,)
    labels: np.ndarray  # (D,)
    areas: np.ndarray  # (D,)
    gt_labels: np.ndarray  # (N,)
    gt_areas: np.ndarray  # (N,)
    gt_crowd: np.ndarray  # (N,) bool
    ious: np.ndarray  # (D, N); to a crowd: intersection over the area of the detection


@dataclass
class _Matches:
    """Detections of any number of images, best first in each, against A ranges of areas and T thresholds."""

    scores: np.ndarray  # (D,)
    groups: np.ndarray  # (D,) category ids, or zeros if class agnostic
    ranks: np.ndarray  # (D,) place among the detections of the same group in the image
    hits: np.ndarray  # (D, A, T) bool: true positives
    misses: np.ndarray  # (D, A, T) bool: false positives; what is neither is ignored
    gt_groups: np.ndarray  # (N,)
    gt_counted: np.ndarray  # (N, A) bool


class CocoMaskMap(evaluate.Metric):
    """Streaming COCO mask AP. See `inputs_description` for what it takes and gives.

    across_classes: set to False before the first image, masks of different classes are not compared, which saves most
    of the time where masks are ragged; then there are no class-agnostic numbers and no details.
    """

    across_classes = True

    def _info(self) -> evaluate.MetricInfo:
        whole, real = datasets.Sequence(datasets.Value("int64")), datasets.Sequence(datasets.Value("float64"))
        image_id, rles = datasets.Value("int64"), [{"size": whole, "counts": datasets.Value("string")}]
        inputs = {
            "predictions": {"image_id": image_id, "scores": real, "labels": whole, "rle": rles},
            "references": {
                "image_id": image_id, "category_id": whole, "segmentation": rles, "iscrowd": whole, "area": real,
            },
        }  # fmt: skip
        features = datasets.Features(inputs)
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation=_CITATION, inputs_description=_INPUTS, features=features
        )

    def __len__(self) -> int:
        """Images added since the last `compute`."""
        return len(self._added())

    def _added(self) -> dict[Any, Image]:
        if self.num_process != 1:
            raise ValueError(f"num_process={self.num_process}: gather the results and add them all in one process.")
        return self.__dict__.setdefault("_images", {})

    def add(self, *, prediction: dict, reference: dict, **kwargs) -> None:
        """Adds one image. Masks are compared at once and not kept."""
        if kwargs:
            raise ValueError(f"Unknown inputs {sorted(kwargs)}; an image is a prediction and a reference.")
        self._keep(reference["image_id"], compare(prediction, reference, self.across_classes))

    def _keep(self, image_id: Any, image: "Image") -> None:
        if image_id in self._added():
            raise ValueError(f"Image {image_id!r} was added before. Call compute() between two runs.")
        self._added()[image_id] = image

    def add_batch(self, *, predictions: list[dict], references: list[dict], **kwargs) -> None:
        """Adds several images."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references.")
        for prediction, reference in zip(predictions, references):
            self.add(prediction=prediction, reference=reference, **kwargs)

    def records(self) -> dict[Any, Image]:
        """What was added so far, by image id: what one process of several sends to the others."""
        return dict(self._added())

    def extend(self, records: dict[Any, Image]) -> None:
        """Adds the `records` of another process. Raises ValueError for an image that was added before."""
        for image_id, image in records.items():
            self._keep(image_id, image)

    def compute(
        self,
        *,
        predictions: list[dict] | None = None,
        references: list[dict] | None = None,
        class_agnostic: bool = False,
        details: bool = False,
    ) -> dict[str, Any]:
        """The numbers over all images added so far, which are then forgotten."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions or [], references=references or [])
        images = self._added()
        if not images:
            raise ValueError("No image was added: nothing to compute.")
        if not self.across_classes and (class_agnostic or details):
            raise ValueError("Masks of different classes were not compared: leave `across_classes` True.")
        self._images: dict = {}
        # The order decides between equal scores. Ids are whole numbers or texts.
        ordered = [images[image_id] for image_id in sorted(images, key=lambda i: (isinstance(i, str), i))]
        curves = _curves(ordered, class_agnostic)
        result: dict[str, Any] = {**curves.summary(), "per_class": {} if class_agnostic else curves.per_class()}
        if details:
            agnostic = curves if class_agnostic else _curves(ordered, True)
            result["details"] = {
                "classes": {} if class_agnostic else curves.table(ordered),
                "class_agnostic": agnostic.summary(),
                "curves": curves.mean_curves(),
            }
        return result


@dataclass
class Curves:
    """Precision and recall of K categories (one, if class agnostic); -1 where no annotation counts."""

    categories: list[Any]
    precision: dict[str, np.ndarray]  # range of areas -> (T, R, K)
    recall: dict[Any, np.ndarray]  # range of areas, or number of detections -> (T, K)

    def summary(self) -> dict[str, float | None]:
        """The 12 numbers."""
        return {
            "AP": _mean(self.precision["all"]),
            "AP50": _mean(self.precision["all"][0]),
            "AP75": _mean(self.precision["all"][5]),
            **{f"AP_{name}": _mean(self.precision[name]) for name in "SML"},
            "AR1": _mean(self.recall[1]),
            "AR10": _mean(self.recall[10]),
            "AR100": _mean(self.recall["all"]),
            **{f"AR_{name}": _mean(self.recall[name]) for name in "SML"},
        }

    def per_class(self) -> dict[Any, float | None]:
        """AP of every category."""
        return {category: _mean(self.precision["all"][:, :, k]) for k, category in enumerate(self.categories)}

    def table(self, images: list[Image]) -> dict[Any, dict[str, Any]]:
        """Numbers and counts of every category that is annotated or detected in the images."""
        labels = np.concatenate([image.labels for image in images])
        gt_labels = np.concatenate([image.gt_labels for image in images])
        crowd = np.concatenate([image.gt_crowd for image in images])
        rows = {}
        for category in sorted({*labels.tolist(), *gt_labels.tolist()}):
            place = [k for k, known in enumerate(self.categories) if known == category]
            precision = self.precision["all"][:, :, place]
            rows[category] = {
                "AP": _mean(precision),
                "AP50": _mean(precision[0]),
                "AP75": _mean(precision[5]),
                "AR100": _mean(self.recall["all"][:, place]),
                "annotations": int((~crowd[gt_labels == category]).sum()),
                "crowds": int(crowd[gt_labels == category].sum()),
                "detections": int((labels == category).sum()),
            }
        return rows

    def mean_curves(self) -> dict[str, Any] | None:
        """Precision at the recall points, mean over the categories with an annotation that counts."""
        counted = self.precision["all"][:, :, (self.precision["all"] > -1).all((0, 1))]
        if not counted.size:
            return None
        chosen = {"mean": counted.mean((0, 2)), "0.50": counted[0].mean(1), "0.75": counted[5].mean(1)}
        precision = {name: values.tolist() for name, values in chosen.items()}
        return {"recall": RECALL_POINTS.tolist(), "precision": precision}


def check_image(prediction: dict, reference: dict) -> tuple[list[dict], list[dict], np.ndarray, np.ndarray]:
    """Detected masks, true masks (compressed RLEs), crowd flags and areas of the latter, after checks.

    Raises ValueError, naming the image, for unequal lengths, masks that are no RLE, whose text is malformed or that
    differ in size, and scores that are not finite.
    """
    image_id, found, truth = reference["image_id"], prediction["rle"], reference["segmentation"]
    if prediction["image_id"] != image_id:
        raise ValueError(f"A prediction for image {prediction['image_id']!r}, but a reference for {image_id!r}.")
    crowd, areas = reference.get("iscrowd"), reference.get("area")
    lengths = {
        "scores": (prediction["scores"], found),
        "labels": (prediction["labels"], found),
        "category_id": (reference["category_id"], truth),
        "iscrowd": (truth if crowd is None else crowd, truth),
        "area": (truth if areas is None else areas, truth),
    }
    for name, (values, masks) in lengths.items():
        if len(values) != len(masks):
            raise ValueError(f"Image {image_id!r}: {len(values)} {name} for {len(masks)} masks.")
    if not np.isfinite(np.asarray(prediction["scores"], dtype=np.float64)).all():
        raise ValueError(f"Image {image_id!r}: scores that are not finite.")
    found, truth = [_compressed(rle, image_id) for rle in found], [_compressed(rle, image_id) for rle in truth]
    sizes = {tuple(int(side) for side in rle["size"]) for rle in (*found, *truth)}
    if len(sizes) > 1:
        raise ValueError(f"Image {image_id!r}: masks of different sizes {sorted(sizes)} (height, width).")
    crowd = np.zeros(len(truth), dtype=bool) if crowd is None else np.asarray(crowd, dtype=bool)
    return found, truth, crowd, mask_areas(truth) if areas is None else np.asarray(areas, dtype=np.float64)


def _compressed(rle: Any, image_id: Any) -> dict:
    if not isinstance(rle, dict) or "counts" not in rle or "size" not in rle:
        raise ValueError(f"Image {image_id!r}: masks must be COCO RLE with 'size' and 'counts', not {type(rle)}.")
    if isinstance(rle["counts"], (str, bytes)):
        codes = rle["counts"].encode() if isinstance(rle["counts"], str) else rle["counts"]
        # pycocotools reads past the end of such text. That runs fill their mask would take longer to check.
        if not codes or codes.translate(None, _CODES) or codes[-1] >= 80:
            raise ValueError(f"Image {image_id!r}: the counts of an RLE are malformed or cut off.")
        return rle
    return coco_mask.frPyObjects({"size": list(rle["size"]), "counts": list(rle["counts"])}, *rle["size"])


def mask_areas(rles: list[dict]) -> np.ndarray:
    """(N,) float64 pixels."""
    # pycocotools 2.0.11 with numpy 2 raises OverflowError for a list of more than 255.
    parts = [coco_mask.area(rles[start : start + 255]) for start in range(0, len(rles), 255)]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float64)


def compare(prediction: dict, reference: dict, across_classes: bool = True) -> Image:
    """What the numbers need to know of an image; without `across_classes`, IoUs between classes are left at 0.

    Raises ValueError as `check_image`.
    """
    found, truth, crowd, gt_areas = check_image(prediction, reference)
    labels = np.asarray(prediction["labels"], dtype=np.int64)
    gt_labels = np.asarray(reference["category_id"], dtype=np.int64)
    ious = np.zeros((len(found), len(truth)))
    for category in [None] if across_classes else np.unique(gt_labels):
        rows, columns = (np.flatnonzero((category is None) | (values == category)) for values in (labels, gt_labels))
        if len(rows) and len(columns):
            pairs = [found[k] for k in rows], [truth[k] for k in columns]
            ious[np.ix_(rows, columns)] = coco_mask.iou(*pairs, crowd[columns].astype(np.uint8).tolist())
    scores = np.asarray(prediction["scores"], dtype=np.float64)
    return Image(scores, labels, mask_areas(found), gt_labels, gt_areas, crowd, ious)


def _ranked(image: Image, class_agnostic: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of the detections, best first, at most 100 a category (or in all), with their groups and ranks."""
    if class_agnostic:  # by category, as pycocotools concatenates them: decides between equal scores
        order = np.argsort(image.labels, kind="mergesort")
        order = order[np.argsort(-image.scores[order], kind="mergesort")][:MAX_DETECTIONS]
        return order, np.zeros_like(order), np.arange(len(order))
    order = np.argsort(-image.scores, kind="mergesort")
    groups = image.labels[order]
    by_group = np.argsort(groups, kind="mergesort")
    starts = np.searchsorted(groups[by_group], groups[by_group], side="left")
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[by_group] = np.arange(len(order)) - starts
    kept = ranks < MAX_DETECTIONS
    return order[kept], groups[kept], ranks[kept]


def _match(image: Image, class_agnostic: bool) -> _Matches:
    """Greedy matching for every range of areas and IoU threshold: best detection first, to its best free annotation.

    Annotations outside the range of areas and crowds are ignored: they are matched only if no other fits, and a crowd
    any number of times. Of equal IoUs the last annotation wins.
    """
    order, groups, ranks = _ranked(image, class_agnostic)
    # Without classes pycocotools looks at the annotations by category, which decides between equal IoUs.
    columns = np.argsort(image.gt_labels, kind="mergesort") if class_agnostic else np.arange(len(image.gt_labels))
    gt_labels, gt_areas, crowd = image.gt_labels[columns], image.gt_areas[columns], image.gt_crowd[columns]
    ious, areas = image.ious[np.ix_(order, columns)], image.areas[order]
    gt_groups = np.zeros_like(gt_labels) if class_agnostic else gt_labels
    ious = np.where(groups[:, None] == gt_groups, ious, -1.0)
    low, high = np.array(list(AREA_RANGES.values()), dtype=np.float64).T[:, :, None]  # (A, 1) each
    gt_ignored = crowd | (gt_areas < low) | (gt_areas > high)  # (A, N)
    outside = (areas < low) | (areas > high)  # (A, D)
    shape = (len(low), len(IOU_THRESHOLDS))
    matched = np.zeros((len(order), *shape), dtype=bool)
    ignored = np.zeros((len(order), *shape), dtype=bool)
    taken = np.zeros((*shape, len(crowd)), dtype=bool)
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    for detection in np.flatnonzero((ious >= thresholds[0]).any(1)):
        near = np.flatnonzero(ious[detection] >= thresholds[0])
        iou, near_ignored = ious[detection, near], gt_ignored[:, None, near]
        fits = (iou >= thresholds) & (~taken[..., near] | crowd[near])  # (A, T, n)
        counted = fits & ~near_ignored
        fits = np.where(counted.any(-1, keepdims=True), counted, fits)
        ranked = np.where(fits, iou, -1.0)
        best = len(near) - 1 - ranked[..., ::-1].argmax(-1)  # (A, T), the last of the maxima
        hit = fits.any(-1)
        matched[detection] = hit
        ignored[detection] = hit & np.take_along_axis(near_ignored[:, 0], best, -1)
        area, threshold = np.nonzero(hit)
        taken[area, threshold, near[best[hit]]] = True
    ignored |= ~matched & outside.T[:, :, None]
    hits, misses = matched & ~ignored, ~matched & ~ignored
    return _Matches(image.scores[order], groups, ranks, hits, misses, gt_groups, ~gt_ignored.T)


def _curves(images: list[Image], class_agnostic: bool) -> Curves:
    parts = [_match(image, class_agnostic) for image in images]
    every = _Matches(*(np.concatenate([getattr(part, name) for part in parts]) for name in _Matches.__annotations__))
    categories = np.unique(every.gt_groups).tolist()
    shape = (len(IOU_THRESHOLDS), len(RECALL_POINTS), len(categories) or 1)
    precision = {name: np.full(shape, -1.0) for name in AREA_RANGES}
    recall = {name: np.full(shape[::2], -1.0) for name in (*AREA_RANGES, 1, 10)}
    # One stable sort by category, so that a category is a slice and keeps the order of the images.
    by_group = np.argsort(every.groups, kind="mergesort")
    first = np.searchsorted(every.groups[by_group], categories, side="left")
    last = np.searchsorted(every.groups[by_group], categories, side="right")
    for k, category in enumerate(categories):
        chosen = by_group[first[k] : last[k]]
        totals = every.gt_counted[every.gt_groups == category].sum(0)  # (A,)
        for a, name in enumerate(AREA_RANGES):
            if totals[a] == 0:
                continue
            hits, misses = every.hits[chosen, a], every.misses[chosen, a]
            order = np.argsort(-every.scores[chosen], kind="mergesort")
            precision[name][:, :, k], recall[name][:, k] = _accumulate(hits[order], misses[order], int(totals[a]))
            if name == "all":
                for limit in (1, 10):
                    recall[limit][:, k] = hits[every.ranks[chosen] < limit].sum(0) / totals[a]
    return Curves(categories, precision, recall)


def _accumulate(hits: np.ndarray, misses: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, R) at the recall points and final recall (T,) of detections (D, T), best first."""
    precision = np.zeros((len(IOU_THRESHOLDS), len(RECALL_POINTS)))
    recall = np.zeros(len(IOU_THRESHOLDS))
    if not len(hits):
        return precision, recall
    true_positives, false_positives = np.cumsum(hits.T, axis=1).astype(float), np.cumsum(misses.T, axis=1).astype(float)
    recalls = true_positives / total
    ratio = true_positives / (false_positives + true_positives + np.spacing(1))
    envelope = np.maximum.accumulate(ratio[:, ::-1], axis=1)[:, ::-1]
    for index in range(len(IOU_THRESHOLDS)):
        at = np.searchsorted(recalls[index], RECALL_POINTS, side="left")
        reached = at < envelope.shape[1]
        precision[index, reached] = envelope[index, at[reached]]
    return precision, recalls[:, -1]


def _mean(values: np.ndarray) -> float | None:
    values = values[values > -1]
    return float(np.mean(values)) if len(values) else None
