"""Exported models, opened anew, against the models: three segmenters, one and three images, with padding."""

import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from uplvp_hf.commands import evaluate, export, finetune, predict
from uplvp_hf.data import DataError, load_dataset_rows
from uplvp_hf.evaluation import load_segmenter
from uplvp_hf.export import TensorModel, canvas_of, check_batch, export_model, formats, trace
from uplvp_hf.inference import OnnxSegmenter, load
from uplvp_hf.models.configuration_mask_rcnn import MaskRcnnConfig
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.modeling_mask_rcnn import MaskRcnnForInstanceSegmentation
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation

CANVAS = (64, 96)
BACKBONES = {"mask2former": "swin", "knet": "resnet", "queryinst": "resnet"}
SEGMENTERS = tuple(BACKBONES)


@pytest.fixture(scope="module")
def make_model(tiny_segmenter):
    """make_model(segmenter, backbone): a tiny model with random weights, whose scores and masks differ."""

    def make(segmenter, backbone="resnet"):
        settings = tiny_segmenter(backbone, decoder_layers=2)
        if segmenter != "mask2former":
            own = {"knet": {"norm_groups": 8}, "queryinst": {"dynamic_channels": 8}}[segmenter]
            settings = {
                "model_type": segmenter, "backbone_config": settings["backbone_config"], "hidden_size": 32,
                "num_queries": 10, "num_attention_heads": 4, "intermediate_size": 48, "num_stages": 1, **own,
            }  # fmt: skip
        torch.manual_seed(0)
        config = UplvpConfig(id2label={0: "a", 1: "b"}, category_ids=[4, 8], segmenter_config=settings)
        return UplvpForInstanceSegmentation(config).eval()

    return make


@pytest.fixture
def processor():
    return UplvpImageProcessor(size={"height": CANVAS[0], "width": CANVAS[1]})


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory):
    """exported(segmenter): the model, the folder with its "model", "onnx" and "torch", and what the command printed.

    Each is exported once, and traced once for both formats: tracing and converting take many seconds.
    """

    @functools.cache
    def make(segmenter):
        model, folder = make_model(segmenter, BACKBONES[segmenter]), tmp_path_factory.mktemp(segmenter)
        model.save_pretrained(folder / "model")
        # QueryInst in the way that images of any shape go, with a size of its own for the export
        size = {"longest_edge": 96} if segmenter == "queryinst" else {"height": CANVAS[0], "width": CANVAS[1]}
        UplvpImageProcessor(size=size).save_pretrained(folder / "model")
        more = ["--size", "64"] if segmenter == "queryinst" else []
        program, printed = functools.cache(lambda canvas: trace(model, canvas)), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(formats, "trace", lambda _, canvas: program(canvas))
            for form in ("onnx", "torch"):
                words = [str(folder / "model"), "--output", str(folder / form), "--format", form, *more]
                assert export.main(words + (["--check"] if form == "onnx" else [])) == 0
        return model, folder, printed.getvalue()

    return make


def described(folder):
    return json.loads((folder / "export.json").read_text())


def difference(expected, found):
    """Largest over the outputs of max |a - b| / max(1, max |a|)."""
    largest = 0.0
    assert list(expected) == list(found)
    for name in expected:
        a, b = (np.asarray(part[name].detach(), dtype=np.float64) for part in (expected, found))
        assert a.shape == b.shape
        largest = max(largest, float(np.abs(a - b).max() / max(1, np.abs(a).max())))
    return largest


@pytest.mark.slow
@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_onnx_gives_what_the_model_gives(segmenter, exported):
    pytest.importorskip("onnxscript")
    model, folder, printed = exported(segmenter)
    done, session = described(folder / "onnx"), OnnxSegmenter.from_directory(folder / "onnx")
    canvas = (64, 64) if segmenter == "queryinst" else CANVAS
    assert tuple(done["canvas"]) == session.canvas == canvas and f"on {canvas[0]} x {canvas[1]}" in printed
    assert [i.name for i in session.session.get_inputs()] == list(done["inputs"])
    for count, seed in ((1, 5), (3, 6), (2, 7)):
        pixel_values, pixel_mask = check_batch(count, canvas, seed)
        with torch.no_grad():
            expected = TensorModel(model)(pixel_values, pixel_mask)
        assert list(expected) == done["outputs"]
        found = session(pixel_values, pixel_mask)
        assert difference(expected, {name: found[name] for name in expected}) < 1e-4
    # The mask counts: the same pixels without padding are another image.
    other = session(pixel_values)
    assert (other.class_queries_logits - found.class_queries_logits)[1].abs().max() > 1e-4
    assert max(done["largest_difference"].values()) < 1e-4
    assert list(done["own_rounding"]) == done["outputs"] and 0 < max(done["own_rounding"].values()) < 1e-3
    assert all(f"{name:22} differs by at most" in printed for name in done["outputs"])
    with pytest.raises(ValueError, match=rf"exported at \({canvas[0]}, {canvas[1]}\)"):
        session(torch.zeros(1, 3, 32, 32))


