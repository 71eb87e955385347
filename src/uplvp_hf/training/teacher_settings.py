"""Settings of teacher-student fine-tuning (`teacher.*`), see `teacher.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..settings import ConfigError, Settings, setting

if TYPE_CHECKING:
    from .config import TrainSettings


@dataclass
class TeacherSettings(Settings):
    """How unlabeled images (`data.unlabeled`) are used in fine-tuning: a teacher, which is the moving average of the
    student, finds instances in a weak view of an image, and the student learns them in a strong view of it.

    Sources: mean teacher (arXiv 1703.01780), Unbiased Teacher (2102.09480), Soft Teacher (2106.09018), Guided
    Distillation (2308.02668), FlexMatch (2110.08263). Defaults without a source are guesses, which no comparison has
    confirmed.
    """

    decay: float = setting(
        0.999,
        "of the moving average that is the teacher, where `optim.ema` is 0; Unbiased Teacher: 0.9996 in 180,000 steps",
        above=0,
        below=1,
    )
    burn_in: int = setting(
        100, "first steps, on the labels alone, in which the teacher comes to know the classes", least=0
    )
    weight: float = setting(
        1.0,
        "weight of a pseudo instance, against 1 for a labeled one; the divisors of the losses count it so too "
        "(Guided Distillation: 2, Unbiased Teacher: 4, each with divisors of its own)",
        above=0,
    )
    ramp: int = setting(100, "steps after the burn-in in which the weight rises linearly from 0", least=0)
    batch_size: int | None = setting(None, "unlabeled images of a step of a process; none: `optim.batch_size`", least=1)
    class_threshold: float = setting(
        0.7, "least probability of its class that a pseudo instance has (Unbiased Teacher: 0.7)", least=0, most=1
    )
    mask_threshold: float = setting(
        0.8, "least mean probability of the pixels inside the mask of a pseudo instance", least=0, most=1
    )
    adaptive: float = setting(
        0.0,
        "0: one threshold for all classes. Above: the class threshold falls to (1 - adaptive) times `class_threshold` "
        "for classes that the teacher finds least often (the rule of FlexMatch, over counts of instances)",
        least=0,
        most=1,
    )
    duplicates: float = setting(
        0.7, "of two pseudo instances whose masks have a larger IoU the better one is kept", above=0, most=1
    )
    ignore: str = setting(
        "unsure",
        "queries of the student without a pseudo instance are no background: unsure, where they lie on what the "
        "teacher half believes in; all, nowhere; none, they are background everywhere",
        choices=("unsure", "all", "none"),
    )
    unsure_threshold: float = setting(
        0.2, "probability of its best class from which on the teacher half believes in an instance", least=0, most=1
    )
    soft_classes: bool = setting(False, "the teacher's probabilities of all classes are the targets of the class head")
    weigh_masks: bool = setting(False, "the mask losses of a pseudo instance are multiplied by its mask quality")
    scale_range: list[float] | None = setting(
        None, "large-scale jitter of the strong view; none: `data.scale_range`", above=0
    )
    color: float = setting(
        0.4,
        "strength of brightness, contrast and saturation in the strong view (Unbiased Teacher: 0.4)",
        least=0,
        most=1,
    )
    hue: float = setting(0.1, "largest shift of the hue, as a share of the circle (as above)", least=0, most=0.5)
    gray: float = setting(0.2, "probability that the strong view is gray (as above)", least=0, most=1)
    blur: float = setting(
        0.5, "probability that it is blurred, by a Gaussian of 0.1 to 2 pixels (as above)", least=0, most=1
    )
    cutouts: int = setting(
        3, "most rectangles of it that are erased, each drawn with probability 1/2 (Unbiased Teacher: up to 3)", least=0
    )
    cutout_area: list[float] = setting(
        [0.02, 0.2], "area of such a rectangle, as shares of the view (as above)", above=0, most=1
    )
    patience: int = setting(
        200, "steps without any pseudo instance after which the run says, once, what to lower; 0: never", least=0
    )
    measure: bool = setting(
        False,
        "compare the pseudo instances with the labels that `data.unlabeled` happens to have, for the log alone: "
        "`pseudo_precision` and `pseudo_recall` at a mask IoU of 0.5, of the right class",
    )


def check_teacher(settings: TrainSettings) -> None:
    """Raises ConfigError for settings of a teacher that do not fit together, or do not fit the run."""
    teacher = settings.teacher
    for name, value in (("scale_range", teacher.scale_range), ("cutout_area", teacher.cutout_area)):
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            raise ConfigError(f"`teacher.{name}` must be two numbers, the lower first, got {value}.")
    if settings.data.unlabeled is None:
        return
    if settings.stage == "pretrain":
        raise ConfigError(
            "`data.unlabeled` is for fine-tuning with a teacher. Pre-training takes its images from `data.train`, the "
            "store that `uplvp label` wrote."
        )
    if settings.optim.epochs is None:  # else the number of steps is known when the images are (`optim.with_steps`)
        check_burn_in(settings, settings.optim.steps)


def check_burn_in(settings: TrainSettings, steps: int) -> None:
    """Raises ConfigError when a run of so many steps would never ask its teacher."""
    if settings.data.unlabeled is not None and settings.teacher.burn_in >= steps:
        raise ConfigError(
            f"`teacher.burn_in` of {settings.teacher.burn_in} steps leaves none of the {steps} for the unlabeled "
            "images: lower it, or raise `optim.steps` or `optim.epochs`."
        )
