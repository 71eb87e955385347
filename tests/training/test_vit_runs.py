"""Training runs of segmenters that are a ViT, and from the cached features of a frozen backbone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.evaluation.predictor import load_segmenter, predict_dataset
from uplvp_hf.models.backbones import build_backbone
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.training.config import ConfigError, OptimSettings, load_settings
from uplvp_hf.training.loop import train
from uplvp_hf.training.optim import parameter_groups

EOMT = {
    "model_type": "eomt", "hidden_size": 32, "num_hidden_layers": 3, "num_blocks": 2, "num_attention_heads": 4,
    "mlp_ratio": 2, "patch_size": 8, "num_upscale_blocks": 1, "num_register_tokens": 1, "num_queries": 12,
    "train_num_points": 64,
}  # fmt: skip
VIT = {
    "model_type": "dinov2_with_registers", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 16, "mlp_ratio": 2, "out_features": ["stage2"],
}  # fmt: skip
DECODER = {
    "model_type": "vit_mask_decoder", "backbone_config": VIT, "hidden_size": 32, "num_blocks": 2, "mlp_ratio": 2,
    "num_attention_heads": 4, "num_queries": 12, "train_num_points": 64,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, scenes_dir):
    """run(segmenter, name, *words) trains six updates on six scenes."""

    def go(segmenter, name, *words, resume=False, **sections):
        defaults = {
            "log_every": 1, "data": {"train": str(scenes_dir), "size": 64}, "model": {"segmenter": segmenter},
            "optim": {"steps": 6, "batch_size": 2, "lr": 1e-3, "warmup": 1}, "checkpoint": {"every": 3, "keep": 9},
        }  # fmt: skip
        for section, values in sections.items():
            defaults[section] |= values
        result = train(load_settings(None, [*words, f"output={tmp_path / name}"], **defaults), resume, progress=False)
        return tmp_path / name, result

    return go


@pytest.fixture
def vit_dir(tmp_path):
    torch.manual_seed(3)
    settings = {key: value for key, value in VIT.items() if key not in ("model_type", "out_features")}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings)).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_eomt_is_pretrained_finetuned_and_predicts(run, scenes_dir, tmp_path):
    """On a side that is no multiple of 32; masks are whole after pre-training and gone after fine-tuning."""
    words = ("data.size=72", "optim.layer_decay=0.5")
    folder, before = run(EOMT, "pretrain", "stage=pretrain", *words)
    assert before.model.segmenter.mask_shares() == [1, 1] and before.model.segmenter.config.image_size == 72
    tuned, result = run(None, "finetune", f"model.init={folder}", "data.size=80", "data.extra=null")
    assert result.model.segmenter.mask_shares() == [0, 0] and result.model.segmenter.config.image_size == 80
    assert torch.isfinite(torch.tensor(losses(folder) + losses(tuned))).all()
    model, processor = load_segmenter(str(tuned), "cpu")
    assert model.segmenter.mask_shares() == [0, 0] and processor.size_divisor == 8
    dataset = load_dataset_rows(scenes_dir)
    found = list(predict_dataset(model, processor, dataset, progress=False))
    assert [row["image_id"] for row, _ in found] == [row["image_id"] for row in dataset.rows]


def test_rates_fall_towards_the_embeddings(run):
    _, result = run(EOMT, "run", "optim.steps=1")
    model = result.model
    groups = parameter_groups(model, OptimSettings(lr=1.0, backbone_multiplier=1.0, layer_decay=0.5))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    segmenter = model.segmenter
    found = [rates[id(layer.mlp.fc1.weight)] for layer in segmenter.layers]
    assert found == [0.25, 0.5, 1.0] and rates[id(segmenter.embeddings.cls_token)] == 0.25
    assert rates[id(segmenter.query.weight)] == rates[id(segmenter.layernorm.weight)] == 1.0
    with pytest.raises(ConfigError, match="multiples of 8"):
        run(EOMT, "refused", "data.size=68")
    with pytest.raises(ConfigError, match=r"leave `data\.canvas`"):
        run(EOMT, "refused", "data.canvas=batch")


def test_only_a_vit_has_rates_by_depth(run, tiny_segmenter):
    with pytest.raises(ValueError, match=r"`optim\.layer_decay` is for the blocks of a ViT"):
        run(tiny_segmenter(), "run", "optim.layer_decay=0.5")


def test_cached_features_train_the_same_decoder(run, vit_dir, tmp_path):
    """The same views without a cache give the same losses, to the half precision of the files."""
    frozen = (f"model.backbone_weights={vit_dir}", "model.freeze_backbone=true", "data.cache_views=3", "optim.steps=9")
    plain, _ = run(DECODER, "plain", *frozen)
    folder, result = run(DECODER, "cached", *frozen, "data.cache_features=true")
    assert losses(folder) == pytest.approx(losses(plain), rel=2e-2)  # 9 steps of 2 of 6 images: 3 epochs, so 3 views
    (features,) = (folder / "features").iterdir()
    before = {path: path.stat().st_mtime_ns for path in features.iterdir()}
    tensors = {name: value for path in before for name, value in load_file(path).items()}
    assert {name.rsplit(".", 1)[0] for name in tensors} == {f"{i}.{v}" for i in range(6) for v in range(3)}
    vit = load_file(vit_dir / "model.safetensors")["embeddings.cls_token"]
    assert torch.equal(result.model.segmenter.backbone.embeddings.cls_token, vit)
    assert "forward" not in vars(result.model.segmenter.backbone)
    # Another run with the same folder computes nothing, and gives the same to the bit.
    words = ("data.cache_features=true", f"data.cache_folder={folder / 'features'}")
    again, _ = run(DECODER, "again", *frozen, *words)
    assert losses(again) == losses(folder)
    assert {path: path.stat().st_mtime_ns for path in features.iterdir()} == before
    # With a file that is broken or gone, what it held is computed once more.
    next(iter(before)).write_bytes(b"broken")
    repaired, _ = run(DECODER, "repaired", *frozen, *words)
    assert losses(repaired) == losses(folder)
    # Other augmentations have a folder of their own.
    run(DECODER, "other", *frozen, *words, "data.flip=0", "optim.steps=1")
    assert len(list((folder / "features").iterdir())) == 2


def test_a_cached_run_is_resumed_to_the_bit(run, vit_dir):
    words = (f"model.backbone_weights={vit_dir}", "model.freeze_backbone=true", "data.cache_features=true")
    whole, _ = run(DECODER, "whole", *words)
    for name in ("checkpoint-6", "model.safetensors", "training_summary.json"):
        path = whole / name
        if path.is_dir():
            for part in path.iterdir():
                part.unlink()
            path.rmdir()
        elif path.exists():
            path.unlink()
    expected = losses(whole)
    run(DECODER, "whole", *words, resume=True)
    assert losses(whole) == expected


def test_frozen_backbones_of_other_segmenters_can_be_cached(run, tiny_segmenter, tmp_path):
    """Padding is masked in what is cached as it is in `encode`."""
    torch.manual_seed(0)
    segmenter = tiny_segmenter()
    config = UplvpConfig(segmenter_config=segmenter, id2label={0: "a"}).segmenter_config
    backbone = build_backbone(config.backbone_config)
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    words = (f"model.backbone_weights={tmp_path / 'backbone.safetensors'}", "model.freeze_backbone=true")
    plain, _ = run(segmenter, "plain", *words)
    cached, _ = run(segmenter, "cached", *words, "data.cache_features=true")
    assert losses(cached) == pytest.approx(losses(plain), rel=2e-2)


@pytest.mark.parametrize(
    "segmenter, words, message",
    [
        (DECODER, (), "is for a frozen backbone"),
        (EOMT, (), "take `vit_mask_decoder`"),
        (DECODER, ("data.copy_paste=0.5",), "`data.copy_paste`"),
        (DECODER, ("model.freeze_backbone=true", "data.cache_gib=1e-6"), "more than `data.cache_gib"),
    ],
)
def test_what_cannot_be_cached(run, vit_dir, segmenter, words, message):
    weights = (f"model.backbone_weights={vit_dir}",) if segmenter is DECODER else ()
    with pytest.raises(ConfigError, match=message):
        run(segmenter, "run", "data.cache_features=true", *weights, *words)
