"""Which parameters of a backbone are trained, and which modules keep their statistics."""

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetBackbone, ResNetConfig, SwinBackbone, SwinConfig

from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation
from uplvp_hf.training.config import ConfigError, ModelSettings, load_settings
from uplvp_hf.training.freezing import freeze_backbone, freeze_stages, freeze_unused, training_mode


def resnet(**options):
    stages = {"hidden_sizes": [8, 16, 24, 40], "depths": [2, 1, 1, 1], "embedding_size": 8, "layer_type": "basic"}
    return ResNetBackbone(ResNetConfig(**stages, out_features=["stage1", "stage2", "stage3", "stage4"], **options))


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_stem_and_the_first_stages_of_a_resnet(stages):
    backbone = resnet()
    frozen = freeze_stages(backbone, stages, 64)
    prefixes = ("embedder.", *(f"encoder.stages.{k}." for k in range(stages)))
    assert frozen == [name for name, _ in backbone.named_parameters() if name.startswith(prefixes)]
    assert frozen == [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]


def test_the_stem_and_the_first_stage_of_a_swin():
    config = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    backbone = SwinBackbone(config)
    frozen = freeze_stages(backbone, 1, 64)
    assert all("embeddings" in n or "layers.0.blocks" in n or "norms.stage1" in n for n in frozen)
    assert any("embeddings" in n for n in frozen) and any("layers.0.blocks" in n for n in frozen)
    assert not any("downsample" in n for n in frozen)  # it belongs to the second stage


def test_timm_stages_count_from_the_stem():
    from transformers import TimmBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone="resnet18", use_pretrained_backbone=False, out_indices=[1, 2, 3, 4])
    backbone = TimmBackbone(config)
    frozen = freeze_stages(backbone, 1, 64)
    assert {name.removeprefix("_backbone.").split(".")[0] for name in frozen} == {"conv1", "bn1", "layer1"}


def test_a_stage_without_a_map_is_refused():
    backbone = ResNetBackbone(ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], out_features=["stage2"]))
    with pytest.raises(ConfigError, match=r"freeze_stages=1.*maps stage2"):
        freeze_backbone(backbone, ModelSettings(freeze_stages=1), 64)


def test_what_no_map_needs_is_frozen_besides():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 2, 1), nn.Linear(2, 2)

        def forward(self, pixels):
            return type("Output", (), {"feature_maps": (self.used(pixels),)})

    backbone = Backbone()
    assert freeze_unused(backbone, 32) == ["unused.weight", "unused.bias"] and freeze_unused(backbone, 32) == []
    backbone.requires_grad_(False)
    assert freeze_unused(backbone, 32) == []


def norms_in_training(model) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def test_norms_of_frozen_parts_keep_their_statistics(tiny_segmenter):
    model = UplvpForInstanceSegmentation(UplvpConfig(segmenter_config=tiny_segmenter("resnet"), id2label={0: "a"}))
    backbone = model.segmenter.backbone
    training_mode(model, freeze_norm=False)
    assert model.training and all(norms_in_training(backbone).values())
    freeze_stages(backbone, 2, 64)
    training_mode(model, freeze_norm=False)
    found = norms_in_training(backbone)
    prefixes = ("embedder.", "encoder.stages.0.", "encoder.stages.1.")
    assert len(found) > 6 and all(on is not name.startswith(prefixes) for name, on in found.items())
    assert not backbone.encoder.stages[0].training and backbone.encoder.stages[2].training  # drop path too
    training_mode(model, freeze_norm=True)
    assert not any(norms_in_training(backbone).values())
    assert all(module.training for module in model.segmenter.modules() if isinstance(module, nn.Dropout))
    backbone.requires_grad_(False)
    training_mode(model, freeze_norm=False)
    assert not backbone.training and model.training


def test_frozen_stages_and_statistics_in_a_run(run, recipe, tiny_segmenter, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["segmenter"] = tiny_segmenter("resnet")
    recipe.write_text(yaml.safe_dump(settings))
    model = UplvpForInstanceSegmentation(UplvpConfig(segmenter_config=tiny_segmenter("resnet"), id2label={0: "a"}))
    start = {name: value.clone() for name, value in model.segmenter.backbone.state_dict().items()}
    save_file(start, tmp_path / "weights.safetensors")
    words = [f"model.backbone_weights={tmp_path / 'weights.safetensors'}", "optim.steps=2", "optim.weight_decay=0.5"]

    def moved(*more):
        state = run("-".join(more), *words, *more).model.segmenter.backbone.state_dict()
        return {name for name, value in state.items() if not torch.equal(value, start[name])}

    frozen = moved("model.freeze_stages=1")
    assert frozen and not any(name.startswith(("embedder.", "encoder.stages.0.")) for name in frozen)
    assert any("stages.1." in n and "running_mean" in n for n in frozen)
    norms = moved("model.freeze_backbone_norm=true")
    assert any("stages.1." in n and "normalization.weight" in n for n in norms)
    assert not any("running" in name or "num_batches" in name for name in norms)


def test_frozen_random_stages_are_refused(run):
    with pytest.raises(ConfigError, match=r"`model\.freeze_stages` would freeze a randomly initialized"):
        run("run", "model.freeze_stages=1")
    with pytest.raises(ConfigError, match=r"model\.freeze_stages"):
        load_settings(None, ["model.freeze_stages=-1"])
