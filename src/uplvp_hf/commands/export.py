"""`uplvp export`: a trained model as ONNX, as a program of torch.export, or as transformers' own class."""

from __future__ import annotations

import argparse

from ..models.errors import UserError
from ._terminal import verb


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp export", description="A trained model for runtimes without this library; any number of images."
    )
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder of a trained model, or USER/NAME on the Hub")
    add("--output", metavar="DIR", required=True, help="for the graph, config.json and preprocessor_config.json")
    add(
        "--format",
        choices=("onnx", "torch", "native", "mask2former"),
        default="onnx",
        help="model.onnx (default), model.pt2 for torch.export.load, or native: a folder of transformers' own class "
        "(mask2former: the same, of a Mask2Former only)",
    )
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help="longer side of the resized images, or side of the window "
        "of a semantic segmenter (default: the processor's)",
    )
    add("--opset", type=int, help="operators of ONNX (default: 20)")
    add("--check", action="store_true", help="open the file anew and print its largest difference from the model")
    add("--verbose", action="store_true", help="also what the libraries say, and where in the code an error arose")
    return parser


def _export(arguments: argparse.Namespace) -> None:
    from uplvp_hf.evaluation import load_segmenter
    from uplvp_hf.evaluation.semantic import is_semantic_model, load_semantic
    from uplvp_hf.export.formats import OPSET, export_model

    if arguments.size is not None and arguments.size < 32:
        raise UserError(f"--size {arguments.size} is too small: at least 32 pixels.")
    if arguments.opset is not None and arguments.format != "onnx":
        raise UserError("--opset is for --format onnx.")
    load = load_semantic if is_semantic_model(arguments.model) else load_segmenter
    model, processor = load(arguments.model, "cpu")
    opset = OPSET if arguments.opset is None else arguments.opset
    done = export_model(
        model, processor, arguments.output, arguments.format, arguments.size, opset, check=arguments.check
    )
    if "canvas" in done:
        height, width = done["canvas"]
        print(f"{arguments.output}/{done['file']}: any number of images on {height} x {width}")
    else:
        print(f"{arguments.output}: loads as {done['class']}")
    for name, difference in done.get("largest_difference", {}).items():
        own = done["own_rounding"][name]
        print(f"  {name:22} differs by at most {difference:.1e}; the model from itself, rounded, by {own:.1e}")


main = verb("export", make_parser, _export)
