"""Errors of the data room: they name the file, the row, the value and what to do about it."""

from __future__ import annotations

from ..models.errors import UserError


class DataError(UserError):
    """Data on disk, or handed in, that cannot be used.

    Args:
        reason: what is wrong, with the offending value.
        file: the file it was found in, or None.
        row: the row inside that file (such as `annotations[3] (id 17)`), or None.
        remedy: what the reader can do about it, or None.

    `str(error)` is "file, row: reason. remedy". The error survives pickling, so that it comes out of worker processes.
    """

    def __init__(self, reason: str, *, file: object = None, row: object = None, remedy: str | None = None) -> None:
        where = ", ".join(str(part) for part in (file, row) if part is not None)
        message = f"{where}: {reason}" if where else reason
        if remedy:
            message = f"{message.rstrip('.')}. {remedy}"
        super().__init__(message)
        self.reason = reason
        self.file = None if file is None else str(file)
        self.row = None if row is None else str(row)
        self.remedy = remedy


class ImageError(DataError):
    """An image that is missing, cannot be decoded, or does not have the size that its annotations say."""


class DataWarning(UserWarning):
    """Something of a row that is left out when the row is read; `file`, `row` and `reason` as of `DataError`."""

    def __init__(self, reason: str, file: object, row: object) -> None:
        super().__init__(f"{file}, {row}: {reason}" if row is not None else f"{file}: {reason}")
        self.reason, self.file, self.row = reason, str(file), None if row is None else str(row)
