"""Two views of the same unlabeled image: a weak one for a teacher, a strong one for its student.

Both are `Window`s of the image, so that a mask found in the weak view has its exact place in the strong one:
`seen_from(strong, weak).masks(...)` cuts the teacher's run lengths to the student's crop without a mask of the whole
image. The changes of color and the erased rectangles of the strong view follow Unbiased Teacher (arXiv 2102.09480).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms.v2 import functional

from .collator import collate
from .dataset import InstanceDataset
from .instance_masks import InstanceMasks
from .training_set import TrainingSet
from .transforms import TrainTransform, uniform
from .window import Window

_COLOR_PROBABILITY = 0.8  # of the color changes; arXiv 2102.09480, table 6
_BLUR = (0.1, 2.0)  # pixels; likewise
_ASPECT = (0.3, 3.3)  # of an erased rectangle; likewise


@dataclass(frozen=True)
class StrongColors:
    """Changes of color, blur, and erased rectangles, all drawn from one generator.

    color: strength of brightness, contrast and saturation. hue: largest shift. gray, blur: probabilities. cutouts: most
    rectangles, each there with probability 1/2. cutout_area: (least, largest) share of the view. fill: their RGB color.
    """

    color: float
    hue: float
    gray: float
    blur: float
    cutouts: int
    cutout_area: tuple[float, float]
    fill: tuple[int, int, int]

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(3, h, w) uint8 -> the same shape, a new tensor where anything changed."""
        if uniform(generator, 0, 1) < _COLOR_PROBABILITY:
            low, high = 1 - self.color, 1 + self.color
            pixels = functional.adjust_brightness(pixels, uniform(generator, low, high))
            pixels = functional.adjust_contrast(pixels, uniform(generator, low, high))
            pixels = functional.adjust_saturation(pixels, uniform(generator, low, high))
            pixels = functional.adjust_hue(pixels, uniform(generator, -self.hue, self.hue))
        if uniform(generator, 0, 1) < self.gray:
            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
        if uniform(generator, 0, 1) < self.blur:
            sigma = uniform(generator, *_BLUR)
            # The kernel reflects the image at its borders, so it reaches no further than the shorter side.
            side = min(2 * round(2 * sigma) + 1, 2 * min(pixels.shape[-2:]) - 1)
            pixels = functional.gaussian_blur(pixels, [side] * 2, [sigma] * 2)
        for _ in range(self.cutouts):
            if uniform(generator, 0, 1) < 0.5:
                pixels = self._erased(pixels, generator)
        return pixels

    def _erased(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """With one rectangle in the color `fill`."""
        height, width = pixels.shape[-2:]
        area, aspect = uniform(generator, *self.cutout_area) * height * width, uniform(generator, *_ASPECT)
        tall = min(max(round((area * aspect) ** 0.5), 1), height)
        wide = min(max(round((area / aspect) ** 0.5), 1), width)
        top, left = (int(uniform(generator, 0, room + 1)) for room in (height - tall, width - wide))
        erased = pixels.clone()
        erased[:, top : top + tall, left : left + wide] = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None]
        return erased


class UnlabeledViews(TrainingSet):
    """The two views of every image of a dataset, the same for a given (seed, epoch, index). Its objects are not used.

    weak: draws windows that show the whole image, without a change of color. transform: draws those of the strong view.
    """

    def __init__(
        self,
        dataset: InstanceDataset,
        weak: TrainTransform,
        transform: TrainTransform,
        colors: StrongColors,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        seed: int,
    ) -> None:
        super().__init__(dataset, transform, None, image_mean, image_std, seed)
        self.weak, self.colors = weak, colors

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """Both views as augmented in `epoch`: weak, strong (3, h, w) float32 normalized, each with its own h and w;
        windows, the pair of their `Window`s; image_id; index of the row used. Raises as `TrainingSet.sample` does."""
        generator = self._generator(index % len(self), epoch)
        position, image = self._open(index % len(self))
        weak = self.weak.draw_window(image.height, image.width, generator)
        strong = self.transform.draw_window(image.height, image.width, generator)
        fill = self.transform.fill
        return {
            "weak": self.normalized(weak.pixels(image, fill)),
            "strong": self.normalized(self.colors(strong.pixels(image, fill), generator)),
            "windows": (weak, strong),
            "image_id": self.dataset.image_id(position),
            "index": position,
        }


def collate_views(samples: Sequence[dict[str, Any]], pad_to: int | None = None) -> dict[str, Any]:
    """Samples of `UnlabeledViews` as one batch: weak and strong, each `pixel_values` and `pixel_mask` as `collate` pads
    them; windows, image_ids, index: lists."""
    batch: dict[str, Any] = {
        "windows": [sample["windows"] for sample in samples],
        "image_ids": [sample["image_id"] for sample in samples],
        "index": [sample["index"] for sample in samples],
    }
    for name in ("weak", "strong"):
        views = [
            {
                "pixel_values": sample[name],
                "mask_labels": InstanceMasks(*sample[name].shape[-2:]),
                "class_labels": torch.zeros(0, dtype=torch.int64),
            }
            for sample in samples
        ]
        padded = collate(views, size_divisor=32 if pad_to is None else 1, pad_to=pad_to, dense=False)
        batch[name] = {key: padded[key] for key in ("pixel_values", "pixel_mask")}
    return batch


def seen_from(window: Window, whole: Window) -> Window:
    """The window as one of the image that `whole` shows: all of an image, perhaps mirrored, not turned.

    `window.masks` of masks on the image gives what `seen_from(window, whole).masks` of masks in the view gives, but for
    what the sizes of the two round. Resizing and turning about the center go with mirroring: only the crop begins at
    the other end, and the angle changes its sign.
    """
    if not whole.flip:
        return window
    left = window.resized_width - window.left - window.width
    return window._replace(left=left, flip=not window.flip, angle=-window.angle)
