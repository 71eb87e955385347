"""Configuration of ICPC (arXiv 2308.07078), semantic segmentation with prompted CLIP, and of its base DenseCLIP."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

from .configuration_base import StrictConfigMixin
from .errors import UserError

PROMPTS = ("none", "names", "static", "post", "dynamic_concat", "dynamic_add", "dynamic_last", "dynamic_query")
CONTRASTIVE = ("none", "align_guided", "text_only", "prototypes", "text_negatives", "symmetric")
DENSE_BLOCKS = ("vanilla", "identity", "clearclip", "naclip")
RESNET_DEFAULTS = {"width": 64, "depths": [3, 4, 6, 3], "pool_heads": 32, "pool_size": 7}


@strict
class IcpcConfig(StrictConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`IcpcForSemanticSegmentation`]. What the abstract of ICPC does not say is one setting each, marked
    *inferred*; with `prompt="post"` and the defaults of `align_strides=[]` and `contrastive="none"` the model is
    DenseCLIP.

    Args:
        vision_config (`dict` or `CLIPVisionConfig`, *optional*): The CLIP vision transformer, patches of 8 or 16
            pixels. Leave it out and give `resnet_config` for a CLIP ResNet.
        resnet_config (`dict`, *optional*): CLIP ResNet: `width` (64), `depths` ([3, 4, 6, 3]), `pool_heads` (32) and
            `pool_size` (7), the side of the attention pool's position table.
        text_config (`dict` or `CLIPTextConfig`, *optional*): The text tower. Unused with `prompt="none"`.
        projection_dim (`int`, *optional*, defaults to 512): Width of the space that images and texts share.
        class_token_ids (`list[list[int]]`, *optional*): Tokens of each class name, without start and end tokens. They
            travel with the model, so that a loaded model needs no tokenizer and cannot mix up its classes.
        start_token_id, end_token_id (`int`, *optional*): Tokens around every name. Default: those of `text_config`, or
            49406 and 49407 for OpenAI's vocabulary.
        prompt (`str`, *optional*, defaults to `"dynamic_concat"`): One of `none` (no text), `names`, `static` (CoOp),
            `post` (DenseCLIP), `dynamic_concat`, `dynamic_add` (CoCoOp), `dynamic_last`, `dynamic_query` (inferred).
        post (`bool`, *optional*, defaults to `False`): Adds DenseCLIP's context decoder to any form of prompt.
        num_context (`int`, *optional*, defaults to 8): Learned vectors in front of every name.
        context_init_std (`float`, *optional*, defaults to 0.02): CoOp's; DenseCLIP starts at 1.
        num_image_tokens (`int`, *optional*, defaults to 4): Tokens that `dynamic_query` makes of an image.
        prompt_hidden (`int`, *optional*): Width inside the network that makes the image's token; `projection_dim // 16`
            by default, as in CoCoOp.
        detach_image (`bool`, *optional*, defaults to `False`): No gradient from the prompt into the backbone.
        decoder_layers (`int`), decoder_width (`int`), decoder_heads (`int`), dropout (`float`): The context decoder;
            3, 256, 4 and 0.1 by default.
        gamma_init (`float`, *optional*, defaults to 1e-4): Initial weight of the context decoder's output.
        align_strides (`list[int]`, *optional*, defaults to `[8, 16, 32]`): Levels with a score map beside the level of
            CLIP's own patch features (inferred). Empty: DenseCLIP's single scale.
        identity_weight (`float`, *optional*, defaults to 0.4), align_weight (`float`, *optional*, defaults to 0.4 / 3):
            Weights of the cross-entropy on the score map of CLIP's level, and on each further one.
        tau (`float`, *optional*, defaults to 0.07): Temperature of cosines in the losses.
        contrastive (`str`, *optional*, defaults to `"align_guided"`): Reading of the contrastive loss (inferred): one
            of `none`, `align_guided` (A), `text_only` (its control), `prototypes` (B), `text_negatives` (C),
            `symmetric` (D).
        contrastive_weight (`float`, *optional*, defaults to 0.1), contrastive_start (`float`, defaults to 1 / 16):
            Weight of that loss, and the part of the training after which it begins.
        max_anchors (`int`, *optional*, defaults to 1024), anchors_per_class (`int`, *optional*, defaults to 100): Cells
            that the contrastive loss samples, in a batch, and per image and class.
        out_layers (`list[int]`, *optional*): Blocks (from 0) whose outputs make the pyramid of a vision transformer.
            Default: the ends of four equal parts, 3, 5, 7, 11 for 12 blocks.
        position_interpolation (`str`, *optional*, defaults to `"bilinear"`): How a vision transformer's position table
            is resized: `bilinear` (DenseCLIP) or `bicubic` (transformers).
        dense_block (`str`, *optional*, defaults to `"vanilla"`): Last block of a vision transformer for the patch
            features: `vanilla` (DenseCLIP), `identity` (values alone), `clearclip` (query-query attention alone) or
            `naclip` (key-key attention alone, which favors near patches).
        dense_sigma (`float`, *optional*, defaults to 5.0), dense_scale (`float`, *optional*, defaults to 1.0): Width in
            patches and height of the gaussian of `naclip`.
        drop_path_rate (`float`, *optional*, defaults to 0.1): Stochastic depth of a vision transformer.
        fpn_channels (`int`, *optional*, defaults to 256), head_channels (`int`, *optional*, defaults to 256),
        head_dropout (`float`, *optional*, defaults to 0.1): Feature pyramid and Semantic FPN head.
        loss_stride (`int`, *optional*): 1: losses at the size of the labels; 4: at the logits' own size, which saves
            memory. Default: 1 up to 300 classes, 4 beyond.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255): Label of pixels that do not count. Must lie
            outside the classes; 65535 is usual beyond 255 classes.
        text_chunk (`int`, *optional*, defaults to 256): Class names encoded at a time.
        category_ids (`list[int]`, *optional*, defaults to `[0, 1, ..., K - 1]`): Ids of the classes in the dataset.

    Raises:
        UserError: for an unknown setting or word, names longer than the text tower has positions, duplicate class
            names, or an ignored label among the classes.
    """

    model_type = "icpc"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": CLIPTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    resnet_config: dict | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    class_token_ids: list | tuple | None = None
    start_token_id: int | None = None
    end_token_id: int | None = None
    prompt: str = "dynamic_concat"
    post: bool = False
    num_context: int = 8
    context_init_std: float | int = 0.02
    num_image_tokens: int = 4
    prompt_hidden: int | None = None
    detach_image: bool = False
    decoder_layers: int = 3
    decoder_width: int = 256
    decoder_heads: int = 4
    dropout: float | int = 0.1
    gamma_init: float | int = 1e-4
    align_strides: list | tuple = (8, 16, 32)
    identity_weight: float | int = 0.4
    align_weight: float | int = 0.4 / 3
    tau: float | int = 0.07
    contrastive: str = "align_guided"
    contrastive_weight: float | int = 0.1
    contrastive_start: float | int = 1 / 16
    max_anchors: int = 1024
    anchors_per_class: int = 100
    out_layers: list | tuple | None = None
    position_interpolation: str = "bilinear"
    dense_block: str = "vanilla"
    dense_sigma: float | int = 5.0
    dense_scale: float | int = 1.0
    drop_path_rate: float | int = 0.1
    fpn_channels: int = 256
    head_channels: int = 256
    head_dropout: float | int = 0.1
    loss_stride: int | None = None
    semantic_loss_ignore_index: int = 255
    text_chunk: int = 256
    category_ids: list | tuple | None = None

    def __post_init__(self, **kwargs: Any):
        self._make_towers()  # transformers expects configurations, not dicts, from here on
        super().__post_init__(**kwargs)
        self._fill_defaults()
        self._check_words()
        self._check_numbers()
        self._check_names()

    def _make_towers(self) -> None:
        if (self.vision_config is None) == (self.resnet_config is None):
            if self.vision_config is not None:
                raise UserError("Give vision_config or resnet_config, not both.")
            self.vision_config = {"patch_size": 16}
        if isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**_plain(self.vision_config))
        if self.resnet_config is not None:
            unknown = sorted(set(self.resnet_config) - set(RESNET_DEFAULTS))
            if unknown:
                raise UserError(f"resnet_config has no setting {unknown[0]!r}; it has {', '.join(RESNET_DEFAULTS)}.")
            self.resnet_config = {**RESNET_DEFAULTS, **self.resnet_config}
        if self.prompt != "none" or self.text_config is not None:
            self.text_config = self.text_config or {}
            if isinstance(self.text_config, dict):
                self.text_config = CLIPTextConfig(**_plain(self.text_config))
            self.text_config.projection_dim = self.projection_dim
        if self.vision_config is not None:
            self.vision_config.projection_dim = self.projection_dim

    def _fill_defaults(self) -> None:
        for name in ("align_strides", "out_layers", "category_ids", "class_token_ids"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else list(value))
        if self.class_token_ids is not None:
            self.class_token_ids = [list(ids) for ids in self.class_token_ids]
        if self.text_config is not None:
            openai = self.text_config.vocab_size == 49408  # whose stored ids were wrong for years (transformers #24773)
            stored = (49406, 49407) if openai else (self.text_config.bos_token_id, self.text_config.eos_token_id)
            self.start_token_id = stored[0] if self.start_token_id is None else self.start_token_id
            self.end_token_id = stored[1] if self.end_token_id is None else self.end_token_id
        if self.category_ids is None:
            self.category_ids = list(range(self.num_labels))
        if self.vision_config is not None and self.out_layers is None:
            depth = self.vision_config.num_hidden_layers
            self.out_layers = [3, 5, 7, 11] if depth == 12 else [(depth * (i + 1) + 3) // 4 - 1 for i in range(4)]

    def _check_words(self) -> None:
        for name, words in (
            ("prompt", PROMPTS), ("contrastive", CONTRASTIVE), ("dense_block", DENSE_BLOCKS),
            ("position_interpolation", ("bilinear", "bicubic")), ("loss_stride", (None, 1, 4)),
        ):  # fmt: skip
            if getattr(self, name) not in words:
                raise UserError(f"{name} must be one of {', '.join(map(str, words))}, got {getattr(self, name)!r}.")
        if self.vision_config is not None and self.vision_config.patch_size not in (8, 16):
            raise UserError(
                f"The pyramid needs patches of 8 or 16 pixels, but this vision tower has patches of "
                f"{self.vision_config.patch_size}."
            )

    def _check_numbers(self) -> None:
        for name in ("num_image_tokens", "decoder_layers", "decoder_width", "decoder_heads", "max_anchors",
                     "anchors_per_class", "fpn_channels", "head_channels", "text_chunk"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("drop_path_rate", "head_dropout", "dropout", "contrastive_start"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if self.dense_sigma <= 0:
            raise UserError(f"dense_sigma must be positive, got {self.dense_sigma}.")
        if self.tau <= 0 or self.num_context < 0:
            raise UserError(f"tau must be positive and num_context not negative, got {self.tau}, {self.num_context}.")
        if set(self.align_strides) - {4, 8, 16, 32}:
            raise UserError(f"align_strides must be among 4, 8, 16 and 32, got {self.align_strides}.")
        if 0 <= self.semantic_loss_ignore_index < self.num_labels:
            raise UserError(
                f"semantic_loss_ignore_index {self.semantic_loss_ignore_index} is the number of a class; with "
                f"{self.num_labels} classes use 65535."
            )
        if self.vision_config is not None:
            depth = self.vision_config.num_hidden_layers
            if len(self.out_layers) != 4 or not all(0 <= layer < depth for layer in self.out_layers):
                raise UserError(f"out_layers must hold 4 numbers from 0 to {depth - 1}, got {self.out_layers}.")

    def _check_names(self) -> None:
        if len(self.category_ids) != self.num_labels or len(set(self.category_ids)) != self.num_labels:
            raise UserError(f"category_ids must hold {self.num_labels} different ids, got {self.category_ids}.")
        if not self.uses_text or self.class_token_ids is None:
            return
        if len(self.class_token_ids) != self.num_labels:
            raise UserError(f"class_token_ids holds {len(self.class_token_ids)} names for {self.num_labels} classes.")
        room = self.text_config.max_position_embeddings - 2 - self.num_prompt_tokens
        for index, ids in enumerate(self.class_token_ids):
            name = self.id2label.get(index, index)
            if not ids or max(ids) >= self.text_config.vocab_size or min(ids) < 0:
                raise UserError(f"Class {name!r}: its tokens {ids} are not in the text tower's vocabulary.")
            if len(ids) > room:
                raise UserError(
                    f"Class {name!r} has {len(ids)} tokens, but beside {self.num_prompt_tokens} prompt vectors the "
                    f"text tower has room for {room}: shorten the name or lower num_context ({self.num_context})."
                )

    @property
    def uses_text(self) -> bool:
        return self.prompt != "none"

    @property
    def uses_image(self) -> bool:
        """Whether every image has text features of its own before the context decoder."""
        return self.prompt.startswith("dynamic")

    @property
    def uses_decoder(self) -> bool:
        return self.uses_text and (self.post or self.prompt == "post")

    @property
    def num_prompt_tokens(self) -> int:
        """Vectors beside start token, name and end token."""
        image = {"dynamic_concat": 1, "dynamic_last": 1, "dynamic_query": self.num_image_tokens}.get(self.prompt, 0)
        return (0 if self.prompt in ("none", "names") else self.num_context) + image

    @property
    def score_stride(self) -> int:
        """Stride of CLIP's own patch features."""
        return 32 if self.vision_config is None else self.vision_config.patch_size

    @property
    def score_strides(self) -> list[int]:
        """Strides of all levels with a score map, ascending; empty without texts."""
        return sorted({self.score_stride, *self.align_strides}) if self.uses_text else []


def _plain(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key != "model_type"}


__all__ = ["IcpcConfig"]
