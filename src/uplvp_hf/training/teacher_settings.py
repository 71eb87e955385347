"""Settings of teacher-student fine-tuning (`teacher.*`), see `teacher.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..settings import ConfigError, Settings, setting

if TYPE_CHECKING:
    from .config import TrainSettings


_BURN_IN, _RAMP = 0.3, 0.1  # shares of the steps


@dataclass
class TeacherSettings(Settings):
    """How unlabeled images (`data.unlabeled`) are used in fine-tuning: a teacher, which is the moving average of the
    student, finds instances in a weak view of an image, and the student learns them in a strong view of it.

    Sources: mean teacher (arXiv 1703.01780), Unbiased Teacher (2102.09480), Soft Teacher (2106.09018), Guided
    Distillation (2308.02668), FlexMatch (2110.08263), LabelMatch (2206.06608). Those of the thresholds were chosen by
    what `docs/results.md` reports of hidden labels; other defaults without a source are guesses.
    """

    decay: float = setting(
        0.999,
        "of the moving average that is the teacher, where `optim.ema` is 0; Unbiased Teacher: 0.9996 in 180,000 steps",
        above=0,
        below=1,
    )
    burn_in: int | None = setting(
        None,
        "first steps, on the labels alone, in which the teacher comes to know the classes; none: 0.3 of all steps",
        least=0,
    )
    weight: float = setting(
        1.0,
        "weight of a pseudo instance, against 1 for a labeled one; the divisors of the losses count it so too "
        "(Guided Distillation: 2, Unbiased Teacher: 4, each with divisors of its own)",
        above=0,
    )
    ramp: int | None = setting(
        None, "steps after the burn-in in which the weight rises linearly from 0; none: 0.1 of all steps", least=0
    )
    batch_size: int | None = setting(None, "unlabeled images of a step of a process; none: `optim.batch_size`", least=1)
    class_threshold: float = setting(
        0.7, "least probability of its class that a pseudo instance has (Unbiased Teacher: 0.7)", least=0, most=1
    )
    class_floor: float = setting(
        0.3, "what `label_share` and `adaptive` lower the class threshold of a class to, at the least", least=0, most=1
    )
    label_share: float = setting(
        0.3,
        "the class threshold of a class falls until the teacher finds so many instances of it an image, as a share of "
        "those that the labels have (the idea of LabelMatch); 0: it does not",
        least=0,
    )
    mask_threshold: float = setting(
        0.9, "least mean probability of the pixels inside the mask of a pseudo instance", least=0, most=1
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
    prompts: bool = setting(
        False,
        "the pseudo instances are prompts of the student, and its queries are drawn towards them, as in pre-training "
        "(settings `model.prompt_*` and `model.kernel_*`); human labels never are, and the final model needs none",
    )
    mix_pretraining: bool = setting(
        False,
        "`data.extra=pretraining` stays: the labels of the pre-training are mixed into the labeled part, beside the "
        "teacher",
    )
    copy_paste: float = setting(
        0.0,
        "probability that a random half of the pseudo instances of another image of the batch are pasted into the "
        "strong view, with their pixels",
        least=0,
        most=1,
    )
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
    draw_every: int = setting(
        0,
        "steps between images in `teacher.html` of the output: what the teacher finds, what its student is taught and "
        "what it finds itself; 0: none",
        least=0,
    )

    def burn_in_of(self, steps: int) -> int:
        """Steps of the burn-in of a run of `steps`."""
        return round(_BURN_IN * steps) if self.burn_in is None else self.burn_in

    def ramp_of(self, steps: int) -> int:
        """Steps of the ramp of a run of `steps`."""
        return round(_RAMP * steps) if self.ramp is None else self.ramp


def check_teacher(settings: TrainSettings) -> None:
    """Raises ConfigError for settings of a teacher that do not fit together, or do not fit the run."""
    teacher = settings.teacher
    for name, value in (("scale_range", teacher.scale_range), ("cutout_area", teacher.cutout_area)):
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            raise ConfigError(f"`teacher.{name}` must be two numbers, the lower first, got {value}.")
    if teacher.adaptive and teacher.label_share:
        raise ConfigError("Set `teacher.label_share=0` for `teacher.adaptive`: each is a rule for class thresholds.")
    if settings.data.unlabeled is None:
        if teacher.prompts:
            raise ConfigError("`teacher.prompts` needs `data.unlabeled`: the prompts are what a teacher finds there.")
        return
    if teacher.copy_paste and (teacher.batch_size or settings.optim.batch_size) == 1:
        raise ConfigError("`teacher.copy_paste` pastes within a batch: `teacher.batch_size` must be at least 2.")
    if teacher.prompts and settings.model.kernel_target not in (None, "prompt"):
        raise ConfigError(
            "`teacher.prompts` goes with `model.kernel_target=prompt`: a teacher's masks have no features."
        )
    if settings.stage != "finetune":
        raise ConfigError(
            "`data.unlabeled` is for fine-tuning with a teacher. Pre-training takes its images from `data.train`, the "
            "store that `uplvp label` wrote."
        )
    if settings.optim.epochs is None:  # else the number of steps is known when the images are (`optim.with_steps`)
        check_burn_in(settings, settings.optim.steps)


def check_burn_in(settings: TrainSettings, steps: int) -> None:
    """Raises ConfigError when a run of so many steps would never ask its teacher."""
    burn_in = settings.teacher.burn_in_of(steps)
    if settings.data.unlabeled is not None and burn_in >= steps:
        raise ConfigError(
            f"`teacher.burn_in` of {burn_in} steps leaves none of the {steps} for the unlabeled "
            "images: lower it, or raise `optim.steps` or `optim.epochs`."
        )
