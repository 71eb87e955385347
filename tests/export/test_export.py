"""Exported models, opened anew, against the models: three segmenters, one and three pictures, with padding."""

import json
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
from uplvp_hf.export import TensorModel, canvas_of, check_batch, export_model
from uplvp_hf.inference import OnnxSegmenter, load, load_model
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation

CANVAS = (64, 96)
SEGMENTERS = ("mask2former", "knet", "queryinst")


@pytest.fixture(scope="session")
def make_model(tiny_segmenter):
    """make_model(segmenter, backbone): a tiny model with random weights, whose scores and masks differ."""

    def make(segmenter, backbone="resnet"):
        settings = tiny_segmenter(backbone, decoder_layers=2)
        if segmenter != "mask2former":
            own = {"knet": {"norm_groups": 8}, "queryinst": {"dynamic_channels": 8}}[segmenter]
            settings = {
                "model_type": segmenter, "backbone_config": settings["backbone_config"], "hidden_size": 32,
                "num_queries": 10, "num_attention_heads": 4, "intermediate_size": 48, "num_stages": 2, **own,
            }  # fmt: skip
        torch.manual_seed(0)
        config = UplvpConfig(id2label={0: "a", 1: "b"}, category_ids=[4, 8], segmenter_config=settings)
        return UplvpForInstanceSegmentation(config).eval()

    return make


@pytest.fixture
def processor():
    return UplvpImageProcessor(size={"height": CANVAS[0], "width": CANVAS[1]})


