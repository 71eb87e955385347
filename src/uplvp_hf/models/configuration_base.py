"""What our configurations share: keywords that are no setting are refused, files of later versions are still read."""

import difflib

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

    A keyword that is not a field raises ValueError naming the nearest one; transformers would store it silently.
    """

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

    @classmethod
    def _is_known(cls, key: str) -> bool:
        return key in cls.__dataclass_fields__ or key in cls.attribute_map or key in COMMON_KEYS or key.startswith("_")


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
