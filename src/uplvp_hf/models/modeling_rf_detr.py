"""RF-DETR's instance segmenter as a query segmenter: transformers' own class and forward, tapped at its decoder.

The features that prompts are pooled from are born inside the native forward, right before the decoder. So `run` goes
through it once; only with `inject` there are hooks on the decoder, which may change the queries. Without them this is
the native model, bit for bit. In training it has several groups of queries, each of which is matched with all masks.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import RfDetrConfig, RfDetrForInstanceSegmentation
from transformers.image_transforms import center_to_corners_format

from .errors import UserError
from .losses import Normalizers
from .losses_rf_detr import RfDetrLayerOutput, RfDetrLoss
from .query_blocks import eager_attention
from .query_segmenter import Inject, QuerySegmenter
from .vit_weights import freeze_mask_token


@dataclass
class RfDetrFeatures:
    """prompt_map (B, D, h, w): what the decoder attends to; extents (B, 2): width and height in pixels of the canvas
    that boxes are shares of; proposals: predictions of the encoder; pixel_values and pixel_mask as given."""

    prompt_map: Tensor
    pixel_mask: Tensor | None
    pixel_values: Tensor | None = None
    extents: Tensor | None = None
    proposals: RfDetrLayerOutput | None = None


class RfDetrSegmenter(QuerySegmenter, RfDetrForInstanceSegmentation):
    """Padding is masked in the decoder, not in the ViT: predictions depend on the canvas, and there is a square one.

    Gradient checkpointing needs `use_reentrant=False`, transformers' default: features reach the decoder by keyword.
    """

    config: RfDetrConfig
    shares_class_head = True
    square_canvas = True
    _no_split_modules = ["RfDetrDecoderLayer", "RfDetrDinov2Layer"]

    def __init__(self, config: RfDetrConfig):
        super().__init__(config)
        freeze_mask_token(self.backbone)

    @classmethod
    def from_pretrained(cls, name_or_dir, *args, **kwargs):
        """As of transformers, whose class it is read by: checkpoints have other names than the model, and transformers
        knows which by the name of the class."""
        loaded: Any = RfDetrForInstanceSegmentation.from_pretrained(name_or_dir, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.__class__ = cls  # which adds methods only
        freeze_mask_token(model.backbone)
        return loaded

    @property
    def backbone(self) -> nn.Module:
        return self.model.model.backbone.backbone

    @property
    def query_channels(self) -> int:
        return self.config.d_model

    @property
    def num_stages(self) -> int:
        return self.config.decoder_layers

    @property
    def groups(self) -> int:
        return self.config.group_detr if self.training else 1

    @property
    def size_divisor(self) -> int:
        backbone = self.config.backbone_config
        return math.lcm(backbone.patch_size * backbone.num_windows, 4)

    @property
    def class_sized(self) -> tuple[str, ...]:
        encoder = [f"model.model.enc_out_class_embed.{group}" for group in range(self.config.group_detr)]
        return tuple(f"{head}.{kind}" for head in ("model.class_embed", *encoder) for kind in ("weight", "bias"))

    def vit_layers(self) -> tuple[nn.Module, list[nn.Module]]:
        return self.backbone.embeddings, list(self.backbone.encoder.layer)

    # ---- the three steps, as views of one call ----

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> RfDetrFeatures:
        return self.run(pixel_values, pixel_mask)[0]

    def initial_queries(self, features: RfDetrFeatures) -> Tensor:
        weight = self.model.model.query_feat.weight[: self.groups * self.config.num_queries]
        return weight[None].expand(len(features.prompt_map), -1, -1)

    def decode(self, features, queries, inject: Inject | None = None, output_attentions: bool = False):
        def replace(own: Tensor, features: RfDetrFeatures, stage: int) -> Tensor:
            if stage == 0:
                return queries
            return own if inject is None else inject(own, features, stage)

        return self.run(features.pixel_values, features.pixel_mask, replace, output_attentions)[2]

    def run(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        inject: Inject | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[RfDetrFeatures, Tensor, list[RfDetrLayerOutput]]:
        self.check_sides(pixel_values)
        wanted = self.wants("output_attentions", output_attentions)
        tap = _Tap(inject, pixel_mask)
        hooks = tap.on(self.model.model.decoder) if inject is not None else []
        try:
            with eager_attention(self.config) if wanted else nullcontext():  # the others do not return their weights
                found = self.model.model(
                    pixel_values.to(self.dtype), pixel_mask=pixel_mask, output_attentions=wanted, return_dict=True
                )
        finally:
            for hook in hooks:
                hook.remove()
        features = RfDetrFeatures(found.backbone_features, pixel_mask, pixel_values)
        features.extents = _extents(pixel_mask, pixel_values, found.backbone_features)
        queries = self.initial_queries(features) if tap.queries is None else tap.queries
        layers, features.proposals = self._predict(found, features, pixel_values.shape[-2:])
        for layer, weights in zip(layers, found.attentions or ()):
            layer.attentions = weights
        return features, queries, layers

    def _predict(self, found, features: RfDetrFeatures, size) -> tuple[list[RfDetrLayerOutput], RfDetrLayerOutput]:
        """The heads of the native forward, for every decoder layer and for the encoder's proposals."""
        references, layers = found.intermediate_reference_points[-1], []
        masks = self.segmentation_head(found.backbone_features, found.intermediate_hidden_states, size)
        for hidden, own in zip(found.intermediate_hidden_states, masks, strict=True):
            # One by one, as the native forward does for the last: other shapes round otherwise.
            logits, boxes = self.model.predict_class_and_boxes(hidden, references)
            layers.append(self._output(logits, own, hidden, boxes, features))
        proposed = found.enc_outputs_class
        class_logits = self.model.predict_encoder_class_logits(proposed)
        masks = self.segmentation_head(found.backbone_features, proposed, size, skip_blocks=True)
        return layers, self._output(class_logits, masks, proposed, found.enc_outputs_coord_logits, features)

    def _output(self, logits, masks, queries, relative, features: RfDetrFeatures) -> RfDetrLayerOutput:
        pixels = center_to_corners_format(relative.float()) * features.extents.repeat(1, 2)[:, None]
        return RfDetrLayerOutput(logits, masks, queries, boxes=pixels, relative=relative)

    # ---- loss ----

    @property
    def loss_function(self) -> RfDetrLoss:
        config = self.config
        return RfDetrLoss(
            class_weight=config.class_loss_coefficient,
            box_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            mask_weight=config.mask_class_loss_coefficient,
            dice_weight=config.mask_dice_loss_coefficient,
            class_cost=config.class_cost,
            box_cost=config.bbox_cost,
            giou_cost=config.giou_cost,
            alpha=config.focal_alpha,
            cells_per_point=config.mask_point_sample_ratio,
        )

    def normalizers(self, counts, most_targets, mask_labels=None) -> Normalizers:
        """As in `QuerySegmenter`, for all groups; the terms are divided by all true masks."""
        known = super().normalizers(counts, most_targets)
        return Normalizers(masks=sum(counts) * self.groups, pairs=known.pairs * self.groups)

    def loss(
        self, layers, features, mask_labels, class_labels, normalizers=None, draw=None, text_logits=None,
        label_guide=None, pseudo=None,
    ):  # fmt: skip
        """See `QuerySegmenter.loss` and `RfDetrLoss`."""
        if pseudo is not None:
            raise UserError(
                "Teacher-student training is not offered for an RF-DETR: its groups have no pseudo targets."
            )
        return self.loss_function(
            layers, features.proposals, features.extents, self.groups, mask_labels, class_labels, normalizers, draw,
            text_logits, label_guide,
        )  # fmt: skip


