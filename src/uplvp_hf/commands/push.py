"""`uplvp push`: a trained model with card and code to the Hub, or into a folder that shows what would be pushed."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from ._terminal import AGAIN, verb


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uplvp push", description="Push a trained model, with its card, to the Hub.")
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder of a trained model")
    add("--repo-id", required=True, metavar="USER/NAME", help="repository; made if it does not exist")
    add("--private", action="store_true", help="make the repository private")
    add("--revision", help="branch to push to; made if it does not exist (default: main)")
    add(
        "--license",
        help="license of the weights, as the Hub names it, such as apache-2.0 (default: that of the network which made "
        "the pseudo labels, where their record knows it; else you are asked)",
    )
    add("--metrics", metavar="FILE", help="metrics.json of `uplvp evaluate`, for the card")
    add("--example", metavar="FILE", action="append", default=[], help="image for the card's widget")
    add("--no-code", action="store_true", help="leave out the source files (the library is needed then)")
    add("--space", metavar="USER/NAME", help="also a Space: a page that shows what the model finds in uploaded images")
    add("--message", default="Upload model", help="commit message")
    add("--dry-run", action="store_true", help="write the folder and push nothing")
    add("--output", metavar="DIR", help="where to write the folder, with --dry-run (that of a Space: DIR-space)")
    add("--verbose", action="store_true", help="also where in the code an error arose")
    return parser


def _push(arguments: argparse.Namespace) -> None:
    from uplvp_hf.hub import check_repo_id, prepare_space, push_folder

    if arguments.dry_run != bool(arguments.output):
        make_parser().error("--dry-run and --output DIR go together")
    if arguments.space:
        check_repo_id(arguments.space)
    remark = ""
    if not arguments.license:
        arguments.license, remark = _license(Path(arguments.model))
    if arguments.dry_run:
        folders = [_prepare(arguments, Path(arguments.output), remark)]
        if arguments.space:
            folders.append(prepare_space(f"{arguments.output}-space", arguments.repo_id))
        for folder in folders:
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            print("\n".join(f"{file.stat().st_size:>12,}  {file.relative_to(folder)}" for file in files))
            print(f"Nothing was pushed; {folder} holds what would be.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = _prepare(arguments, Path(temporary) / "repository", remark)
        print(push_folder(folder, arguments.repo_id, arguments.private, arguments.revision, message=arguments.message))
        if arguments.space:
            folder = prepare_space(Path(temporary) / "space", arguments.repo_id)
            print(push_folder(folder, arguments.space, arguments.private, message="Upload app", repo_type="space"))
            print("The Space runs the code of the model's repository once its variable TRUST_REMOTE_CODE is set to 1.")


def _license(model: Path) -> tuple[str, str]:
    """The license that the record of the labels knows, else the user's answer, else a default; and what to say of it
    once the folder is made."""
    from uplvp_hf.hub.run_record import known_licenses

    known = known_licenses(model)
    if len(known) == 1:
        return known[0], f"License: {known[0]}, that of the network which made the pseudo labels (--license sets it)."
    why = f"the pseudo labels come under {', '.join(known)}" if known else "no record knows another"
    usual = "other" if known else "apache-2.0"
    if sys.stdin is not None and sys.stdin.isatty():
        return input(f"License of the weights, as the Hub names it ({why}) [{usual}]: ").strip() or usual, ""
    return usual, f"uplvp push: warning: the card says license {usual}, as {why}; --license sets it."


def _prepare(arguments: argparse.Namespace, folder: Path, remark: str) -> Path:
    from uplvp_hf.hub import prepare_folder

    prepared = prepare_folder(
        arguments.model,
        folder,
        arguments.repo_id,
        license=arguments.license,
        metrics_file=arguments.metrics,
        examples=arguments.example,
        remote_code=not arguments.no_code,
    )
    if remark:
        print(remark, file=sys.stderr)
    return prepared


main = verb("push", make_parser, _push, AGAIN)