LOADED_ANEW = """
import sys, torch
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    if "queryinst" in folder:
        import torchvision  # roi_align is an operator of it, registered when it is imported
    inputs, found = load_file(folder + "/inputs.safetensors"), {}
    run = torch.export.load(folder + "/model.pt2").module()
    for count in (1, 3):
        output = run(inputs[f"values{count}"], inputs[f"mask{count}"])
        found.update({f"{count} {name}": value.contiguous() for name, value in output.items()})
    save_file(found, folder + "/found.safetensors")
print(sorted({name.partition(".")[0] for name in sys.modules} & {"uplvp_hf", "transformers"}))
"""


@pytest.mark.slow
def test_programs_of_torch_export_in_a_fresh_process(exported):
    """Loaded with torch alone: neither this library nor transformers is imported there.

    It gets as many threads as this process has, as sums depend on them.
    """
    folders, expected = [], {}
    for segmenter in SEGMENTERS:
        model, folder, _ = exported(segmenter)
        folders.append(folder / "torch")
        done, inputs = described(folders[-1]), {}
        for count in (1, 3):
            pixel_values, pixel_mask = check_batch(count, tuple(done["canvas"]), count)
            inputs |= {f"values{count}": pixel_values, f"mask{count}": pixel_mask}
            with torch.no_grad():
                expected[folders[-1], count] = TensorModel(model)(pixel_values, pixel_mask)
            assert list(expected[folders[-1], count]) == done["outputs"]
        save_file(inputs, folders[-1] / "inputs.safetensors")
    words = [sys.executable, "-c", LOADED_ANEW, *map(str, folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    fresh = subprocess.run(words, capture_output=True, text=True, cwd="/", env=environment)
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.strip() == "[]"
    for (folder, count), output in expected.items():
        found = load_file(folder / "found.safetensors")
        assert difference(output, {name: found[f"{count} {name}"] for name in output}) < 1e-5


@pytest.mark.slow
def test_predictions_of_an_exported_model_are_those_of_the_model(exported, scenes_dir, tmp_path):
    """QueryInst, whose images are padded to the canvas of the export by the image processor that was written."""
    pytest.importorskip("onnxscript")
    model, folder, _ = exported("queryinst")
    data = load_dataset_rows(scenes_dir)
    images = [data.load_image(0), data.load_image(1).resize((50, 90)), data.load_image(2).resize((90, 30))]
    runtime = load(folder / "onnx", "cpu")
    whole = type(runtime)(model, UplvpImageProcessor(size={"longest_edge": 64}))
    assert isinstance(runtime.model, OnnxSegmenter) and runtime.names == {0: "a", 1: "b"}
    count = 0
    for ours, theirs in zip(whole.predict(images, threshold=0.0), runtime.predict(images, threshold=0.0)):
        assert len(ours) == len(theirs) and ours.labels.tolist() == theirs.labels.tolist()
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-5, rtol=0)
        assert (ours.masks() != theirs.masks()).sum() <= 1e-3 * ours.masks().size
        count += len(ours)
    assert count > 3
    words = [str(folder / "onnx"), str(scenes_dir / "images"), "--threshold", "0", "--no-overlays", "--quiet"]
    assert predict.main([*words, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(result["images"]) == 6 and [c["id"] for c in result["categories"]] == [4, 8]


def test_native_mask2former(make_model, tmp_path, capsys):
    model = make_model("mask2former", "swin")
    model.save_pretrained(tmp_path / "model")
    UplvpImageProcessor(size={"longest_edge": 64}).save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), "--output", str(tmp_path / "plain"), "--format", "mask2former", "--check"]
    assert export.main(words) == 0
    said = capsys.readouterr()
    assert "loads as Mask2FormerForUniversalSegmentation" in said.out and "Comparing transformers' model" in said.err
    plain = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "plain").eval()
    assert Mask2FormerImageProcessor.from_pretrained(tmp_path / "plain").num_labels == 2
    pixel_values, pixel_mask = check_batch(1, (64, 64))
    with torch.no_grad():
        ours, theirs = model(pixel_values, pixel_mask), plain(pixel_values=pixel_values, pixel_mask=pixel_mask)
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
    assert max(described(tmp_path / "plain")["largest_difference"].values()) < 1e-5
    # an exported folder is exported into once more, but no model that was trained is written over
    assert export.main([*words[:-1], "--size", "32"]) == 0
    assert "largest_difference" not in described(tmp_path / "plain")
    assert export.main([words[0], "--output", words[0]]) == 2
    assert "would be lost" in capsys.readouterr().err


