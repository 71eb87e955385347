"""What an evaluation is judged by: mask AP of instances, mean IoU of classes of pixels."""

from __future__ import annotations

from collections.abc import Collection

_SHOWN = {"mIoU": ("mIoU", "aAcc"), "AP": ("AP", "AP50")}


def shown_metrics(metrics: Collection[str]) -> tuple[str, str]:
    """The two numbers that stand for an evaluation with these, of 0 to 1; the first one decides which is better."""
    return _SHOWN["mIoU" if "mIoU" in metrics else "AP"]


def main_metric(metrics: Collection[str]) -> str:
    """`mIoU` of a semantic segmenter, else `AP`."""
    return shown_metrics(metrics)[0]


def spelled(metric: str, begins: bool = False) -> str:
    """The number as an axis or a caption names it, `mask AP50` or `mIoU`; begins: at the beginning of a sentence."""
    mask = "Mask" if begins else "mask"
    return metric if metric in ("mIoU", "mAcc", "aAcc") else f"{mask} {metric}"


__all__ = ["main_metric", "shown_metrics", "spelled"]