class _Tap:
    """Hooks on the native decoder and its layers that let `inject` change the queries."""

    def __init__(self, inject: Inject | None, pixel_mask: Tensor | None):
        self.inject, self.pixel_mask = inject, pixel_mask
        self.features: RfDetrFeatures | None = None
        self.queries: Tensor | None = None

    def on(self, decoder: nn.Module) -> list:
        hooks = [decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)]
        for stage, layer in enumerate(decoder.layers[1:], start=1):
            hooks.append(layer.register_forward_pre_hook(partial(self._before_layer, stage)))
        return hooks

    def _before_decoder(self, module: nn.Module, given: tuple, options: dict) -> tuple[tuple, dict]:
        tokens, shape = options["encoder_hidden_states"], tuple(options["spatial_shapes_list"][0])
        self.features = RfDetrFeatures(tokens.transpose(1, 2).unflatten(2, shape), self.pixel_mask)
        self.queries = self.inject(options["inputs_embeds"], self.features, 0)
        return given, {**options, "inputs_embeds": self.queries}

    def _before_layer(self, stage: int, module: nn.Module, given: tuple) -> tuple:
        return (self.inject(given[0], self.features, stage), *given[1:])


def _extents(pixel_mask: Tensor | None, pixel_values: Tensor, features: Tensor) -> Tensor:
    """Width and height (B, 2) of the images in pixels, rounded to cells of the features as the native model does."""
    (height, width), (rows, columns) = pixel_values.shape[-2:], features.shape[-2:]
    if pixel_mask is None:
        return torch.tensor([width, height], dtype=torch.float32, device=features.device).expand(len(features), 2)
    cells = F.interpolate(pixel_mask[None].float(), size=(rows, columns))[0].bool()
    shown = torch.stack([cells[:, 0].sum(1), cells[:, :, 0].sum(1)], 1).float()
    return shown * torch.tensor([width / columns, height / rows], device=features.device)
