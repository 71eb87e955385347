"""UPLVP: unsupervised pre-training with language-vision prompts for low-data instance segmentation.

Papers: UPLVP (arXiv 2405.13388) and its predecessor Saliency Prompt (arXiv 2302.01171). The whole method is this file:

    features = encode(image)                       a query segmenter, step 1
    queries  = initial_queries(features)             step 2
    prompts  = pool(features, pseudo masks)          pre-training only, from here ...
    match    = argmax cos(queries, prompts)
    queries  = queries + keep * prompts[match]       ... to here: `inject` of `QueryNetwork.run`
    layers   = decode(features, queries)             step 3
    loss     = segmenter loss(layers, pseudo masks) + mean(1 - cos(queries of the layers, prompts of their masks))

The last term is the papers'; what else queries can be drawn towards, and how, is in kernel_targets.py.
`UplvpForInstanceSegmentation` leaves the prompts out; with prompts off both models give the same bits. The segmenter is
any of `SEGMENTERS` (modeling_base_uplvp.py), such as a Mask2Former or a K-Net: nothing here depends on which.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_uplvp import UplvpConfig
from .errors import UserError
from .kernel_targets import KernelSupervision, given_targets
from .losses import LayerOutput, Normalizers
from .matching import guidance, label_guide, match_prompts
from .modeling_base_uplvp import UplvpPreTrainedModel
from .point_sampling import Draw
from .prompts import PromptFusion, Prompts, faded, inject_prompts, kept_prompts, pool_prompts
from .pseudo_targets import PseudoTargets
from .query_segmenter import SegmenterOutput
from .text_head import TextHeads, checked_text_features


class UplvpForInstanceSegmentation(UplvpPreTrainedModel):
    """The plain segmenter: for fine-tuning on labels, and for inference. Nothing of the prompting path is here."""

    # Of pre-training checkpoints.
    _keys_to_ignore_on_load_unexpected = [
        r"^prompt_projection\.", r"^prompt_fusion\.", r"^text_heads\.", r"^kernel_supervision\.",
    ]  # fmt: skip

    def __init__(self, config: UplvpConfig, segmenter: PreTrainedModel | None = None):
        super().__init__(config, segmenter)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None, **options,
    ) -> SegmenterOutput | tuple:  # fmt: skip
        """As of the segmenter; see `QuerySegmenter.forward` for all arguments."""
        labels = None if mask_labels is None else self.labels_for(mask_labels, class_labels)
        return self.segmenter(pixel_values, pixel_mask, mask_labels, labels, **self.options(options))


class UplvpForPreTraining(UplvpPreTrainedModel):
    """The segmenter with prompts and kernel supervision, to pre-train on pseudo masks.

    A linear layer projects the prompts only where the map that they are pooled from has other channels than the
    queries (Mask2Former); K-Net and QueryInst pool from their pyramid, whose vectors are added as they are.
    """

    def __init__(self, config: UplvpConfig, segmenter: PreTrainedModel | None = None):
        super().__init__(config, segmenter)
        pooled, wanted = self.segmenter.prompt_channels, self.segmenter.query_channels
        prompts = config.prompt_matching != "none"
        self.prompt_projection = self.prompt_fusion = self.text_heads = self.kernel_supervision = None
        if pooled != wanted and self._uses_prompts:
            self.prompt_projection = nn.Linear(pooled, wanted)
        if prompts and config.prompt_injection == "concat":
            self.prompt_fusion = PromptFusion(wanted)
        if config.text_dim is not None:
            self.text_heads = TextHeads(
                heads=1 if self.segmenter.shares_class_head else self.segmenter.num_stages,
                num_labels=config.num_labels,
                text_dim=config.text_dim,
                channels=wanted,
                temperature=config.text_temperature,
                no_object=self.segmenter.has_no_object,
                prior=0.01,
            )
        if config.supervises_kernels:
            self.kernel_supervision = KernelSupervision(config, wanted)
        self.epoch = 0.0
        self.prompts_pseudo_alone = False  # labels without `pseudo` are learned as the plain segmenter learns them
        self.post_init()

    @property
    def _uses_prompts(self) -> bool:
        config = self.config
        return config.prompt_matching != "none" or (config.supervises_kernels and config.kernel_target == "prompt")

    def set_progress(self, epoch: float) -> None:
        """Tells how many epochs (fractions count) are done, which the label-guided curriculum and `prompt_epochs`
        follow. Before a step."""
        self.epoch = float(epoch)

    def set_text_features(self, features: Tensor, class_names: list[str]) -> None:
        """Gives the additional class head its text embeddings: (any number, text_dim), one row a name.

        Every class of the model needs a row (case counts only between names that differ in nothing else); they are
        normalized and saved with the weights.
        """
        if self.text_heads is None:
            raise UserError("The model has no text class head: set `text_dim` in its configuration.")
        rows = checked_text_features(features, class_names, self.config.id2label)
        if rows.shape[1] != self.config.text_dim:
            raise UserError(f"Text features have {rows.shape[1]} channels, but text_dim is {self.config.text_dim}.")
        self.text_heads.text_features.copy_(rows)
        self.config.text_classes = list(self.config.id2label.values())

    def make_prompts(self, features, mask_labels: list[Tensor], scores: list[Tensor] | None) -> Prompts | None:
        """Pseudo masks -> prompts in the space of the queries. Pooling is detached, the projection is trained."""
        config = self.config
        if not self._uses_prompts:
            return None
        prompts = pool_prompts(features.prompt_map, mask_labels, scores, config.num_prompts, config.prompt_pooling)
        if self.prompt_projection is None:
            return prompts
        projected = self.prompt_projection(prompts.vectors.to(self.dtype))
        return Prompts(projected, prompts.valid, prompts.source)

    def match_prompts(self, queries: Tensor, prompts: Prompts | None) -> tuple[Tensor, Prompts] | None:
        """The prompt of every query, (B, N) int64 with -1 for none, and the prompts that this counts."""
        if prompts is None or self.config.prompt_matching == "none":
            return None
        if self.config.prompt_slots is not None:
            prompts = prompts.to_slots(self.config.prompt_slots)
        return match_prompts(queries, prompts.vectors, prompts.valid, self.config.prompt_matching), prompts

    def kept_prompts(self, match: Tensor, draw: Draw | None) -> Tensor:
        """Which queries get their prompt, (B, N) bool: not a random share of them, which is drawn here."""
        drop = 0.0
        if self.training:
            drop = faded(self.config.prompt_drop, self.epoch, self.config.prompt_epochs)
        uniform = draw(0, "keep", -1, tuple(match.shape)) if draw is not None and drop > 0 else None
        return kept_prompts(match, drop, uniform)

    def injection(self, match: Tensor, prompts: Prompts, keep: Tensor) -> Callable[[Tensor], Tensor]:
        """What puts prompts into queries (B, N, D), into those to `keep`."""
        return lambda queries: inject_prompts(queries, prompts.vectors, match, keep, self.prompt_fusion)

    def supervise_kernels(
        self,
        layers: list[LayerOutput],
        matches: list,
        targets: Prompts,
        mask_labels: list[Tensor],
        labels: list[Tensor],
        pairs,
        prompted: Tensor | None,
    ) -> Tensor:
        """Unweighted loss between the updated queries and the targets of the pseudo masks they are matched to."""
        # An output from before any update of the queries is not supervised (SP: every stage). Without auxiliary
        # losses only the last layer has a match.
        first = 1 if self.segmenter.predicts_first and len(matches) == len(layers) else 0
        layers = layers[-len(matches) :]
        return self.kernel_supervision(layers[first:], matches[first:], targets, mask_labels, labels, pairs, prompted)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        prompt_scores: list[Tensor] | None = None,
        kernel_targets: list[Tensor] | None = None,
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        pseudo: PseudoTargets | None = None,
        **options,
    ) -> SegmenterOutput | tuple:
        """As `UplvpForInstanceSegmentation.forward`, with pseudo masks as labels and their `prompt_scores` (G,) each.

        kernel_targets: per image (G, kernel_target_dim), one vector a mask, with `kernel_target="labeler"`. Without
        `mask_labels` no prompt is made: the output is that of the plain model. `pseudo`: see there.
        """
        options = self.options(options)
        if mask_labels is None:
            return self.segmenter(pixel_values, pixel_mask, **options)
        labels = self.labels_for(mask_labels, class_labels)
        if self.prompts_pseudo_alone and pseudo is None:
            return self._without_prompts(pixel_values, pixel_mask, mask_labels, labels, normalizers, draw, options)
        prompts = matched = keep = add = None

        def inject(queries: Tensor, features, stage: int) -> Tensor:
            nonlocal prompts, matched, keep, add
            if stage == 0:
                prompts = self.make_prompts(features, mask_labels, prompt_scores)
                matched = self.match_prompts(queries, prompts)
                keep = None if matched is None else self.kept_prompts(matched[0], draw)
                add = None if matched is None else self.injection(*matched, keep)
            elif self.config.prompt_injection != "every_stage":
                return queries
            return queries if add is None else add(queries)

        features, queries, layers = self.segmenter.run(pixel_values, pixel_mask, inject, options["output_attentions"])
        extra: dict[str, Any] = {} if self.text_heads is None else {"text_logits": self._text_logits(layers)}
        if matched is not None and self.config.prompt_matching == "hungarian":
            extra["label_guide"] = self._label_guide(*matched, labels)
        extra |= {} if pseudo is None else {"pseudo": pseudo}
        losses, matches = self.segmenter.loss(layers, features, mask_labels, labels, normalizers, draw, **extra)
        if self.kernel_supervision is not None:
            pairs = None if normalizers is None else normalizers.pairs
            targets = self._targets(prompts, kernel_targets, mask_labels)
            term = self.supervise_kernels(layers, matches, targets, mask_labels, labels, pairs, keep)
            # Targets are detached; when no prompt is injected either, this keeps the projection in the graph.
            losses["kernel"] = self.kernel_supervision.weight(term, losses) * term + targets.vectors.sum() * 0
        return self.segmenter.describe(queries, layers, losses, **options)

    def _without_prompts(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        mask_labels: list[Tensor],
        labels: list[Tensor],
        normalizers: Normalizers | None,
        draw: Draw | None,
        options: dict,
    ) -> SegmenterOutput:
        """The segmenter's own output and losses. What is for prompts alone stays in the graph, without a gradient."""
        output = self.segmenter(pixel_values, pixel_mask, mask_labels, labels, normalizers, draw, **options)
        own = [value for name, value in self.named_parameters() if not name.startswith("segmenter.")]
        output.loss = output.loss + sum(value.sum() * 0 for value in own)
        return output

    def plain(self) -> UplvpForInstanceSegmentation:
        """The segmenter without what is for prompts; it shares its weights with this model."""
        return UplvpForInstanceSegmentation(self.config, self.segmenter)

    def _targets(self, prompts: Prompts | None, vectors: list[Tensor] | None, mask_labels: list[Tensor]) -> Prompts:
        if self.config.kernel_target == "prompt":
            return prompts
        if vectors is not None:
            vectors = [own.to(self.device) for own in vectors]
        return given_targets(vectors, mask_labels, self.config.kernel_target_dim)

    def _label_guide(self, match: Tensor, prompts: Prompts, labels: list[Tensor]):
        theta = guidance(self.epoch, self.config.guidance_start, self.config.guidance_epochs)
        return label_guide(match, prompts.source, labels, theta)

    def _text_logits(self, layers: list[LayerOutput]) -> list[Tensor]:
        """Logits of the additional class head for every layer."""
        names = list(self.config.id2label.values())
        if list(self.config.text_classes or []) != names:
            known = f"are those of {', '.join(self.config.text_classes)}" if self.config.text_classes else "are not set"
            raise UserError(
                f"The text features {known}, the classes are {', '.join(names)}: call set_text_features(...) first."
            )
        return self.text_heads([layer.queries for layer in layers])


__all__ = ["UplvpForInstanceSegmentation", "UplvpForPreTraining", "UplvpPreTrainedModel"]
