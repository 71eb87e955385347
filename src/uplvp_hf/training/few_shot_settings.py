"""Settings of few-shot training (`fewshot.*`), see `few_shot_task.py`."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.few_shot_choices import CONDITIONING, NORMALIZATIONS, SCORES, SUPPORT_MAPS
from ..settings import Settings, setting

_OF_MODEL = "none keeps the value of `model.init`; see UplvpFewShotConfig"


@dataclass
class FewShotSettings(Settings):
    """Training on base classes, so that later a few supports are enough for a new one (stage `fewshot`)."""

    classes: str = setting(
        "all",
        "which classes are base classes: coco2voc, coco20i-0 to -3, looks24, holdout:K, a file with `novel: [names]`, "
        "or all (data/class_splits.py)",
    )
    conditioning: str | None = setting(
        None,
        "prototype trains a segmenter of any object, whose masks similarity to supports names; prompt trains it to "
        f"answer for the class of a support prompt, and starts best from a trained prototype; {_OF_MODEL}",
        choices=CONDITIONING,
    )
    shots: list[int] = setting([1, 5], "least and most supports of an episode", least=1)
    negatives: float = setting(
        0.25, "share of the episodes that ask for a class that the image does not show", least=0, most=1
    )
    novel_in_base: str = setting(
        "keep", "images that also show novel objects, whose labels are taken out in any case", choices=("keep", "drop")
    )
    freeze_encoder: bool | None = setting(
        None, "all that comes before the queries stays as in `model.init`; none: with `prompt` and `model.init`"
    )
    support_bank: int = setting(
        0,
        "with a frozen encoder: so many objects of a base class go through it once, before training, and supports are "
        "drawn from them; 0: supports are augmented and encoded in every step",
        least=0,
    )
    support_map: str | None = setting(None, f"what supports are pooled from; {_OF_MODEL}", choices=SUPPORT_MAPS)
    support_normalization: str | None = setting(
        None, f"of supports before they become prompts; {_OF_MODEL}", choices=NORMALIZATIONS
    )
    support_score: str | None = setting(None, f"how masks are scored; {_OF_MODEL}", choices=SCORES)
    least_share: float = setting(0.005, "least share of its image that a support covers", least=0, below=1)
    evaluation_shots: int = setting(5, "supports of a base class when `data.val` is evaluated", least=1)
