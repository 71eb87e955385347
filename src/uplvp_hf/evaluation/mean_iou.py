"""Mean IoU as an `evaluate` metric that keeps one matrix of counts, whatever the number of images and classes.

The numbers are those of the `evaluate` package's own `mean_iou`, which stores every map in a file, loses predictions
beyond the classes, and reads labels of more than 255 classes wrongly where it reduces them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from uplvp_hf.models.errors import UserError

_DESCRIPTION = "Mean intersection over union, mean accuracy and pixel accuracy of label maps, streaming."

_CITATION = """\
@article{everingham2010pascal,
  title={The Pascal Visual Object Classes (VOC) Challenge}, journal={IJCV}, year={2010},
  author={Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and Zisserman, Andrew}
}
"""

_INPUTS = """
Args:
    predictions: one label map (H, W) an image, of integers from 0 to K - 1.
    references: one label map of the same size an image; `ignored` where a pixel does not count.
Returns:
    mIoU, mAcc, aAcc: 0 to 1, or None where nothing is labeled; per_class: K values of IoU or None; absent: number of
    classes in neither labels nor predictions.
Examples:
    >>> metric = evaluate.load("src/uplvp_hf/evaluation/mean_iou.py", num_classes=150, ignored=255)
    >>> for prediction, reference in pairs:
    ...     metric.add(prediction=prediction, reference=reference)
    >>> metric.compute()["mIoU"]
"""


class MeanIoU(evaluate.Metric):
    """Intersection over union of classes from one confusion matrix, image by image, for any number of classes.

    num_classes: K; ignored: value of pixels that do not count; settings: those of every `evaluate.Metric`.
    """

    def __init__(self, num_classes: int, ignored: int = 255, **settings: Any) -> None:
        self.num_classes, self.ignored = num_classes, ignored
        super().__init__(**settings)
        self.reset()

    def _info(self) -> evaluate.MetricInfo:
        labels = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        features = datasets.Features({"predictions": labels, "references": labels})
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation=_CITATION, inputs_description=_INPUTS, features=features
        )

    def reset(self) -> None:
        """Forgets what was added."""
        self.confusion = np.zeros((self.num_classes,) * 2, dtype=np.int64)  # [true class, found class]

    def add(self, prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:  # type: ignore[override]
        """Counts an image, label maps (H, W) of integers; pixels whose reference is `ignored` do not count. Returns its
        own confusion matrix.

        Raises UserError for other shapes, and for an id that is no class.
        """
        prediction, reference = np.asarray(prediction), np.asarray(reference)
        if prediction.shape != reference.shape:
            raise UserError(f"a prediction of {prediction.shape} cannot be compared with labels of {reference.shape}.")
        valid = reference != self.ignored
        true, found = reference[valid].astype(np.int64), prediction[valid].astype(np.int64)
        for what, ids in (("labels", true), ("prediction", found)):
            if ids.size and not 0 <= ids.min() <= ids.max() < self.num_classes:
                last = self.num_classes - 1
                raise UserError(f"the {what} hold ids from {ids.min()} to {ids.max()}; classes are 0 to {last}.")
        counts = np.bincount(true * self.num_classes + found, minlength=self.num_classes**2)
        counts = counts.reshape(self.num_classes, self.num_classes)
        self.confusion += counts
        return counts

    def add_batch(  # type: ignore[override]
        self, predictions: Sequence[np.ndarray], references: Sequence[np.ndarray]
    ) -> None:
        """Counts several images."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction, reference)

    def compute(  # type: ignore[override]
        self, *, predictions: Sequence[np.ndarray] = (), references: Sequence[np.ndarray] = ()
    ) -> dict[str, Any]:
        """Adds these, and gives the numbers of everything added since the last `reset`: mIoU, mAcc and aAcc, 0 to 1.
        Classes that occur neither in labels nor predictions have no IoU and do not count; `per_class` has the IoU of
        each, or None, and `absent` their number."""
        self.add_batch(predictions, references)
        hits = self.confusion.diagonal().astype(np.float64)
        true, found = self.confusion.sum(1), self.confusion.sum(0)
        with np.errstate(invalid="ignore"):
            iou, accuracy = hits / (true + found - hits), hits / true
        total = self.confusion.sum()
        return {
            "mIoU": _mean(iou), "mAcc": _mean(accuracy), "aAcc": hits.sum() / total if total else None,
            "absent": int(np.isnan(iou).sum()), "per_class": [None if np.isnan(x) else float(x) for x in iou],
        }  # fmt: skip

    def classes(self, names: Sequence[str], ids: Sequence[int]) -> list[dict[str, Any]]:
        """Of every class id, name, IoU and accuracy (0 to 1 or None), labeled and predicted pixels, and the other class
        that most of its pixels were taken for, with the share of them (None where all are right)."""
        true, found, hits = self.confusion.sum(1), self.confusion.sum(0), self.confusion.diagonal()
        wrong = self.confusion - np.diag(hits)
        most = wrong.argmax(1)
        rows = []
        for k, iou in enumerate(self.compute()["per_class"]):
            taken = wrong[k, most[k]]
            rows.append({
                "id": ids[k], "name": names[k], "IoU": iou, "accuracy": hits[k] / true[k] if true[k] else None,
                "labeled": int(true[k]), "predicted": int(found[k]), "taken_for": names[most[k]] if taken else None,
                "taken_share": taken / true[k] if taken else None,
            })  # fmt: skip
        return rows


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


__all__ = ["MeanIoU"]
