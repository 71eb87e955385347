"""What our configurations share: keywords that are no setting are refused, files of later versions are still read."""

import difflib

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .errors import UserError

logger = logging.get_logger(__name__)

# Keyword arguments that transformers itself hands to a configuration, beside the declared fields.
COMMON_KEYS = frozenset(
    {
        "model_type",
        "label2id",
        "num_labels",
        "name_or_path",
        "auto_map",
        "attn_implementation",
        "torch_dtype",
        "custom_pipelines",
        "output_attentions",
        "finetuning_task",
        "task_specific_params",
        "revision",
        "experts_implementation",
        "quantization_config",
        "is_decoder",
        "tie_encoder_decoder",
        "add_cross_attention",
        "pruned_heads",
        "torchscript",
        "use_bfloat16",
    }
)


class StrictConfigMixin:
    """Goes before `PreTrainedConfig` in the bases of a configuration class, which is also decorated with `@strict`.

    A keyword that is not a field raises UserError naming the nearest one; transformers would store it silently.
    """

    # Left out of the predictions of transformers' `Trainer`, which then begin with the class logits.
    keys_to_ignore_at_inference = [
        "losses", "auxiliary_logits", "roi_mask_logits", "queries", "hidden_states", "attentions",
    ]  # fmt: skip

    def __post_init__(self, **kwargs):
        for key in kwargs:
            if not self._is_known(key):
                near = difflib.get_close_matches(key, [*self.__dataclass_fields__, *COMMON_KEYS], n=1)
                hint = f" Did you mean `{near[0]}`?" if near else ""
                raise UserError(f"{type(self).__name__} has no setting `{key}`.{hint}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, for configurations read from a file, with one allowance: keys that this version does not
        know, which a later version of transformers may have written, are left out with a warning."""
        if not cls.__module__.startswith("transformers_modules."):
            # They name the folder's own code. The installed package is used in its place, and transformers would ask
            # for trust_remote_code where both are there.
            config_dict = {key: config_dict[key] for key in config_dict if key not in ("auto_map", "custom_pipelines")}
        unknown = [key for key in config_dict if not cls._is_known(key)]
        if unknown:
            logger.warning_once(f"Settings of a configuration that {cls.__name__} does not know: {', '.join(unknown)}.")
        return super().from_dict({key: config_dict[key] for key in config_dict if key not in unknown}, **kwargs)

    def to_dict(self) -> dict:
        """As in transformers, without `use_cache`, which its `Trainer` sets on every configuration."""
        return {key: value for key, value in super().to_dict().items() if key != "use_cache"}

    @classmethod
    def _is_known(cls, key: str) -> bool:
        return key in cls.__dataclass_fields__ or key in cls.attribute_map or key in COMMON_KEYS or key.startswith("_")

    def check_shown(self) -> None:
        """Raises UserError for a `default_threshold` or `duplicate_iou` outside of 0 to 1."""
        for name in ("default_threshold", "duplicate_iou"):
            value = getattr(self, name, None)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} must lie between 0 and 1, got {value}.")

    def check(self, least_one: tuple[str, ...] = (), shares: tuple[str, ...] = (), **choices: tuple[str, ...]) -> None:
        """Raises UserError for a number below 1, a share outside of 0 to 1, and a word that is no choice."""
        for name in least_one:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got `{getattr(self, name)}`.")


@strict
class OwnSegmenterConfig(StrictConfigMixin, PreTrainedConfig):
    r"""
    What the configurations of all segmenters have that transformers does not.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to a ResNet-50):
            Any transformers backbone or `TimmBackboneConfig` that gives four maps with strides 4, 8, 16 and 32. A
            `timm_kwargs` dict on the latter is handed to timm.
        hidden_size (`int`, *optional*, defaults to 256): Channels of the pyramid and of the heads.

    Raises UserError for a keyword that is not a setting (the nearest one is named) or a number out of range.

    Example:

    ```python
    >>> from uplvp_hf import KNetConfig, KNetForInstanceSegmentation

    >>> model = KNetForInstanceSegmentation(KNetConfig(id2label={0: "cat", 1: "dog"}))
    ```
    """

    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="resnet",
            init_kwargs={"out_features": ["stage1", "stage2", "stage3", "stage4"]},
        )
    }

    backbone_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 256


@strict
class QuerySegmenterConfig(OwnSegmenterConfig):
    r"""
    What the configurations of K-Net and QueryInst share.

    Args:
        num_queries (`int`, *optional*, defaults to 100): Queries: kernels or learned proposals, one an instance.
        num_stages (`int`, *optional*): Rounds of updates.
        num_attention_heads (`int`, *optional*, defaults to 8): Heads of the self-attention over the queries.
        intermediate_size (`int`, *optional*, defaults to 2048): Width of the feed-forward layer.
        num_class_layers (`int`, *optional*, defaults to 1): Linear layers before the class predictor.
        class_weight, class_cost (`float`, *optional*, defaults to 2): Of the focal loss and in the matching.
        focal_alpha, focal_gamma (`float`, *optional*, defaults to 0.25 and 2): Of the focal losses and of their cost.
        text_class_weight, text_class_cost (`float`, *optional*, defaults to 2 and 2):
            Weights of the loss and the matching cost of an optional text class head on the queries.
        prior_probability (`float`, *optional*, defaults to 0.01): Class probability at initialization.
        output_auxiliary_logits (`bool`, *optional*): Whether the output holds the predictions of the earlier layers.
    """

    attribute_map = {"num_hidden_layers": "num_stages"}

    num_queries: int = 100
    num_stages: int = 3
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    num_class_layers: int = 1
    class_weight: float | int = 2.0
    class_cost: float | int = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float | int = 2.0
    text_class_weight: float | int = 2.0
    text_class_cost: float | int = 2.0
    prior_probability: float = 0.01
    output_auxiliary_logits: bool | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check(("num_queries", "num_stages"))
        self.check_divisor("num_attention_heads", self.num_attention_heads)
        if not 0 < self.prior_probability < 1:
            raise UserError(f"prior_probability must lie between 0 and 1, got {self.prior_probability}.")

    def check_divisor(self, name: str, divisor: int) -> None:
        if self.hidden_size % divisor:
            raise UserError(f"hidden_size {self.hidden_size} is not a multiple of {name}: {divisor}.")


def checked_category_ids(id2label: dict[int, str], category_ids: list[int] | None) -> list[int]:
    """The original ids of the classes, 1, 2, ... when not given.

    Raises UserError for classes that are not numbered 0..K-1, two of one name, and other than K different ids.
    """
    if sorted(id2label) != list(range(len(id2label))):
        raise UserError(f"id2label must map 0..{len(id2label) - 1}, got the keys {sorted(id2label)}.")
    names = list(id2label.values())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"Two classes have the same name: {', '.join(twice)}.")
    ids = list(category_ids) if category_ids is not None else [key + 1 for key in id2label]
    if len(ids) != len(id2label) or len(set(ids)) != len(ids):
        raise UserError(f"category_ids must hold {len(id2label)} different ids, one a class, got {ids}.")
    return ids
