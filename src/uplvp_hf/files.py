"""Writing files in one step: the new content or the old one, never half of it; errors name the file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from .models.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


@contextmanager
def writing(path: str | os.PathLike[str], *drafts: str) -> Iterator[None]:
    """For code that writes `path`: turns a failed write, such as on a full disk, into an OSError that names the file.

    Python leaves the name out when a write fails after the file was opened; safetensors raises an error of its own.
    drafts: names of temporary files, in place of which `path` is named.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
    except OSError as error:
        if error.errno is None or error.filename not in (None, *drafts):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO]:
    """Opens a draft beside `path` (text is UTF-8), which is synced and renamed to `path` at the end of the block.

    Makes the folder if needed. When the block or a write fails, `path` stays as it was and no draft is left. Raises
    OSError naming `path`.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(path, str(draft)):
            with open(draft, mode, encoding=None if "b" in mode else "utf-8") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text in one step, see `replacing`."""
    with replacing(path) as stream:
        stream.write(text)


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Writes JSON as `write_text` does. Raises ValueError for numbers that JSON cannot hold (nan)."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Writes one JSON value per line, as `write_text` does."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def new_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a draft folder beside `output`, which becomes `output` at the end of the block: complete or not at all.

    Raises FileExistsError when `output` exists and is not an empty folder.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} already exists and is not an empty folder; choose another or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as draft:
        folder = Path(draft) / "folder"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rmdir()
        os.replace(folder, output)


@contextmanager
def only_run(folder: str | os.PathLike[str], remedy: str = "choose another output folder") -> Iterator[None]:
    """Around a run that writes into `folder`, which is made if needed: a second run on it is refused.

    The system gives the lock back when the process ends, however it does. A folder that is still empty at the end is
    removed again if it was made here. Raises UserError when another run, of this process or of another, is in it.
    """
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as stream:
        _lock(stream, folder, remedy)
        _held.add(stream)
        try:
            yield
        finally:
            _held.discard(stream)
            with contextlib.suppress(OSError):
                if not stream.closed:  # in a fork of the run, it is closed
                    os.unlink(folder / ".lock")
                if made:
                    folder.rmdir()


_held: set[IO] = set()


def _close_held() -> None:
    """In a forked worker: with the file open there, the lock would outlive a run that is killed."""
    for stream in _held:
        stream.close()


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_held)


def _lock(stream: IO, folder: Path, remedy: str) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The run before may have removed the file between its opening and its locking here.
        free = os.path.exists(stream.name) and os.path.samestat(os.fstat(stream.fileno()), os.stat(stream.name))
    except BlockingIOError:
        free = False
    except OSError as error:  # file systems without locks
        logger.warning("%s cannot be locked (%s): start no second run on it.", folder, error)
        return
    if not free:
        raise UserError(f"another run is writing into {folder}; wait for it, or {remedy}")


def usual_rights(folder: str | os.PathLike[str]) -> None:
    """Gives the safetensors in a folder the access rights of its other files: they are written for their owner only."""
    for file in Path(folder).glob("*.safetensors"):
        file.chmod(Path(folder).stat().st_mode & 0o666)


def check_model_name(name: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError when `name` is neither the folder of a model nor meant as a Hub repository (USER/NAME),
    or is a folder whose weights are a pickle.

    A missing folder beside existing ones is not looked up on the Hub, which would take long without a network.
    """
    text = os.fspath(name)
    if os.path.isdir(text):
        if not os.path.isfile(os.path.join(text, "config.json")):
            raise FileNotFoundError(f"{text}: no config.json; not the folder of a model.")
        _refuse_pickles(text)
        return
    parent = os.path.dirname(text)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or os.path.isdir(parent):
        raise FileNotFoundError(f"{text}: no such folder. Pass a model folder or a Hub repository USER/NAME.")


def _refuse_pickles(folder: str) -> None:
    """Raises FileNotFoundError for weights in pickles alone, which run code of their maker when they are opened."""
    names = sorted(os.listdir(folder))
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise FileNotFoundError(
            f"{folder}: no safetensors, only {pickles[0]}, a pickle, which is not opened: it can run code. Load it "
            "where you trust it and write it anew with `save_pretrained`; a checkpoint of mmdetection or detectron2 is "
            "read by `uplvp convert`."
        )
