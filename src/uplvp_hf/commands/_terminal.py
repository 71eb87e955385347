"""What the commands share: calm libraries, warnings and errors in one line, exit codes."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..models.errors import UserError

FIRST_ERROR = "UPLVP_FIRST_ERROR"  # a file that does not exist until one of several processes has told its error
AGAIN = "run the same command again to go on"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "--verbose", action="store_true", help="also what the libraries say, and where in the code an error arose"
    )


def verb(
    name: str,
    make_parser: Callable[[], argparse.ArgumentParser],
    work: Callable[[argparse.Namespace], None],
    again: str = "",
) -> Callable[[Sequence[str] | None], int]:
    """The `main(argv)` of a command: parses, then `run`."""

    def main(argv: Sequence[str] | None = None) -> int:
        arguments = make_parser().parse_intermixed_args(argv)  # words and options in any order
        return run(name, lambda: work(arguments), arguments.verbose, again)

    return main


def run(
    command: str, work: Callable[[], None], verbose: bool = False, again: str = "", transformers: bool = True
) -> int:
    """Runs `work` and returns the exit code: 0, 2 with one line on stderr for what the user can put right, 130.

    `again`: what to do after a full disk or Ctrl-C, such as "run the same command again to go on". Any other error is
    a fault of the program and keeps its traceback. `transformers`: whether that library is used at all; it takes two
    seconds to load.
    """
    with _output(command, verbose, transformers):
        try:
            work()
            return 0
        except KeyboardInterrupt:
            if _is_first():
                print(f"uplvp {command}: interrupted{again and '; ' + again}", file=sys.stderr)
            return 130
        except Exception as error:
            if not _is_first():
                return 2
            if not _is_for_the_user(error):
                raise
            if verbose:
                traceback.print_exc()
            print(f"uplvp {command}: error: {_one_line(error, again)}", file=sys.stderr)
            return 2


def _is_first() -> bool:
    """Whether no other process of this command has told its error: the others fail as well, or for want of it."""
    file = os.environ.get(FIRST_ERROR)
    if file is None:
        return True
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def check_device(name: str | None) -> None:
    """Raises UserError, now rather than after everything was loaded, when torch cannot compute on this device."""
    if name is None:
        return
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def is_main_process() -> bool:
    """Whether this process speaks for all that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _output(command: str, verbose: bool, transformers: bool) -> Iterator[None]:
    """Our own log and warnings as plain lines; what is put into other hands is restored at the end."""
    ours = logging.getLogger("uplvp_hf")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if is_main_process() or verbose else logging.WARNING)
    try:
        with warnings.catch_warnings(), _calm_transformers(verbose or not transformers):
            _show_plainly(command)
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


def _show_plainly(command: str) -> None:
    """Warnings of this package without the line of code that they arose from. None of them ends a run."""
    plain = warnings.showwarning
    warnings.simplefilter("default", UserWarning)

    def show(message, category, filename, lineno, file=None, line=None):
        if f"{os.sep}uplvp_hf{os.sep}" in filename:
            print(f"uplvp {command}: warning: {message}", file=sys.stderr)
        else:
            plain(message, category, filename, lineno, file, line)

    warnings.showwarning = show


@contextmanager
def _calm_transformers(verbose: bool) -> Iterator[None]:
    """No bar for every file of weights, and nothing about backbones that Mask2Former was not published with.

    All other messages, such as those about weights that a checkpoint lacks, stay.
    """
    if verbose:
        yield
        return
    from transformers.utils import logging as transformers_logging

    backbones = logging.getLogger("transformers.models.mask2former.configuration_mask2former")
    level, had_bar = backbones.level, transformers_logging.is_progress_bar_enabled()
    backbones.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        backbones.setLevel(level)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _is_for_the_user(error: Exception) -> bool:
    from huggingface_hub.errors import StrictDataclassError  # a wrong value in a model's configuration
    from safetensors import SafetensorError

    return isinstance(error, (UserError, OSError, SafetensorError, StrictDataclassError)) or _out_of_memory(error)


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _one_line(error: Exception, again: str) -> str:
    text = str(error)
    if "Original Traceback" in text:  # out of a worker process of a DataLoader: its last line is the error
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if _out_of_memory(error):
        text = f"{text.splitlines()[0]} Lower the batch size (and raise optim.accumulation in training)."
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        text += f". What was finished before is kept: make room{again and ', then ' + again}."
    return " ".join(text.split())
