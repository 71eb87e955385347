"""What `uplvp pretrain` and `uplvp finetune` have in common: arguments, errors, the closing lines."""

from __future__ import annotations

import argparse
import dataclasses

from ..settings import describe
from ..training.config import TrainSettings
from ._data_preview import write_preview
from ._terminal import add_verbosity, is_main_process, run

_EPILOG = """settings:
  Any setting of a recipe can be overridden by section.key=value, for example
    data.train=runs/labels  data.val=photos/val.json  optim.steps=500  optim.lr=1e-3  model.init=runs/pretrain
  docs/training.md says more. Without a recipe these defaults hold:

{settings}

recipes:
  YAML files of settings. --recipe can be given several times, the later one wins key by key, and words win
  over all of them; `base: NAME` (or a list) in a file names the recipes that it builds on. A name is a file, or
  a shipped recipe of uplvp_hf/training/recipes, for example
    --recipe one_gpu_pretrain --recipe parts/queryinst_r50
    --recipe paper/knet_coco10_finetune --recipe paper/init_densecl
"""


def run_training(stage: str, description: str, argv: list[str] | None) -> int:
    """Parses, trains, prints where the result is. Returns 0, or 2 with one line about what is wrong."""
    parser = argparse.ArgumentParser(
        prog=f"uplvp {stage}",
        description=description,
        epilog=_EPILOG.format(settings=describe(TrainSettings)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="section.key=value", help="settings, see below")
    add(
        "--recipe",
        action="append",
        default=[],
        help="YAML file, or the name of a shipped recipe; repeatable, later wins",
    )
    add("--output", help="folder for checkpoints and the model (default: runs/<stage>)")
    add("--seed", type=int, help="seed of everything random (default: 0)")
    add("--resume", action="store_true", help="continue from the newest checkpoint in the output")
    add(
        "--overfit-one-batch",
        action="store_true",
        help="train on the first batch only, to see that the loss can fall (default output: runs/<stage>-one-batch)",
    )
    add("--preview", metavar="FILE", help="write a sheet of augmented training samples there (.png, .jpg) and stop")
    add_verbosity(parser)
    arguments = parser.parse_intermixed_args(argv)  # settings and options in any order
    again = f"run the same command again{'' if arguments.resume else ' with --resume'} to go on"
    return run(stage, lambda: _train(stage, arguments), arguments.verbose, again)


def _train(stage: str, arguments: argparse.Namespace) -> None:
    from uplvp_hf.training.config import load_settings

    words = [*arguments.settings]
    words += [f"output={arguments.output}"] if arguments.output else []
    words += [f"seed={arguments.seed}"] if arguments.seed is not None else []
    words += ["overfit_one_batch=true"] if arguments.overfit_one_batch else []
    settings = load_settings(arguments.recipe, [*words, f"stage={stage}"], output=f"runs/{stage}")
    if arguments.overfit_one_batch and not arguments.output:  # the real run is to have its own folder free
        settings = dataclasses.replace(settings, output=f"{settings.output}-one-batch")
    if arguments.preview:
        if is_main_process():
            write_preview(settings, arguments.preview)
        return

    from uplvp_hf.training.loop import train
    from uplvp_hf.training.validation import shown

    result = train(settings, resume=arguments.resume, progress=not arguments.quiet)
    if not is_main_process():
        return
    for step, metrics in sorted(result.evaluations.items()):
        print(f"step {step}: {shown(metrics)}")
    which = f", of step {result.model_step}" if result.model_step != result.steps else ""
    print(f"{result.steps} steps in {result.seconds:.0f} s. Model{which}: {settings.output}")
