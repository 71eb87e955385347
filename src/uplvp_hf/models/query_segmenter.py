"""What every segmenter shares, and the seam through which UPLVP puts prompts into the queries of any of them.

A query segmenter works in three steps, `encode` -> `initial_queries` -> `decode`; `run` takes them in order and lets a
caller change the queries before any stage. A new one is a subclass of [`QuerySegmenter`] and of `PreTrainedModel` (or
of the class that transformers already has) with these three steps, a `loss`, the properties that `QuerySegmenter`
lists, and a line in `SEGMENTERS` (modeling_base_uplvp.py). CONTRIBUTING.md shows it, and
tests/models/test_new_segmenter.py does it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .errors import UserError
from .losses import LayerOutput, Normalizers
from .matching import LabelGuide
from .point_sampling import Draw
from .pseudo_targets import PseudoTargets
from .transfer import TransferReport, transfer_weights

# (queries (B, N, D), features as `encode` gives them, number of the stage) -> the queries that enter the stage.
Inject = Callable[[Tensor, Any, int], Tensor]
# Per layer and image: the ids of matched queries and of their targets.
Matches = list[list[tuple[Tensor, Tensor]]]


@dataclass
class SegmenterOutput(ModelOutput):
    """Output of every segmenter: B images, N queries, K classes, on a padded input of H x W pixels.

    loss: scalar, the sum of `losses`, with labels only. Of the last layer: class_queries_logits (B, N, K + 1), the last
    class being "no object" (Mask2Former), or (B, N, K) for a sigmoid (K-Net, QueryInst); masks_queries_logits
    (B, N, H/4, W/4); class_scores (B, N, K): that sigmoid, which tells post-processing that scores are final; boxes
    (B, N, 4) x1, y1, x2, y2 in pixels, which may leave the image; roi_mask_logits (B, N, K, S, S): masks of every class
    within these boxes, to be pasted with `paste_masks` (QueryInst and Mask R-CNN; in evaluation mode only).

    losses: weighted terms by name. auxiliary_logits: classes, masks and boxes of the earlier layers, where asked for by
    `output_auxiliary_logits=True`. queries (B, N, D): updated queries. hidden_states: queries that enter the first
    stage and after each stage, (B, N, D). attentions: self-attention weights of every stage, (B, heads, N, N); where
    queries are tokens among others (EoMT) those of all T tokens, queries first, (B, heads, T, T).
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    class_scores: Tensor | None = None
    boxes: Tensor | None = None
    roi_mask_logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    queries: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class InstanceSegmenter:
    """What any model here has, with queries or without. Goes before `PreTrainedModel` in the bases."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    transfer_report: TransferReport | None = None
    size_divisor = 32  # sides of the canvas are multiples of it
    square_canvas = False  # whether predictions depend on the canvas, so that all images need the same one

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: all our initialization goes through `transformers.initialization`.

        For custom code, transformers leaves out the initialization that a module without weights of its own does for
        its children, when they are missing from a checkpoint.
        """
        return False

    @classmethod
    def from_pretraining(
        cls,
        name_or_dir: str,
        id2label: dict[int, str],
        category_ids: list[int] | None = None,
        class_head: str = "remap",
        **kwargs,
    ) -> "InstanceSegmenter":
        """Loads a checkpoint for other classes in one call.

        Tensors of equal shape are kept. Class-sized tensors get the row of the class of the same name where the
        checkpoint knows it (`class_head="remap"`) and are re-initialized otherwise, or always (`"new"`); `"spread"` is
        "remap", with the mean of the checkpoint's rows for classes that it does not know. What happened is in
        `model.transfer_report`; print it. `kwargs` that are settings of the method replace those of the checkpoint,
        the others go to `from_pretrained`.
        """
        source, settings = cls._source(name_or_dir, kwargs)
        config = cls._config_for(source, settings, dict(id2label), category_ids)
        model = cls(config).to(source.dtype)  # type: ignore[call-arg]  # the constructor is PreTrainedModel's
        model.transfer_report = transfer_weights(source, model, class_head)
        return model

    @classmethod
    def _source(cls, name_or_dir: str, kwargs: dict) -> tuple["InstanceSegmenter", dict]:
        """The model that a checkpoint holds, and the settings among `kwargs` that replace its own."""
        return cls.from_pretrained(name_or_dir, **kwargs), {}

    def set_progress(self, epoch: float) -> None:
        """Tells how many epochs are done, before a step. Only pre-training depends on it."""

    def check_sides(self, pixel_values: Tensor) -> None:
        """Raises UserError for images (B, 3, H, W) whose sides are no multiples of `size_divisor`."""
        height, width = pixel_values.shape[-2:]
        if height % self.size_divisor or width % self.size_divisor:
            raise UserError(
                f"Images of {height} x {width} pixels are not whole patches or windows of this {type(self).__name__}: "
                f"pad them to multiples of {self.size_divisor}, as the image processor does with `size_divisor`."
            )

    def anneal(self, share: float) -> None:
        """Tells which share of the steps is done, before a step. For what a segmenter changes on its way."""

    def vit_layers(self) -> tuple[nn.Module | None, list[nn.Module]]:
        """Embeddings and blocks of the ViT, first to last, for rates by depth; (None, []) without a ViT."""
        return None, []

    def fit_canvas(self, size: int) -> None:
        """Prepares for images on a canvas of size x size pixels. Raises UserError for a side that does not fit."""
        if size % self.size_divisor:
            raise UserError(
                f"A canvas of {size} pixels does not suit a `{self.config.model_type}`: its sides must be multiples of "
                f"{self.size_divisor}."
            )

    def wants(self, name: str, asked: bool | None) -> bool:
        """An option of `forward`, such as `output_attentions`: what was asked for, else what the configuration says."""
        return bool(getattr(self.config, name, None) if asked is None else asked)

    def returned(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return output if self.wants("return_dict", return_dict) else output.to_tuple()


class QueryNetwork(InstanceSegmenter):
    """The three steps of a query segmenter, and a forward pass without loss."""

    predicts_first = False  # whether the first output of `decode` comes before any update of the queries
    shares_class_head = False  # whether all layers share one
    has_no_object = False  # whether "no object" is a class of its own, the last one

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Any:
        """Everything before the queries, with at least `prompt_map` (B, C, h, w), the map that prompts are pooled from,
        and `pixel_mask` as given. pixel_values (B, 3, H, W), pixel_mask (B, H, W) with 1 on the image."""
        return self.model.encode(pixel_values, pixel_mask)

    def initial_queries(self, features: Any) -> Tensor:
        """The queries that enter the first stage, (B, N, D)."""
        return self.model.initial_queries(features)

    def decode(
        self, features: Any, queries: Tensor, inject: Inject | None = None, output_attentions: bool = False
    ) -> list[LayerOutput]:
        """Updates queries (B, N, D) stage by stage, one output a stage. `inject(queries, features, stage)` replaces the
        queries before every stage but the first."""
        return self.model.decode(features, queries, inject, output_attentions)

    def run(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        inject: Inject | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Any, Tensor, list[LayerOutput]]:
        """Features, the queries that entered the first stage, and the outputs of all layers.

        `inject(queries, features, stage)` is called before every stage and returns the queries that enter it. Without
        it nothing is added to the network.
        """
        features = self.encode(pixel_values, pixel_mask)
        queries = self.initial_queries(features)
        if inject is not None:
            queries = inject(queries, features, 0)
        wanted = self.wants("output_attentions", output_attentions)
        return features, queries, self.decode(features, queries, inject, output_attentions=wanted)

    def describe(
        self,
        queries: Tensor,
        layers: list[LayerOutput],
        losses: dict[str, Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        return_dict: bool | None = None,
        **unused,
    ) -> SegmenterOutput | tuple:
        """The output for the queries that entered the first stage, all layers and the weighted loss terms."""
        last, hidden = layers[-1], None
        if self.wants("output_hidden_states", output_hidden_states):
            hidden = (*(() if self.predicts_first else (queries,)), *(layer.queries for layer in layers))
        auxiliary = self.wants("output_auxiliary_logits", output_auxiliary_logits)
        output = SegmenterOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            **_predictions(last),
            class_scores=None if self.has_no_object else last.class_logits.float().sigmoid(),
            roi_mask_logits=getattr(last, "roi_mask_logits", None),
            losses=losses,
            auxiliary_logits=[_predictions(layer) for layer in layers[:-1]] if auxiliary else None,
            queries=last.queries,
            hidden_states=hidden,
            attentions=tuple(layer.attentions for layer in layers if layer.attentions is not None) or None,
        )
        return self.returned(output, return_dict)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **options) -> SegmenterOutput | tuple:
        """pixel_values (B, 3, H, W), sides in multiples of `size_divisor`; pixel_mask (B, H, W), 1 on the image."""
        _, queries, layers = self.run(pixel_values, pixel_mask, output_attentions=options.get("output_attentions"))
        return self.describe(queries, layers, **options)


