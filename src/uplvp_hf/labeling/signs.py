"""Signs that a mask source is failing, read from the masks alone, for users who have no truth to compare with."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..data import Row

LEAST_IMAGES = 20  # fewer say nothing about a source
# On the true labels of seven classes of animals, most of them one large animal in the middle, the first two shares are
# .56 and .81, on those of nuts, nuclei, balloons and street scenes at most .34 and .44.
SAME_PLACE = 0.7  # median IoU of each image's largest box with the median of these boxes
ONE_MASK = 0.9  # share of the images that have exactly one mask
WHOLE_IMAGE, MANY_WHOLE = 0.6, 0.3  # a mask of this share of its image is large; this share of large ones is a sign
MANY_EMPTY = 0.5  # share of the images without a mask
ONE_CLASS = 0.95  # share of the masks in one class, of three classes or more
SAME_SCORE = 0.01  # standard deviation of the scores
LOW_AGREEMENT = 0.5  # mean best IoU with another source


@dataclass
class Signs:
    """What the signs are read from beside the counts of a store. Grows by four numbers an image."""

    largest: array = field(default_factory=lambda: array("f"))  # box of the largest mask: x0, y0, x1, y1, in shares
    large: int = 0
    score_sum: float = 0.0
    score_squares: float = 0.0

    def add(self, row: Row) -> None:
        """Counts one row."""
        objects = row["objects"]
        areas = np.asarray(objects["area"], dtype=np.float64)
        scores = np.asarray(objects["score"], dtype=np.float64)
        self.large += int((areas > WHOLE_IMAGE * row["width"] * row["height"]).sum())
        self.score_sum += float(scores.sum())
        self.score_squares += float((scores**2).sum())
        if len(areas):
            x, y, width, height = objects["bbox"][int(areas.argmax())]
            right, bottom = (x + width) / row["width"], (y + height) / row["height"]
            self.largest.extend((x / row["width"], y / row["height"], right, bottom))

    def texts(
        self,
        per_image: Counter[int],
        per_class: Counter[int],
        names: Mapping[int, str],
        agreement: float | None = None,
    ) -> list[str]:
        """One sentence for each sign, most telling first; none below `LEAST_IMAGES` images.

        per_image: number of masks to number of images with so many. per_class: class id to number of masks. names:
        class id to name, of all classes that a mask could have. agreement: mean best IoU with the masks of another
        source, None where there is none.
        """
        images, instances = per_image.total(), per_class.total()
        if images < LEAST_IMAGES:
            return []
        found = []
        empty = per_image[0] / images
        if empty >= MANY_EMPTY:
            found.append(f"{empty:.0%} of the images have no mask: the source misses much, or its thresholds are high.")
        if instances == 0:
            return found
        if agreement is not None and agreement < LOW_AGREEMENT:
            found.append(
                f"Another source agrees little (mean best IoU {agreement:.2f}): at least one of the two is wrong."
            )
        place = self._same_place()
        if place >= SAME_PLACE:
            found.append(
                f"The largest masks cover the same place in every image (median IoU of their boxes {place:.2f}): the "
                "source may follow the middle of the image and not its content."
            )
        whole = self.large / instances
        if whole >= MANY_WHOLE:
            found.append(f"{whole:.0%} of the masks cover more than {WHOLE_IMAGE:.0%} of their image: background?")
        one = per_image[1] / images
        if one >= ONE_MASK:
            found.append(
                f"{one:.0%} of the images have exactly one mask: objects that touch, and small ones, may be merged or "
                "missed."
            )
        mean = self.score_sum / instances
        if max(0.0, self.score_squares / instances - mean**2) ** 0.5 < SAME_SCORE:
            found.append(f"The scores do not vary (all about {mean:.2f}): they cannot tell good masks from bad ones.")
        key, most = per_class.most_common(1)[0]
        if len(names) >= 3 and most >= ONE_CLASS * instances:
            share = most / instances
            found.append(f"{share:.0%} of the masks are called {names[key]}, one of {len(names)} classes.")
        return found

    def _same_place(self) -> float:
        boxes = np.frombuffer(self.largest, dtype=np.float32).reshape(-1, 4).astype(np.float64)
        middle = np.median(boxes, axis=0)
        sides = np.minimum(boxes[:, 2:], middle[2:]) - np.maximum(boxes[:, :2], middle[:2])
        inside = sides.clip(0).prod(axis=1)
        union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (middle[2:] - middle[:2]).prod() - inside
        return float(np.median(inside / union.clip(1e-12)))
