"""The row schema, and the dataset that every stage reads: rows, categories, and what could not be used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from PIL import Image

from ..models.images import as_rgb, open_bytes, open_image
from ..models.masks import decode_segmentation
from .errors import DataError

if TYPE_CHECKING:
    import datasets

OBJECT_KEYS = ("segmentation", "category_id", "bbox", "area", "iscrowd", "score")


class _Objects(TypedDict):
    segmentation: list[Any]  # polygons, or an RLE (models/masks.py)
    category_id: list[int]  # original ids, may be sparse
    bbox: list[list[float]]  # x, y, width, height
    area: list[float]
    iscrowd: list[int]
    score: list[float]  # 0 to 1; 1 for human labels


class Objects(_Objects, total=False):
    """The instances of one image, as parallel lists (COCO conventions, pixels of the image). Where they were asked for,
    with a vector of every mask that a labeler's network computed (`store_features`)."""

    features: list[np.ndarray]


class _Row(TypedDict):
    image: str | bytes | Image.Image
    image_id: int | str
    file_name: str
    width: int
    height: int
    objects: Objects


class Row(_Row, total=False):
    """One image. `image` is an absolute path, the content of an image file, or a PIL image; an unlabeled image
    has empty lists in `objects`. width and height are 0 for content that no image can be read from. `as_stored`
    (absent: False) marks images that were annotated as they are stored, whatever rotation their EXIF asks for. `void`
    holds segmentations of regions where a detection is neither right nor wrong; absent: not known. Only the AP of the
    Cityscapes benchmark reads them. `label_map`: the file with the class of every pixel that the objects are from."""

    as_stored: bool
    void: list[Any]
    label_map: str


def empty_objects() -> Objects:
    """No instances."""
    return {"segmentation": [], "category_id": [], "bbox": [], "area": [], "iscrowd": [], "score": []}


def _without_objects(row: Row) -> Row:
    return Row(**{**{key: value for key, value in row.items() if key != "void"}, "objects": empty_objects()})


def load_row_image(row: Row) -> Image.Image:
    """The image of a row as RGB, of the row's width and height.

    An image with an EXIF rotation is turned upright unless the row says `as_stored`, or its size fits only the stored
    frame (see `open_image`). Raises ImageError when it is missing, cannot be decoded, or has
    another size than the row says.
    """
    size, exif = (row["width"], row["height"]), not row.get("as_stored", False)
    if isinstance(row["image"], Image.Image):
        return as_rgb(row["image"], size, row["file_name"], exif)
    if isinstance(row["image"], bytes):
        return open_bytes(row["image"], size, row["file_name"], exif)
    return open_image(row["image"], size, exif)


class LazyRows(Sequence[Row]):
    """Rows that are read one at a time: their images may be large, or their masks may have to be made first. The row
    read last is kept, since a sample asks for its image and for its objects.

    Args:
        read: the row at a position. identify: its image id, without its image.
        indices: the positions, in order.
    """

    def __init__(
        self, read: Callable[[int], Row], identify: Callable[[int], int | str], indices: Sequence[int]
    ) -> None:
        self._read, self._identify, self._indices = read, identify, indices
        self._last: tuple[int, Row] | None = None

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int | slice) -> Row | LazyRows:
        if isinstance(index, slice):
            return LazyRows(self._read, self._identify, self._indices[index])
        position = self._indices[index]
        last = self._last  # taken once: another thread may replace it
        if last is None or last[0] != position:
            last = self._last = (position, self._read(position))
        return last[1]

    def image_id(self, index: int) -> int | str:
        """Of the row at `index`."""
        return self._identify(self._indices[index])

    def select(self, indices: Iterable[int]) -> LazyRows:
        """The rows at `indices`, in that order."""
        return LazyRows(self._read, self._identify, [self._indices[index] for index in indices])

    def bare(self) -> LazyRows:
        """The same rows without their objects where the reader (its method `bare`) can spare itself making them."""
        return LazyRows(getattr(self._read, "bare", self._read), self._identify, self._indices)

    def map(self, change: Callable[[Row], Row]) -> LazyRows:
        """The same rows, each passed through `change` when it is asked for."""
        # No closure: worker processes that are spawned need to pickle it.
        return LazyRows(partial(_changed, self._read, change), self._identify, self._indices)


