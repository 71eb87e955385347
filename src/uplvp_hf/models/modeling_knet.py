"""K-Net (arXiv 2106.14855) for instance segmentation, in plain PyTorch: kernels that segment, updated in stages.

As all our query segmenters it works in three steps, encode -> initial_queries -> decode, so that UPLVP can change the
queries (the kernels) between the second and the third:

    backbone -> feature pyramid -> maps at stride 8 -> initial masks -> kernels that have seen their objects
    3 times: sum of the map under each mask -> gated update -> self-attention -> feed-forward -> class and new mask

With a full pixel mask, or none, the numbers are those of the original implementation on the same weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .backbones import build_backbone
from .configuration_knet import KNetConfig
from .errors import UserError
from .fpn import FeaturePyramid
from .losses import Draw, Normalizers
from .losses_knet import KNetLoss, KNetStageOutput, count_cells
from .matching import LabelGuide
from .modules_knet import KernelHead, KNetStage, SemanticPyramid
from .padding import is_padded, padding_masked, upsample, valid_cells
from .remote_code import SavesItsCode


@dataclass
class KNetFeatures:
    """Everything before the kernels are updated; prompts change nothing of it.

    maps (B, D, h, w) at stride 8; masks (B, N, h, w): initial mask logits; class_maps (B, K, h, w): class logits of
    every cell; kernels (B, N, D), with the features of their objects added; valid (B, h, w) bool, cells of the
    images, or None; pyramid: P2 to P5; prompt_map (B, D, H/32, W/32): P5, which prompts are pooled from; pixel_mask
    as given.
    """

    maps: Tensor
    masks: Tensor
    class_maps: Tensor
    kernels: Tensor
    valid: Tensor | None
    pyramid: list[Tensor]
    prompt_map: Tensor
    pixel_mask: Tensor | None


@dataclass
class KNetModelOutput(ModelOutput):
    """Output of [`KNetModel`].

    class_queries_logits (B, N, K), one sigmoid a class, no "no object"; masks_queries_logits (B, N, H/4, W/4) on the
    padded input; queries (B, N, D): of the last stage. auxiliary_logits: the first two of the earlier stages.
    class_maps_logits (B, K, H/8, W/8) and initial_masks_logits (B, N, H/8, W/8): of the kernel head. hidden_states:
    the kernels that enter the first stage and those after each; attentions: (B, heads, N, N) a stage; where asked for.
    """

    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    queries: Tensor | None = None
    class_maps_logits: Tensor | None = None
    initial_masks_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class KNetForInstanceSegmentationOutput(ModelOutput):
    """Output of [`KNetForInstanceSegmentation`]: that of [`KNetModel`] and, with labels, the loss.

    loss: scalar, the sum of `losses`, weighted terms by name. class_scores (B, N, K): sigmoids of
    class_queries_logits; scores of instances are these, masks are not rated.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    class_queries_logits: Tensor | None = None
    class_scores: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    queries: Tensor | None = None
    class_maps_logits: Tensor | None = None
    initial_masks_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class KNetPreTrainedModel(SavesItsCode, PreTrainedModel):
    """Initialization and loading, common to both models."""

    config: KNetConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["KNetStage"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, FeaturePyramid | SemanticPyramid | KernelHead | KNetStage):
            module.init_weights()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: all our initialization goes through `transformers.initialization`.

        For custom code, transformers leaves out the initialization that a module without weights of its own does for
        its children, when they are missing from a checkpoint.
        """
        return False


class KNetModel(KNetPreTrainedModel):
    """The network, without loss: `encode`, `initial_queries`, `decode`."""

    def __init__(self, config: KNetConfig):
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        self.pyramid = FeaturePyramid(self.backbone.channels, config.hidden_size)
        self.semantic_pyramid = SemanticPyramid(config)
        self.kernel_head = KernelHead(config)
        self.stages = nn.ModuleList(KNetStage(config) for _ in range(config.num_stages))
        self.post_init()

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> KNetFeatures:
        """pixel_values (B, 3, H, W), H and W multiples of 32; pixel_mask (B, H, W) with 1 on the image."""
        pixel_values = pixel_values.to(self.kernel_head.kernels.weight.dtype)
        with padding_masked(self, pixel_mask):
            pyramid = self.pyramid(self.backbone(pixel_values).feature_maps)
            localization, semantic = self.semantic_pyramid(pyramid, pixel_mask)
            valid = None
            if is_padded(pixel_mask):
                valid = valid_cells(pixel_mask, localization.shape[-2:]).to(localization.device)
            maps, masks, class_maps, kernels = self.kernel_head(localization, semantic, valid)
        return KNetFeatures(maps, masks, class_maps, kernels, valid, pyramid, pyramid[-1], pixel_mask)

    def initial_queries(self, features: KNetFeatures) -> Tensor:
        """Learned kernels plus the features under their initial masks, (B, N, D)."""
        return features.kernels

    def decode(
        self,
        features: KNetFeatures,
        queries: Tensor,
        inject: Callable[[Tensor, int], Tensor] | None = None,
        output_attentions: bool = False,
    ) -> list[KNetStageOutput]:
        """Updates queries (B, N, D) stage by stage. `inject(queries, stage)` replaces those that enter a stage."""
        masks, outputs = features.masks, []
        for number, stage in enumerate(self.stages):
            if inject is not None:
                queries = inject(queries, number)
            # Positional: what a checkpointed stage gets by keyword is not tracked.
            classes, masks, queries, weights = stage(features.maps, masks, queries, features.valid, output_attentions)
            large = doubled(masks, features.pixel_mask)
            outputs.append(KNetStageOutput(classes, large, queries, small_masks=masks, attentions=weights))
        return outputs

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> KNetModelOutput | tuple:
        """pixel_values (B, 3, H, W), H and W multiples of 32; pixel_mask (B, H, W), 1 on the image, 0 on padding."""
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features = self.encode(pixel_values, pixel_mask)
        queries = self.initial_queries(features)
        layers = self.decode(features, queries, output_attentions=bool(attentions))
        output = KNetModelOutput(**describe(features, queries, layers, hidden, attentions))
        return output.to_tuple() if _wants_tuple(return_dict, self.config) else output


class KNetForInstanceSegmentation(KNetPreTrainedModel):
    """K-Net with its set loss, for training and inference on its own and as segmenter of UPLVP."""

    def __init__(self, config: KNetConfig):
        super().__init__(config)
        self.model = KNetModel(config)
        self.post_init()

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone

    @property
    def prompt_channels(self) -> int:
        """Channels of the map that prompts are pooled from."""
        return self.config.hidden_size

    @property
    def query_channels(self) -> int:
        return self.config.hidden_size

    @property
    def num_stages(self) -> int:
        return self.config.num_stages

    @property
    def class_sized(self) -> tuple[str, ...]:
        """Names of the tensors that have a row a class."""
        heads = ["model.kernel_head", *(f"model.stages.{stage}" for stage in range(self.num_stages))]
        return tuple(f"{head}.classifier.{kind}" for head in heads for kind in ("weight", "bias"))

    @property
    def loss_function(self) -> KNetLoss:
        return KNetLoss(**{name: getattr(self.config, name) for name in KNetLoss.__dataclass_fields__})

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> KNetFeatures:
        """See `KNetModel.encode`."""
        return self.model.encode(pixel_values, pixel_mask)

    def initial_queries(self, features: KNetFeatures) -> Tensor:
        """See `KNetModel.initial_queries`."""
        return self.model.initial_queries(features)

    def decode(self, features: KNetFeatures, queries: Tensor, inject=None, output_attentions: bool = False):
        """See `KNetModel.decode`."""
        return self.model.decode(features, queries, inject, output_attentions)

    def normalizers(self, counts: list[int], num_prompts: int, mask_labels: list[Tensor] | None = None) -> Normalizers:
        """Divisors of the loss terms for images with `counts` masks each, before any forward pass.

        That of the class maps needs the masks too, per image (G, H, W) bool: without them it is that of each batch.
        Plain counts, which may be 0: the training loop averages them over processes before it keeps them at least 1.
        """
        queries = self.config.num_queries
        pairs = sum(min(count, queries, num_prompts) for count in counts) * self.num_stages
        cells = None
        if mask_labels is not None:
            cells = sum(count_cells(masks, self.config.semantic_targets) for masks in mask_labels)
        positives = sum(min(count, queries) for count in counts)
        return Normalizers(masks=positives, pairs=pairs, cells=cells)

    def loss(
        self,
        layers: list[KNetStageOutput],
        features: KNetFeatures,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        text_logits: list[Tensor] | None = None,
        label_guide: LabelGuide | None = None,
    ) -> tuple[dict[str, Tensor], list[list[tuple[Tensor, Tensor]]]]:
        """Weighted loss terms by name, and the assignment that supervises each stage. See `KNetLoss`.

        `draw` is not used: nothing is sampled.
        """
        return self.loss_function(
            doubled(features.masks, features.pixel_mask),
            doubled(features.class_maps, features.pixel_mask),
            layers,
            mask_labels,
            class_labels,
            features.pixel_mask,
            normalizers,
            text_logits,
            label_guide,
        )

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> KNetForInstanceSegmentationOutput | tuple:
        """
        pixel_values (B, 3, H, W), H and W multiples of 32; pixel_mask (B, H, W), 1 on the image, 0 on padding;
        mask_labels: per image (G, H, W) bool at the padded input size; class_labels: per image (G,) int in 0..K-1.
        """
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features = self.encode(pixel_values, pixel_mask)
        queries = self.initial_queries(features)
        layers = self.decode(features, queries, output_attentions=bool(attentions))
        losses = None
        if mask_labels is not None:
            if class_labels is None:
                raise UserError("mask_labels need class_labels beside them.")
            losses, _ = self.loss(layers, features, mask_labels, class_labels, normalizers, draw)
        output = KNetForInstanceSegmentationOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            losses=losses,
            class_scores=layers[-1].class_logits.float().sigmoid(),
            **describe(features, queries, layers, hidden, attentions),
        )
        return output.to_tuple() if _wants_tuple(return_dict, self.config) else output


def doubled(maps: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Maps of stride 8 (B, C, h, w) -> stride 4 (B, C, 2h, 2w)."""
    return upsample(maps, (2 * maps.shape[-2], 2 * maps.shape[-1]), pixel_mask)


def describe(
    features: KNetFeatures, queries: Tensor, layers: list[KNetStageOutput], hidden: bool | None, attentions: bool | None
) -> dict:
    """Fields of `KNetModelOutput`. queries: those that entered the first stage."""
    logits = [
        {"class_queries_logits": layer.class_logits, "masks_queries_logits": layer.mask_logits} for layer in layers
    ]
    return {
        **logits[-1],
        "auxiliary_logits": logits[:-1],
        "queries": layers[-1].queries,
        "class_maps_logits": features.class_maps,
        "initial_masks_logits": features.masks,
        "hidden_states": (queries, *(layer.queries for layer in layers)) if hidden else None,
        "attentions": tuple(layer.attentions for layer in layers) if attentions else None,
    }


def _wants_tuple(return_dict: bool | None, config: KNetConfig) -> bool:
    return (config.return_dict if return_dict is None else return_dict) is False


__all__ = ["KNetForInstanceSegmentation", "KNetModel", "KNetPreTrainedModel"]
