"""What segmenters share that end in mask classification (arXiv 2107.06278): a softmax with "no object" as the last
class, one class head for all layers, predictions before the first update of the queries, and Mask2Former's loss."""

from torch import Tensor

from .losses import LayerOutput, Normalizers
from .losses_mask2former import MaskClassificationLoss
from .matching import LabelGuide
from .point_sampling import Draw
from .pseudo_targets import PseudoTargets
from .query_segmenter import Matches, QuerySegmenter


class MaskClassificationSegmenter(QuerySegmenter):
    """A query segmenter with Mask2Former's loss, whose settings (`class_weight`, `mask_weight`, `dice_weight`,
    `no_object_weight`, `train_num_points`, `oversample_ratio`, `importance_sample_ratio`) its configuration has."""

    predicts_first = shares_class_head = has_no_object = True
    class_sized = ("class_predictor.weight", "class_predictor.bias", "criterion.empty_weight")

    @property
    def loss_function(self) -> MaskClassificationLoss:
        config = self.config
        return MaskClassificationLoss(
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            no_object_weight=config.no_object_weight,
            num_points=config.train_num_points,
            oversample_ratio=config.oversample_ratio,
            importance_ratio=config.importance_sample_ratio,
            hard_points=getattr(config, "hard_points", False),
        )

    def normalizers(self, counts, most_targets, mask_labels=None) -> Normalizers:
        """As in `QuerySegmenter`; the mask terms are divided by all true masks, and the class terms have weights."""
        known = super().normalizers(counts, most_targets)
        known.masks, weights = sum(counts), self.loss_function.class_weight_sum(self.config.num_queries, counts)
        known.class_weight = weights
        return known

    def loss(
        self,
        layers: list[LayerOutput],
        features,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        text_logits: list[Tensor] | None = None,
        label_guide: LabelGuide | None = None,
        pseudo: PseudoTargets | None = None,
    ) -> tuple[dict[str, Tensor], Matches]:
        """See `QuerySegmenter.loss` and `MaskClassificationLoss`. Both class heads have the class weight."""
        if not getattr(self.config, "use_auxiliary_loss", True):
            layers, text_logits = layers[-1:], None if text_logits is None else text_logits[-1:]
        loss = self.loss_function
        guide = label_guide if text_logits is None else loss.with_text_cost(text_logits, class_labels, label_guide)
        terms, matches = loss(layers, mask_labels, class_labels, features.pixel_mask, normalizers, draw, guide, pseudo)
        if text_logits is not None:
            terms.update(loss.text_terms(text_logits, class_labels, matches, normalizers))
        return terms, matches
