"""`uplvp demo`: the whole path on generated scenes, without data, weights or network."""

from __future__ import annotations

import argparse

from ._terminal import run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="uplvp demo",
        description="Label generated scenes with the small CLIP of the package, pre-train, fine-tune on 20 labelled "
        "pictures, and compare with training from scratch. Needs no data, weights or network; about 5 minutes on 2 "
        "cores.",
    )
    parser.add_argument(
        "--output", default="runs/demo", help="folder; an earlier demo there is replaced (default: runs/demo)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on pictures and steps, for a quick look")
    parser.add_argument("--verbose", action="store_true", help="also where in the code an error arose")
    arguments = parser.parse_args(argv)

    def demo() -> None:
        from uplvp_hf.demo.pipeline import run_demo

        run_demo(arguments.output, arguments.seed, arguments.scale)

    return run("demo", demo, arguments.verbose)
