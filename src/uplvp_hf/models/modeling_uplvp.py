"""UPLVP: unsupervised pre-training with language-vision prompts for low-data instance segmentation.

Papers: UPLVP (arXiv 2405.13388) and its predecessor Saliency Prompt (arXiv 2302.01171). The whole method is this file:

    features = encode(picture)                       a query segmenter, step 1
    queries  = initial_queries(features)             step 2
    prompts  = pool(features, pseudo masks)          pre-training only, from here ...
    queries  = queries + keep * prompts[match]       ... to here
    layers   = decode(features, queries)             step 3
    loss     = segmenter loss(layers, pseudo masks) + kernel supervision(layers, prompts)

`UplvpForInstanceSegmentation` leaves the prompts out; with prompts off both models give the same bits.
"""

from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from .configuration_uplvp import UplvpConfig
from .losses import Draw, LayerOutput, Normalizers, kernel_supervision
from .matching import match_prompts
from .modeling_base_uplvp import UplvpOutput, UplvpPreTrainedModel
from .modeling_mask2former import SegmenterFeatures
from .prompts import Prompts, inject_prompts, pool_prompts


class UplvpForInstanceSegmentation(UplvpPreTrainedModel):
    """The plain segmenter: for fine-tuning on labels, and for inference. Nothing of the prompting path is here."""

    _keys_to_ignore_on_load_unexpected = [r"^prompt_projection\."]  # of pre-training checkpoints

    def __init__(self, config: UplvpConfig, segmenter: PreTrainedModel | None = None):
        super().__init__(config, segmenter)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> UplvpOutput | tuple:
        """
        pixel_values (B, 3, H, W), H and W multiples of 32; pixel_mask (B, H, W), 1 on the picture, 0 on padding;
        mask_labels: per picture (G, H, W) bool; class_labels: per picture (G,) int in 0..K-1. `normalizers` and
        `draw` are for the training loop and for tests: see `MaskClassificationLoss`.
        """
        features = self.segmenter.encode(pixel_values, pixel_mask)
        layers = self.segmenter.decode(features, self.segmenter.initial_queries(features))
        losses = None
        if mask_labels is not None:
            labels = self._labels(mask_labels, class_labels)
            losses, _ = self.segmenter.loss(layers, features, mask_labels, labels, normalizers, draw)
        output = self._output(layers, losses)
        return output if return_dict is not False else output.to_tuple()

    def to_mask2former(self, directory: str, processor: BaseImageProcessor | None = None) -> None:
        """Writes a plain `Mask2FormerForUniversalSegmentation` directory: no custom code is needed to load it.

        With our image `processor` a `Mask2FormerImageProcessor` of the same size, mean and deviation is written beside
        it. On pictures without padding the plain model gives the same bits; on padded ones it does not, because
        transformers' class lets the padding take part. Raises ValueError when the backbone has `timm_kwargs`, which
        that class does not pass on.
        """
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

        if self.config.segmenter_config.model_type != "mask2former":
            raise ValueError(f"A `{self.config.segmenter_config.model_type}` has no native class in transformers.")
        if getattr(self.config.segmenter_config.backbone_config, "timm_kwargs", None):
            raise ValueError(
                "The backbone is built with timm_kwargs, which transformers' Mask2Former ignores: the exported model "
                "would give other results. Train with a backbone without timm_kwargs to export."
            )
        plain = Mask2FormerForUniversalSegmentation(self.config.segmenter_config)
        plain.load_state_dict(self.segmenter.state_dict())
        plain.save_pretrained(directory)
        if processor is not None:
            side = processor.size["longest_edge"]
            Mask2FormerImageProcessor(
                size={"shortest_edge": side, "longest_edge": side},  # the longer side becomes `side`
                image_mean=processor.image_mean,
                image_std=processor.image_std,
                num_labels=self.config.num_labels,
            ).save_pretrained(directory)


class UplvpForPreTraining(UplvpPreTrainedModel):
    """The segmenter with prompts and kernel supervision, to pre-train on pseudo masks."""

    def __init__(self, config: UplvpConfig, segmenter: PreTrainedModel | None = None):
        super().__init__(config, segmenter)
        self.prompt_projection = None
        if config.prompt_matching != "none" or config.kernel_supervision_weight > 0:
            self.prompt_projection = nn.Linear(self.segmenter.prompt_channels, self.segmenter.query_channels)
        self.post_init()

    def make_prompts(
        self, features: SegmenterFeatures, mask_labels: list[Tensor], scores: list[Tensor] | None
    ) -> Prompts | None:
        """Pseudo masks -> prompts in the space of the queries. Pooling is detached, the projection is trained."""
        if self.prompt_projection is None:
            return None
        config = self.config
        prompts = pool_prompts(features.prompt_map, mask_labels, scores, config.num_prompts, config.prompt_pooling)
        projected = self.prompt_projection(prompts.vectors.to(self.prompt_projection.weight.dtype))
        return Prompts(projected, prompts.valid, prompts.source)

    def prompt_queries(self, queries: Tensor, prompts: Prompts | None) -> Tensor:
        """Match every query with a prompt and add it, except to a random share of them. (B, N, D) -> (B, N, D)."""
        if prompts is None or self.config.prompt_matching == "none":
            return queries
        match = match_prompts(queries, prompts.vectors, prompts.valid, self.config.prompt_matching)
        return inject_prompts(queries, prompts.vectors, match, self.config.prompt_drop, self.training)

    def supervise_kernels(
        self, layers: list[LayerOutput], matches: list, prompts: Prompts, normalizers: Normalizers | None
    ) -> Tensor:
        """Weighted cosine loss between the updated queries and the prompts of the pseudo masks they are matched to."""
        # The first output comes before any update of the queries, so it is not supervised (SP: every stage).
        # Without auxiliary losses only the last layer has a match.
        first = 1 if len(matches) == len(layers) else 0
        layers = layers[-len(matches) :]
        pairs = None if normalizers is None else normalizers.pairs
        loss = kernel_supervision(layers[first:], matches[first:], prompts.vectors, prompts.source, pairs)
        # The targets are detached; when nothing is injected either, this keeps the projection in the graph.
        return self.config.kernel_supervision_weight * loss + prompts.vectors.sum() * 0

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        prompt_scores: list[Tensor] | None = None,
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> UplvpOutput | tuple:
        """As `UplvpForInstanceSegmentation.forward`, with pseudo masks as labels and their `prompt_scores` (G,) each.

        Without `mask_labels` no prompt is made: the output is that of the plain model.
        """
        features = self.segmenter.encode(pixel_values, pixel_mask)
        queries = self.segmenter.initial_queries(features)
        if mask_labels is None:
            output = self._output(self.segmenter.decode(features, queries))
            return output if return_dict is not False else output.to_tuple()

        prompts = self.make_prompts(features, mask_labels, prompt_scores)
        layers = self.segmenter.decode(features, self.prompt_queries(queries, prompts))
        labels = self._labels(mask_labels, class_labels)
        losses, matches = self.segmenter.loss(layers, features, mask_labels, labels, normalizers, draw)
        if prompts is not None and self.config.kernel_supervision_weight > 0:
            losses["kernel"] = self.supervise_kernels(layers, matches, prompts, normalizers)
        output = self._output(layers, losses)
        return output if return_dict is not False else output.to_tuple()


__all__ = ["UplvpForInstanceSegmentation", "UplvpForPreTraining", "UplvpOutput", "UplvpPreTrainedModel"]
