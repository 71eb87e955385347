"""`uplvp push`: a trained model with card and code to the Hub, or into a folder that shows what would be pushed."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ._terminal import run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uplvp push", description="Push a trained model, with its card, to the Hub.")
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a trained model")
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="repository; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to push to; made if it does not exist (default: main)")
    parser.add_argument("--license", default="apache-2.0", help="licence of the weights (default: apache-2.0)")
    parser.add_argument("--metrics", metavar="FILE", help="metrics.json of `uplvp evaluate`, for the card")
    parser.add_argument("--example", metavar="FILE", action="append", default=[], help="picture for the card's widget")
    parser.add_argument(
        "--no-code", action="store_true", help="leave out the source files (the library is needed then)"
    )
    parser.add_argument("--message", default="Upload model", help="commit message")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and push nothing")
    parser.add_argument("--output", metavar="DIR", help="where to write the folder, with --dry-run")
    parser.add_argument("--verbose", action="store_true", help="also where in the code an error arose")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 with one line on stderr for wrong input."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.dry_run != bool(arguments.output):
        parser.error("--dry-run and --output DIR go together")
    return run("push", lambda: _push(arguments), arguments.verbose)


def _push(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        folder = _prepare(arguments, Path(arguments.output))
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        print("\n".join(f"{file.stat().st_size:>12,}  {file.relative_to(folder)}" for file in files))
        print(f"Nothing was pushed; {folder} holds what would be.")
        return
    from uplvp_hf.hub import push_folder

    with tempfile.TemporaryDirectory() as temporary:
        folder = _prepare(arguments, Path(temporary) / "repository")
        # Errors of the Hub are OSErrors, so they are one line too.
        print(push_folder(folder, arguments.repo_id, arguments.private, arguments.revision, message=arguments.message))


def _prepare(arguments: argparse.Namespace, folder: Path) -> Path:
    from uplvp_hf.hub import prepare_folder

    return prepare_folder(
        arguments.model,
        folder,
        arguments.repo_id,
        license=arguments.license,
        metrics_file=arguments.metrics,
        examples=arguments.example,
        remote_code=not arguments.no_code,
    )
