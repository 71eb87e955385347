"""Mask R-CNN (arXiv 1703.06870) from torchvision's parts, on the backbones of the query segmenters: the baseline.

    maps      = pyramid(backbone(image))                  five levels, strides 4 to 64
    proposals = region proposal network(maps)
    classes, boxes = box head(RoIAlign(maps, proposals))
    masks     = mask head(RoIAlign(maps, boxes))

It has no queries, so there is nothing to prompt: it is fine-tuned from a pre-trained backbone, and evaluated, as the
segmenters of UPLVP are. Exact to torchvision's own model on images whose sides are multiples of 64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from transformers import PreTrainedModel

from .backbones import FeaturePyramid, build_backbone
from .configuration_mask_rcnn import MaskRcnnConfig
from .errors import UserError
from .layers_mask_rcnn import POOLED, build_heads, build_proposals, init_mask_rcnn_weights
from .losses import Normalizers, check_labels
from .masks import tight_boxes
from .padding import extend_edges, padding_masked
from .query_segmenter import InstanceSegmenter, SegmenterOutput
from .remote_code import SavesItsCode
from .roi_masks import paste_masks

# Masks on the whole image are given at a quarter of its resolution, as by the other segmenters.
MASK_STRIDE = 4
# Mask probabilities become logits of at most this size, 13.8.
PROBABILITY_EPS = 1e-6
# Score of a class that a detection does not have: below any threshold.
NO_DETECTION = -1.0


@dataclass
class MaskRcnnFeatures:
    """Pyramid levels by name, "0" to "3" with strides 4 to 32.

    maps: with "4", stride 64, for the proposals; pooled: edges of the images repeated over the padding, for the
    heads; images: the padded input with the (height, width) of every image; pixel_mask as given.
    """

    maps: dict[str, Tensor]
    pooled: dict[str, Tensor]
    images: ImageList
    pixel_mask: Tensor | None


class MaskRcnnPreTrainedModel(InstanceSegmenter, SavesItsCode, PreTrainedModel):
    """Weights and loading."""

    config: MaskRcnnConfig
    base_model_prefix = "mask_rcnn"
    _no_split_modules = ["FeaturePyramid", "RPNHead", "TwoMLPHead", "MaskRCNNHeads"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_mask_rcnn_weights(module)
        if isinstance(module, FeaturePyramid):
            module.init_weights()


class MaskRcnnForInstanceSegmentation(MaskRcnnPreTrainedModel):
    """Mask R-CNN with its losses. What the training loop asks of a model beside `forward` is here too: `segmenter`,
    `normalizers`, and what `InstanceSegmenter` has."""

    def __init__(self, config: MaskRcnnConfig):
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        self.neck = FeaturePyramid(self.backbone.channels, config.hidden_size)
        self.rpn = build_proposals(config)
        self.roi_heads = build_heads(config)
        self.post_init()

    @property
    def segmenter(self) -> "MaskRcnnForInstanceSegmentation":
        """The model itself: nothing is wrapped around it."""
        return self

    @property
    def class_sized(self) -> tuple[str, ...]:
        """Names of the tensors with as many rows for the background, then for every class."""
        heads = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
        return tuple(f"roi_heads.{head}.{part}" for head in heads for part in ("weight", "bias"))

    @property
    def background_first(self) -> bool:
        """Whether the class-sized tensors begin with the background."""
        return True

    @classmethod
    def _config_for(cls, source, settings: dict, id2label: dict[int, str], category_ids) -> MaskRcnnConfig:
        kept = {key: value for key, value in source.config.to_dict().items() if key != "label2id"}
        return MaskRcnnConfig.from_dict({**kept, "id2label": id2label, "category_ids": category_ids})

    def normalizers(self, counts: list[int], most_targets: int = 0, mask_labels=None) -> Normalizers:
        """The number of images: the terms are means over a batch, whose share in a step is its share of images."""
        return Normalizers(images=len(counts))

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> MaskRcnnFeatures:
        """pixel_values (B, 3, H, W), H and W multiples of 32; pixel_mask (B, H, W) with 1 on the image."""
        batch, _, *canvas = pixel_values.shape
        with padding_masked(self.backbone, pixel_mask):
            maps = self.backbone(pixel_values.to(self.dtype)).feature_maps
        with padding_masked(self.neck, pixel_mask):
            maps = self.neck(maps)
        coarsest = maps[-1][..., ::2, ::2]
        if pixel_mask is None:
            sizes = [tuple(canvas)] * batch
        else:
            real = pixel_mask.bool()
            # Where the canvas is no multiple of 64, what is masked by shares of it reaches too far on this map.
            coarsest = coarsest * real[:, None, ::64, ::64].to(coarsest)
            sizes = [tuple(size) for size in torch.stack([real[:, :, 0].sum(1), real[:, 0].sum(1)], 1).tolist()]
        named = dict(zip((*POOLED, "4"), (*maps, coarsest), strict=True))
        pooled = {name: extend_edges(named[name], pixel_mask) for name in POOLED}
        return MaskRcnnFeatures(named, pooled, ImageList(pixel_values, sizes), pixel_mask)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        normalizers: Normalizers | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SegmenterOutput | tuple:
        """
        pixel_values (B, 3, H, W), H and W multiples of 32, normalized by the image processor; pixel_mask (B, H, W), 1
        on the image, 0 on padding; mask_labels: per image (G, H, W) bool at the padded input size, masks without a
        pixel are left out; class_labels: per image (G,) int in 0..K-1. `normalizers` is for the training loop: the
        images of the whole step. Raises UserError for labels that do not fit the masks or the classes.

        With labels there is a loss, for which anchors and proposals are sampled from torch's global generator; without
        labels, or in evaluation mode, there are detections, see `_detections`.
        """
        features = self.encode(pixel_values, pixel_mask)
        losses, found = None, {}
        if mask_labels is not None:
            if class_labels is None:
                raise UserError("mask_labels need class_labels beside them.")
            losses = self._losses(features, mask_labels, class_labels, normalizers)
        if mask_labels is None or not self.training:
            found = self._detections(features)
        loss = None if losses is None else torch.stack(list(losses.values())).sum()
        return self.returned(SegmenterOutput(loss=loss, losses=losses, **found), return_dict)

    @contextmanager
    def _heads(self, training: bool, pixel_mask: Tensor | None) -> Iterator[None]:
        """The heads take their path with a loss, or that with detections; they hold no layer that differs otherwise."""
        before = self.rpn.training, self.roi_heads.training
        self.rpn.training = self.roi_heads.training = training
        try:
            with padding_masked(self.rpn.head, pixel_mask):
                yield
        finally:
            self.rpn.training, self.roi_heads.training = before

    def _losses(
        self,
        features: MaskRcnnFeatures,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        normalizers: Normalizers | None,
    ) -> dict[str, Tensor]:
        targets = self._targets(features.images, mask_labels, class_labels)
        with self._heads(True, features.pixel_mask):
            proposals, losses = self.rpn(features.images, features.maps, targets)
            _, more = self.roi_heads(features.pooled, proposals, features.images.image_sizes, targets)
        count = None if normalizers is None else normalizers.images
        share = 1.0 if count is None else len(targets) / count
        return {name.removeprefix("loss_"): share * value.float() for name, value in {**losses, **more}.items()}

    def _targets(
        self, images: ImageList, mask_labels: list[Tensor], class_labels: list[Tensor]
    ) -> list[dict[str, Tensor]]:
        """What torchvision's heads compare with: boxes around the masks, classes from 1 on, masks."""
        check_labels(class_labels, mask_labels, self.config.num_labels)
        device, targets = images.tensors.device, []
        for masks, labels in zip(mask_labels, class_labels, strict=True):
            masks, labels = masks.to(device).bool(), labels.to(device).long()
            seen = masks.flatten(1).any(1)
            masks, labels = masks[seen], labels[seen]
            targets.append({"boxes": tight_boxes(masks).float(), "labels": labels + 1, "masks": masks})
        return targets

    def _detections(self, features: MaskRcnnFeatures) -> dict[str, Tensor]:
        """Fields of the output, float32, for N = `detections_per_image` places, best detections first, the rest empty.

        class_scores (B, N, K): the final score in the column of the detection's class, -1 in the others and in empty
        places. boxes (B, N, 4): within the image, zeros in empty places. roi_mask_logits (B, N, K, 28, 28): the mask of
        the detection's class, the same in all columns (a view). masks_queries_logits (B, N, H/4, W/4): these pasted on
        the padded input, -13.8 outside the box.
        """
        with self._heads(False, features.pixel_mask):
            proposals, _ = self.rpn(features.images, features.maps)
            found, _ = self.roi_heads(features.pooled, proposals, features.images.image_sizes)
        pixels, places, classes = features.images.tensors, self.config.detections_per_image, self.config.num_labels
        side = 2 * self.config.mask_pool_size
        size = [-(-length // MASK_STRIDE) for length in pixels.shape[-2:]]
        values = pixels.new_zeros((), dtype=torch.float32)
        scores = values.new_full((len(found), places, classes), NO_DETECTION)
        boxes = values.new_zeros((len(found), places, 4))
        masks = values.new_zeros((len(found), places, side, side))
        pasted = values.new_zeros((len(found), places, *size))
        for index, one in enumerate(found):
            count = len(one["scores"])
            scores[index, torch.arange(count, device=scores.device), one["labels"] - 1] = one["scores"]
            boxes[index, :count] = one["boxes"]
            masks[index, :count] = one["masks"][:, 0]
            pasted[index, :count] = paste_masks(masks[index, :count], one["boxes"] / MASK_STRIDE, size)
        regions = masks.logit(PROBABILITY_EPS)[:, :, None].expand(-1, -1, classes, -1, -1)
        return {
            "class_scores": scores,
            "masks_queries_logits": pasted.logit(PROBABILITY_EPS),
            "boxes": boxes,
            "roi_mask_logits": regions,
        }
