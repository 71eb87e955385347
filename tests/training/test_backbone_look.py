"""A backbone is shown its images as its weights were trained to see them: by their own configuration, or refused."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from uplvp_hf.conversion.weights_look import weights_look
from uplvp_hf.models.errors import UserError
from uplvp_hf.training.backbone_weights import refuse_other_look
from uplvp_hf.training.build import with_image_settings
from uplvp_hf.training.config import ConfigError, load_settings

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture
def weights(tmp_path):
    """A file of weights with timm's configuration beside it, of a network with TensorFlow's padding."""
    own = {"architecture": "tf_some", "pretrained_cfg": {"mean": MEAN, "std": STD}}
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(json.dumps(own))
    return tmp_path / "w.safetensors"


def settings(weights, *words):
    return load_settings("small_finetune", [f"model.backbone_weights={weights}", *words])


def test_mean_deviation_and_padding_are_those_of_the_weights(weights):
    ready = with_image_settings(settings(weights))
    assert (ready.data.image_mean, ready.data.image_std) == (MEAN, STD)
    assert ready.model.segmenter["backbone_config"]["timm_kwargs"] == {"pad_type": "same"}
    assert with_image_settings(settings(weights, f"data.image_mean={MEAN}")) == ready  # the same, said twice


def test_metadata_say_it_too_and_weights_without_a_configuration_say_nothing(tmp_path):
    text = json.dumps({"mean": MEAN, "std": STD, "pad_type": "same"})
    save_file({"a": torch.zeros(1)}, tmp_path / "own.safetensors", metadata={"pretrained_cfg": text})
    assert weights_look(str(tmp_path / "own.safetensors")).pad_type == "same"
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    assert weights_look(str(tmp_path / "bare.safetensors")) is None
    assert with_image_settings(settings(tmp_path / "bare.safetensors")).data.image_mean == [0.485, 0.456, 0.406]
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    assert weights_look(str(tmp_path / "vit")).image_std == tuple(STD)
    (tmp_path / "bare.json").write_text('{"mean": [1, 2], "std": [1, 1, 1]}')
    with pytest.raises(UserError, match=r"bare\.json: `mean` must be three numbers, got \[1, 2\]"):
        weights_look(str(tmp_path / "bare.safetensors"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.image_mean=[0.5, 0.5, 0.5]", r"`data\.image_mean` is .*trained with \[0\.4, 0\.5, 0\.6\] \(.*w\.json\)"),
        ("data.image_std=[0.5, 0.5, 0.5]", r"`data\.image_std` is"),
        ("model.segmenter.backbone_config.timm_kwargs={pad_type: ''}", r"pad_type` is '', but .* 'same'"),
    ],
)
def test_a_mismatch_is_refused(weights, word, said):
    with pytest.raises(ConfigError, match=said):
        with_image_settings(settings(weights, word))


def test_labels_of_the_same_network_shown_otherwise_are_refused(weights, tmp_path):
    look = {"network": "timm:hf-hub:timm/mobilenetv2_100.ra_in1k", "image_mean": MEAN, "image_std": STD}
    header, ready = tmp_path / "header.json", with_image_settings(settings(weights, f"data.train={tmp_path}"))
    header.write_text(json.dumps({"look": {**look, "pad_type": "same"}}))
    refuse_other_look(ready)
    header.write_text(json.dumps({"look": {**look, "pad_type": ""}}))
    with pytest.raises(ConfigError, match=r"made by timm:.* with pad_type 'symmetric', but .* 'same'"):
        with_image_settings(settings(weights, f"data.train={tmp_path}"))
    header.write_text(json.dumps({"look": {**look, "network": "timm:resnet18", "pad_type": ""}}))
    refuse_other_look(ready)  # another network may see as it likes
    header.write_text("{}")
    refuse_other_look(ready)  # a store of an earlier release


def test_the_small_recipes_name_weights_whose_configuration_timm_ships():
    for recipe in ("small_pretrain", "small_finetune", "small_mask_rcnn_finetune", "small_teacher_finetune"):
        model = load_settings(recipe).model
        repository = model.backbone_weights.removeprefix("hf-hub:")
        own = timm.get_pretrained_cfg(repository.partition("/")[2])
        assert own.hf_hub_id == repository and own.license == "apache-2.0"
        backbone = model.segmenter["backbone_config"]
        assert own.architecture == backbone["backbone"] and "timm_kwargs" not in backbone
    tf = load_settings("small_tf_finetune", ["model.backbone_weights=some.safetensors"])
    assert tf.model.segmenter["backbone_config"]["timm_kwargs"] == {"pad_type": "same"}
    assert tf.model.segmenter["num_queries"] == load_settings("small_finetune").model.segmenter["num_queries"]
