"""What both UPLVP models share beside the method: the choice of a segmenter, loading and wrapping of checkpoints."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, initialization as init

from .configuration_uplvp import UplvpConfig
from .errors import UserError
from .kernel_targets import KernelSupervision, RunningMean
from .modeling_eomt import EomtDinov3Segmenter, EomtSegmenter
from .modeling_knet import KNetForInstanceSegmentation
from .modeling_mask2former import Mask2FormerSegmenter
from .modeling_queryinst import QueryInstForInstanceSegmentation
from .modeling_rf_detr import RfDetrSegmenter
from .modeling_vit_mask_decoder import VitMaskDecoder
from .prompts import PromptFusion
from .query_segmenter import InstanceSegmenter
from .remote_code import SavesItsCode
from .text_head import TextHead, TextHeads

SEGMENTERS = {
    "mask2former": Mask2FormerSegmenter,
    "knet": KNetForInstanceSegmentation,
    "queryinst": QueryInstForInstanceSegmentation,
    "eomt": EomtSegmenter,
    "eomt_dinov3": EomtDinov3Segmenter,
    "vit_mask_decoder": VitMaskDecoder,
    "rf_detr": RfDetrSegmenter,
}

# What `from_pretrained` needs to find a configuration.
_WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")


class UplvpPreTrainedModel(InstanceSegmenter, SavesItsCode, PreTrainedModel):
    """Weights, loading and transfer, common to both models."""

    config: UplvpConfig
    base_model_prefix = "uplvp"
    _no_split_modules = sorted({name for segmenter in SEGMENTERS.values() for name in segmenter._no_split_modules})

    def __init__(self, config: UplvpConfig, segmenter: PreTrainedModel | None = None):
        if config.id2label != config.segmenter_config.id2label:  # replaced by `from_pretrained(..., id2label=...)`
            same_number = len(config.category_ids) == len(config.id2label)
            config.sync_classes(config.id2label, config.category_ids if same_number else None)
        super().__init__(config)
        name = config.segmenter_config.model_type
        if name not in SEGMENTERS:
            raise UserError(f"segmenter_config is a `{name}`; UPLVP works on: {', '.join(SEGMENTERS)}.")
        self.segmenter = segmenter if segmenter is not None else SEGMENTERS[name](config.segmenter_config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear) and module is getattr(self, "prompt_projection", None):
            # Orthogonal rows: cosines of projected prompts stay close to those of the features (equal where the
            # queries have no fewer channels), so cosine matching means something from the first step.
            init.orthogonal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (PromptFusion, TextHead, TextHeads, KernelSupervision, RunningMean)):
            module.init_weights()

    @classmethod
    def from_segmenter_pretrained(cls, name_or_dir: str, **kwargs) -> "UplvpPreTrainedModel":
        """Wraps a segmenter checkpoint, such as an official `Mask2FormerForUniversalSegmentation`, in one call.

        `kwargs` that are settings of `UplvpConfig` go there, the others to `from_pretrained` of the segmenter (for
        example `revision`). The classes are those of the checkpoint, with COCO's own ids if they are its 80.
        """
        kwargs.setdefault("use_safetensors", True)  # pickles can run code
        config = AutoConfig.from_pretrained(name_or_dir, **_where(kwargs))
        if config.model_type not in SEGMENTERS:
            raise UserError(
                f"{name_or_dir} holds a `{config.model_type}` model; UPLVP works on: {', '.join(SEGMENTERS)}."
            )
        settings = cls._take_settings(kwargs)
        segmenter = SEGMENTERS[config.model_type].from_pretrained(name_or_dir, **kwargs)
        parts = [module.config for module in segmenter.modules() if isinstance(module, PreTrainedModel)]
        attention = [(part, part._attn_implementation) for part in parts]
        id2label = distinct_names(segmenter.config.id2label)
        settings.setdefault("category_ids", coco_category_ids(id2label))
        config = UplvpConfig(segmenter_config=segmenter.config, id2label=id2label, **settings)
        model = cls(config, segmenter=segmenter).to(segmenter.dtype)
        # A configuration that takes in another one resets its choice of attention.
        for part, implementation in attention:
            part._attn_implementation = implementation
        return model

    @classmethod
    def _take_settings(cls, kwargs: dict) -> dict:
        """Takes the settings of the method out of keyword arguments."""
        own = frozenset(cls.config_class.__dataclass_fields__) - frozenset(PreTrainedConfig.__dataclass_fields__)
        return {key: kwargs.pop(key) for key in list(kwargs) if key in own}

    @classmethod
    def _source(cls, name_or_dir: str, kwargs: dict) -> tuple["UplvpPreTrainedModel", dict]:
        """A checkpoint of either model, or of a segmenter as transformers has it, and settings of `UplvpConfig`."""
        settings = cls._take_settings(kwargs)
        kwargs.setdefault("use_safetensors", True)  # pickles can run code
        found, _ = UplvpConfig.get_config_dict(name_or_dir, **_where(kwargs))
        kinds = {kind.config_class.model_type: kind.config_class for kind in UplvpPreTrainedModel.__subclasses__()}
        if found.get("model_type") not in kinds:
            return cls.from_segmenter_pretrained(name_or_dir, **kwargs), settings
        config = kinds[found["model_type"]].from_pretrained(name_or_dir, **_where(kwargs))
        return cls._source_class(config).from_pretrained(name_or_dir, config=config, **kwargs), settings

    @classmethod
    def _config_for(cls, source, settings: dict, id2label: dict[int, str], category_ids) -> UplvpConfig:
        known = {key: value for key, value in source.config.to_dict().items() if UplvpConfig._is_known(key)}
        known.pop("model_type")  # a few-shot model's, of which the settings of the method are taken
        config = UplvpConfig.from_dict({**known, "class_agnostic": False, **settings})
        config.sync_classes(id2label, category_ids)
        return config

    @staticmethod
    def _source_class(config: UplvpConfig) -> type["UplvpPreTrainedModel"]:
        """The model that a checkpoint was saved from; the plain one when it does not say."""
        models = {model.__name__: model for model in UplvpPreTrainedModel.__subclasses__()}
        names = [name for name in config.architectures or [] if name in models]
        return models[names[0] if names else "UplvpForInstanceSegmentation"]

    def options(self, asked: dict) -> dict:
        """What `forward` was asked to return, as arguments of the segmenter's own."""
        names = ("output_hidden_states", "output_attentions", "return_dict")
        return {**asked, **{name: self.wants(name, asked.get(name)) for name in names}}

    def labels_for(self, mask_labels: list[Tensor], class_labels: list[Tensor] | None) -> list[Tensor]:
        """The class of every mask; "object" for a class-agnostic model."""
        if self.config.class_agnostic:
            return [torch.zeros(len(masks), dtype=torch.int64) for masks in mask_labels]
        return self.segmenter.labels_for(mask_labels, class_labels)


def distinct_names(id2label: dict[int, str]) -> dict[int, str]:
    """The names, with the number behind those that were there before, such as the "N/A" at gaps of COCO's ids."""
    seen: set[str] = set()
    found = {}
    for key, name in id2label.items():
        found[int(key)] = f"{name} {key}" if name in seen else name
        seen.add(name)
    return found


def coco_category_ids(id2label: dict[int, str]) -> list[int] | None:
    """COCO's ids of its 80 instance classes, 1 to 90 with gaps, if these are they in order, or if the classes are
    numbered by these ids (as RF-DETR's are); otherwise None."""
    if len(id2label) == 91 and (id2label.get(1), id2label.get(90)) == ("person", "toothbrush"):
        return list(range(91))
    if len(id2label) != 80 or (id2label[0], id2label[79]) != ("person", "toothbrush"):
        return None
    return [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def _where(kwargs: dict) -> dict:
    return {key: kwargs[key] for key in _WHERE if key in kwargs}
