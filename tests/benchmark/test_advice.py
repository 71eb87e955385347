"""What a benchmark advises: with clear differences it says what to do, within noise it says nothing."""

import pytest
from scipy import stats

from uplvp_hf.benchmark.advice import advise


def rows(arm, values, count=10, segmenter="mask2former", **more):
    """A row a seed. Labeled images: three classes' worth."""
    return [
        {
            "segmenter": segmenter,
            "arm": arm,
            "seed": seed,
            "labels_per_class": count,
            "labels": None,
            "metrics": {"AP": value, "AP50": value},
            "class_agnostic": False,
            "finetune": {"steps": 100},
            "pretrain": None,
            "images": {"train": 3 * count},
        }
        | more
        for seed, value in enumerate(values)
    ]


SCRATCH = rows("scratch", (0.20, 0.22, 0.21))
PRETRAINED = {"labels": "clip", "pretrain": {"images": 256}}


def test_a_clear_gain_is_advised_with_its_numbers():
    text = advise([*SCRATCH, *rows("full", (0.30, 0.33, 0.31), **PRETRAINED)])
    p_value = stats.ttest_rel((0.30, 0.33, 0.31), (0.20, 0.22, 0.21)).pvalue
    assert text.startswith(
        "On this data: pre-train on the unlabeled images (`full` 31.3 against `scratch` 21.0 AP with "
    )
    assert f"10 labels a class, +10.3 over 3 seeds, p = {p_value:.2g})" in text
    assert "Within the noise" not in text and "help most" not in text  # nothing says what more labels would bring
    assert "unlabeled images by about +1.3 (what pre-training on 256 of them" in text  # 10.3 points in eight doublings


def test_a_clear_loss_is_advised_against():
    text = advise([*SCRATCH, *rows("full", (0.10, 0.12, 0.105), **PRETRAINED)])
    assert text.startswith("On this data: do not pre-train (`full` 10.8 against `scratch` 21.0 AP")


@pytest.mark.parametrize(
    "values", [(0.21, 0.20, 0.23), (0.35, 0.22, 0.21), (0.40,)], ids=["equal", "chance", "one seed"]
)
def test_nothing_is_advised_within_the_noise(values):
    text = advise([*SCRATCH, *rows("full", values, **PRETRAINED)])
    assert "On this data" not in text
    if len(values) == 1:
        assert text.startswith("With one seed an arm, a difference cannot be told from chance")
    else:
        assert "nothing is advised: whether to pre-train on the unlabeled images (`full`" in text


def test_the_best_of_many_arms_has_to_be_further_ahead():
    """p is 0.018 for one arm, which counts; the best of four arms needs a quarter of 0.05."""
    best = rows("full", (0.30, 0.31, 0.36), **PRETRAINED)
    assert 0.0125 < stats.ttest_rel((0.30, 0.31, 0.36), (0.20, 0.22, 0.21)).pvalue < 0.05
    assert "On this data: pre-train" in advise([*SCRATCH, *best])
    others = [row for name in "abc" for row in rows(name, (0.2, 0.2, 0.2), **PRETRAINED)]
    assert "On this data: pre-train" not in advise([*SCRATCH, *best, *others])


def test_equal_steps_in_all_is_what_pre_training_is_compared_with():
    """Where an arm of as many steps in all was run with 10 labels alone, 20 labels are not the place to compare at."""
    more = [*rows("scratch", (0.2, 0.2, 0.2), 20), *rows("full", (0.4, 0.41, 0.42), 20, **PRETRAINED)]
    total = rows("scratch total", (0.30, 0.33, 0.32))
    text = advise([*SCRATCH, *total, *more, *rows("full", (0.31, 0.32, 0.33), **PRETRAINED)])
    assert "whether to pre-train on the unlabeled images (`full` 32.0 against `scratch total` 31.7" in text


def test_segmenters_teacher_and_labels():
    teacher = {**PRETRAINED, "pseudo": {"20": {"instances": 2.0}}}
    text = advise(
        [
            *rows("full", (0.30, 0.33, 0.31), **PRETRAINED),
            *rows("full", (0.36, 0.40, 0.375), 20, **PRETRAINED),
            *rows("teacher", (0.40, 0.44, 0.415), **teacher),
            *rows("full", (0.10, 0.12, 0.11), segmenter="knet", **PRETRAINED),
            *SCRATCH,
        ]
    )
    assert "take mask2former rather than knet (`teacher` 41.8 against `full` 11.0" in text
    assert "fine-tune with a teacher on the unlabeled images (`teacher` 41.8 against `full` 31.3" in text
    assert "twice the labels by +6.5 (`full`, 10 labels a class to 20 labels a class)" in text
    assert "What would help most next is more labels (p = " in text


def test_no_winner_within_the_noise():
    """Twice the labels bring 6 points in the mean, with one of three seeds against it."""
    text = advise(
        [*SCRATCH, *rows("full", (0.30, 0.33, 0.31), **PRETRAINED), *rows("full", (0.45, 0.28, 0.39), 20, **PRETRAINED)]
    )
    assert (
        "What would help most next cannot be told from these runs: AP was changed by: twice the labels by +6.0" in text
    )


def test_rows_without_a_pair_say_nothing():
    assert advise([]) == "" and advise(rows("full", (0.3, 0.3), **PRETRAINED)) == ""
    assert advise([{**row, "class_agnostic": True} for row in SCRATCH]) == ""
