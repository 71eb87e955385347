"""Benchmarks: tables, verdicts and figures of rows, against a few lines of arithmetic."""

import json
import math
import statistics

import pytest
import torch

from uplvp_hf.benchmark.ablation import ablation_table
from uplvp_hf.benchmark.activations import spread
from uplvp_hf.benchmark.claims import CLAIMS, Verdict, judge
from uplvp_hf.benchmark.figures import pseudo_curves, results_table, write_results
from uplvp_hf.benchmark.rows import read_rows
from uplvp_hf.benchmark.separation import separation_table


def row(arm: str, seed: int, ap: float, labels: int = 10, segmenter: str = "knet", steps: int = 200) -> dict:
    return {
        "benchmark": "test", "segmenter": segmenter, "arm": arm, "seed": seed, "labels_per_class": labels,
        "metrics": {"AP": ap, "AP50": 2 * ap}, "class_agnostic": False,
        "curve": {str(steps // 2): ap / 2, str(steps): ap},
        "finetune": {"steps": steps, "seconds": 1.0, "settings": {}}, "pretrain": None,
    }  # fmt: skip


ROWS = [row("scratch", seed, ap) for seed, ap in enumerate((0.10, 0.12, 0.11))]
ROWS += [row("full", seed, ap) for seed, ap in enumerate((0.20, 0.23, 0.21))]
ROWS[1]["pseudo"] = {"20": {"instances": 1.5, "precision": 0.5, "recall": 0.25}}
ROWS[2]["pseudo"] = {"20": {"instances": 2.0, "precision": 0.7, "recall": 0.5}, "40": {"recall": 0.0}}
ROWS += [row("pseudo", seed, ap) for seed, ap in enumerate((0.20, 0.05, 0.11))]


def test_table():
    table = results_table(ROWS, "knet").splitlines()
    assert table[0] == "| knet: arm | 10 labels a class | fine-tuning steps | runs |"
    assert table[2] == "| scratch | 11.0 (1.0) / 22.0 (2.0) | 200 | 3 |"
    assert table[3] == "| full | 21.3 (1.5) / 42.7 (3.1) | 200 | 3 |"


def test_table_of_neighbors():
    """Found at .5, found and merged at the best score, of images with several objects; rows of before have no such."""
    rows = [row("scratch", seed, 0.1) for seed in range(2)]
    assert separation_table(rows) == ""
    for one, found in zip(rows, (0.2, 0.4)):
        several = {"objects": "2 or more", "images": 3, "annotations": 9, "found": found, "merged": 0.5, "split": 0.0}
        at = [{"threshold": 0.5, "f1": found / 2, "by_objects": [several]}]
        at.append({"threshold": 0.3, "f1": found, "by_objects": [{**several, "objects": "1", "found": 0.9}]})
        at[1]["by_objects"].append({**several, "found": 2 * found})
        one["findings"] = {"best_threshold": 0.3, "at": at}
    line = separation_table(rows).splitlines()[2]
    numbers = "10.0 (0.0) | 20.0 (0.0) | 15.0 (7.1) | 30.0 (14.1) | 30.0 (0.0) | 90.0 (0.0) | 30.0 (14.1) | 60.0 (28.3)"
    assert line == f"| knet: scratch | 10 labels a class | 200 | {numbers} | 50.0 (0.0) | 2 |"


def test_table_of_pretrained_models_alone():
    one = {**row("no human label", 0, 0.2), "labels_per_class": 0}
    assert results_table([one], "knet").splitlines()[0] == "| knet: arm | no label | fine-tuning steps | runs |"
    assert "| 20.0 / 40.0 |" in results_table([one], "knet")


def test_verdicts_are_paired_over_seeds():
    found = {(one.better, one.worse): one for one in judge(ROWS)}
    full = found["full", "scratch"]
    assert full.differences == pytest.approx([0.10, 0.11, 0.10])
    assert full.error == pytest.approx(0.0057735 / math.sqrt(3), rel=1e-4)
    assert full.word == "supported" and full.p_value == pytest.approx(paired_t_test(full.differences), rel=1e-9)
    assert found["pseudo", "scratch"].word == "undecided"  # +10, -7 and 0 points
    turned = [{**one, "arm": {"full": "scratch", "scratch": "full"}.get(one["arm"], one["arm"])} for one in ROWS]
    assert next(one for one in judge(turned) if one.worse == "scratch").word == "contradicted"
    assert judge([row("full", 0, 0.5), row("scratch", 1, 0.1)]) == []  # no seed in common
    single = judge([row("full", 0, 0.5), row("scratch", 0, 0.1)])[0]
    assert single.error is None and single.p_value is None and single.word == "undecided"
    tie = Verdict("cosine matching is at least random", "full", "full random", "knet", 10, [0.01, -0.01, 0.0])
    assert tie.word == "not contradicted"
    assert Verdict(tie.claim, "", "", "knet", 10, [-0.02, -0.03, -0.02]).word == "contradicted"
    assert Verdict(tie.claim, "", "", "knet", 10, [0.02, 0.03, 0.02]).word == "supported"


def paired_t_test(differences: list[float]) -> float:
    """Two-sided p-value for three seeds: Student's distribution with two degrees of freedom in closed form."""
    assert len(differences) == 3
    t = statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(3))
    return 1 - abs(t) / math.sqrt(2 + t * t)


def test_a_model_without_labels_counts_for_every_seed_where_it_was_trained_once():
    alone = {**row("no human label", 0, 0.2), "labels_per_class": 0}
    mixed = [row("mixed", seed, 0.2 + seed / 100) for seed in range(3)]
    one = next(one for one in judge([alone, *mixed]) if one.better == "mixed")
    assert one.differences == pytest.approx([0.0, 0.01, 0.02])
    second = {**row("no human label", 2, 0.3), "labels_per_class": 0}
    one = next(one for one in judge([alone, second, *mixed]) if one.better == "mixed")
    assert one.differences == pytest.approx([0.0, -0.08])  # a pre-training a seed: paired


def test_ablation_is_read_at_two_places():
    gains = {"pseudo": (0.0, 0.0), "frozen": (0.02, -0.02), "frozen agnostic": (0.0, 0.0)}
    rows = [
        row(arm + suffix, seed, 0.3 + gain + seed / 100 + (seed == 2) * (arm == "frozen") * 0.03)
        for arm, two in gains.items()
        for suffix, gain in zip((" alone", ""), two, strict=True)
        for seed in range(3)
    ]
    lines = ablation_table(rows, "pseudo").splitlines()
    assert lines[2] == "| knet | pseudo | 31.0 (1.0) |  | 31.0 (1.0) |  | 3 |"
    differences = [0.02, 0.02, 0.05], [-0.02, -0.02, 0.01]
    first, second = (f"{100 * statistics.mean(one):+.1f} ± 1.0, p = {paired_t_test(one):.2f}" for one in differences)
    assert lines[3] == f"| knet | frozen | 34.0 (2.6) | {first} | 30.0 (2.6) | {second} | 3 |"
    assert "| - |" in lines[4]  # no `pseudo agnostic` to compare with


def test_two_standard_errors_are_not_enough_for_three_seeds():
    wide = Verdict("pseudo labels alone help", "pseudo", "scratch", "knet", 10, [0.05, 0.20, 0.12])
    assert wide.mean > 2 * wide.error and wide.p_value == pytest.approx(paired_t_test(wide.differences))
    assert wide.p_value > 0.05 and wide.word == "undecided"
    same = Verdict(wide.claim, "pseudo", "scratch", "knet", 10, [0.03, 0.03, 0.03])
    assert same.word == "supported"
    assert Verdict(wide.claim, "pseudo", "scratch", "knet", 10, [0.0, 0.0]).word == "undecided"


def test_claims_name_arms_of_shipped_recipes():
    import yaml

    from uplvp_hf.benchmark.recipe import resources

    folder = resources.files("uplvp_hf.benchmark") / "recipes"
    arms = [
        set(yaml.safe_load((folder / name).read_text())["arms"])
        for name in ("animals7_cpu.yaml", "finetuning_animals7_cpu.yaml", "teacher_animals7_cpu.yaml")
    ]
    for claim, better, worse in CLAIMS:
        assert any({better, worse} <= own for own in arms), claim


def test_what_a_teacher_finds_is_averaged_over_the_runs_that_have_it():
    curves = pseudo_curves(ROWS)
    assert curves == {"scratch": {"precision": {20: pytest.approx(0.6)}, "recall": {20: pytest.approx(0.375), 40: 0.0}}}


@pytest.mark.slow
def test_files_are_the_same_twice(tmp_path):
    maps = {"knet": {"scratch": torch.rand(20, 8, 8), "full": torch.rand(20, 8, 8)}}
    text = write_results(ROWS, tmp_path / "a", maps)
    write_results(ROWS, tmp_path / "b", maps)
    names = {file.name for file in (tmp_path / "a").iterdir()}
    stems = ("curves_knet_10", "ablation_knet_10", "queries_knet", "pseudo_knet_10")
    assert names == {"results.md", *(f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png"))}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    claim = "pre-training beats the supervised backbone, equal fine-tuning steps (`full` - `scratch`)"
    assert f"| {claim} | knet | 10 labels a class |" in text


def test_reading_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    assert read_rows(path) == ROWS
    path.write_text(path.read_text() + '{"arm": 3}\n')
    with pytest.raises(ValueError, match="line 10: no row of a benchmark"):
        read_rows(path)
    with pytest.raises(ValueError, match="no finished run"):
        write_results([], tmp_path)


def test_spread_of_known_maps():
    even = torch.full((3, 4, 4), 0.5)
    assert spread(even) == {"entropy": 1.0, "centers": 0.0}
    corners = torch.zeros(2, 4, 4)
    corners[0, 0, 0] = corners[1, 3, 3] = 1.0
    found = spread(corners)
    assert found["entropy"] == pytest.approx(0, abs=1e-3)
    assert found["centers"] == pytest.approx(0.375)  # centers at 1/8 and 7/8 of both sides
