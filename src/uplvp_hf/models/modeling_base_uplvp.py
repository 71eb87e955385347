"""What both UPLVP models share beside the method: output, loading, wrapping and transfer of checkpoints."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_uplvp import UplvpConfig
from .errors import UserError
from .losses import LayerOutput
from .modeling_knet import KNetForInstanceSegmentation
from .modeling_mask2former import Mask2FormerSegmenter
from .modeling_queryinst import QueryInstForInstanceSegmentation
from .prompts import PromptFusion
from .remote_code import SavesItsCode
from .text_head import TextHead, TextHeads
from .transfer import TransferReport, transfer_weights

SEGMENTERS = {
    "mask2former": Mask2FormerSegmenter,
    "knet": KNetForInstanceSegmentation,
    "queryinst": QueryInstForInstanceSegmentation,
}

# Settings of the method, and what `from_pretrained` needs to find a configuration.
_SETTINGS = frozenset(UplvpConfig.__dataclass_fields__) - frozenset(PreTrainedConfig.__dataclass_fields__)
_WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")


@dataclass
class UplvpOutput(ModelOutput):
    """Output of both models.

    loss: scalar, the sum of `losses`, with labels only. losses: weighted terms by name. Of the last layer:
    class_queries_logits (B, N, K + 1), the last class being "no object" (Mask2Former), or (B, N, K) for a sigmoid
    (K-Net, QueryInst); class_scores (B, N, K): that sigmoid, which says to post-processing that scores are final;
    masks_queries_logits (B, N, H/4, W/4) on the padded input; boxes (B, N, 4) x1, y1, x2, y2 in its pixels and
    roi_mask_logits (B, N, K, 28, 28) in these boxes (QueryInst, in place of masks on the image).
    auxiliary_logits: classes, masks and boxes of the earlier layers. queries (B, N, D): updated queries, last layer.
    hidden_states: queries that enter the first stage and after each stage, (B, N, D). attentions: self-attention
    weights of every stage, (B, heads, N, N).
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    class_queries_logits: Tensor | None = None
    class_scores: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    boxes: Tensor | None = None
    roi_mask_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    queries: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class UplvpPreTrainedModel(SavesItsCode, PreTrainedModel):
    """Weights, loading and transfer, common to both models."""

    config: UplvpConfig
    base_model_prefix = "uplvp"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
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
        self.transfer_report: TransferReport | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear) and module is getattr(self, "prompt_projection", None):
            # Orthogonal rows: cosines of projected prompts stay close to those of the features (equal where the
            # queries have no fewer channels), so cosine matching means something from the first step.
            init.orthogonal_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (PromptFusion, TextHead, TextHeads)):
            module.init_weights()

    @classmethod
    def is_custom_code(cls) -> bool:
        """As for `Mask2FormerSegmenter`."""
        return False

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
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in _SETTINGS}
        segmenter = SEGMENTERS[config.model_type].from_pretrained(name_or_dir, **kwargs)
        parts = [module.config for module in segmenter.modules() if isinstance(module, PreTrainedModel)]
        attention = [(part, part._attn_implementation) for part in parts]
        id2label = dict(segmenter.config.id2label)
        settings.setdefault("category_ids", coco_category_ids(id2label))
        config = UplvpConfig(segmenter_config=segmenter.config, id2label=id2label, **settings)
        model = cls(config, segmenter=segmenter).to(segmenter.dtype)
        # A configuration that takes in another one resets its choice of attention.
        for part, implementation in attention:
            part._attn_implementation = implementation
        return model

    @classmethod
    def from_pretraining(
        cls,
        name_or_dir: str,
        id2label: dict[int, str],
        category_ids: list[int] | None = None,
        class_head: str = "remap",
        **kwargs,
    ) -> "UplvpPreTrainedModel":
        """Loads a checkpoint, of either model or of a segmenter as transformers has it, for other classes in one call.

        Tensors of equal shape are kept. Class-sized tensors get the row of the class of the same name where the
        checkpoint knows it (`class_head="remap"`) and are re-initialized otherwise, or always (`"new"`); `"spread"` is
        "remap", with the mean of the checkpoint's rows for classes that it does not know. What happened is in
        `model.transfer_report`; print it. `kwargs` that are settings of `UplvpConfig` replace those of the checkpoint,
        the others go to `from_pretrained`.
        """
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in _SETTINGS}
        kwargs.setdefault("use_safetensors", True)  # pickles can run code
        found, _ = UplvpConfig.get_config_dict(name_or_dir, **_where(kwargs))
        if found.get("model_type") == UplvpConfig.model_type:
            config = UplvpConfig.from_pretrained(name_or_dir, **_where(kwargs))
            source = cls._source_class(config).from_pretrained(name_or_dir, config=config, **kwargs)
        else:
            source = cls.from_segmenter_pretrained(name_or_dir, **kwargs)
        config = UplvpConfig.from_dict({**source.config.to_dict(), "class_agnostic": False, **settings})
        config.sync_classes(id2label, category_ids)
        model = cls(config).to(source.dtype)
        model.transfer_report = transfer_weights(source, model, class_head)
        return model

    @staticmethod
    def _source_class(config: UplvpConfig) -> type["UplvpPreTrainedModel"]:
        """The model that a checkpoint was saved from; the plain one when it does not say."""
        models = {model.__name__: model for model in UplvpPreTrainedModel.__subclasses__()}
        names = [name for name in config.architectures or [] if name in models]
        return models[names[0] if names else "UplvpForInstanceSegmentation"]

    def _segmenter_is(self, trait: str) -> bool:
        """Mask2Former differs from the others: `predicts_first` (before any update of the queries),
        `shares_class_head` (one for all layers), `has_no_object` (a class of its own)."""
        return getattr(self.segmenter, trait, False)

    def set_progress(self, epoch: float) -> None:
        """Tells how many epochs are done, before a step. Only pre-training depends on it."""

    def _decode(self, features, queries: Tensor, inject, output_attentions: bool | None) -> list[LayerOutput]:
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        return self.segmenter.decode(features, queries, inject, output_attentions=bool(wanted))

    def _output(
        self,
        layers: list[LayerOutput],
        features,
        queries: Tensor,
        losses: dict | None,
        output_hidden_states: bool | None,
    ) -> UplvpOutput:
        last, hidden = layers[-1], None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            first = () if self._segmenter_is("predicts_first") else (queries,)
            hidden = (*first, *(layer.queries for layer in layers))
        attentions = tuple(layer.attentions for layer in layers if layer.attentions is not None)
        return UplvpOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            losses=losses,
            class_queries_logits=last.class_logits,
            class_scores=None if self._segmenter_is("has_no_object") else last.class_logits.float().sigmoid(),
            masks_queries_logits=last.mask_logits,
            boxes=getattr(last, "boxes", None),
            roi_mask_logits=getattr(last, "roi_mask_logits", None),
            auxiliary_logits=[_auxiliary(layer) for layer in layers[:-1]],
            queries=last.queries,
            hidden_states=hidden,
            attentions=attentions or None,
        )

    def _labels(self, mask_labels: list[Tensor], class_labels: list[Tensor] | None) -> list[Tensor]:
        if self.config.class_agnostic:
            return [torch.zeros(len(masks), dtype=torch.int64) for masks in mask_labels]
        if class_labels is None:
            raise UserError("mask_labels need class_labels beside them, unless the model is class-agnostic.")
        return class_labels


def coco_category_ids(id2label: dict[int, str]) -> list[int] | None:
    """COCO's ids of its 80 instance classes, 1 to 90 with gaps, if these are they in order; otherwise None."""
    if len(id2label) != 80 or (id2label[0], id2label[79]) != ("person", "toothbrush"):
        return None
    return [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def _auxiliary(layer: LayerOutput) -> dict[str, Tensor]:
    values = {"class_queries_logits": layer.class_logits, "masks_queries_logits": layer.mask_logits}
    values["boxes"] = getattr(layer, "boxes", None)
    return {name: value for name, value in values.items() if value is not None}


def _where(kwargs: dict) -> dict:
    return {key: kwargs[key] for key in _WHERE if key in kwargs}
