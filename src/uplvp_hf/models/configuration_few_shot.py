"""Configuration of few-shot models: a UPLVP model whose classes are given by support images instead of training."""

from huggingface_hub.dataclasses import strict

from .configuration_uplvp import UplvpConfig
from .errors import UserError
from .few_shot_choices import CONDITIONING, NORMALIZATIONS, SCORES, SUPPORT_MAPS


@strict
class UplvpFewShotConfig(UplvpConfig):
    r"""
    Configuration of [`UplvpForFewShotSegmentation`]. `id2label` and `category_ids` are those of the classes that the
    model has supports of, none at first; the segmenter itself has one class, "object".

    Args:
        conditioning (`str`, *optional*, defaults to `"prompt"`):
            `prompt` (the class's prompt is put into all queries, and the head says "is of this class"; UPLVP figure 5)
            or `prototype` (the segmenter finds objects of any class, and similarity to the supports names them).
        support_map (`str`, *optional*, defaults to `"fine"`):
            What supports are pooled from: `fine` (the map of stride 8) or `prompt` (that of stride 32, which
            pre-training pools prompts from; small objects fill no cell of it).
        support_normalization (`str`, *optional*, defaults to `"layer"`):
            `layer` (less the running mean over supports, then normalized over the channels) or `none`, before a
            support becomes a prompt.
        support_score (`str`, *optional*, defaults to `"head_similarity"`):
            Score of a mask: `head` or, times the similarity of what the mask covers to the supports, `head_similarity`.
            A `prototype` model always uses the similarity.
        similarity_midpoint (`float`, *optional*, defaults to 0.5), similarity_temperature (`float`, *optional*,
            defaults to 0.1):
            The similarity is sigmoid((cosine - midpoint) / temperature). A training run fits both on base classes.
        support_counts (`list[int]`, *optional*): Examples of every class. Set with the supports.
        max_masks (`int`, *optional*, defaults to 100): Most pairs of mask and class that an image keeps.
        prompt_injection (`str`, *optional*, defaults to `"every_stage"`), kernel_supervision_weight (`float`,
            *optional*, defaults to 0.0):
            As of [`UplvpConfig`]; the target of the supervision is the prompt of the supports.

    Raises UserError as `UplvpConfig` does.

    Example:

    ```python
    >>> from uplvp_hf import UplvpFewShotConfig, UplvpForFewShotSegmentation

    >>> model = UplvpForFewShotSegmentation(UplvpFewShotConfig(segmenter_config={"model_type": "knet"}))
    ```
    """

    model_type = "uplvp_few_shot"

    conditioning: str = "prompt"
    support_map: str = "fine"
    support_normalization: str = "layer"
    support_score: str = "head_similarity"
    similarity_midpoint: float | int = 0.5
    similarity_temperature: float | int = 0.1
    support_counts: list[int] | tuple[int, ...] | None = None
    max_masks: int = 100
    prompt_injection: str = "every_stage"
    kernel_supervision_weight: float | int = 0.0

    def __post_init__(self, **kwargs):
        if kwargs.get("num_labels") is None and self.id2label is None and kwargs.get("label2id") is None:
            self.id2label = {}
        super().__post_init__(**kwargs)
        counts = list(self.support_counts or [1] * len(self.id2label))
        if len(counts) != len(self.id2label) or min(counts, default=1) < 1:
            raise UserError(f"support_counts must hold a number a class, {len(self.id2label)} of them, got {counts}.")
        self.support_counts = counts
        self.check(
            ("max_masks",),
            conditioning=CONDITIONING,
            support_map=SUPPORT_MAPS,
            support_normalization=NORMALIZATIONS,
            support_score=SCORES,
        )
        if self.similarity_temperature <= 0:
            raise UserError(f"similarity_temperature must be positive, got {self.similarity_temperature}.")

    def sync_classes(self, id2label: dict[int, str], category_ids: list[int] | None = None) -> None:
        """Sets the classes here; the segmenter keeps its one class, "object"."""
        segmenter, self.segmenter_config = self.segmenter_config, None
        super().sync_classes(id2label, category_ids)
        self.segmenter_config = segmenter
        if segmenter is not None:
            segmenter.id2label, segmenter.label2id = {0: "object"}, {"object": 0}
