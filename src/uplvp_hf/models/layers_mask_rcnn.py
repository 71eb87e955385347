"""torchvision's parts of Mask R-CNN, made to leave padding out.

On a batch without padding, with sides that are multiples of 64, they compute what torchvision's do.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from transformers import initialization as init

from .configuration_mask_rcnn import MaskRcnnConfig

STRIDES = (4, 8, 16, 32, 64)
POOLED = ["0", "1", "2", "3"]  # levels that regions are pooled from: all but the coarsest


class ImageAnchors(AnchorGenerator):
    """Anchors at fixed strides; those whose center lies on padding have no area and match nothing.

    torchvision infers the stride of the coarsest map from the sides of the batch, so that it changes with them.
    """

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Per image (A, 4) float32 x1, y1, x2, y2 in pixels of the padded input, level by level."""
        device = feature_maps[0].device
        # Not kept from the constructor, which may have run without storage.
        shapes = zip(self.sizes, self.aspect_ratios, strict=True)
        self.cell_anchors = [self.generate_anchors(size, ratio, device=device) for size, ratio in shapes]
        strides = [[stride, stride] for stride in STRIDES]
        anchors = torch.cat(self.grid_anchors([map_.shape[-2:] for map_ in feature_maps], strides))
        across, down = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
        return [
            anchors.masked_fill(((across >= width) | (down >= height))[:, None], 0.0)
            for height, width in image_list.image_sizes
        ]


class ImageProposals(RegionProposalNetwork):
    """Proposals and their loss from the anchors of `ImageAnchors` that have an area."""

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):
        """As in torchvision. Anchors on padding take no place among the best of a level; without area they are then
        dropped."""
        objectness = objectness.detach().reshape(proposals.shape[:2])
        empty = proposals[..., 2] <= proposals[..., 0]
        objectness = objectness.masked_fill(empty, torch.finfo(objectness.dtype).min)
        return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)

    def assign_targets_to_anchors(self, anchors, targets):
        """As in torchvision; anchors on padding are not sampled, not even as background."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for label, anchor in zip(labels, anchors, strict=True):
            label[anchor[:, 2] <= anchor[:, 0]] = -1.0
        return labels, boxes


class CanvasRoIAlign(MultiScaleRoIAlign):
    """RoIAlign in float32, with the scales of the levels from the padded input: images may be much smaller."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        canvas = tuple(STRIDES[0] * side for side in x[POOLED[0]].shape[-2:])
        pooled = super().forward({name: map_.float() for name, map_ in x.items()}, boxes, [canvas])
        return pooled.to(x[POOLED[0]].dtype)


def build_proposals(config: MaskRcnnConfig) -> ImageProposals:
    """The region proposal network, with torchvision's thresholds where the configuration has none."""
    anchors = ImageAnchors(tuple((size,) for size in config.anchor_sizes), (tuple(config.anchor_ratios),) * 5)
    head = RPNHead(config.hidden_size, len(config.anchor_ratios))
    head.register_forward_hook(_in_float32)
    return ImageProposals(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.sampled_anchors,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(("training", "testing"), config.proposals_before_nms, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), config.proposals, strict=True)),
        nms_thresh=config.proposal_nms_threshold,
    )


def build_heads(config: MaskRcnnConfig) -> RoIHeads:
    """Box and mask head; class 0 is the background."""
    channels, width, classes = config.hidden_size, config.intermediate_size, config.num_labels + 1
    box_predictor = FastRCNNPredictor(width, classes)
    mask_predictor = MaskRCNNPredictor(channels, channels, classes)
    for predictor in (box_predictor, mask_predictor):
        predictor.register_forward_hook(_in_float32)
    return RoIHeads(
        CanvasRoIAlign(POOLED, config.box_pool_size, config.pool_sampling_ratio),
        TwoMLPHead(channels * config.box_pool_size**2, width),
        box_predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.sampled_proposals,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections_per_image,
        mask_roi_pool=CanvasRoIAlign(POOLED, config.mask_pool_size, config.pool_sampling_ratio),
        mask_head=MaskRCNNHeads(channels, (channels,) * config.num_mask_layers, 1),
        mask_predictor=mask_predictor,
    )


def _in_float32(module: nn.Module, inputs: tuple, output):
    """Boxes and losses are computed in float32, whatever the weights or autocast."""
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_in_float32(module, inputs, part) for part in output)


def init_mask_rcnn_weights(module: nn.Module) -> None:
    """torchvision's initial weights of the part `module`, if it is one; biases of the mask predictor are zero here. For
    `_init_weights` of a model."""
    if isinstance(module, RPNHead):
        _each(module, nn.Conv2d, lambda weight: init.normal_(weight, std=0.01))
    elif isinstance(module, (TwoMLPHead, FastRCNNPredictor)):
        for layer in (child for child in module.modules() if isinstance(child, nn.Linear)):
            bound = layer.in_features**-0.5  # torch's own of linear layers
            init.uniform_(layer.weight, -bound, bound)
            init.uniform_(layer.bias, -bound, bound)
    elif isinstance(module, (MaskRCNNHeads, MaskRCNNPredictor)):
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        _each(module, kinds, lambda weight: init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"))


def _each(module: nn.Module, kind: type | tuple[type, ...], start: Callable[[Tensor], object]) -> None:
    for layer in module.modules():
        if isinstance(layer, kind):
            start(layer.weight)
            init.zeros_(layer.bias)
