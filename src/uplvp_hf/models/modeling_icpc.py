"""ICPC (arXiv 2308.07078): semantic segmentation with CLIP, whose prompts are conditioned on the image.

The method on one page (`forward`):

    image -> four maps, a global vector g and patch features z in the space of the texts    (CLIP's image tower)
    g, class names, learned vectors -> text features t, an own set for every image           (ClassPrompts)
    t + gamma * decoder(t, [g; z]), where asked for                                      (ContextDecoder, DenseCLIP)
    score maps <z, t>, and <q(map), t> on further levels: the multi-scale alignment
    maps with their score maps -> feature pyramid -> Semantic FPN -> logits with stride 4
    loss = cross-entropy(logits) + w * cross-entropy(score maps / tau) + lambda * contrastive loss

With `prompt="post"`, `align_strides=[]` and `contrastive="none"` this is DenseCLIP (arXiv 2112.01518), equal to its
released code on recorded tensors. Of ICPC only the abstract is open: what it does not say is a setting that
`IcpcConfig` marks as inferred.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    initialization as init,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from .backbones import FeaturePyramid
from .clip_resnet import ClipAttentionPool
from .configuration_base import checked_category_ids
from .configuration_icpc import IcpcConfig
from .errors import UserError
from .icpc_backbones import build_clip_backbone
from .icpc_classes import STRIDES, ClassLayers, tokens_of_classes, transfer_by_class
from .icpc_decoder import ContextDecoder
from .icpc_prompts import ClassPrompts, ImageQueries, ImageToken, name_tokens
from .icpc_text import NameBuckets
from .losses import Normalizers
from .losses_icpc import check_semantic_labels, contrastive_loss, on_grid, pixel_cross_entropy
from .query_segmenter import InstanceSegmenter
from .remote_code import SavesItsCode
from .semantic_fpn import SemanticFpnHead


@dataclass
class IcpcOutput(SemanticSegmenterOutput):
    """B images of H x W pixels, K classes, D channels of the space of images and texts.

    loss: scalar, the sum of `losses`, weighted terms by name, with labels only. logits (B, K, H/4, W/4). score_maps:
    cosines in [-1, 1] of patches and class names, (B, K, H/s, W/s) by stride s. text_embeds (B, K, D), image_embeds
    (B, D): CLIP's own vectors, not normalized. hidden_states: the backbone's four maps, where asked for.
    """

    losses: dict[str, Tensor] | None = None
    score_maps: dict[int, Tensor] | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class IcpcPreTrainedModel(InstanceSegmenter, SavesItsCode, PreTrainedModel):
    config: IcpcConfig
    base_model_prefix = "icpc"
    _no_split_modules = ["CLIPEncoderLayer", "ClipBottleneck", "ContextDecoderLayer"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As of transformers, which makes every weight trainable."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """PyTorch's rule for convolutions; Kaiming's for pyramid and head, as really happens in the original."""
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, FeaturePyramid | SemanticFpnHead):
            for conv in module.modules():
                if isinstance(conv, nn.Conv2d):
                    init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, SemanticFpnHead):
                init.normal_(module.classifier.weight, std=0.01)
        elif isinstance(module, ContextDecoder):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    init.trunc_normal_(linear.weight, std=0.02)
        elif isinstance(module, ClassPrompts) and module.contexts is not None:
            init.normal_(module.contexts, std=self.config.context_init_std)
        elif isinstance(module, ImageToken | ImageQueries):
            # Every image starts with nearly the same token.
            init.normal_(module.linear2.weight, std=1e-3)
            init.zeros_(module.linear2.bias)
            if isinstance(module, ImageQueries):
                init.normal_(module.queries, std=0.02)
        elif isinstance(module, NameBuckets):
            module.init_weights()
        elif isinstance(module, ClipAttentionPool):
            init.normal_(module.positional_embedding, std=module.positional_embedding.shape[1] ** -0.5)
        elif isinstance(module, IcpcForSemanticSegmentation) and module.gamma is not None:
            init.constant_(module.gamma, self.config.gamma_init)


class IcpcForSemanticSegmentation(IcpcPreTrainedModel):
    def __init__(self, config: IcpcConfig):
        super().__init__(config)
        self.backbone = build_clip_backbone(config)
        self.text = self.prompts = self.decoder = self.gamma = None
        if config.uses_text:
            self.text = CLIPTextModelWithProjection._from_config(config.text_config)
            self.prompts = ClassPrompts(config)
        if config.uses_decoder:
            self.decoder = ContextDecoder(config)
            self.gamma = nn.Parameter(torch.empty(config.projection_dim))
        further = [stride for stride in config.score_strides if stride != config.score_stride]
        channels = dict(zip(STRIDES, self.backbone.channels, strict=True))
        self.align = nn.ModuleDict({str(s): nn.Conv2d(channels[s], config.projection_dim, 1) for s in further})
        layers = ClassLayers(config, self.backbone.channels)
        self.neck, self.head = layers.neck, layers.head
        self.progress = 1.0  # the share of the training that is done; the training loop sets it
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """The text tower is not trained (the released DenseCLIP means that, and trains it a little after all), and
        without texts neither is what leads to their space."""
        if self.text is not None:
            self.text.requires_grad_(False)
        else:
            for module in self.backbone.to_texts():
                module.requires_grad_(False)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        normalizers: Normalizers | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool | None = None,
        text_embeds: Tensor | None = None,
        **kwargs,
    ) -> IcpcOutput | tuple:
        """
        pixel_values (B, 3, H, W), H and W multiples of 32; labels (B, H, W) int64, classes 0 to K - 1 and
        `semantic_loss_ignore_index` for pixels that do not count. `normalizers` is for the training loop: pixels that
        count and images of the whole step. `generator` draws the anchors of the contrastive loss. `text_embeds`
        (1 or B, K, D) take the place of the text features that the model makes, such as those of another image. Raises
        UserError for other sizes and for labels that are no class.
        """
        if pixel_values.shape[-2] % 32 or pixel_values.shape[-1] % 32:
            raise UserError(
                f"Images must have sides that are multiples of 32 pixels, got {tuple(pixel_values.shape[-2:])}: the "
                "image processor pads them."
            )
        maps, pooled, local = self.backbone(pixel_values)
        text = self.text_features(pooled, local) if text_embeds is None else text_embeds
        scores = self._score_maps(maps, local, text)
        joined = [torch.cat([map_, scores[s]], 1) if s in scores else map_ for s, map_ in zip(STRIDES, maps)]
        logits = self.head(self.neck(joined))
        losses = None
        if labels is not None:
            check_semantic_labels(labels, pixel_values.shape[-2:], self.config)
            losses = self._losses(logits, scores, local, text, labels, normalizers, generator)
        output = IcpcOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            logits=logits,
            hidden_states=tuple(maps) if self.wants("output_hidden_states", output_hidden_states) else None,
            losses=losses,
            score_maps=scores or None,
            text_embeds=None if text is None else text.expand(pooled.shape[0], -1, -1),
            image_embeds=pooled,
        )
        return self.returned(output, return_dict)

    def text_features(self, pooled: Tensor, local: Tensor) -> Tensor | None:
        """Text features of the classes for images with pooled (B, D) and patches (B, D, h, w): (1 or B, K, D)."""
        if self.prompts is None:
            return None
        memory = torch.cat([pooled[:, None], local.flatten(2).transpose(1, 2)], dim=1)
        checkpointing = self.training and self.text.text_model.encoder.layers[0].gradient_checkpointing
        text = self.prompts(self.text, pooled, memory, checkpointing)
        if self.decoder is not None:
            text = text + self.gamma * self.decoder(text.expand(memory.shape[0], -1, -1), memory)
        return text

    def _score_maps(self, maps: list[Tensor], local: Tensor, text: Tensor | None) -> dict[int, Tensor]:
        """Cosines of patches and texts by stride, those of CLIP's own level first."""
        if text is None:
            return {}
        features = {self.config.score_stride: local}
        features |= {int(stride): layer(maps[STRIDES.index(int(stride))]) for stride, layer in self.align.items()}
        text = F.normalize(text.float(), dim=-1).expand(local.shape[0], -1, -1)
        return {
            stride: torch.einsum("bchw,bkc->bkhw", F.normalize(x.float(), dim=1), text).to(x.dtype)
            for stride, x in features.items()
        }

    def _losses(self, logits, scores, local, text, labels, normalizers, generator) -> dict[str, Tensor]:
        """The weighted terms by name."""
        config = self.config
        count = None if normalizers is None else normalizers.pixels
        targets = on_grid(labels, self.loss_stride)
        losses = {"segmentation": pixel_cross_entropy(logits, targets, config.semantic_loss_ignore_index, count)}
        for stride, scores_of_level in scores.items():
            weight = config.identity_weight if stride == config.score_stride else config.align_weight
            term = pixel_cross_entropy(
                scores_of_level.float() / config.tau, targets, config.semantic_loss_ignore_index, count
            )
            losses["identity" if stride == config.score_stride else f"align_{stride}"] = weight * term
        if text is not None and config.contrastive != "none":
            weight = config.contrastive_weight * (self.progress >= config.contrastive_start)
            share = 1.0 if normalizers is None or normalizers.images is None else len(labels) / normalizers.images
            losses["contrastive"] = weight * share * contrastive_loss(local, text, labels, config, generator)
        return losses

    @property
    def loss_stride(self) -> int:
        if self.config.loss_stride is not None:
            return self.config.loss_stride
        return 4 if self.config.num_labels > 300 else 1

    def normalizers(self, labels: Sequence[Tensor]) -> Normalizers:
        """Divisors of the loss terms for these label maps (H, W), before any forward pass."""
        ignored = self.config.semantic_loss_ignore_index
        counted = sum(int((on_grid(one[None], self.loss_stride) != ignored).sum()) for one in labels)
        return Normalizers(pixels=counted, images=len(labels))

    @property
    def segmenter(self) -> "IcpcForSemanticSegmentation":
        """The model itself: nothing is wrapped around it."""
        return self

    @property
    def class_sized(self) -> tuple[str, ...]:
        return ClassLayers.class_sized

    @classmethod
    def _config_for(cls, source, settings: dict, id2label: dict[int, str], category_ids) -> IcpcConfig:
        ids = checked_category_ids(id2label, category_ids)
        kept = {key: value for key, value in source.config.to_dict().items() if key not in ("label2id", "dtype")}
        return IcpcConfig.from_dict({**kept, **settings, "id2label": id2label, "category_ids": ids})

    @classmethod
    def from_pretraining(
        cls, name_or_dir, id2label, category_ids=None, class_head="remap", tokenizer=None, **kwargs
    ) -> "IcpcForSemanticSegmentation":
        """Loads a checkpoint for other classes, as for the other segmenters. The names of classes that it does not know
        need the tokenizer, by default the one in its folder. `kwargs` that are settings of `IcpcConfig` replace those
        of the checkpoint."""
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in IcpcConfig.__dataclass_fields__}
        source = cls.from_pretrained(name_or_dir, **kwargs)
        if settings.get("prompt", source.config.prompt) != "none" and "class_token_ids" not in settings:
            settings["class_token_ids"] = tokens_of_classes(source.config, id2label, tokenizer, name_or_dir)
        model = cls(cls._config_for(source, settings, dict(id2label), category_ids)).to(source.dtype)
        model.transfer_report = transfer_by_class(source, model, class_head)
        return model

    @classmethod
    def from_clip(
        cls,
        clip: str | os.PathLike | CLIPModel,
        id2label: dict[int, str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        category_ids: list[int] | None = None,
        **settings,
    ) -> "IcpcForSemanticSegmentation":
        """A model on both towers of a CLIP, the rest initialized.

        clip: a folder or repository with a `CLIPModel` whose patches have 8 or 16 pixels, or the model; tokenizer: by
        default the one of the folder; category_ids: ids of the classes in the dataset. `settings` are those of
        `IcpcConfig`.
        """
        if not isinstance(clip, CLIPModel):
            if tokenizer is None and settings.get("prompt") != "none":
                from transformers import AutoTokenizer

                tokenizer = AutoTokenizer.from_pretrained(clip)
            clip = CLIPModel.from_pretrained(clip, use_safetensors=True)
        ids = checked_category_ids(id2label, category_ids)
        if settings.get("prompt") != "none":
            if tokenizer is None:
                raise UserError("The class names need the CLIP's tokenizer: pass tokenizer=...")
            settings = {"class_token_ids": name_tokens(list(id2label.values()), tokenizer), **settings}
        config = IcpcConfig(
            vision_config=clip.config.vision_config.to_dict(), text_config=clip.config.text_config.to_dict(),
            projection_dim=clip.config.projection_dim, id2label=id2label, category_ids=ids, **settings,
        )  # fmt: skip
        model = cls(config).to(clip.dtype)
        weights = clip.state_dict()
        _load_part(model.backbone.tower, weights, ("vision_model.", "visual_projection."))
        if model.text is not None:
            _load_part(model.text, weights, ("text_model.", "text_projection."))
        return model

    @torch.no_grad()
    def set_classes(
        self, names: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, category_ids: list[int] | None = None
    ) -> None:
        """Gives the model other class names. Score maps follow at once (open vocabulary); of the layers that are tied
        to the classes, those of names that the model had are kept and the others are initialized, to be trained."""
        tokens = {"class_token_ids": name_tokens(names, tokenizer) if self.config.uses_text else None}
        config = self._config_for(self, tokens, dict(enumerate(names)), category_ids)
        layers = ClassLayers(config, self.backbone.channels).apply(self._init_weights)
        layers = layers.to(self.device, self.dtype).train(self.training)
        transfer_by_class(ClassLayers(self.config, self.backbone.channels, self.neck, self.head), layers, "remap")
        for old, new in ((self.neck, layers.neck), (self.head, layers.head)):
            for mine, other in zip(old.parameters(), new.parameters(), strict=True):
                other.requires_grad_(mine.requires_grad)
        self.config, self.neck, self.head = config, layers.neck, layers.head
        if self.prompts is not None:
            self.prompts.names = NameBuckets(config.class_token_ids, config.text_chunk).to(self.device)


def _load_part(module: nn.Module, weights: dict[str, Tensor], prefixes: tuple[str, ...]) -> None:
    """Loads the tensors with these prefixes; every tensor of the module must be there."""
    found = {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}
    missing, _ = module.load_state_dict(found, strict=False)
    if missing:
        raise UserError(f"The CLIP lacks {len(missing)} tensors, for example `{missing[0]}`.")


__all__ = ["IcpcForSemanticSegmentation", "IcpcOutput", "IcpcPreTrainedModel"]
