"""What evaluators keep of every image, until they compute."""

from __future__ import annotations

from typing import Any

from ..models.errors import UserError


class ImageRecords:
    """One record an image, by its id. What one process of several keeps is sent to the others as `records`."""

    def __init__(self) -> None:
        self._images: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._images)

    def records(self) -> dict[Any, Any]:
        """The images added so far, by image id."""
        return dict(self._images)

    def extend(self, records: dict[Any, Any]) -> None:
        """Adds the `records` of another process. Raises UserError for an image that was added before."""
        for image_id, record in records.items():
            if image_id in self._images:
                raise UserError(f"Image {image_id!r} was added before. Call compute() between two runs.")
            self._images[image_id] = record

    def take(self) -> list[Any]:
        """All records, which are then forgotten, in an order that decides between equal scores: ids are whole numbers
        or texts. Raises UserError without any."""
        if not self._images:
            raise UserError("No image was added: nothing to compute.")
        ordered = sorted(self._images.items(), key=lambda item: (isinstance(item[0], str), item[0]))
        self._images = {}
        return [record for _, record in ordered]