def difference(expected, found):
    """Largest over the outputs of |a - b| / max(1, |a|), pasted masks as probabilities, boxes by their largest end."""
    largest = 0.0
    assert list(expected) == list(found)
    for name in expected:
        a, b = (np.asarray(part[name].detach(), dtype=np.float64) for part in (expected, found))
        assert a.shape == b.shape
        if name == "masks_queries_logits" and "roi_mask_logits" in expected:
            a, b = 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(-b))
        size = np.abs(a).max(-1, keepdims=True) if name == "boxes" else np.abs(a)
        largest = max(largest, float((np.abs(a - b) / np.maximum(1, size)).max()))
    return largest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("segmenter", "backbone"), [("mask2former", "swin"), ("knet", "resnet"), ("queryinst", "resnet")]
)
def test_onnx_gives_what_the_model_gives(segmenter, backbone, make_model, processor, tmp_path):
    pytest.importorskip("onnxscript")
    model = make_model(segmenter, backbone)
    done = export_model(model, processor, tmp_path, "onnx", check=True)
    assert done["canvas"] == list(CANVAS) and done == json.loads((tmp_path / "export.json").read_text())
    exported = OnnxSegmenter.from_directory(tmp_path)
    assert exported.canvas == CANVAS and [i.name for i in exported.session.get_inputs()] == list(done["inputs"])
    for count, seed in ((1, 5), (3, 6), (2, 7)):
        pixel_values, pixel_mask = check_batch(count, CANVAS, seed)
        with torch.no_grad():
            expected = TensorModel(model)(pixel_values, pixel_mask)
        assert list(expected) == done["outputs"]
        found = exported(pixel_values, pixel_mask)
        assert difference(expected, {name: found[name] for name in expected}) < 1e-4
    # The mask counts: the same pixels without padding are another picture.
    other = exported(pixel_values)
    assert (other.class_queries_logits - found.class_queries_logits)[1].abs().max() > 1e-4
    assert max(done["largest_difference"].values()) < 1e-4
    assert list(done["own_rounding"]) == done["outputs"] and 0 < max(done["own_rounding"].values()) < 1e-3
    with pytest.raises(ValueError, match=r"exported at \(64, 96\)"):
        exported(torch.zeros(1, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_a_program_of_torch_export_in_a_fresh_process(segmenter, make_model, processor, tmp_path):
    """Loaded with torch alone: neither this library nor transformers is imported there."""
    model = make_model(segmenter)
    done = export_model(model, processor, tmp_path, "torch")
    expected, inputs = {}, {}
    for count in (1, 3):
        inputs[f"values{count}"], inputs[f"mask{count}"] = check_batch(count, CANVAS, count)
        with torch.no_grad():
            output = TensorModel(model)(inputs[f"values{count}"], inputs[f"mask{count}"])
        expected[count] = output
    save_file(inputs, tmp_path / "inputs.safetensors")
    # roi_align is an operator of torchvision, which registers it when it is imported.
    code = (
        f"import sys, torch{', torchvision' if segmenter == 'queryinst' else ''}"
        + """
from safetensors.torch import load_file, save_file
inputs = load_file(sys.argv[1] + "/inputs.safetensors")
run = torch.export.load(sys.argv[1] + "/model.pt2").module()
found = {}
for count in (1, 3):
    output = run(inputs[f"values{count}"], inputs[f"mask{count}"])
    found.update({f"{count} {name}": value.contiguous() for name, value in output.items()})
save_file(found, sys.argv[1] + "/found.safetensors")
print(sorted({name.partition(".")[0] for name in sys.modules} & {"uplvp_hf", "transformers"}))
"""
    )
    fresh = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd="/")
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.strip() == "[]"
    found = load_file(tmp_path / "found.safetensors")
    for count, output in expected.items():
        assert list(output) == done["outputs"]
        assert difference(output, {name: found[f"{count} {name}"] for name in output}) < 1e-5


@pytest.mark.slow
def test_predictions_of_an_exported_model_are_those_of_the_model(make_model, scenes_dir, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    model, data = make_model("queryinst"), load_dataset_rows(scenes_dir)
    model.save_pretrained(tmp_path / "model")
    UplvpImageProcessor(size={"longest_edge": 64}).save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--output", str(tmp_path / "onnx"), "--check"]
    assert export.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "on 64 x 64" in printed and "class_scores" in printed and "differs by at most" in printed
    pictures = [data.load_image(0), data.load_image(1).resize((50, 90)), data.load_image(2).resize((90, 30))]
    whole, exported = load(tmp_path / "model", "cpu"), load(tmp_path / "onnx", "cpu")
    assert isinstance(exported.model, OnnxSegmenter) and exported.names == {0: "a", 1: "b"}
    count = 0
    for ours, theirs in zip(whole.predict(pictures, threshold=0.0), exported.predict(pictures, threshold=0.0)):
        assert len(ours) == len(theirs) and ours.labels.tolist() == theirs.labels.tolist()
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-5, rtol=0)
        assert (ours.masks() != theirs.masks()).sum() <= 1e-3 * ours.masks().size
        count += len(ours)
    assert count > 3
    words = [str(tmp_path / "onnx"), str(scenes_dir / "images"), "--threshold", "0", "--no-overlays", "--quiet"]
    assert predict.main([*words, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(result["images"]) == 6 and [c["id"] for c in result["categories"]] == [4, 8]
    # the folder is exported into once more, but no model that was trained is written over
    assert export.main([*arguments, "--size", "32"]) == 0
    assert load_model(tmp_path / "onnx")[0].canvas == (32, 32)
    assert export.main([str(tmp_path / "model"), "--output", str(tmp_path / "model")]) == 2
    assert "would be lost" in capsys.readouterr().err


def test_native_mask2former(make_model, tmp_path, capsys):
    model = make_model("mask2former", "swin")
    model.save_pretrained(tmp_path / "model")
    UplvpImageProcessor(size={"longest_edge": 64}).save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), "--output", str(tmp_path / "plain"), "--format", "mask2former", "--check"]
    assert export.main(words) == 0
    assert "loads as Mask2FormerForUniversalSegmentation" in capsys.readouterr().out
    plain = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "plain").eval()
    assert Mask2FormerImageProcessor.from_pretrained(tmp_path / "plain").num_labels == 2
    pixel_values, pixel_mask = check_batch(1, (64, 64))
    with torch.no_grad():
        ours, theirs = model(pixel_values, pixel_mask), plain(pixel_values=pixel_values, pixel_mask=pixel_mask)
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
    described = json.loads((tmp_path / "plain" / "export.json").read_text())
    assert max(described["largest_difference"].values()) < 1e-5


def test_what_cannot_be_exported(make_model, processor, tmp_path, capsys):
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
def test_the_canvas_holds_every_picture(size, longest, canvas):
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
