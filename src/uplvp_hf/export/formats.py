"""Writes an exported model to one folder: the graph, the classes, the image processor and what is needed to run it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uplvp_hf.files import replacing, write_json, writing

from ..models.errors import UserError
from .check import largest_differences, own_rounding
from .graph_file import DESCRIPTION, FILES, save_program
from .native import native_class, our_names, to_native
from .program import INPUTS, OUTPUTS, canvas_of, trace
from .semantic import export_semantic

# Operators of ONNX that the graphs are written in: the first with all that the three segmenters need, as torch has it.
OPSET = 20
MIN_OPSET = 18  # of torch's exporter
FORMATS = tuple(FILES)
logger = logging.getLogger(__name__)


def export_model(
    model: nn.Module,
    processor: Any,
    directory: str | os.PathLike[str],
    form: str = "onnx",
    longest_edge: int | None = None,
    opset: int = OPSET,
    check: bool = False,
) -> dict[str, Any]:
    """Writes `model` and its image processor to a folder, for a runtime.

    onnx: `model.onnx`, for onnxruntime; also `uplvp predict` and `inference.load` read the folder. torch: `model.pt2`,
    for `torch.export.load`. Both take any number of images on a fixed canvas; the image processor that is written
    pads every image to it. native: a plain directory of transformers; mask2former: the same, of a Mask2Former only.

    Args:
        model: a `UplvpForInstanceSegmentation`, or an `IcpcForSemanticSegmentation` (see `export_semantic`); it is put
            into evaluation mode, float32, on the CPU.
        processor: its image processor.
        directory: made if needed. A folder with a model that was not exported is refused.
        form: one of `FORMATS`.
        longest_edge: pixels; images are scaled so that their longer side has them, in place of the processor's size.
        opset: of ONNX.
        check: also compare the file that was written, opened anew, with the model (`largest_differences`), and that
            with itself (`own_rounding`).

    Returns the content of `export.json`: format, file, canvas, inputs, outputs, versions, and differences if checked.
    Raises UserError for an unknown format, for a model that the format cannot hold, or for a folder that is in use.
    """
    directory = Path(directory)
    _check(model, directory, form, opset)
    model = model.eval().float().cpu()
    if model.config.model_type == "icpc":
        return export_semantic(model, processor, directory, form, longest_edge, opset, check)
    if form in ("native", "mask2former"):
        return _write_native(model, processor, directory, form, longest_edge, check)
    canvas = canvas_of(processor, longest_edge)
    logger.info("Tracing the model on %d x %d pixels ...", *canvas)
    program = trace(model, canvas)
    _write_settings(model, processor, directory, canvas, longest_edge)
    file = directory / FILES[form]
    logger.info("Writing %s ...", file)
    with replacing(file, "wb") as stream, writing(file):
        save_program(program, stream, form, opset, INPUTS, _output_names(program))
    versions = {"torch": torch.__version__} if form == "torch" else {"torch": torch.__version__, "opset": opset}
    shape = [None, *canvas]
    description = {
        "format": form,
        "file": FILES[form],
        "canvas": list(canvas),
        "inputs": dict(zip(INPUTS, ([None, 3, *canvas], shape), strict=True)),
        "outputs": [name for name in OUTPUTS if name in _output_names(program)],
        **versions,
    }
    if check:
        logger.info("Opening %s anew and comparing it with the model ...", file)
        description["largest_difference"] = largest_differences(model, _runner(file), canvas)
        description["own_rounding"] = own_rounding(model, canvas)
    write_json(directory / DESCRIPTION, description)
    return description


def _check(model: nn.Module, directory: Path, form: str, opset: int) -> None:
    if form not in FILES:
        raise UserError(f"format `{form}` is not known; known are {', '.join(FORMATS)}.")
    kind = model.config.model_type
    if kind not in ("uplvp", "icpc"):  # Mask R-CNN: the number of its boxes depends on the image
        raise UserError(
            f"a `{kind}` model cannot be exported, only a `uplvp` one (Mask2Former, K-Net, QueryInst) or an `icpc` one."
        )
    if kind == "icpc" and form in ("native", "mask2former"):
        raise UserError(
            "an `icpc` model gives classes of pixels, and transformers has no class of its own that does what it does: "
            "choose onnx or torch, or load it with AutoModelForSemanticSegmentation."
        )
    if opset < MIN_OPSET:
        raise UserError(f"opset {opset} is too old: torch writes {MIN_OPSET} and later.")
    if (directory / "config.json").is_file() and not (directory / DESCRIPTION).is_file():
        raise UserError(f"{directory} holds a model that was not exported, which would be lost: name another folder.")


def _write_settings(
    model: nn.Module, processor: Any, directory: Path, canvas: tuple[int, int], longest_edge: int | None
) -> None:
    """config.json, which has the classes, and an image processor that pads to the canvas."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {**processor.to_dict(), "pad_size": {"height": canvas[0], "width": canvas[1]}, "do_pad": True}
    if longest_edge is not None:
        settings["size"] = {"longest_edge": longest_edge}
    with writing(directory / "config.json"):
        model.config.save_pretrained(directory)
    with writing(directory / "preprocessor_config.json"):
        type(processor).from_dict(settings).save_pretrained(directory)


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    return list(program.call_spec.out_spec.context)


def _runner(file: Path):
    """The exported file, opened anew, as a function of pixel_values and pixel_mask."""
    if file.suffix == ".onnx":
        from uplvp_hf.inference.onnx_runtime import open_session, run_session

        session = open_session(file)
        return lambda pixel_values, pixel_mask: run_session(session, pixel_values, pixel_mask)
    return torch.export.load(file).module()


def _write_native(
    model: nn.Module, processor: Any, directory: Path, form: str, longest_edge: int | None, check: bool
) -> dict[str, Any]:
    """transformers' own class and image processor; on images without padding it gives the same outputs."""
    name = model.config.segmenter_config.model_type
    native = native_class(name)
    if form not in ("native", name):
        raise UserError(f"The model is a `{name}`, which cannot be written as a `{form}`: take the format `native`.")
    if longest_edge is not None:
        processor = type(processor).from_dict({**processor.to_dict(), "size": {"longest_edge": longest_edge}})
    with tempfile.TemporaryDirectory() as draft:  # refused models leave nothing behind
        to_native(model, draft, processor)
        directory.mkdir(parents=True, exist_ok=True)
        for name in sorted(os.listdir(draft)):
            with replacing(directory / name, "wb") as stream:
                stream.write(Path(draft, name).read_bytes())
    description = {
        "format": form,
        "file": FILES[form],
        "class": native.__name__,
        "transformers": metadata.version("transformers"),
    }
    if check:
        logger.info("Comparing transformers' model with ours ...")
        description["largest_difference"] = _compare_with_transformers(model, processor, directory)
        description["own_rounding"] = own_rounding(model, canvas_of(processor))
    write_json(directory / DESCRIPTION, description)
    return description


def _compare_with_transformers(model: nn.Module, processor: Any, directory: Path) -> dict[str, float]:
    """`largest_differences` on an image without padding; transformers' class lets padding take part."""
    name = model.config.segmenter_config.model_type
    plain = native_class(name).from_pretrained(directory).eval()

    def run(pixel_values: Tensor, pixel_mask: Tensor) -> Mapping[str, Tensor]:
        masked = {} if name.startswith("eomt") else {"pixel_mask": pixel_mask}
        return our_names(plain(pixel_values=pixel_values, **masked), pixel_values.shape[-2:])

    return largest_differences(model, run, canvas_of(processor), batches=(1,))
