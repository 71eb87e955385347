"""Configuration of UPLVP models: a query segmenter and how prompts and kernel supervision act on it."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_base import StrictConfigMixin

MATCHING = ("cosine", "sequential", "random", "none")
POOLING = ("mask", "box")


@strict
class UplvpConfig(StrictConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`UplvpForPreTraining`] and [`UplvpForInstanceSegmentation`].

    Args:
        segmenter_config (`dict` or `PreTrainedConfig`, *optional*, defaults to `Mask2FormerConfig()`):
            The query segmenter. Its `id2label` is always replaced by the one given here.
        category_ids (`list[int]`, *optional*, defaults to `[1, 2, ..., num_labels]`):
            Original category id of every class, so that results leave with the ids of the data set.
        class_agnostic (`bool`, *optional*, defaults to `False`):
            Whether the single class stands for "any object" (labels are then collapsed to class 0).
        num_prompts (`int`, *optional*, defaults to 20):
            Most prompts a picture; the best by score are kept (SP keeps 20 masks a picture).
        prompt_matching (`str`, *optional*, defaults to `"cosine"`):
            `cosine` (SP eq. 2: each query takes the prompt of largest cosine similarity), `sequential` (equal runs of
            queries take the prompts in order, as in the authors' released recipe), `random` or `none` (no prompts:
            pre-training on pseudo masks only).
        prompt_pooling (`str`, *optional*, defaults to `"mask"`):
            `mask` (average of the feature under the mask) or `box` (under its tight box, as in the released code).
        prompt_drop (`float`, *optional*, defaults to 0.05):
            Probability that a query of a picture gets no prompt. 0.05 for Mask2Former and QueryInst, 0.1 for K-Net.
        kernel_supervision_weight (`float`, *optional*, defaults to 1.0):
            Weight of the cosine loss between queries and prompts (SP eq. 3); 0 switches it off.

    Raises:
        ValueError: for a keyword that is not a setting (the nearest one is named), an unknown choice, a number out of
            range, or `category_ids` of another length than the classes.

    Example:

    ```python
    >>> from uplvp_hf import UplvpConfig, UplvpForInstanceSegmentation

    >>> config = UplvpConfig(id2label={0: "cat", 1: "dog"}, segmenter_config={"model_type": "mask2former"})
    >>> model = UplvpForInstanceSegmentation(config)
    ```
    """

    model_type = "uplvp"
    sub_configs_defaults = {"segmenter_config": SubConfigSpec(config_class=AutoConfig, model_type="mask2former")}

    segmenter_config: dict | PreTrainedConfig | None = None
    category_ids: list[int] | tuple[int, ...] | None = None
    class_agnostic: bool = False
    num_prompts: int = 20
    prompt_matching: str = "cosine"
    prompt_pooling: str = "mask"
    prompt_drop: float = 0.05
    kernel_supervision_weight: float | int = 1.0

    def __post_init__(self, **kwargs):
        if kwargs.get("num_labels") is None and self.id2label is None and kwargs.get("label2id") is None:
            segmenter = self.segmenter_config
            names = segmenter.get("id2label") if isinstance(segmenter, dict) else getattr(segmenter, "id2label", None)
            self.id2label = dict(names) if names else None
        super().__post_init__(**kwargs)
        self.sync_classes(self.id2label, self.category_ids)
        self._check_settings()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in `StrictConfigMixin`; other classes given by keyword (`num_labels`, `id2label`) also drop the stored
        `category_ids`."""
        config_dict = dict(config_dict)
        if "category_ids" not in kwargs and any(kwargs.get(key) is not None for key in ("num_labels", "id2label")):
            config_dict.pop("category_ids", None)
        return super().from_dict(config_dict, **kwargs)

    def sync_classes(self, id2label: dict[int, str], category_ids: list[int] | None = None) -> None:
        """Sets the classes here and in the segmenter. `id2label` maps 0..K-1 to names; `category_ids` has K ids."""
        self.id2label = {int(key): str(name) for key, name in id2label.items()}
        self.label2id = {name: key for key, name in self.id2label.items()}
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label must map 0..{len(self.id2label) - 1}, got the keys {sorted(self.id2label)}.")
        if len(self.label2id) != len(self.id2label):
            names = list(self.id2label.values())
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"Two classes have the same name: {', '.join(twice)}.")
        ids = list(category_ids) if category_ids is not None else [key + 1 for key in self.id2label]
        if len(ids) != len(self.id2label) or len(set(ids)) != len(ids):
            raise ValueError(f"category_ids must hold {len(self.id2label)} different ids, one a class, got {ids}.")
        self.category_ids = ids
        if self.segmenter_config is not None:
            self.segmenter_config.id2label = dict(self.id2label)
            self.segmenter_config.label2id = dict(self.label2id)

    def _check_settings(self) -> None:
        if self.prompt_matching not in MATCHING:
            raise ValueError(f"prompt_matching must be one of {', '.join(MATCHING)}, got `{self.prompt_matching}`.")
        if self.prompt_pooling not in POOLING:
            raise ValueError(f"prompt_pooling must be one of {', '.join(POOLING)}, got `{self.prompt_pooling}`.")
        if not 0 <= self.prompt_drop <= 1:
            raise ValueError(f"prompt_drop is a probability, got {self.prompt_drop}.")
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {self.num_prompts}.")
        if self.kernel_supervision_weight < 0:
            raise ValueError(f"kernel_supervision_weight must not be negative, got {self.kernel_supervision_weight}.")


__all__ = ["UplvpConfig"]
