"""One vector a mask: what a network sees of the object, in its surroundings and without them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...models.errors import UserError
from ...models.masks import tight_boxes
from ...models.prompts import mask_weights
from ..cutting.proposals import Proposals
from ..encoders.backbone import Encoder
from ..features import aligned
from ..prompt_settings import LookSettings
from .crops import crop_box, fill_color

if TYPE_CHECKING:
    from ..encoders.clip import Clip

Crop = tuple[Image.Image, Image.Image, np.ndarray]


class MaskFeatures:
    """Describes masks by the features of a frozen network.

    network: a backbone with feature maps (`load_encoder`), or a CLIP or SigLIP (`load_clip`). settings, changes: see
    `LookSettings`.

    The vector of a mask is made of parts of unit length, and has unit length itself. Where the surroundings are kept:
    the map's cells averaged under the mask, each weighted by the share of it that the mask covers, so that an object
    smaller than a cell is not lost; and the network's embedding of the whole crop (a CLIP's own, otherwise the average
    of the map). Where they are painted over: the embedding. On seven animals and on synthetic scenes the three parts
    together named more masks rightly than any one of them (docs/labeling.md). With view="image" there is one part, the
    cells under the mask.

    Raises UserError for a network without feature maps.
    """

    def __init__(self, network: Encoder | Clip, settings: LookSettings | None = None, **changes: Any) -> None:
        if isinstance(network, Encoder) and not network.maps:
            raise UserError(f"{network.name} was loaded as a classifier, which gives no feature maps; name a backbone")
        self.network, self.config = network, LookSettings.of(settings, **changes)
        own = 224 if isinstance(network, Encoder) else network.image_size
        self.image_size = self.config.image_size or own * (1 if self.config.view == "crop" else 2)

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> torch.Tensor:
        """Vectors of all masks of several images, in order: (sum of N, D) float32 of unit length on the CPU."""
        if self.config.view == "image":
            parts = [self._of_image(image, p.masks) for image, p in zip(images, proposals) if len(p)]
        else:
            crops = self._crops(images, proposals)
            chunks = iter(lambda: list(itertools.islice(crops, self.config.batch_size)), [])
            parts = [self._of_crops(chunk) for chunk in chunks]
        return torch.cat(parts).cpu() if parts else torch.zeros(0, 1)

    def _crops(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> Iterator[Crop]:
        """(crop as it is, crop with its surroundings painted over, mask within the crop) of each mask."""
        fill = fill_color(self.network.image_mean)
        for image, p in zip(images, proposals):
            for box, mask in zip(tight_boxes(p.masks).tolist(), p.masks):
                left, top, right, bottom = crop_box(box, image.width, image.height, self.config.context)
                plain, inside = image.crop((left, top, right, bottom)), mask[top:bottom, left:right]
                ground = Image.new("RGB", plain.size, fill)
                yield plain, Image.composite(plain, ground, Image.fromarray(inside.astype(np.uint8) * 255)), inside

    @torch.inference_mode()
    def _of_crops(self, crops: Sequence[Crop]) -> torch.Tensor:
        """(B, D) of a batch of crops."""
        parts: list[torch.Tensor] = []
        size = self._size(1, 1)
        if self.config.surroundings != "paint":
            maps, embeddings = self._encode([plain for plain, _, _ in crops], size)
            masks = [torch.from_numpy(np.ascontiguousarray(mask))[None] for *_, mask in crops]
            weights = torch.cat([mask_weights(mask, maps.shape[-2:]) for mask in masks]).to(maps.device)
            parts += [_pool(maps, weights), F.normalize(embeddings, dim=-1)]
        if self.config.surroundings != "keep":
            parts.append(F.normalize(self._encode([painted for _, painted, _ in crops], size)[1], dim=-1))
        return F.normalize(torch.cat(parts, dim=-1), dim=-1)

    @torch.inference_mode()
    def _of_image(self, image: Image.Image, masks: np.ndarray) -> torch.Tensor:
        """(N, D): the map of the whole image under each of its masks."""
        size = self._size(*image.size)
        maps, _ = self._encode([image], size)
        stride = size[0] / maps.shape[2]
        offset = self.network.cell_offset(stride) if getattr(self.network, "shift", 0.0) else 0.0
        moved = aligned(masks, maps.shape[-2:], offset)
        weights = mask_weights(torch.from_numpy(moved), maps.shape[-2:]).to(maps.device)
        return _pool(maps.expand(len(masks), -1, -1, -1), weights)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) that an image or a crop is stretched to."""
        if isinstance(self.network, Encoder):
            return self.network.fit(width, height, self.image_size)
        patch = self.network.patch_size
        scale = self.image_size / max(width, height)
        return tuple(max(patch, round(side * scale / patch) * patch) for side in (height, width))

    def _encode(self, images: Sequence[Image.Image], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Map (B, C, h, w) and embedding (B, E) of images, float32."""
        pixels = self.network.pixels(images, size)
        if isinstance(self.network, Encoder):
            maps = self.network.last_map(pixels).float()
            return maps, maps.mean(dim=(2, 3))
        return self.network.encode_patches(pixels)


def _pool(maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted averages of the cells, of unit length: (B, C, h, w), (B, h, w) -> (B, C)."""
    pooled = torch.einsum("bchw,bhw->bc", maps, weights) / weights.sum(dim=(1, 2)).clamp_min(1e-12)[:, None]
    return F.normalize(pooled, dim=-1)
