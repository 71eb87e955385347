"""The `uplvp` command: one verb a stage. Dispatches, no logic; each verb also is a script for `accelerate launch`."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import tempfile

from .commands._terminal import FIRST_ERROR

VERBS = {
    "auto": "images and a few labels -> a model, a page, and why",
    "data": "a dataset -> what is in it, COCO JSON, low-data splits",
    "label": "images and class names -> pseudo labels",
    "pretrain": "pseudo labels -> pre-trained segmenter",
    "finetune": "a few labels -> fine-tuned segmenter",
    "fewshot": "classes from a few outlined examples, without training: train, draw, add, table",
    "evaluate": "model and labeled images -> COCO mask AP",
    "compare": "runs -> learning curves, and a table of mean and deviation over seeds",
    "predict": "model and images -> COCO results and overlays",
    "export": "model -> ONNX, torch.export, transformers' Mask2Former",
    "push": "model -> Hub",
    "convert": "checkpoint of another code base -> a folder that from_pretrained reads",
    "benchmark": "arms x seeds x segmenters: does pre-training pay with few labels?",
    "demo": "all of it on generated scenes, without data or network",
}
SHARED = ("label", "pretrain", "finetune", "fewshot", "evaluate")


def _usage() -> str:
    lines = [f"  {verb:10} {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: uplvp VERB [--processes N] [arguments]",
            "",
            *lines,
            "",
            "`uplvp VERB --help` shows the arguments of a verb. With --processes N, label, pretrain, finetune,",
            "fewshot train and evaluate share the work among N processes, one a GPU.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns its exit code: 0, or 2 for wrong arguments or unusable input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from uplvp_hf import __version__

        print(__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        print(f"uplvp: no verb `{verb}`." + (f" Did you mean `{near[0]}`?" if near else ""), file=sys.stderr)
        print(_usage(), file=sys.stderr)
        return 2
    if "--processes" in rest:
        return _launch(verb, rest)
    return importlib.import_module(f"uplvp_hf.commands.{verb}").main(rest)


def _launch(verb: str, rest: list[str]) -> int:
    """The verb in several processes, by torchrun; of what they have to say of an error, the first word is heard."""
    if verb not in SHARED:
        print(f"uplvp: {verb} runs in one process; --processes is for {', '.join(SHARED)}.", file=sys.stderr)
        return 2
    place = rest.index("--processes")
    count = rest[place + 1] if place + 1 < len(rest) else ""
    if not count.isdigit() or int(count) < 1:
        print("uplvp: --processes needs a number, such as --processes 8.", file=sys.stderr)
        return 2
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it would tell every failure over again
    words = ["--standalone", "--nproc_per_node", count, "-m", "uplvp_hf.cli", verb, *rest[:place], *rest[place + 2 :]]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FIRST_ERROR] = os.path.join(folder, "told")
        try:
            torchrun(words)
        except ChildFailedError as error:
            return abs(error.get_first_failure()[1].exitcode) or 1
        finally:
            del os.environ[FIRST_ERROR]
    return 0


if __name__ == "__main__":
    sys.exit(main())