def _changed(read: Callable[[int], Row], change: Callable[[Row], Row], position: int) -> Row:
    return change(read(position))


@dataclass
class RowStream:
    """Images that come one after the other and are never held all at once, such as those of a streamed dataset.

    Args:
        source: starts from the first row every time it is called; equal image ids and order each time.
        categories, name, failures: as of `InstanceDataset`.
    """

    source: Callable[[], Iterator[Row]]
    categories: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""
    failures: list[dict[str, Any]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        return self.source()


@dataclass
class InstanceDataset:
    """Images with (or without) instances.

    Args:
        rows: one `Row` an image; a list, or `LazyRows` that are read when they are asked for.
        categories: [{"id": original id, "name": str}, ...]; kept sorted by id.
        name: for reports.
        failures: what was left out while reading, [{"file", "row", "reason"}, ...].
        official: the published set that this says it is all of, such as "cityscapes train", or "" (`data.check`).
        manifest: the low-data split that these rows are (`data.manifest`), or None.

    Model classes are 0..K-1 in the order of `categories`; `category_ids` leads back to the original ids.
    Raises DataError when a category id occurs twice.
    """

    rows: Sequence[Row]
    categories: list[dict[str, Any]]
    name: str = ""
    failures: list[dict[str, Any]] = field(default_factory=list)
    official: str = ""
    manifest: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.categories = sorted(self.categories, key=lambda category: category["id"])
        ids = self.category_ids
        for previous, following in itertools.pairwise(ids):
            if previous == following:
                raise DataError(f"category id {following} occurs twice", file=self.name or None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def id2label(self) -> dict[int, str]:
        """{model class: name}."""
        return {index: category["name"] for index, category in enumerate(self.categories)}

    @property
    def category_ids(self) -> list[int]:
        """Original category id of each model class."""
        return [category["id"] for category in self.categories]

    def subset(self, indices: Iterable[int]) -> InstanceDataset:
        """The rows at `indices`, in that order, with the same categories."""
        rows = self.rows.select(indices) if isinstance(self.rows, LazyRows) else [self.rows[i] for i in indices]
        return InstanceDataset(rows, self.categories, self.name, list(self.failures))

    def unlabeled(self) -> InstanceDataset:
        """The same images without their objects; categories stay."""
        return self.map(_without_objects)

    def map(self, change: Callable[[Row], Row]) -> InstanceDataset:
        """The rows passed through `change`: those of `LazyRows` when they are asked for, others now."""
        rows = self.rows.map(change) if isinstance(self.rows, LazyRows) else [change(row) for row in self.rows]
        return InstanceDataset(rows, self.categories, self.name, list(self.failures), self.official)

    def load_image(self, index: int) -> Image.Image:
        """The image of a row, as `load_row_image` gives it."""
        return load_row_image(self.rows[index])

    def image_id(self, index: int) -> int | str:
        """Of a row, without reading its image."""
        if isinstance(self.rows, LazyRows):
            return self.rows.image_id(index)
        return self.rows[index]["image_id"]

    def mask(self, index: int, k: int) -> np.ndarray:
        """(height, width) bool mask of object `k` of row `index`. Raises DataError for a malformed segmentation."""
        row = self.rows[index]
        try:
            return decode_segmentation(row["objects"]["segmentation"][k], row["height"], row["width"])
        except DataError as error:
            raise DataError(error.reason, file=row["file_name"], row=f"object {k}") from error

    def to_hf_dataset(self) -> datasets.Dataset:
        """The rows as a `datasets.Dataset`: `image` is a `datasets.Image` (a path, decoded when read), and each object
        is a struct of the lists above with every segmentation a compressed RLE, so that one schema fits all, and with
        its class as a `ClassLabel` in `category`.

        `datasets` always turns images upright, also those that `load_image` leaves as stored for their annotations.
        Raises DataError for a malformed segmentation.
        """
        from .arrow import has_text_ids, rows_to_dataset

        return rows_to_dataset(self.rows, has_text_ids(self.rows), self.categories)
