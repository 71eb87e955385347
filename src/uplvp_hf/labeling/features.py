"""One frozen vector a mask, which labelers and namers keep in the store for kernel supervision (`model.kernel_target`).

While labeling it costs next to nothing, because it is what the network saw anyway: CLIP's embedding of the crop that it
names, or the labeler's own feature map, averaged under the mask. A store without them, or for which another network is
to look at the masks, is given them by `describe_store` (`uplvp label STORE --features`). The files are those of
`data.store_features`.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..data.dataset import Row, load_row_image
from ..data.fields import read_json
from ..data.store_features import ABOUT, feature_file
from ..data.store_reader import shard_files, stream_store
from ..files import only_run, replacing, write_json
from ..models.errors import UserError
from ..models.masks import decode_segmentation
from ..models.prompts import mask_weights
from .cutting.proposals import Proposals
from .processes import Processes
from .progress import Progress

if TYPE_CHECKING:
    from .encoders.backbone import Encoder
    from .encoders.clip import Clip

MOST = 1024  # numbers of a vector: 2 kB in half precision


class Describer(Protocol):
    """Computes the vectors of masks. about: what the vectors depend on, as JSON values."""

    about: dict[str, Any]

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[np.ndarray]: ...


def shortened(vectors: torch.Tensor | np.ndarray) -> np.ndarray:
    """(N, D) -> float16 of unit length and at most `MOST` numbers: longer ones go through a fixed random projection,
    which keeps their cosines to about 0.03."""
    vectors = torch.as_tensor(vectors).float().cpu()
    if vectors.shape[1] > MOST:
        vectors = vectors @ torch.randn(vectors.shape[1], MOST, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(vectors, dim=-1).half().numpy()


def aligned(masks: np.ndarray, grid: Sequence[int], offset: float) -> np.ndarray:
    """Masks (N, H, W) moved as far to the left and the top as the cells of a map of `grid` (h, w) lie to the right and
    below their place (`offset`, in cells). What leaves the image stays at its border; no mask becomes empty."""
    if not offset:
        return masks
    moves = []
    for length, cells in zip(masks.shape[1:], grid):
        moves.append(np.minimum(np.arange(length) + round(offset * length / cells), length - 1))
    moved = masks[:, moves[0]][:, :, moves[1]]
    return np.where(moved.any(axis=(1, 2))[:, None, None], moved, masks)


def pooled(proposals: Proposals, features: torch.Tensor, offset: float = 0.0) -> Proposals:
    """Proposals with the average of a map (C, h, w) under each mask. offset: of its cells, see `aligned`."""
    if not len(proposals):
        return proposals
    grid = features.shape[-2:]
    weights = mask_weights(torch.from_numpy(aligned(proposals.masks, grid, offset)), grid)
    return replace(proposals, features=averages(weights, features))


def averages(weights: torch.Tensor, features: torch.Tensor) -> np.ndarray:
    """Weighted averages of the cells of a map: (N, h, w), (C, h, w) -> (N, C) as they are kept, see `shortened`."""
    weights = weights.flatten(1).to(features)
    return shortened(weights @ features.flatten(1).T / weights.sum(dim=1, keepdim=True).clamp_min(1e-12))


def split(vectors: np.ndarray, proposals: Sequence[Proposals]) -> list[np.ndarray]:
    """The vectors of all masks of several images, by image."""
    return np.split(vectors, np.cumsum([len(p) for p in proposals])[:-1]) if len(proposals) else []


def crop_about(network: str, context: float, surroundings: str) -> dict[str, Any]:
    """Of vectors that are embeddings of crops."""
    return {"network": network, "of": "crop", "context": context, "surroundings": surroundings}


class CropDescriber:
    """CLIP's embedding of each mask's crop: what the namer `clip` keeps by itself."""

    def __init__(self, clip: Clip, context: float = 0.1, surroundings: str = "none", batch_size: int = 64) -> None:
        self.clip, self.context, self.surroundings, self.batch_size = clip, context, surroundings, batch_size
        self.about = crop_about(clip.name, context, surroundings)

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[np.ndarray]:
        """(n, D) float16 for each image."""
        from .naming.crops import crops_of

        crops = crops_of(images, proposals, self.context, self.surroundings, self.clip.image_mean)
        size = (self.clip.image_size, self.clip.image_size)
        chunks = iter(lambda: list(itertools.islice(crops, self.batch_size)), [])
        parts = [self.clip.encode_images(self.clip.pixels(chunk, size)).cpu() for chunk in chunks]
        vectors = torch.cat(parts) if parts else torch.zeros(0, self.clip.dimension)
        return split(shortened(vectors), proposals)


class MapDescriber:
    """A backbone's last map under each mask."""

    def __init__(self, encoder: Encoder) -> None:
        from .naming.mask_features import MaskFeatures

        self.features = MaskFeatures(encoder, view="image")
        self.about = {"network": encoder.name, "of": "map", "image_size": self.features.image_size}

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[np.ndarray]:
        """(n, D) float16 for each image."""
        return split(shortened(self.features(images, proposals)), proposals)