def test_what_cannot_be_exported(make_model, tiny_segmenter, processor, tmp_path, capsys):
    baseline = MaskRcnnForInstanceSegmentation(MaskRcnnConfig(backbone_config=tiny_segmenter()["backbone_config"]))
    for form in ("onnx", "torch", "mask2former"):
        with pytest.raises(ValueError, match="a `mask_rcnn` model cannot be exported"):
            export_model(baseline, processor, tmp_path / "a", form)
    with pytest.raises(ValueError, match="`knet` has no native class"):
        export_model(make_model("knet"), processor, tmp_path / "a", "mask2former")
    with pytest.raises(ValueError, match="format `tflite` is not known"):
        export_model(make_model("knet"), processor, tmp_path / "a", "tflite")
    with pytest.raises(ValueError, match="give --size"):
        export_model(make_model("knet"), UplvpImageProcessor(size={"shortest_edge": 64}), tmp_path / "a")
    with pytest.raises(ValueError, match="opset 11 is too old"):
        export_model(make_model("knet"), processor, tmp_path / "a", opset=11)
    assert not (tmp_path / "a").exists()
    words = [str(tmp_path), "--output", str(tmp_path / "a")]
    assert (
        export.main([*words, "--size", "8"]) == 2 and export.main([*words, "--format", "torch", "--opset", "18"]) == 2
    )
    assert export.main(words) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "at least 32" in errors[0] and "--opset" in errors[1] and "no config.json" in errors[2]


def test_folders_of_other_formats(make_model, tmp_path):
    model = make_model("knet")
    model.config.save_pretrained(tmp_path)
    UplvpImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "model.pt2").write_bytes(b"-")
    with pytest.raises(DataError, match=r"torch.export.load, or export with --format onnx"):
        load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ValueError, match=r"model.onnx cannot be run"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("size", "longest", "canvas"),
    [
        ({"longest_edge": 1000}, None, (1024, 1024)),
        ({"shortest_edge": 800, "longest_edge": 1333}, None, (1344, 1344)),
        ({"height": 480, "width": 641}, None, (480, 672)),
        ({"shortest_edge": 800}, 512, (512, 512)),
    ],
)
def test_the_canvas_holds_every_image(size, longest, canvas):
    processor = UplvpImageProcessor(size=size)
    assert canvas_of(processor, longest) == canvas
    if longest is None:
        for shape in ((30, 4), (4, 30), (20, 20)):
            inputs = processor(np.zeros((*shape, 3), dtype=np.uint8), return_tensors="pt")
            assert all(side <= limit for side, limit in zip(inputs["pixel_mask"].shape[-2:], canvas))


def test_weights_in_a_pickle_are_refused(tiny_model_dir, scenes_dir, tmp_path, capsys):
    """In every way in, and without opening it: the file here would make one if it were."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model.bin, a pickle.*uplvp convert"):
        load_segmenter(str(folder))
    data = str(scenes_dir)
    assert predict.main([str(folder), data, "--output", str(tmp_path / "out")]) == 2
    assert evaluate.main([str(folder), data]) == 2
    assert export.main([str(folder), "--output", str(tmp_path / "out")]) == 2
    words = ["--recipe", "small_finetune", f"data.train={data}", f"model.init={folder}", "--output"]
    assert finetune.main([*words, str(tmp_path / "run")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 4 and all("pytorch_model.bin" in line and "uplvp convert" in line for line in errors)
    assert not (tmp_path / "opened").exists()


def test_a_session_stays_where_and_what_it_is():
    """`predict_dataset` moves models and switches modes: that changes nothing of a session."""

    class Session:
        def get_inputs(self):
            return [SimpleNamespace(shape=["batch", 3, 64, 64])]

    segmenter = OnnxSegmenter(Session(), None)
    assert segmenter.to(torch.float16) is segmenter and next(segmenter.parameters()).dtype == torch.float32
    assert segmenter.canvas == (64, 64) and not segmenter.train(False).training
