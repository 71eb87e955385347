"""A query segmenter is one file and one line in `SEGMENTERS`: a toy one, added here so, goes through the whole path."""

import json
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.evaluation.predictor import load_segmenter, predict_dataset
from uplvp_hf.models.backbones import FeaturePyramid, build_backbone
from uplvp_hf.models.configuration_base import QuerySegmenterConfig
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.losses import LayerOutput, check_labels, dice_cost, dice_loss, focal_cost, sigmoid_focal_loss
from uplvp_hf.models.losses_knet import soft_targets
from uplvp_hf.models.matching import hungarian, pair_up
from uplvp_hf.models.modeling_base_uplvp import SEGMENTERS
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining
from uplvp_hf.models.query_segmenter import QuerySegmenter
from uplvp_hf.training.config import load_settings
from uplvp_hf.training.loop import train


# The new file: queries that attend to the coarsest map, and whose products with the finest one are masks.
@strict
class DotConfig(QuerySegmenterConfig):
    model_type = "dot"


@dataclass
class DotFeatures:
    map: Tensor
    prompt_map: Tensor
    pixel_mask: Tensor | None


class DotStage(nn.Module):
    def __init__(self, config: DotConfig):
        super().__init__()
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.filter = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, queries: Tensor, features: DotFeatures) -> LayerOutput:
        cells = features.prompt_map.flatten(2).transpose(1, 2)
        queries = self.norm(queries + self.attention(queries, cells, cells, need_weights=False)[0])
        masks = torch.einsum("bnd,bdhw->bnhw", self.filter(queries), features.map)
        return LayerOutput(self.classifier(queries), masks, queries)


class DotNetwork(nn.Module):
    def __init__(self, config: DotConfig):
        super().__init__()
        self.backbone = build_backbone(config.backbone_config)
        self.pyramid = FeaturePyramid(self.backbone.channels, config.hidden_size)
        self.queries = nn.Embedding(config.num_queries, config.hidden_size)
        self.stages = nn.ModuleList(DotStage(config) for _ in range(config.num_stages))

    def encode(self, pixel_values, pixel_mask=None) -> DotFeatures:
        maps = self.pyramid(self.backbone(pixel_values).feature_maps)
        return DotFeatures(maps[0], maps[-1], pixel_mask)

    def initial_queries(self, features: DotFeatures) -> Tensor:
        return self.queries.weight.expand(len(features.map), -1, -1)

    def decode(self, features, queries, inject=None, output_attentions=False) -> list[LayerOutput]:
        outputs = []
        for number, stage in enumerate(self.stages):
            if inject is not None and number > 0:
                queries = inject(queries, features, number)
            outputs.append(stage(queries, features))
            queries = outputs[-1].queries
        return outputs


class DotForInstanceSegmentation(QuerySegmenter, PreTrainedModel):
    config: DotConfig
    config_class = DotConfig
    base_model_prefix = "model"
    _no_split_modules = ["DotStage"]

    def __init__(self, config: DotConfig):
        super().__init__(config)
        self.model = DotNetwork(config)
        self.post_init()

    @property
    def class_sized(self) -> tuple[str, ...]:
        stages = range(self.num_stages)
        return tuple(f"model.stages.{stage}.classifier.{kind}" for stage in stages for kind in ("weight", "bias"))

    def loss(self, layers, features, mask_labels, class_labels, normalizers=None, draw=None, text_logits=None,
             label_guide=None):  # fmt: skip
        classes = torch.stack([layer.class_logits for layer in layers])  # (L, B, N, K)
        masks = torch.stack([layer.mask_logits for layer in layers])
        check_labels(class_labels, mask_labels, classes.shape[-1])
        targets = [soft_targets(mask.bool(), masks.shape[-2:]).flatten(1) for mask in mask_labels]
        costs = []
        for i, (target, labels) in enumerate(zip(targets, class_labels, strict=True)):
            probability = masks[:, i].detach().flatten(2).sigmoid()
            cost = dice_cost(probability, target) + focal_cost(classes[:, i].detach(), labels)
            costs.append(cost if label_guide is None else label_guide(cost, i))
        matches = hungarian(costs)
        pairs = pair_up(matches, [len(labels) for labels in class_labels], masks.device)
        known = None if normalizers is None else normalizers.masks
        divisor = max(pairs.query.shape[1], 1) if known is None else known
        wanted = torch.full(classes.shape[:3], classes.shape[-1], dtype=torch.int64)
        wanted[pairs.layer, pairs.image, pairs.query] = torch.cat(class_labels).long()[pairs.target]
        matched = masks[pairs.layer, pairs.image, pairs.query].flatten(2).sigmoid()  # (L, M, cells)
        terms = {
            "class": sigmoid_focal_loss(classes, wanted).sum((1, 2, 3)),
            "mask": dice_loss(matched, torch.cat(targets)[pairs.target]).sum(1),
        }
        return {f"{name}_{i}": value[i] / divisor for name, value in terms.items() for i in range(len(layers))}, matches


