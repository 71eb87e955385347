"""Errors of the data room: they name the file, the row, the value and what to do about it."""

from __future__ import annotations

from ..models.errors import DataError, ImageError


class DataWarning(UserWarning):
    """Something of a row that is left out when the row is read; `file`, `row` and `reason` as of `DataError`."""

    def __init__(self, reason: str, file: object, row: object) -> None:
        super().__init__(f"{file}, {row}: {reason}" if row is not None else f"{file}: {reason}")
        self.reason, self.file, self.row = reason, str(file), None if row is None else str(row)


__all__ = ["DataError", "DataWarning", "ImageError"]
