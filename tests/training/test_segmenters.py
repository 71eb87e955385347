"""Training runs of K-Net and QueryInst, with the settings of the method that the other runs leave alone."""

import json

import pytest
import torch
from pycocotools import mask as coco_mask
from safetensors.torch import load_file

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.text_embeddings import write_text_matrix
from uplvp_hf.evaluation.predictor import load_segmenter, predict_dataset
from uplvp_hf.hub.card import build_card
from uplvp_hf.models.modeling_uplvp import UplvpForPreTraining
from uplvp_hf.training import loop
from uplvp_hf.training.build import build_model
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.loop import train

SEGMENTERS = {
    "knet": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "norm_groups": 8, "num_stages": 2},
    "queryinst": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "dynamic_channels": 8, "num_stages": 2,
        "num_mask_layers": 1, "finest_scale": 14,
    },
}  # fmt: skip


@pytest.fixture(params=list(SEGMENTERS))
def run(request, tmp_path, scenes_dir, tiny_segmenter):
    """run(name, *words) trains six updates on six scenes of 64 px into tmp_path/name."""
    backbone = tiny_segmenter("resnet")["backbone_config"]
    segmenter = {
        "model_type": request.param,
        "backbone_config": backbone,
        "num_queries": 12,
        **SEGMENTERS[request.param],
    }

    def go(name="run", *words, resume=False, start=train, **sections):
        defaults = {
            "stage": "pretrain",
            "log_every": 1,
            "data": {"train": str(scenes_dir), "size": 64},
            "model": {"segmenter": segmenter, **sections.get("model", {})},
            "optim": {"steps": 6, "batch_size": 2, "lr": 1e-3, "warmup": 1, **sections.get("optim", {})},
            "checkpoint": {"every": 2, "keep": 9, "stay": True},
        }
        settings = load_settings(None, [*words, f"output={tmp_path / name}"], **defaults)
        return start(settings, resume=resume, progress=False) if start is train else start(settings)

    go.segmenter = request.param
    return go


def text_file(folder, names, channels=16):
    file = folder / "text.safetensors"
    features = torch.randn(len(names), channels, generator=torch.Generator().manual_seed(0))
    write_text_matrix(file, features, list(names))
    return str(file)


@pytest.mark.slow
def test_a_guided_run_with_text_stopped_and_resumed_equals_uninterrupted(run, tmp_path, scenes_dir, monkeypatch):
    """The curriculum goes on where it was: progress is a function of the step."""
    names = load_dataset_rows(scenes_dir).id2label.values()
    method = {
        "prompt_matching": "hungarian", "prompt_injection": "concat", "guidance_epochs": 1.5,
        "kernel_supervision_weight": 1.0, "text_features": text_file(tmp_path, names),
    }  # fmt: skip
    epochs, inner = [], UplvpForPreTraining.set_progress
    monkeypatch.setattr(UplvpForPreTraining, "set_progress", lambda self, e: (epochs.append(e), inner(self, e))[1])
    run("whole", model=method)
    assert epochs == pytest.approx([2 * step / 6 for step in range(6)])
    update = loop._Run._update

    def interrupted(self, step, batches):
        if step == 3:
            raise KeyboardInterrupt
        return update(self, step, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("parts", model=method)
    run("parts", model=method, resume=True)
    for file in ("model.safetensors", "log.jsonl", "checkpoint-4/optimizer.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert {"kernel", "class_0", "text_class_0", "mask_1"} <= line.keys()
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert weights["text_heads.text_features"].shape == (len(names), 16)


@pytest.mark.slow
def test_from_pretraining_to_predictions_and_card(run, tmp_path, scenes_dir):
    run("pre")
    result = run(
        "fine", "stage=finetune", f"model.init={tmp_path / 'pre'}", f"data.val={scenes_dir}", "optim.steps=2",
        "model.class_head=remap",
    )  # fmt: skip
    report = result.model.transfer_report
    assert not report.reinitialized and len(report.kept) > 100 and report.remapped
    assert set(result.evaluations) == {2} and 0 <= result.evaluations[2]["AP"] <= 1
    model, processor = load_segmenter(str(tmp_path / "fine"), "cpu")
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 64))
    found = processor.post_process_instance_segmentation(output, threshold=0.0, top_k=5)[0]
    assert len(found["scores"]) <= 5 and found["masks"].shape[1:] == (64, 64)
    rows, pixels = load_dataset_rows(scenes_dir), []
    for bound in (0.3, 0.7):
        results = predict_dataset(model, processor, rows, progress=False, mask_threshold=bound)
        pixels.append(sum(coco_mask.area(rle) for _, result in results for rle in result["rle"]))
    assert pixels[0] > pixels[1]  # the lower the bound, the larger the masks
    card = str(build_card(tmp_path / "fine", "user/name", "apache-2.0"))
    assert f"An instance segmenter ({run.segmenter})" in card and f"- {run.segmenter}" in card


def test_settings_of_the_method_reach_the_model(run, tmp_path, scenes_dir):
    names = list(load_dataset_rows(scenes_dir).id2label.values())

    def build(settings):
        return build_model(settings, load_dataset_rows(scenes_dir))

    given = {"prompt_injection": "every_stage", "prompt_slots": 20, "guidance_start": 0.3}
    config = run(start=build, model={**given, "text_features": text_file(tmp_path, names)}).config
    assert all(getattr(config, name) == value for name, value in given.items())
    assert config.text_dim == 16 and config.text_classes == names
    assert config.prompt_drop == (0.1 if run.segmenter == "knet" else 0.05)
    with pytest.raises(ConfigError, match="No text feature for the classes"):
        run(start=build, model={"text_features": text_file(tmp_path, ["nothing"])})
    with pytest.raises(ConfigError, match="no such file"):
        run(start=build, model={"text_features": str(tmp_path / "missing.safetensors")})
    with pytest.raises(ConfigError, match=r"model.segmenter.hidden_sise.*Did you mean `model.segmenter.hidden_size`"):
        run("x", "model.segmenter.hidden_sise=4", start=build)
