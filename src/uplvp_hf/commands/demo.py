"""`uplvp demo`: the whole path on generated scenes, without data, weights or network; or the page of a model."""

from __future__ import annotations

import argparse

from ..models.errors import UserError
from ._terminal import verb


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp demo",
        description="Label generated scenes with the small CLIP of the package, pre-train, fine-tune on a few labeled "
        "ones, and compare with training from scratch: the benchmark recipe `demo`. Needs no data, weights or network; "
        "about 8 minutes on 2 free cores, with a page that grows meanwhile. With --app: a page on this machine that "
        "shows what a model finds in your images.",
    )
    add = parser.add_argument
    add("--output", default="runs/demo", help="folder; a demo that stopped there goes on (default: runs/demo)")
    add("--seed", type=int, default=0)
    add("--scale", type=float, default=1.0, help="factor on images and steps, for a quick look")
    page = parser.add_argument_group("the page of a model")
    page.add_argument("--app", metavar="MODEL", help="model folder or USER/NAME of the Hub; nothing is trained")
    page.add_argument("--port", type=int, default=7860, help="of the page, on this machine only (default: 7860)")
    page.add_argument(
        "--share", choices=("no", "yes"), default="no", help="yes: also a public address through gradio's servers"
    )
    add("--verbose", action="store_true", help="also where in the code an error arose")
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.app is not None:
        return _page(arguments)
    from uplvp_hf.demo.pipeline import run_demo

    run_demo(arguments.output, arguments.seed, arguments.scale)


def _page(arguments: argparse.Namespace) -> None:
    from uplvp_hf.hub.push import load_shown
    from uplvp_hf.hub.space_app import load_app

    try:
        app = load_app()
    except ImportError as error:
        raise UserError(str(error)) from error
    model, processor = load_shown(arguments.app)
    name = arguments.app.rstrip("/").split("/")[-1]
    page = app.build(model, processor, name)
    page.launch(
        server_name="127.0.0.1",
        server_port=arguments.port or None,
        share=arguments.share == "yes",
        theme=app.THEME,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"{page.local_url}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


main = verb("demo", make_parser, _demo)