class QuerySegmenter(QueryNetwork):
    """A query segmenter with its loss. Its `config` has `num_queries`, `num_labels` and, where earlier layers may go
    without supervision, `use_auxiliary_loss`; the three steps are those of `self.model` where it does not have its own.

    Further properties: class_sized, the names of the tensors with a row a class.
    """

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone

    @property
    def query_channels(self) -> int:
        return self.config.hidden_size

    @property
    def prompt_channels(self) -> int:
        """Channels of the map that prompts are pooled from."""
        return self.query_channels

    @property
    def fine_channels(self) -> int:
        """Channels of `fine_map`."""
        return self.prompt_channels

    def fine_map(self, features: Any) -> Tensor:
        """The map that small objects are pooled from, (B, C, H/8, W/8) where the segmenter has one of that stride."""
        return features.prompt_map

    @property
    def encoder(self) -> list[nn.Module]:
        """The modules that the features come from: what stays as it is where only the queries are to learn."""
        return [self.backbone]

    @property
    def num_stages(self) -> int:
        """Outputs of `decode`."""
        return self.config.num_stages

    def normalizers(self, counts: list[int], most_targets: int, mask_labels: Any = None) -> Normalizers:
        """Divisors of the loss terms for images with `counts` masks each, before any forward pass.

        mask_labels, per image (G, H, W) bool, is for terms whose divisor depends on the masks themselves. Plain counts,
        which may be 0: the training loop averages them over processes before it keeps them at least 1.
        """
        updates = self.num_stages - self.predicts_first
        supervised = updates if getattr(self.config, "use_auxiliary_loss", True) else min(updates, 1)
        matched = [min(count, self.config.num_queries) for count in counts]
        return Normalizers(masks=sum(matched), pairs=sum(min(count, most_targets) for count in matched) * supervised)

    def loss(
        self,
        layers: list[LayerOutput],
        features: Any,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        text_logits: list[Tensor] | None = None,
        label_guide: LabelGuide | None = None,
        pseudo: PseudoTargets | None = None,
    ) -> tuple[dict[str, Tensor], Matches]:
        """Weighted loss terms by name, and the assignments of every supervised layer.

        text_logits: of a further class head for every layer, which adds its class cost to the matching and terms
        `text_class_0`, ... label_guide changes the matching costs. pseudo: of pseudo labels, see there.
        """
        raise NotImplementedError

    def labels_for(self, mask_labels: list[Tensor], class_labels: list[Tensor] | None) -> list[Tensor]:
        if class_labels is None:
            raise UserError("mask_labels need class_labels beside them.")
        return class_labels

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        pseudo: PseudoTargets | None = None,
        **kwargs,
    ) -> SegmenterOutput | tuple:
        """
        pixel_values (B, 3, H, W), H and W multiples of `size_divisor`; pixel_mask (B, H, W), 1 on the image, else 0;
        mask_labels: per image (G, H, W) bool at the padded input size; class_labels: per image (G,) int in 0..K-1.
        `normalizers`, `draw` and `pseudo` are for the training loop and for tests: see their classes. Raises UserError
        for labels that do not fit the masks or the classes.
        """
        features, queries, layers = self.run(pixel_values, pixel_mask, output_attentions=output_attentions)
        losses = None
        if mask_labels is not None:
            labels = self.labels_for(mask_labels, class_labels)
            options = {} if pseudo is None else {"pseudo": pseudo}
            losses, _ = self.loss(layers, features, mask_labels, labels, normalizers, draw, **options)
        return self.describe(
            queries, layers, losses, output_hidden_states, output_auxiliary_logits, return_dict=return_dict
        )


def _predictions(layer: LayerOutput) -> dict[str, Tensor]:
    """Classes, masks and boxes of a layer, as far as it has them."""
    values = {"class_queries_logits": layer.class_logits, "masks_queries_logits": layer.mask_logits}
    values["boxes"] = getattr(layer, "boxes", None)
    return {name: value for name, value in values.items() if value is not None}
