"""The base of all errors that are meant for the person at the keyboard."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten


class UserError(ValueError):
    """Something that its reader can put right: a wrong file, value, name or combination of settings.

    The message says what is wrong, where (file, row, value), and what to do. Commands print it as one line; any other
    exception is a fault of the library and keeps its traceback.
    """


@contextmanager
def reading(what: str, remedy: str = "") -> Iterator[None]:
    """Around calls of a library that read what a user named: its ValueErrors become UserErrors that begin with `what`.

    Libraries raise ValueError for an unknown `model_type`, a text that is not UTF-8, broken JSON and the like, without
    naming the file. Errors of the system (OSError) already name it and pass through, as do our own.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        reason = shorten(next(iter(str(error).strip().splitlines()), type(error).__name__), 240, placeholder=" ...")
        raise UserError(f"{what}: {reason}{remedy and ' ' + remedy}") from error


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
