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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .backbones import build_backbone
from .configuration_queryinst import QueryInstConfig
from .errors import UserError
from .fpn import FeaturePyramid
from .layers_queryinst import DynamicMaskHead, QueryInstStage, init_queryinst_weights
from .losses import Draw, Normalizers
from .losses_queryinst import QueryInstLoss, QueryInstStageOutput
from .matching import LabelGuide
from .padding import extend_edges, is_padded, padding_masked
from .remote_code import SavesItsCode
from .roi import center_to_corners
from .roi_masks import paste_masks

# (queries (B, N, D), stage) -> queries, before the stage.
Inject = Callable[[Tensor, int], Tensor]
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


@dataclass
class QueryInstModelOutput(ModelOutput):
    """Output of [`QueryInstModel`]: B images, N queries, S stages, K classes.

    last_hidden_state (B, N, D): queries after the last stage; class_logits (S, B, N, K) of sigmoids; boxes
    (S, B, N, 4) x1, y1, x2, y2 in pixels of the padded input; roi_mask_logits (B, N, K, s, s) within the boxes of the
    last stage, in evaluation mode only; hidden_states: queries before the first stage and after each; attentions: per
    stage (B, heads, N, N).
    """

    last_hidden_state: Tensor | None = None
    class_logits: Tensor | None = None
    boxes: Tensor | None = None
    roi_mask_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QueryInstForInstanceSegmentationOutput(ModelOutput):
    """Output of [`QueryInstForInstanceSegmentation`]: B images, N queries, K classes, last stage unless said.

    loss: scalar, the sum of `losses`, with labels only; losses: weighted terms by name. class_queries_logits (B, N, K)
    of sigmoids, there is no "no object"; class_scores (B, N, K): their sigmoid, the final scores. boxes (B, N, 4) x1,
    y1, x2, y2 in pixels of the padded input, which they may exceed. In evaluation mode: roi_mask_logits
    (B, N, K, 28, 28), masks of every class within the boxes (to be pasted with `paste_masks`), and masks_queries_logits
    (B, N, H/4, W/4), those of the best class pasted on the padded input, -13.8 outside the box. auxiliary_logits:
    class_queries_logits and boxes of the earlier stages. queries (B, N, D); hidden_states: queries before the first
    stage and after each; attentions: self-attention weights per stage (B, heads, N, N).
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    class_queries_logits: Tensor | None = None
    class_scores: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    boxes: Tensor | None = None
    roi_mask_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    queries: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class QueryInstPreTrainedModel(SavesItsCode, PreTrainedModel):
    """Weights and loading, common to both models."""

    config: QueryInstConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
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

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: all our initialization goes through `transformers.initialization`, so transformers may initialize
        what is missing from a checkpoint module by module."""
        return False


class QueryInstModel(QueryInstPreTrainedModel):
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
        """One output per stage from queries (B, N, D). In evaluation mode the last one has masks.

        `inject` changes the queries at the start of every stage.
        """
        boxes, layers = self.initial_boxes(features), []
        sizes = features.sizes if features.padded else None
        for index, stage in enumerate(self.stages):
            if inject is not None:
                queries = inject(queries, index)
            class_logits, deltas, boxes, queries, attended, attentions = stage(
                queries, boxes, sizes, output_attentions, *features.maps
            )
            layers.append(QueryInstStageOutput(class_logits, None, queries, boxes, deltas, attended, attentions))
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

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> QueryInstModelOutput | tuple:
        """pixel_values (B, 3, H, W), H and W multiples of 32; pixel_mask (B, H, W), 1 on the image."""
        features = self.encode(pixel_values, pixel_mask)
        queries = self.initial_queries(features)
        layers = self.decode(features, queries, output_attentions=_asked(self, "output_attentions", output_attentions))
        output = QueryInstModelOutput(
            last_hidden_state=layers[-1].queries,
            class_logits=torch.stack([layer.class_logits for layer in layers]),
            boxes=torch.stack([layer.boxes for layer in layers]),
            roi_mask_logits=layers[-1].roi_mask_logits,
            **_extras(self, queries, layers, output_hidden_states, output_attentions),
        )
        return output if _asked(self, "return_dict", return_dict) else output.to_tuple()


