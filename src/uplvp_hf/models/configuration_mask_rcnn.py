"""Configuration of Mask R-CNN (arXiv 1703.06870), the baseline without queries."""

from huggingface_hub.dataclasses import strict

from .configuration_base import OwnSegmenterConfig, checked_category_ids
from .errors import UserError

CLASS_KEYS = ("num_labels", "id2label", "label2id", "category_ids")


@strict
class MaskRcnnConfig(OwnSegmenterConfig):
    r"""
    Configuration of [`MaskRcnnForInstanceSegmentation`]. Defaults are those of torchvision's `maskrcnn_resnet50_fpn`.
    `backbone_config` and `hidden_size` are those of [`OwnSegmenterConfig`].

    Args:
        category_ids (`list[int]`, *optional*, defaults to `[1, 2, ..., num_labels]`):
            Original category id of every class, so that results leave with the ids of the dataset.
        intermediate_size (`int`, *optional*, defaults to 1024): Width of the two linear layers of the box head.
        num_mask_layers (`int`, *optional*, defaults to 4): 3 x 3 convolutions of the mask head.
        box_pool_size (`int`, *optional*, defaults to 7): Side of the pooled regions of the box head, in cells.
        mask_pool_size (`int`, *optional*, defaults to 14):
            Side of the pooled regions of the mask head, in cells. Masks come out at twice this side.
        pool_sampling_ratio (`int`, *optional*, defaults to 2): Samples a side in every cell of a pooled region.
        anchor_sizes (`list[int]`, *optional*, defaults to `[32, 64, 128, 256, 512]`):
            Root of the area of the anchors on the maps with strides 4, 8, 16, 32 and 64, in pixels.
        anchor_ratios (`list[float]`, *optional*, defaults to `[0.5, 1.0, 2.0]`): Height over width of the anchors.
        proposals_before_nms (`list[int]`, *optional*, defaults to `[2000, 1000]`),
        proposals (`list[int]`, *optional*, defaults to `[2000, 1000]`):
            Proposals a level before, and an image after, their non-maximum suppression, in training and at inference.
        proposal_nms_threshold (`float`, *optional*, defaults to 0.7): IoU above which a worse proposal is dropped.
        sampled_anchors (`int`, *optional*, defaults to 256): Anchors an image in the loss, at most half of them on
            objects.
        sampled_proposals (`int`, *optional*, defaults to 512): Proposals an image in the loss, at most a quarter of
            them on objects.
        score_threshold (`float`, *optional*, defaults to 0.05): Detections of a lower score are left out.
        nms_threshold (`float`, *optional*, defaults to 0.5): IoU above which a worse detection of a class is dropped.
        detections_per_image (`int`, *optional*, defaults to 100): Most detections an image.
        default_threshold (`float`, *optional*): As in [`UplvpConfig`].
    """

    model_type = "mask_rcnn"
    category_ids: list[int] | tuple[int, ...] | None = None
    intermediate_size: int = 1024
    num_mask_layers: int = 4
    box_pool_size: int = 7
    mask_pool_size: int = 14
    pool_sampling_ratio: int = 2
    anchor_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: list[float] | tuple[float, ...] = (0.5, 1.0, 2.0)
    proposals_before_nms: list[int] | tuple[int, ...] = (2000, 1000)
    proposals: list[int] | tuple[int, ...] = (2000, 1000)
    proposal_nms_threshold: float = 0.7
    sampled_anchors: int = 256
    sampled_proposals: int = 512
    score_threshold: float | int = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100
    default_threshold: float | int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("anchor_sizes", "anchor_ratios", "proposals_before_nms", "proposals"):
            setattr(self, name, list(getattr(self, name)))
        self.category_ids = checked_category_ids(self.id2label, self.category_ids)
        self._check_settings()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in `StrictConfigMixin`; other classes given by keyword (`num_labels`, `id2label`) replace all that is
        stored about classes."""
        given = {key: kwargs.pop(key) for key in CLASS_KEYS if kwargs.get(key) is not None}
        if given:
            config_dict = {key: value for key, value in config_dict.items() if key not in CLASS_KEYS} | given
        return super().from_dict(config_dict, **kwargs)

    @property
    def most_targets(self) -> int:
        """None: there are no queries to supervise. The training loop asks every model."""
        return 0

    def _check_settings(self) -> None:
        self.check_shown()
        self.check(
            (
                "hidden_size", "intermediate_size", "num_mask_layers", "box_pool_size", "mask_pool_size",
                "pool_sampling_ratio", "sampled_anchors", "sampled_proposals", "detections_per_image",
            ),
            shares=("proposal_nms_threshold", "score_threshold", "nms_threshold"),
        )  # fmt: skip
        for name, length in (("anchor_sizes", 5), ("proposals_before_nms", 2), ("proposals", 2)):
            if len(getattr(self, name)) != length or min(getattr(self, name)) < 1:
                raise UserError(f"{name} must hold {length} numbers from 1 on, got {getattr(self, name)}.")
        if not self.anchor_ratios or min(self.anchor_ratios) <= 0:
            raise UserError(f"anchor_ratios must be positive numbers, got {self.anchor_ratios}.")
