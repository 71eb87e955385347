"""K-Net (arXiv 2106.14855) for instance segmentation, in plain PyTorch: kernels that segment, updated in stages.

As all our query segmenters it works in three steps, encode -> initial_queries -> decode, so that UPLVP can change the
queries (the kernels) between the second and the third:

    backbone -> feature pyramid -> maps at stride 8 -> initial masks -> kernels that have seen their objects
    3 times: sum of the map under each mask -> gated update -> self-attention -> feed-forward -> class and new mask

With a full pixel mask, or none, the numbers are those of the original implementation on the same weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbones import FeaturePyramid, build_backbone
from .configuration_knet import KNetConfig
from .layers_knet import KernelHead, KNetStage, SemanticPyramid
from .losses import Normalizers
from .losses_knet import KNetLoss, KNetStageOutput, count_cells
from .padding import is_padded, padding_masked, upsample, valid_cells
from .query_segmenter import Inject, QueryNetwork, QuerySegmenter
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


class KNetPreTrainedModel(SavesItsCode, PreTrainedModel):
    """Initialization and loading, common to both models."""

    config: KNetConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["KNetStage"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, FeaturePyramid | SemanticPyramid | KernelHead | KNetStage):
            module.init_weights()


class KNetModel(QueryNetwork, KNetPreTrainedModel):
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
        inject: Inject | None = None,
        output_attentions: bool = False,
    ) -> list[KNetStageOutput]:
        """See `QueryNetwork.decode`."""
        masks, outputs = features.masks, []
        for number, stage in enumerate(self.stages):
            if inject is not None and number > 0:
                queries = inject(queries, features, number)
            # Positional: what a checkpointed stage gets by keyword is not tracked.
            classes, masks, queries, weights = stage(features.maps, masks, queries, features.valid, output_attentions)
            large = doubled(masks, features.pixel_mask)
            outputs.append(KNetStageOutput(classes, large, queries, weights, small_masks=masks))
        return outputs


class KNetForInstanceSegmentation(QuerySegmenter, KNetPreTrainedModel):
    """K-Net with its set loss, for training and inference on its own and as segmenter of UPLVP."""

    def __init__(self, config: KNetConfig):
        super().__init__(config)
        self.model = KNetModel(config)
        self.post_init()

    @property
    def class_sized(self) -> tuple[str, ...]:
        """Names of the tensors that have a row a class."""
        heads = ["model.kernel_head", *(f"model.stages.{stage}" for stage in range(self.num_stages))]
        return tuple(f"{head}.classifier.{kind}" for head in heads for kind in ("weight", "bias"))

    @property
    def fine_channels(self) -> int:
        return self.config.hidden_size

    def fine_map(self, features: KNetFeatures) -> Tensor:
        return features.maps

    @property
    def encoder(self) -> list[nn.Module]:
        return [self.backbone, self.model.pyramid, self.model.semantic_pyramid, self.model.kernel_head]

    @property
    def loss_function(self) -> KNetLoss:
        return KNetLoss(**{name: getattr(self.config, name) for name in KNetLoss.__dataclass_fields__})

    def normalizers(self, counts, most_targets, mask_labels=None) -> Normalizers:
        """As in `QuerySegmenter`; the divisor of the class maps needs the masks, and without them is that of each
        batch."""
        known = super().normalizers(counts, most_targets)
        if mask_labels is not None:
            known.cells = sum(count_cells(masks, self.config.semantic_targets) for masks in mask_labels)
        return known

    def loss(
        self, layers, features, mask_labels, class_labels, normalizers=None, draw=None, text_logits=None,
        label_guide=None, pseudo=None,
    ):  # fmt: skip
        """See `QuerySegmenter.loss` and `KNetLoss`. `draw` is not used: nothing is sampled."""
        maps = [doubled(map_, features.pixel_mask) for map_ in (features.masks, features.class_maps)]
        return self.loss_function(
            *maps, layers, mask_labels, class_labels, features.pixel_mask, normalizers, text_logits, label_guide, pseudo
        )


def doubled(maps: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Maps of stride 8 (B, C, h, w) -> stride 4 (B, C, 2h, 2w)."""
    return upsample(maps, (2 * maps.shape[-2], 2 * maps.shape[-1]), pixel_mask)