@pytest.fixture
def dot(monkeypatch, tiny_segmenter):
    """Settings of the new segmenter, which is known during the test."""
    AutoConfig.register("dot", DotConfig)  # the last line of the file
    monkeypatch.setitem(SEGMENTERS, "dot", DotForInstanceSegmentation)  # the line in `SEGMENTERS`
    backbone = tiny_segmenter("resnet")["backbone_config"]
    yield {"model_type": "dot", "backbone_config": backbone, "hidden_size": 32, "num_attention_heads": 4,
           "num_queries": 12, "num_stages": 2}  # fmt: skip
    CONFIG_MAPPING._extra_content.pop("dot")


def make(cls, segmenter, **settings):
    torch.manual_seed(0)
    return cls(UplvpConfig(segmenter_config=segmenter, id2label={0: "cat", 1: "dog", 2: "horse"}, **settings))


def test_prompts_enter_where_the_method_says(dot, make_batch):
    batch = make_batch(counts=(3, 0, 2))
    stages = []
    model = make(UplvpForPreTraining, dot).eval()

    def watch(queries, features, stage):
        stages.append(stage)
        return queries

    pixels = batch["pixel_values"]
    _, first, layers = model.segmenter.run(pixels, None, watch)
    assert stages == [0, 1] and first.shape == (3, 12, 32) and layers[-1].mask_logits.shape == (3, 12, 16, 24)
    assert torch.equal(model(pixels).masks_queries_logits, layers[-1].mask_logits)
    plain = model(**batch | {"prompt_scores": None})
    without = make(UplvpForPreTraining, dot, prompt_matching="none", kernel_supervision_weight=0.0).eval()(**batch)
    assert {"class_0", "mask_1", "kernel"} <= plain.losses.keys() and "kernel" not in without.losses
    assert not torch.equal(plain.class_queries_logits[0], without.class_queries_logits[0])
    assert torch.equal(plain.class_queries_logits[1], without.class_queries_logits[1])  # no masks, no prompts


def test_a_saved_model_goes_on_with_other_classes(dot, tmp_path):
    source = make(UplvpForPreTraining, dot)
    source.save_pretrained(tmp_path)
    model = UplvpForInstanceSegmentation.from_pretraining(str(tmp_path), id2label={0: "fox", 1: "dog"})
    mine, theirs = (m.segmenter.model.stages[1].classifier.weight for m in (model, source))
    assert mine.shape == (2, 32) and torch.equal(mine[1], theirs[1])
    assert torch.equal(model.segmenter.model.queries.weight, source.segmenter.model.queries.weight)


@pytest.mark.slow
def test_pretrain_finetune_and_predict(dot, scenes_dir, tmp_path):
    def run(stage, **model):
        defaults = {
            "stage": stage, "log_every": 1, "data": {"train": str(scenes_dir), "size": 64}, "model": model,
            "optim": {"steps": 12, "batch_size": 3, "lr": 3e-3, "warmup": 1},
        }  # fmt: skip
        train(load_settings(None, [f"output={tmp_path / stage}"], **defaults), progress=False)
        return [json.loads(line)["loss"] for line in (tmp_path / stage / "log.jsonl").read_text().splitlines()]

    losses = run("pretrain", segmenter=dot)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert run("finetune", init=str(tmp_path / "pretrain"))[0] < losses[0]
    dataset = load_dataset_rows(scenes_dir)
    found = list(predict_dataset(*load_segmenter(str(tmp_path / "finetune"), "cpu"), dataset, progress=False))
    assert [row["image_id"] for row, _ in found] == [row["image_id"] for row in dataset.rows]
    scores = [result["scores"].tolist() for _, result in found]
    assert any(scores) and all(own == sorted(own, reverse=True) for own in scores)