def save_features(folder: str | os.PathLike[str], shard: str, vectors: Sequence[np.ndarray | None]) -> bool:
    """Write the vectors of the rows of a shard; None for a row whose masks have none. Where one is lacking, or they are
    not all of one width, there is no file. Returns whether there is one."""
    file = Path(feature_file(folder, shard))
    kept = [one for one in vectors if one is None or len(one)]
    if not kept or any(one is None for one in kept) or len({one.shape[1] for one in kept if one is not None}) > 1:
        file.unlink(missing_ok=True)  # of an earlier shard of this name
        return False
    content = io.BytesIO()  # into a file, numpy's own error of a full disk names neither
    np.save(content, np.concatenate(kept))
    with replacing(file, "wb") as stream:
        stream.write(content.getbuffer())
    return True


def describe_store(
    store: str | os.PathLike[str],
    describer: Describer,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Compute the vectors of all masks of a finished store, shard by shard; shards that have them are left as they are.

    folder: where they are kept; None: in the store itself. Raises UserError where vectors of another kind lie there,
    DataError and ImageError for rows and images that cannot be read. Returns {"folder", "masks", "shards", "skipped"}.
    """
    folder = Path(store if folder is None else folder)
    before = folder / ABOUT
    if before.is_file() and read_json(str(before)) != describer.about:
        raise UserError(
            f"{folder} has features of another kind ({read_json(str(before))}, not {describer.about}): choose another "
            f"folder, --features FOLDER, or delete {ABOUT} and features-*.npy there."
        )
    folder.mkdir(parents=True, exist_ok=True)
    rows = iter(stream_store(store))
    result = {"folder": str(folder), "masks": 0, "shards": 0, "skipped": 0}
    with only_run(folder), Progress("describing", None, progress, Processes()) as bar:
        write_json(before, describer.about)
        for shard in shard_files(store):
            with open(shard, encoding="utf-8") as stream:
                own = list(itertools.islice(rows, sum(1 for line in stream if line.strip())))
            if Path(feature_file(folder, shard)).is_file():
                result["skipped"] += 1
                continue
            vectors = [vector for part in _batches(own, batch_size) for vector in _describe(part, describer)]
            save_features(folder, shard, vectors)
            result["shards"] += 1
            result["masks"] += sum(map(len, vectors))
            bar.update(len(own))
    return result


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _describe(rows: Sequence[Row], describer: Describer) -> list[np.ndarray]:
    images, proposals = [], []
    for row in rows:
        height, width = row["height"], row["width"]
        found = [decode_segmentation(one, height, width) for one in row["objects"]["segmentation"]]
        proposals.append(Proposals.build(found, [1.0] * len(found), (height, width)))
        images.append(load_row_image(row))
    return describer(images, proposals)