class QueryInstForInstanceSegmentation(QueryInstPreTrainedModel):
    """QueryInst with its loss: alone, or as the segmenter of UPLVP."""

    def __init__(self, config: QueryInstConfig):
        super().__init__(config)
        self.model = QueryInstModel(config)
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
        """Names of the tensors with one row a class."""
        heads = [f"model.stages.{index}.class_predictor" for index in range(self.config.num_stages)]
        heads += [f"model.mask_heads.{index}.class_masks" for index in range(self.config.num_stages)]
        return tuple(f"{head}.{part}" for head in heads for part in ("weight", "bias"))

    @property
    def loss_function(self) -> QueryInstLoss:
        return QueryInstLoss(**{name: getattr(self.config, name) for name in QueryInstLoss.__dataclass_fields__})

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> QueryInstFeatures:
        """See `QueryInstModel.encode`."""
        return self.model.encode(pixel_values, pixel_mask)

    def initial_queries(self, features: QueryInstFeatures) -> Tensor:
        """See `QueryInstModel.initial_queries`."""
        return self.model.initial_queries(features)

    def decode(self, features: QueryInstFeatures, queries: Tensor, inject=None, output_attentions: bool = False):
        """See `QueryInstModel.decode`."""
        return self.model.decode(features, queries, inject, output_attentions)

    def normalizers(self, counts: list[int], num_prompts: int, mask_labels: list[Tensor] | None = None) -> Normalizers:
        """Divisors of the loss terms for images with `counts` masks each, before any forward pass.

        `mask_labels` is not used: the numbers suffice.
        """
        stages = self.config.num_stages if self.config.use_auxiliary_loss else 1
        matched = [min(count, self.config.num_queries) for count in counts]
        return Normalizers(masks=sum(matched), pairs=sum(min(count, num_prompts) for count in matched) * stages)

    def loss(
        self,
        layers: list[QueryInstStageOutput],
        features: QueryInstFeatures,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        text_logits: list[Tensor] | None = None,
        label_guide: LabelGuide | None = None,
    ):
        """Weighted loss terms by name, and the assignments of every supervised stage. See `QueryInstLoss`.

        `draw` is not used: nothing is sampled.
        """
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
        )

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        normalizers: Normalizers | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> QueryInstForInstanceSegmentationOutput | tuple:
        """
        pixel_values (B, 3, H, W), H and W multiples of 32; pixel_mask (B, H, W), 1 on the image, 0 on padding;
        mask_labels: per image (G, H, W) bool at the padded input size; class_labels: per image (G,) int in 0..K-1.
        `normalizers` is for the training loop. Raises UserError for labels that do not fit the masks or the classes.
        """
        features = self.encode(pixel_values, pixel_mask)
        queries = self.initial_queries(features)
        layers = self.decode(features, queries, output_attentions=_asked(self, "output_attentions", output_attentions))
        losses = None
        if mask_labels is not None:
            if class_labels is None:
                raise UserError("mask_labels need class_labels beside them.")
            losses, _ = self.loss(layers, features, mask_labels, class_labels, normalizers)
        last = layers[-1]
        output = QueryInstForInstanceSegmentationOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            losses=losses,
            class_queries_logits=last.class_logits,
            class_scores=last.class_logits.float().sigmoid(),
            masks_queries_logits=last.mask_logits,
            boxes=last.boxes,
            roi_mask_logits=last.roi_mask_logits,
            auxiliary_logits=[
                {"class_queries_logits": layer.class_logits, "boxes": layer.boxes} for layer in layers[:-1]
            ],
            queries=last.queries,
            **_extras(self, queries, layers, output_hidden_states, output_attentions),
        )
        return output if _asked(self, "return_dict", return_dict) else output.to_tuple()


def _asked(model: PreTrainedModel, name: str, value: bool | None) -> bool:
    return getattr(model.config, name) if value is None else value


def _extras(model, queries: Tensor, layers: list, hidden_states: bool | None, attentions: bool | None) -> dict:
    """Hidden states and attention weights, as far as asked for."""
    extras = {}
    if _asked(model, "output_hidden_states", hidden_states):
        extras["hidden_states"] = (queries, *(layer.queries for layer in layers))
    if _asked(model, "output_attentions", attentions):
        extras["attentions"] = tuple(layer.attentions for layer in layers)
    return extras


__all__ = [
    "QueryInstForInstanceSegmentation",
    "QueryInstForInstanceSegmentationOutput",
    "QueryInstModel",
    "QueryInstModelOutput",
    "QueryInstPreTrainedModel",
]
