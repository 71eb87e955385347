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
