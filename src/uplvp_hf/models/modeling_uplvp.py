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

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_uplvp import UplvpConfig
from .losses import Draw, LayerOutput, Normalizers, kernel_supervision
from .matching import match_prompts
from .modeling_mask2former import Mask2FormerSegmenter, SegmenterFeatures
from .prompts import Prompts, inject_prompts, pool_prompts
from .transfer import TransferReport, transfer_weights

SEGMENTERS = {"mask2former": Mask2FormerSegmenter}

# Settings of the method, and what `from_pretrained` needs to find a configuration.
_SETTINGS = frozenset(UplvpConfig.__dataclass_fields__) - frozenset(PreTrainedConfig.__dataclass_fields__)
_WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")


@dataclass
class UplvpOutput(ModelOutput):
    """Output of both models.

    loss: scalar, the sum of `losses`, with labels only. losses: weighted terms by name. class_queries_logits
    (B, N, K + 1), the last class is "no object"; masks_queries_logits (B, N, H/4, W/4) on the padded input: of the
    last layer. auxiliary_logits: the same two of the earlier layers. queries (B, N, D): updated queries, last layer.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    queries: Tensor | None = None


class UplvpPreTrainedModel(PreTrainedModel):
    """Weights, loading and transfer, common to both models."""

    config: UplvpConfig
    base_model_prefix = "uplvp"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = Mask2FormerSegmenter._no_split_modules

    def __init__(self, config: UplvpConfig, segmenter: PreTrainedModel | None = None):
        if config.id2label != config.segmenter_config.id2label:  # replaced by `from_pretrained(..., id2label=...)`
            same_number = len(config.category_ids) == len(config.id2label)
            config.sync_classes(config.id2label, config.category_ids if same_number else None)
        super().__init__(config)
        name = config.segmenter_config.model_type
        if name not in SEGMENTERS:
            raise ValueError(f"segmenter_config is a `{name}`; UPLVP works on: {', '.join(SEGMENTERS)}.")
        self.segmenter = segmenter if segmenter is not None else SEGMENTERS[name](config.segmenter_config)
        self.transfer_report: TransferReport | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear) and module is getattr(self, "prompt_projection", None):
            # Orthogonal: prompts keep their angles, so cosine matching means something from the first step.
            init.orthogonal_(module.weight)
            init.zeros_(module.bias)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As for `Mask2FormerSegmenter`."""
        return False

    @classmethod
    def from_segmenter_pretrained(cls, name_or_dir: str, **kwargs) -> "UplvpPreTrainedModel":
        """Wraps a segmenter checkpoint, such as an official `Mask2FormerForUniversalSegmentation`, in one call.

        `kwargs` that are settings of `UplvpConfig` go there, the others to `from_pretrained` of the segmenter (for
        example `revision`). The classes are those of the checkpoint.
        """
        config = AutoConfig.from_pretrained(name_or_dir, **_where(kwargs))
        if config.model_type not in SEGMENTERS:
            raise ValueError(
                f"{name_or_dir} holds a `{config.model_type}` model; UPLVP works on: {', '.join(SEGMENTERS)}."
            )
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in _SETTINGS}
        segmenter = SEGMENTERS[config.model_type].from_pretrained(name_or_dir, **kwargs)
        parts = [module.config for module in segmenter.modules() if isinstance(module, PreTrainedModel)]
        attention = [(part, part._attn_implementation) for part in parts]
        config = UplvpConfig(segmenter_config=segmenter.config, id2label=dict(segmenter.config.id2label), **settings)
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
        """Loads a checkpoint of either model for another set of classes, in one call.

        Tensors of equal shape are kept. Class-sized tensors get the row of the class of the same name where the
        checkpoint knows it (`class_head="remap"`) and are re-initialised otherwise, or always (`"new"`). What happened
        is in `model.transfer_report`; print it. `kwargs` that are settings of `UplvpConfig` replace those of the
        checkpoint, the others go to `from_pretrained`.
        """
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in _SETTINGS}
        config = UplvpConfig.from_pretrained(name_or_dir, **_where(kwargs))
        source = cls._source_class(config).from_pretrained(name_or_dir, config=config, **kwargs)
        config = UplvpConfig.from_dict({**source.config.to_dict(), "class_agnostic": False, **settings})
        config.sync_classes(id2label, category_ids)
        model = cls(config).to(source.dtype)
        model.transfer_report = transfer_weights(source, model, class_head)
        return model

    @staticmethod
    def _source_class(config: UplvpConfig) -> type["UplvpPreTrainedModel"]:
        pretraining = "UplvpForPreTraining" in (config.architectures or [])
        return UplvpForPreTraining if pretraining else UplvpForInstanceSegmentation

    def _output(self, layers: list[LayerOutput], losses: dict[str, Tensor] | None = None) -> UplvpOutput:
        return UplvpOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            losses=losses,
            class_queries_logits=layers[-1].class_logits,
            masks_queries_logits=layers[-1].mask_logits,
            auxiliary_logits=[
                {"class_queries_logits": layer.class_logits, "masks_queries_logits": layer.mask_logits}
                for layer in layers[:-1]
            ],
            queries=layers[-1].queries,
        )

    def _labels(self, mask_labels: list[Tensor], class_labels: list[Tensor] | None) -> list[Tensor]:
        if self.config.class_agnostic:
            return [torch.zeros(len(masks), dtype=torch.int64) for masks in mask_labels]
        if class_labels is None:
            raise ValueError("mask_labels need class_labels beside them, unless the model is class-agnostic.")
        return class_labels


def _where(kwargs: dict) -> dict:
    return {key: kwargs[key] for key in _WHERE if key in kwargs}


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

    def to_mask2former(self, directory: str) -> None:
        """Writes a plain `Mask2FormerForUniversalSegmentation` directory: no custom code is needed to load it.

        Raises ValueError when the backbone has `timm_kwargs`, which transformers' class does not pass on.
        """
        from transformers import Mask2FormerForUniversalSegmentation

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
            # The first output comes before any update of the queries, so it is not supervised (SP: every stage).
            # Without auxiliary losses only the last layer has a match.
            updated = list(zip(layers[-len(matches) :], matches, strict=True))[len(matches) == len(layers) :]
            pairs = None if normalizers is None else normalizers.pairs
            supervised = kernel_supervision(
                [layer for layer, _ in updated],
                [match for _, match in updated],
                prompts.vectors,
                prompts.source,
                pairs,
            )
            # The projection gets no gradient from the loss above when nothing is injected: keep it in the graph.
            touched = prompts.vectors.sum() * 0
            losses["kernel"] = self.config.kernel_supervision_weight * supervised + touched
        output = self._output(layers, losses)
        return output if return_dict is not False else output.to_tuple()


__all__ = ["UplvpForInstanceSegmentation", "UplvpForPreTraining", "UplvpOutput", "UplvpPreTrainedModel"]
