"""QueryInst (arXiv 2105.01928): instances as queries, with dynamic box and mask heads, in pure PyTorch.

    maps    = pyramid(backbone(image))                                  encode
    queries, boxes = learned proposals                                    initial_queries
    every stage:  attended = norm(queries + self-attention(queries))      decode
                  queries  = feed-forward(norm(attended + dynamic convolution(attended, RoIAlign(maps, boxes))))
                  classes, boxes = predictors(queries)
                  masks    = mask head(attended, RoIAlign(maps, boxes))

Exact to the implementation in mmdetection 2.28 where there is no padding, or with `mask_padding=False`. The mask heads
run where their output is used: on the matched queries of every stage for the loss, on all queries of the last stage for
inference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization as init

from .backbones import FeaturePyramid, build_backbone
from .configuration_queryinst import QueryInstConfig
from .layers_queryinst import DynamicMaskHead, QueryInstStage, init_queryinst_weights
from .losses_queryinst import QueryInstLoss, QueryInstStageOutput
from .padding import extend_edges, is_padded, padding_masked
from .query_segmenter import Inject, QueryNetwork, QuerySegmenter
from .remote_code import SavesItsCode
from .roi import center_to_corners
from .roi_masks import paste_masks

# Masks on the whole image are given at a quarter of its resolution, as by the other segmenters.
MASK_STRIDE = 4
# Pasted probabilities become logits of at most this size, 13.8.
PROBABILITY_EPS = 1e-6


@dataclass
class QueryInstFeatures:
    """Everything before the queries.

    maps: pyramid levels, strides 4 to 32, (B, C, h, w) float32, edges of the images repeated over the padding;
    sizes (B, 2): height and width of every image in pixels; canvas: those of the padded input; padded: whether
    padding is to be masked; prompt_map (B, C, H/32, W/32): the map that prompts are pooled from (P5); pixel_mask as
    given.
    """

    maps: list[Tensor]
    sizes: Tensor
    canvas: tuple[int, int]
    padded: bool
    prompt_map: Tensor
    pixel_mask: Tensor | None


class QueryInstPreTrainedModel(SavesItsCode, PreTrainedModel):
    """Weights and loading, common to both models."""

    config: QueryInstConfig
    _supports_sdpa = True
    base_model_prefix = "model"
    _no_split_modules = ["QueryInstStage", "DynamicMaskHead"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_queryinst_weights(module, self.config.prior_probability)
        if isinstance(module, FeaturePyramid):
            module.init_weights()
        elif isinstance(module, QueryInstModel):
            # Every proposal starts as the whole image: center 0.5, 0.5 and sides 1, 1.
            start = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(self.config.num_queries, 4)
            init.copy_(module.proposal_boxes.weight, start)
            init.normal_(module.proposal_features.weight)


class QueryInstModel(QueryNetwork, QueryInstPreTrainedModel):
    """Backbone, pyramid, proposals and heads, without a loss."""

    def __init__(self, config: QueryInstConfig):
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        self.neck = FeaturePyramid(self.backbone.channels, config.hidden_size)
        self.proposal_boxes = nn.Embedding(config.num_queries, 4)  # center and sides, as shares of the image
        self.proposal_features = nn.Embedding(config.num_queries, config.hidden_size)
        self.stages = nn.ModuleList(QueryInstStage(config) for _ in range(config.num_stages))
        self.mask_heads = nn.ModuleList(DynamicMaskHead(config) for _ in range(config.num_stages))
        self.post_init()

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> QueryInstFeatures:
        """pixel_values (B, 3, H, W), H and W multiples of 32; pixel_mask (B, H, W) with 1 on the image."""
        batch, _, *canvas = pixel_values.shape
        masked = pixel_mask if self.config.mask_padding else None
        with padding_masked(self.backbone, masked):
            maps = self.backbone(pixel_values.to(self.dtype)).feature_maps
        with padding_masked(self.neck, masked):
            maps = self.neck(maps)
        if pixel_mask is None:
            sizes = pixel_values.new_tensor(canvas, dtype=torch.float32).expand(batch, 2)
        else:
            real = pixel_mask.bool()
            sizes = torch.stack([real[:, :, 0].sum(1), real[:, 0].sum(1)], 1).to(pixel_values.device).float()
        # RoIAlign computes in float32.
        pooled = [extend_edges(map_.float(), masked) for map_ in maps]
        return QueryInstFeatures(pooled, sizes, tuple(canvas), is_padded(masked), maps[-1], pixel_mask)

    def initial_queries(self, features: QueryInstFeatures) -> Tensor:
        """The learned proposal features, (B, N, D)."""
        return self.proposal_features.weight[None].expand(features.sizes.shape[0], -1, -1)

    def initial_boxes(self, features: QueryInstFeatures) -> Tensor:
        """The learned proposal boxes on every image, (B, N, 4) x1, y1, x2, y2 in pixels, float32."""
        factors = features.sizes.flip(1).repeat(1, 2)[:, None]  # width, height, width, height
        return center_to_corners(self.proposal_boxes.weight.float()) * factors

    def decode(
        self,
        features: QueryInstFeatures,
        queries: Tensor,
        inject: Inject | None = None,
        output_attentions: bool = False,
    ) -> list[QueryInstStageOutput]:
        """See `QueryNetwork.decode`. In evaluation mode the last output has masks."""
        boxes, layers = self.initial_boxes(features), []
        sizes = features.sizes if features.padded else None
        for index, stage in enumerate(self.stages):
            if inject is not None and index > 0:
                queries = inject(queries, features, index)
            class_logits, deltas, boxes, queries, attended, attentions = stage(
                queries, boxes, sizes, output_attentions, *features.maps
            )
            layers.append(
                QueryInstStageOutput(
                    class_logits, None, queries, attentions, boxes=boxes, deltas=deltas, attended=attended
                )
            )
            boxes = boxes.detach()
        if not self.training:
            self._add_masks(layers[-1], features)
        return layers

    def predict_masks(
        self, stage: int, layer: QueryInstStageOutput, features: QueryInstFeatures, image: Tensor, query: Tensor
    ) -> Tensor:
        """Mask logits (M, K, S, S) of chosen queries, (M,) each, within their detached boxes."""
        head = self.mask_heads[stage]
        if not torch.compiler.is_compiling() and len(query) == 0:
            # A zero that still touches the weights: no statistics can be taken over nothing.
            classes, side = head.class_masks.out_channels, 2 * self.config.mask_pool_size
            return layer.boxes.new_zeros((0, classes, side, side)) + sum(p.sum() for p in head.parameters()) * 0
        sizes = features.sizes if features.padded else None
        pooled = head.pooler(features.maps, layer.boxes[image, query], image, sizes)
        return head(pooled, layer.attended[image, query])

    def _add_masks(self, layer: QueryInstStageOutput, features: QueryInstFeatures) -> None:
        """Masks of every class and query, and those of the best class on the whole image."""
        batch, count, classes = layer.class_logits.shape
        device = layer.boxes.device
        image = torch.arange(batch, device=device)[:, None].expand(batch, count).flatten()
        query = torch.arange(count, device=device).expand(batch, count).flatten()
        logits = self.predict_masks(len(self.stages) - 1, layer, features, image, query)
        layer.roi_mask_logits = logits.view(batch, count, classes, *logits.shape[-2:])
        best = layer.class_logits.flatten(0, 1).argmax(-1)
        chosen = logits.gather(1, best[:, None, None, None].expand(-1, 1, *logits.shape[-2:]))[:, 0]
        size = tuple(-(-side // MASK_STRIDE) for side in features.canvas)
        pasted = paste_masks(chosen.float().sigmoid(), layer.boxes.flatten(0, 1) / MASK_STRIDE, size)
        layer.mask_logits = pasted.logit(PROBABILITY_EPS).view(batch, count, *size)


class QueryInstForInstanceSegmentation(QuerySegmenter, QueryInstPreTrainedModel):
    """QueryInst with its loss: alone, or as the segmenter of UPLVP."""

    def __init__(self, config: QueryInstConfig):
        super().__init__(config)
        self.model = QueryInstModel(config)
        self.post_init()

    @property
    def fine_channels(self) -> int:
        return self.config.hidden_size

    def fine_map(self, features: QueryInstFeatures) -> Tensor:
        return features.maps[1]

    @property
    def encoder(self) -> list[nn.Module]:
        return [self.backbone, self.model.neck]

    @property
    def loss_function(self) -> QueryInstLoss:
        return QueryInstLoss(**{name: getattr(self.config, name) for name in QueryInstLoss.__dataclass_fields__})

    @property
    def class_sized(self) -> tuple[str, ...]:
        """Names of the tensors with one row a class."""
        heads = [f"model.stages.{index}.class_predictor" for index in range(self.config.num_stages)]
        heads += [f"model.mask_heads.{index}.class_masks" for index in range(self.config.num_stages)]
        return tuple(f"{head}.{part}" for head in heads for part in ("weight", "bias"))

    def loss(
        self, layers, features, mask_labels, class_labels, normalizers=None, draw=None, text_logits=None,
        label_guide=None, pseudo=None,
    ):  # fmt: skip
        """See `QuerySegmenter.loss` and `QueryInstLoss`. `draw` is not used: nothing is sampled."""
        first = 0 if self.config.use_auxiliary_loss else len(layers) - 1
        supervised = layers[first:]

        def predict_masks(stage: int, image: Tensor, query: Tensor) -> Tensor:
            return self.model.predict_masks(first + stage, supervised[stage], features, image, query)

        canvas = features.sizes.new_tensor(features.canvas).expand_as(features.sizes)
        return self.loss_function(
            supervised,
            features.sizes,
            features.sizes if features.padded else canvas,
            mask_labels,
            class_labels,
            predict_masks,
            normalizers,
            None if text_logits is None else text_logits[first:],
            label_guide,
            pseudo,
        )
