"""Features of a frozen backbone on disk (`data.cache_features`): it sees every image and view once, and then the rest
of the segmenter is trained from files.

A view is what the augmentation makes of an image; epoch e shows view e mod `data.cache_views`. The files are
safetensors, in a folder named after a hash of all that the features depend on (weights, images, augmentation), so that
a run with other ones never reads them, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.collator import collate
from ..data.training_set import TrainingSet
from ..files import replacing
from .config import TrainSettings
from .mixture import MixedSamples

logger = logging.getLogger(__name__)

SHARD = 64  # samples of a file
Key = tuple[int, int]  # index of the image, view


class FeatureCache:
    """Maps of images and views in the files of a folder, which is made if needed. Files that cannot be read are left
    alone, and what they held counts as missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[Key, Path] = {}
        self._open: dict[Path, Any] = {}
        self._waiting: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as archive:
                    names = list(archive.keys())
            except (OSError, SafetensorError) as error:
                logger.warning("%s is not read (%s); its features are computed anew.", path, error)
                continue
            self._files.update(dict.fromkeys(map(_key, names), path))

    def __contains__(self, key: Key) -> bool:
        return key in self._files

    def __len__(self) -> int:
        return len(self._files)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def add(self, key: Key, row: int, maps: Iterable[Tensor]) -> None:
        """Keeps the maps (C, h, w) of a sample, in half precision, and the row whose image it shows. What was added
        is on disk after every `SHARD` samples and after `flush`."""
        name = f"{key[0]}.{key[1]}"
        self._waiting[f"{name}.row"] = torch.tensor(row)
        for level, one in enumerate(maps):
            half = one.half()
            # Beyond float16's range, bfloat16 is coarser but finite.
            self._waiting[f"{name}.{level}"] = (half if half.isfinite().all() else one.bfloat16()).cpu().contiguous()
        if len({_key(waiting) for waiting in self._waiting}) >= SHARD:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            path = self.folder / f"{uuid4().hex}.safetensors"  # several processes may write
            with replacing(path, "wb") as stream:
                stream.write(save(self._waiting))
            self._files.update(dict.fromkeys(map(_key, self._waiting), path))
            self._waiting = {}

    def read(self, key: Key) -> tuple[int, list[Tensor]]:
        """The row whose image was used, and the maps (C, h, w). Raises KeyError for what is not there."""
        path = self._files[key]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        archive, name = self._open[path], f"{key[0]}.{key[1]}"
        maps: list[Tensor] = []
        while f"{name}.{len(maps)}" in archive.keys():  # noqa: SIM118 (an archive, not a dict)
            maps.append(archive.get_tensor(f"{name}.{len(maps)}"))
        return int(archive.get_tensor(f"{name}.row")), maps


def _key(name: str) -> Key:
    index, view, _ = name.split(".")
    return int(index), int(view)


class CachedSamples(Dataset):
    """Samples without pixels, with `feature_maps` from the cache in their place."""

    def __init__(self, samples: TrainingSet | MixedSamples, cache: FeatureCache, views: int) -> None:
        self.samples, self.cache, self.views = samples, cache, views
        self.extra = getattr(samples, "extra", ())

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        view = epoch % self.views
        row, maps = self.cache.read((index, view))
        return {**self.samples.sample(index, view, seen_at=row), "feature_maps": maps}


def collate_cached(samples: list[dict[str, Any]], pad_to: int) -> dict[str, Any]:
    """As `collate` on a square canvas, with `feature_maps`: per level (B, C, h, w), in the precision of the files."""
    batch = collate(samples, size_divisor=1, pad_to=pad_to, dense=False)
    batch["feature_maps"] = [torch.stack(level) for level in zip(*(s["feature_maps"] for s in samples), strict=True)]
    return batch


def cache_folder(
    settings: TrainSettings, backbone: nn.Module, samples: TrainingSet | MixedSamples, precision: str
) -> Path:
    """Where features of this backbone, these images and this augmentation are: `data.cache_folder`, or `features` in
    the output folder, and in it a hash."""
    digest = hashlib.sha256()
    for piece in _pieces(settings, backbone, samples, precision):
        digest.update(piece)
    root = Path(settings.data.cache_folder or Path(settings.output) / "features")
    return root / digest.hexdigest()[:16]


def _pieces(settings, backbone, samples, precision) -> Iterator[bytes]:
    config = {key: value for key, value in backbone.config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    yield json.dumps([config, precision, settings.data.size], sort_keys=True, default=str).encode()
    for name, value in sorted(backbone.state_dict().items()):
        yield name.encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    parts = [samples.labeled, samples.extra] if isinstance(samples, MixedSamples) else [samples]
    for part in parts:
        yield repr((part.transform, part.mean.tolist(), part.std.tolist(), part.seed)).encode()
        for row in part.dataset.rows:
            yield repr((row["file_name"], row["width"], row["height"], _stamp(row["image"]))).encode()
            # Where no object is in a crop, another one is drawn.
            yield hashlib.sha256(repr(row["objects"]["segmentation"]).encode()).digest()


def _stamp(image: Any) -> tuple[int, int] | None:
    """Size and time of an image file."""
    if not isinstance(image, str | os.PathLike) or not os.path.isfile(image):
        return None
    found = os.stat(image)
    return found.st_size, found.st_mtime_ns
