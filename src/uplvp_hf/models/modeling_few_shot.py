"""Few-shot instance segmentation with support prompts (UPLVP, arXiv 2405.13388, figure 5).

    vectors = mean over the shots of pool(features of support images, masks)      one vector a class
    prompt  = projection(normalize(vectors - running mean))
    features = encode(image)                                                       once, whatever the classes
    for every class: layers = decode(features, queries + prompt at every stage)    "is it of this class?"

The paper gives the idea and no numbers or code; the protocol is that of FGN (arXiv 2004.00204). Every class is a
question of its own, so classes cannot influence one another, and one that is added or removed leaves the others as
they are. With `conditioning="prototype"` the segmenter finds any object in one pass, and the similarity of what a mask
covers to the supports says which class it is: the baseline that prompts have to beat.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, initialization as init

from .configuration_few_shot import UplvpFewShotConfig
from .errors import UserError
from .kernel_targets import RunningMean
from .losses import LayerOutput, Normalizers, kernel_supervision
from .modeling_base_uplvp import UplvpPreTrainedModel
from .modeling_uplvp import UplvpForInstanceSegmentation
from .padding import is_padded, valid_cells
from .point_sampling import Draw
from .postprocessing_uplvp import mask_quality
from .prompts import PromptFusion, inject_prompts, kept_prompts
from .query_segmenter import SegmenterOutput
from .supports import class_vectors, pool_predictions, pool_supports, similarity
from .transfer import transfer_weights

# Share of the newest batch in the running mean over supports: that of DINO's center (arXiv 2104.14294).
_MOMENTUM = 0.9
# Score of a mask for a class that it was not found for: below any threshold.
NOT_ASKED = -1.0


class UplvpForFewShotSegmentation(UplvpPreTrainedModel):
    """A segmenter whose classes are given by a few outlined examples.

    With stored supports (`set_supports`, `add_class`) it behaves like any other model here: `forward(pixel_values)`
    returns masks with `class_scores`, one column a class, and a pushed model carries its supports.
    """

    config: UplvpFewShotConfig
    supports: Tensor  # (P, C), a buffer
    # Of pre-training checkpoints.
    _keys_to_ignore_on_load_unexpected = [r"^text_heads\.", r"^kernel_supervision\."]

    def __init__(self, config: UplvpFewShotConfig, segmenter: PreTrainedModel | None = None):
        super().__init__(config, segmenter)
        channels = self.segmenter.prompt_channels
        if config.support_map == "fine":
            channels = self.segmenter.fine_channels
        wanted = self.segmenter.query_channels
        self.prompt_projection = self.prompt_fusion = None
        if config.conditioning == "prompt":
            self.prompt_projection = nn.Linear(channels, wanted, bias=False)
            self.prompt_fusion = PromptFusion(wanted) if config.prompt_injection == "concat" else None
        self.support_mean = RunningMean(channels, _MOMENTUM)
        self.register_buffer("supports", torch.zeros(len(config.id2label), channels))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.supports)

    @classmethod
    def from_pretraining(
        cls, name_or_dir: str, id2label=None, category_ids=None, class_head: str = "spread", **kwargs
    ) -> "UplvpForFewShotSegmentation":
        """Starts from a checkpoint of any of our models, or of a segmenter as transformers has it.

        The head for "object" starts from that of a class-agnostic checkpoint, or from the mean of all classes. Classes
        come with supports: `id2label` is not used. `kwargs`: settings of `UplvpFewShotConfig`, the others go to
        `from_pretrained`. `transfer_report` says what was kept.
        """
        settings = cls._take_settings(kwargs)
        source, _ = UplvpForInstanceSegmentation._source(name_or_dir, kwargs)
        known = source.config.to_dict() if isinstance(source, cls) else {}
        for key in ("id2label", "label2id", "num_labels", "category_ids", "support_counts", "architectures"):
            known.pop(key, None)
        given = {**known, **settings, "segmenter_config": copy.deepcopy(source.config.segmenter_config.to_dict())}
        model = cls(UplvpFewShotConfig.from_dict(given)).to(source.dtype)
        model.transfer_report = transfer_weights(source, model, class_head)
        return model

    @classmethod
    def from_segmenter_pretrained(cls, name_or_dir: str, **kwargs) -> "UplvpForFewShotSegmentation":
        """As `from_pretraining`."""
        return cls.from_pretraining(name_or_dir, **kwargs)

    # ---- supports ----------------------------------------------------------------------------------------------------

    def encode_support(
        self, pixel_values: Tensor, masks: Tensor, pixel_mask: Tensor | None = None, names: list[str] | None = None
    ) -> Tensor:
        """One vector an object, (S, C) float32, as `set_supports` and `forward` take them.

        pixel_values (S, 3, H, W), or one image (1, 3, H, W) that shows all S objects; masks (S, H, W) bool, one object
        each; pixel_mask as of `forward`; names of the images for errors. Raises DataError for a mask that is empty.
        """
        features = self._support_map(self.segmenter.encode(pixel_values, pixel_mask))
        return pool_supports(features.expand(len(masks), -1, -1, -1), masks, names)

    def set_supports(
        self,
        names: list[str],
        vectors: Tensor,
        counts: list[int] | None = None,
        category_ids: list[int] | None = None,
    ) -> None:
        """Stores the classes and their vectors (P, C), each the mean of `encode_support` over `counts` examples.

        They are saved with the model. Raises UserError for names or numbers that do not fit.
        """
        if vectors.shape != (len(names), self.supports.shape[1]):
            raise UserError(
                f"{len(names)} classes need vectors of the shape {(len(names), self.supports.shape[1])}, got "
                f"{tuple(vectors.shape)}."
            )
        if counts is not None and len(counts) != len(names):
            raise UserError(f"counts must hold a number a class, {len(names)} of them, got {list(counts)}.")
        self.config.sync_classes(dict(enumerate(names)), category_ids)
        self.config.support_counts = list(counts) if counts is not None else [1] * len(names)
        self.supports = vectors.detach().to(self.supports.device, self.supports.dtype)

    def add_class(
        self,
        name: str,
        pixel_values: Tensor,
        masks: Tensor,
        pixel_mask: Tensor | None = None,
        category_id: int | None = None,
    ) -> None:
        """Adds a class from S examples, without training; arguments as of `encode_support`. The other classes are not
        touched. Raises UserError for a class that is there already."""
        known = list(self.config.id2label.values())
        if name in known:
            raise UserError(f"The model has a class {name!r}: call remove_class({name!r}) first to replace it.")
        with torch.no_grad():
            vector = self.encode_support(pixel_values, masks, pixel_mask).mean(0, keepdim=True)
        ids = list(self.config.category_ids)
        ids.append(category_id if category_id is not None else max(ids, default=0) + 1)
        counts = [*self.config.support_counts, len(masks)]
        self.set_supports([*known, name], torch.cat([self.supports.float(), vector.to(self.supports)]), counts, ids)

    def remove_class(self, name: str) -> None:
        """Takes a class out. Raises UserError for one that is not there."""
        known = list(self.config.id2label.values())
        if name not in known:
            raise UserError(f"The model has no class {name!r}; it has: {', '.join(known) or 'none'}.")
        kept = [index for index, other in enumerate(known) if other != name]
        ids, counts = self.config.category_ids, self.config.support_counts
        self.set_supports(
            [known[i] for i in kept], self.supports[kept], [counts[i] for i in kept], [ids[i] for i in kept]
        )

    def _support_map(self, features) -> Tensor:
        return features.prompt_map if self.config.support_map == "prompt" else self.segmenter.fine_map(features)

    def _centered(self, vectors: Tensor) -> Tensor:
        """(S, C) less the running mean over supports, which in training takes these in."""
        valid = torch.ones(1, len(vectors), dtype=torch.bool, device=vectors.device)
        centered = self.support_mean(vectors.detach().float()[None], valid)[0]
        return vectors.float() + (centered - vectors.detach().float())  # the gradient is that of the vectors

    def make_prompts(self, vectors: Tensor) -> Tensor:
        """Vectors of classes (P, C) -> prompts in the space of the queries (P, D)."""
        if self.config.support_normalization == "layer":
            vectors = F.layer_norm(self._centered(vectors), vectors.shape[-1:])
        return self.prompt_projection(vectors.to(self.prompt_projection.weight.dtype))

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        support_values: Tensor | None = None,
        support_masks: Tensor | None = None,
        support_pixel_mask: Tensor | None = None,
        support_owner: Tensor | None = None,
        support_vectors: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        **options,
    ) -> SegmenterOutput | tuple:
        """Without labels: the instances of every class, M pairs of mask and class an image.

        pixel_values (B, 3, H, W), pixel_mask (B, H, W). The classes are those stored, or `support_vectors` (P, C), or
        the objects of `support_values` (S, 3, H', W') under `support_masks` (S, H', W'), whose classes are
        `support_owner` (S,) in 0..P-1 (all of one class without it). Returns `masks_queries_logits` (B, M, H/4, W/4)
        and `class_scores` (B, M, P): -1 where the mask was not found for the class.

        With `mask_labels`, per image (G, H, W) bool: one question an image. Supports of image b are those with
        `support_owner` b; its labels are the objects of that one class (`class_labels` are not needed), and the output
        has the loss. A prototype model is trained on all objects, without supports.
        """
        if mask_labels is not None:
            vectors = self._given(support_values, support_masks, support_pixel_mask, support_owner, support_vectors)
            if vectors is None and self.config.conditioning == "prompt":
                raise UserError("mask_labels need supports, one class an image: `support_values` or `support_vectors`.")
            return self._learn(pixel_values, pixel_mask, vectors, mask_labels, normalizers, draw, self.options(options))
        vectors = self._given(support_values, support_masks, support_pixel_mask, support_owner, support_vectors)
        vectors = self.supports if vectors is None else vectors
        find = self._find_prototypes if self.config.conditioning == "prototype" else self._find_prompted
        masks, scores = find(self.segmenter.encode(pixel_values, pixel_mask), vectors)
        if masks is None:
            height, width = pixel_values.shape[-2:]
            masks = pixel_values.new_zeros((len(pixel_values), 0, -(-height // 4), -(-width // 4)))
        output = SegmenterOutput(masks_queries_logits=masks, class_scores=scores)
        return self.segmenter.returned(output, options.get("return_dict"))

    def _given(self, values, masks, pixel_mask, owner, vectors) -> Tensor | None:
        """Vectors (P, C) of the supports that came with a call, or None."""
        if vectors is not None or values is None:
            return vectors
        if masks is None:
            raise UserError("support_values need support_masks beside them.")
        found = self.encode_support(values, masks, pixel_mask)
        owner = torch.zeros(len(found), dtype=torch.int64) if owner is None else owner
        return class_vectors(found, owner.to(found.device), int(owner.max()) + 1 if len(owner) else 0)

    def _injected(self, prompts: Tensor, keep_share: float = 1.0, draw: Draw | None = None):
        """What puts one prompt an image (B, D) into all its queries, the same ones at every stage."""
        keep = None

        def inject(queries: Tensor, features, stage: int) -> Tensor:
            nonlocal keep
            match = torch.zeros(queries.shape[:2], dtype=torch.int64, device=queries.device)
            if stage == 0:
                drop = 1 - keep_share
                uniform = draw(0, "keep", -1, tuple(match.shape)) if draw is not None and drop > 0 else None
                keep = kept_prompts(match, drop, uniform)
            elif self.config.prompt_injection != "every_stage":
                return queries
            return inject_prompts(queries, prompts[:, None], match, keep, self.prompt_fusion)

        return inject

    def _learn(self, pixel_values, pixel_mask, vectors, mask_labels, normalizers, draw, options):
        """The output of the segmenter with its loss, for one question an image."""
        prompts = inject = None
        if self.config.conditioning == "prompt":
            if len(vectors) != len(pixel_values):
                raise UserError(f"{len(pixel_values)} images with labels need as many classes, got {len(vectors)}.")
            prompts = self.make_prompts(vectors)
            inject = self._injected(prompts, 1 - self.config.prompt_drop if self.training else 1.0, draw)
        labels = [torch.zeros(len(masks), dtype=torch.int64) for masks in mask_labels]
        features, queries, layers = self.segmenter.run(pixel_values, pixel_mask, inject, options["output_attentions"])
        losses, matches = self.segmenter.loss(layers, features, mask_labels, labels, normalizers, draw)
        if prompts is not None and self.config.kernel_supervision_weight > 0:
            term = self._supervise(layers, matches, prompts, mask_labels, normalizers)
            losses["kernel"] = self.config.kernel_supervision_weight * term
        return self.segmenter.describe(queries, layers, losses, **options)

    def _supervise(self, layers, matches, prompts, mask_labels, normalizers) -> Tensor:
        """Mean over layers and matched queries of 1 - cosine to the prompt of the supports (detached)."""
        first = 1 if self.segmenter.predicts_first and len(matches) == len(layers) else 0
        layers = layers[-len(matches) :][first:]
        most = max((len(masks) for masks in mask_labels), default=0)
        prompt_of_mask = torch.zeros((len(prompts), most + 1), dtype=torch.int64, device=prompts.device)
        pairs = None if normalizers is None else normalizers.pairs
        return kernel_supervision(layers, matches[first:], prompts[:, None], prompt_of_mask, pairs)

    # ---- instances ---------------------------------------------------------------------------------------------------

    def _objectness(self, layer: LayerOutput, masks: Tensor) -> Tensor:
        """How sure a query is of its object: (B, N) float32 in 0..1. masks: of `_on_image`."""
        if not self.segmenter.has_no_object:
            return layer.class_logits.float().sigmoid()[..., 0]
        return layer.class_logits.float().softmax(-1)[..., 0] * torch.stack([mask_quality(own, 0.5) for own in masks])

    def _on_image(self, layer: LayerOutput, features) -> Tensor:
        """Mask logits (B, N, h, w), far below zero on padding: what lies there must not count."""
        if not is_padded(features.pixel_mask):
            return layer.mask_logits
        valid = valid_cells(features.pixel_mask, layer.mask_logits.shape[-2:]).to(layer.mask_logits.device)
        return torch.where(valid[:, None], layer.mask_logits, -100.0)

    def _similarity(self, masks: Tensor, features, vectors: Tensor) -> Tensor:
        """Of what masks of `_on_image` cover to classes: (B, N, P) in 0..1."""
        seen = pool_predictions(self._support_map(features), masks)
        mean, config = self.support_mean.mean, self.config
        return similarity(seen - mean, vectors - mean, config.similarity_midpoint, config.similarity_temperature)

    def _find_prototypes(self, features, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of any object and their score for every class: (B, N, H/4, W/4), (B, N, P)."""
        layer = self.segmenter.decode(features, self.segmenter.initial_queries(features))[-1]
        masks = self._on_image(layer, features)
        return layer.mask_logits, self._objectness(layer, masks)[..., None] * self._similarity(masks, features, vectors)

    def _find_prompted(self, features, vectors: Tensor) -> tuple[Tensor | None, Tensor]:
        """One pass of the decoder a class, of which the best `max_masks` pairs of an image are kept: masks
        (B, M, H/4, W/4), None without classes, and scores (B, M, P)."""
        queries = self.segmenter.initial_queries(features)
        batch, count = queries.shape[0], len(vectors)
        kept: list[Tensor] = []  # masks, scores and classes
        for label in range(count):
            inject = self._injected(self.make_prompts(vectors[label : label + 1]).expand(batch, -1))
            layer = self.segmenter.decode(features, inject(queries, features, 0), inject)[-1]
            shown = self._on_image(layer, features)
            scores = self._objectness(layer, shown)
            if self.config.support_score == "head_similarity":
                scores = scores * self._similarity(shown, features, vectors[label : label + 1])[..., 0]
            found = [layer.mask_logits, scores, torch.full_like(scores, label, dtype=torch.int64)]
            kept = [torch.cat(pair, 1) for pair in zip(kept, found, strict=True)] if kept else found
            if kept[1].shape[1] > self.config.max_masks:
                best = kept[1].topk(self.config.max_masks, dim=1).indices.sort(1).values
                rows = torch.arange(batch, device=best.device)[:, None]
                kept = [part[rows, best] for part in kept]
        if not kept:
            return None, queries.new_zeros((batch, 0, 0), dtype=torch.float32)
        masks, scores, labels = kept
        table = scores.new_full((*scores.shape, count), NOT_ASKED)
        return masks, table.scatter(2, labels[..., None], scores[..., None])


__all__ = ["UplvpForFewShotSegmentation"]
