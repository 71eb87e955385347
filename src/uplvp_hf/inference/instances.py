"""The instances of one image, and conversions to the forms that users want."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uplvp_hf.data import decode_segmentation, encode_mask, rle_areas, rle_boxes

from ..models.errors import UserError
from ..models.images import as_rgb

if TYPE_CHECKING:
    import supervision


@dataclass
class Instances:
    """N instances of one image, best first; they may overlap.

    scores (N,) float32, 0 to 1; labels (N,) int64, class indices; names: N class names; boxes (N, 4) float32 x1, y1,
    x2, y2 in pixels of the image, ends exclusive (those of QueryInst are the model's own and may leave the image);
    rle: N COCO run lengths of the image's size; size: its (height, width); category_ids: N original ids of the
    classes; source: file name or address, None of an image in memory.
    """

    scores: Tensor
    labels: Tensor
    names: list[str]
    boxes: Tensor
    rle: list[dict[str, Any]]
    size: tuple[int, int]
    category_ids: list[int]
    source: str | None = None

    def __len__(self) -> int:
        return len(self.rle)

    def __getitem__(self, chosen: Any) -> Instances:
        """Selects instances by a slice, a list of positions, or a bool tensor (N,)."""
        places = torch.arange(len(self))[torch.as_tensor(chosen) if isinstance(chosen, list) else chosen].tolist()
        if not isinstance(places, list):
            places = [places]
        return Instances(
            scores=self.scores[places],
            labels=self.labels[places],
            names=[self.names[place] for place in places],
            boxes=self.boxes[places],
            rle=[self.rle[place] for place in places],
            size=self.size,
            category_ids=[self.category_ids[place] for place in places],
            source=self.source,
        )

    def above(self, threshold: float) -> Instances:
        """The instances with at least this score."""
        return self[self.scores >= threshold]

    def mask(self, index: int) -> np.ndarray:
        """(height, width) bool mask of one instance."""
        return decode_segmentation(self.rle[index], *self.size)

    def iter_masks(self) -> Iterator[np.ndarray]:
        """`mask` of every instance, one at a time."""
        return (self.mask(index) for index in range(len(self)))

    def masks(self) -> np.ndarray:
        """(N, height, width) bool. All N masks are in memory at once; `iter_masks` holds one."""
        stack = np.zeros((len(self), *self.size), dtype=bool)
        for index, mask in enumerate(self.iter_masks()):
            stack[index] = mask
        return stack

    def areas(self) -> np.ndarray:
        """The number of pixels of every mask, (N,) int64."""
        return rle_areas(self.rle)

    def to_coco(self, image_id: int | str = 0, first_id: int = 1) -> list[dict[str, Any]]:
        """Entries of a COCO results file that also serve as annotations, numbered from `first_id`; bbox is x, y, width,
        height."""
        boxes = self.boxes.tolist()
        return [
            {
                "id": first_id + index,
                "image_id": image_id,
                "category_id": int(self.category_ids[index]),
                "segmentation": self.rle[index],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": score,
                "area": area,
                "iscrowd": 0,
            }
            for index, (box, score, area) in enumerate(
                zip(boxes, self.scores.tolist(), self.areas().tolist(), strict=True)
            )
        ]

    def to_supervision(self, compact: bool = True) -> supervision.Detections:
        """`supervision.Detections` with `class_name` in its data.

        compact: masks as `supervision.CompactMask` (crops, run lengths) where the installed version has it, else, and
        with False, as (N, height, width) bool. Raises ImportError without supervision.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision() needs a package: pip install 'uplvp_hf[supervision]'") from error
        kind = getattr(supervision, "CompactMask", None) if compact else None
        if kind is not None and hasattr(kind, "from_coco_rle"):
            around = rle_boxes(self.rle)
            around[:, 2:] += around[:, :2] - 1  # ends belong to the box there
            masks = kind.from_coco_rle(self.rle, around, self.size)
        else:
            masks = self.masks()
        return supervision.Detections(
            xyxy=self.boxes.numpy().reshape(-1, 4),
            mask=masks,
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy().astype(int),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, image: Image.Image, longest_edge: int = 2560) -> Image.Image:
        """The image with every instance tinted, outlined and named.

        Of instances that were found in a file, `image` is turned upright by its EXIF rotation, as the file was; others
        are drawn on the image as it stands. Larger ones are drawn scaled down to `longest_edge` pixels: every mask
        drawn takes a byte a pixel. Raises ValueError if the image has another size than the instances.
        """
        from uplvp_hf.evaluation.visualize import draw_instances

        image = as_rgb(image, exif=self.source is not None)
        if (image.height, image.width) != tuple(self.size):
            raise UserError(f"instances of an image of {self.size}, drawn on {(image.height, image.width)}.")
        names = dict(zip(self.labels.tolist(), self.names, strict=True))
        rles, scale = self.rle, longest_edge / max(image.size)
        if scale < 1:
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
            rles = [encode_mask(_scaled(mask, image.size)) for mask in self.iter_masks()]
        return draw_instances(image, rles, self.labels.tolist(), self.scores.tolist(), names)


def _scaled(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at (width, height): pixels of which at least half was inside."""
    return np.asarray(Image.fromarray(mask.view(np.uint8) * 255).resize(size, Image.Resampling.BOX)) > 127


def instances_of(
    result: dict[str, Any], size: tuple[int, int], id2label: dict[int, str], category_ids: Sequence[int], source=None
) -> Instances:
    """`Instances` from what `predict_dataset` yields for an image of `size` (height, width)."""
    labels = result["labels"].tolist()
    return Instances(
        scores=result["scores"],
        labels=result["labels"],
        names=[id2label[label] for label in labels],
        boxes=result["boxes"],
        rle=result["rle"],
        size=size,
        category_ids=[int(category_ids[label]) for label in labels],
        source=source,
    )
