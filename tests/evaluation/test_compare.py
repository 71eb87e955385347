"""Comparing runs: arms, means and deviations against a few lines of arithmetic, and everything that is refused."""

import csv
import io
import json
import math
import re

import pytest

from uplvp_hf.evaluation.compare import compare_runs
from uplvp_hf.evaluation.compare_page import as_dict, csv_table, draw_curves, markdown_table, write_comparison
from uplvp_hf.evaluation.runs import CompareError
from uplvp_hf.training.config import load_settings

STEPS = (10, 20, 30)


@pytest.fixture
def runs(tmp_path):
    """`make(name, values, *words)` -> folder of a finished run whose AP after 10, 20, 30 steps is `values`."""

    def make(
        name, values, *words, seed=0, trained_on=80, processes=1, steps=STEPS, images=50, finished=True, split=None
    ):
        words = ["data.val=data/val.json", "optim.batch_size=8", f"optim.steps={steps[-1]}", *words]
        settings = load_settings(None, [*words, f"seed={seed}", f"output={name}"]).to_dict()
        numbers = {
            str(s): {"AP": v, "AP50": v, "num_images": images, "num_instances": 9} for s, v in zip(steps, values)
        }
        folder = tmp_path / name
        folder.mkdir()
        if split:
            (folder / "split.json").write_text(json.dumps({"hash": split}))
        if not finished:
            lines = [{"step": int(s), "val_AP": n["AP"], "val_AP50": n["AP50"]} for s, n in numbers.items()]
            text = json.dumps({"step": 1, "loss": 3.0}) + "\n" + "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "log.jsonl").write_text(text + '{"step": 99, "val_A')  # the line being written
            (folder / "settings.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "output"}))
            return folder
        content = {
            "settings": settings, "images": trained_on, "hardware": f"{processes} x CPU", "seconds": 60.0,
            "metrics": numbers[str(steps[-1])], "evaluations": numbers,
        }  # fmt: skip
        (folder / "training_summary.json").write_text(json.dumps(content))
        return folder

    return make


AP = {"a": ([0.1, 0.2, 0.35], [0.2, 0.2, 0.4], [0.15, 0.4, 0.3]), "b": ([0.3, 0.5, 0.6], [0.1, 0.4, 0.2])}


@pytest.fixture
def two_arms(runs):
    """Three seeds of one arm and two of another, which has another rate."""
    folders = [runs(f"a_seed{seed}", values, seed=seed) for seed, values in enumerate(AP["a"])]
    return folders + [runs(f"b_seed{s}", v, "optim.lr=1e-3", seed=s) for s, v in enumerate(AP["b"])]


def brute_force(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def test_means_and_deviations_over_seeds(two_arms):
    comparison = compare_runs(two_arms)
    assert [arm.name for arm in comparison.arms] == ["lr=0.0001", "lr=0.001"]
    for arm, values in zip(comparison.arms, AP.values()):
        assert [run.seed for run in arm.runs] == list(range(len(values)))
        assert [point.step for point in arm.points] == list(STEPS)
        assert [point.x for point in arm.points] == pytest.approx([1, 2, 3])  # 8 of 80 images a step
        for index, point in enumerate([*arm.points, arm.end]):
            column = [run[min(index, 2)] for run in values]
            assert (point.mean, point.deviation) == pytest.approx(brute_force(column)) and point.values == column
    goal = sum(AP["a"][k][2] for k in range(3)) / 3
    means = [sum(run[i] for run in AP["b"]) / 2 for i in range(3)]
    first = next(i for i in range(3) if means[i] >= goal)
    assert comparison.reached(comparison.arms[1]) == pytest.approx(first + 1)
    assert comparison.notes == ["lr=0.001: no run with seed 2, which other arms have."]


def test_tables_say_the_same_as_the_numbers(two_arms):
    comparison = compare_runs(two_arms)
    rows = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert len(rows) == 8 and [row["evaluation"] for row in rows[:4]] == ["step"] * 3 + ["end"]
    mean, deviation = brute_force([run[1] for run in AP["b"]])
    assert [float(rows[5][key]) for key in ("mean", "deviation")] == pytest.approx([mean, deviation], abs=1e-6)
    assert [float(value) for value in rows[5]["values"].split(";")] == [run[1] for run in AP["b"]]
    table = markdown_table(comparison)
    end, first, second = "40.0 (28.3)", "20.0 (14.1)", f"{100 * mean:.1f} ({100 * deviation:.1f})"
    assert f"| lr=0.001 | {end} | 2 | {first} | {second} | {end} |" in table
    assert table.startswith("| arm | AP at the end | runs | AP at 1 epochs |")
    below = table.partition("What the arms differ in:")[2].strip().splitlines()
    assert below == ["| setting | lr=0.0001 | lr=0.001 |", "| --- | --- | --- |", "| optim.lr | 0.0001 | 0.001 |"]
    assert "no run with seed 2" in table
    record = json.loads(json.dumps(as_dict(comparison), allow_nan=False))
    assert record["arms"][0]["points"][2]["mean"] == pytest.approx(sum(run[2] for run in AP["a"]) / 3)
    assert record["arms"][1]["differences"] == {"optim.lr": 0.001} and len(record["arms"][0]["runs"]) == 3


def test_the_figure_has_a_line_and_a_band_for_every_arm(two_arms, tmp_path):
    comparison = compare_runs(two_arms)
    axes = draw_curves(comparison).axes[0]
    for line, band, values in zip(axes.lines, axes.collections, AP.values(), strict=True):
        expected = [brute_force([run[i] for run in values]) for i in range(3)]
        assert list(line.get_xdata()) == pytest.approx([1, 2, 3])
        assert list(line.get_ydata()) == pytest.approx([100 * mean for mean, _ in expected])
        corners = [tuple(point) for point in band.get_paths()[0].vertices.round(6).tolist()]
        for x, (mean, deviation) in enumerate(expected, 1):
            for edge in (mean - deviation, mean + deviation):
                assert (x, round(100 * edge, 6)) in corners
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lr=0.0001 (3 runs)", "lr=0.001 (2 runs)"]
    written = write_comparison(comparison, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in written)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.index("AP at the end") < page.index("What the arms differ in") < page.index("<td>optim.lr</td>")
    assert page.count("<svg") == 1 and "a_seed2" in page and not re.search(r"(src|href)=\"(?!#|data:)", page)
    first = (tmp_path / "out" / "curves.svg").read_bytes()
    write_comparison(comparison, tmp_path / "out")
    assert (tmp_path / "out" / "curves.svg").read_bytes() == first
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_an_arm_has_no_deviation(runs):
    comparison = compare_runs([runs("one", [0.1, 0.2, 0.3])])
    assert comparison.arms[0].end.deviation is None and "30.0 |" in markdown_table(comparison)
    assert not draw_curves(comparison).axes[0].collections and comparison.arms[0].name == "one"


def test_seeds_inside_names_and_folds_do_not_part_an_arm(runs):
    for seed in (0, 1, 12):
        words = [
            f"model.init=runs/pre_seed{seed}",
            f"data.subset={seed}@10",
            f"data.split_seed={seed}",
            "data.workers=3",
        ]
        runs(f"own_{seed}", [0.1, 0.2, 0.3], *words, f"checkpoint.every={seed}", seed=seed, split=f"{seed}")
        runs(f"scratch_{seed}", [0.1, 0.2, 0.3], *words[1:], seed=seed, split=f"{seed}")
    folders = [runs_folder for runs_folder in sorted(runs("x", [1, 1, 1]).parent.iterdir()) if runs_folder.name != "x"]
    comparison = compare_runs(folders)
    assert [(arm.name, len(arm.runs)) for arm in comparison.arms] == [("init=pre_seed*", 3), ("init=-", 3)]
    assert comparison.notes == []
    other = runs("other_0", [0.1, 0.2, 0.3], "optim.lr=9", "data.subset=0@10", split="zz")
    notes = compare_runs([*folders, other]).notes
    assert any("different labeled images at seed 0 on fold 0: split 0 (" in note for note in notes)
    tenth = [runs("tenth_0", [0.1, 0.2, 0.3], "data.subset=0@20"), folders[0]]
    assert "different data, data.subset: *@20 (" in compare_runs(tenth).notes[-1]


def test_evaluations_that_not_all_runs_have_are_left_out_aloud(runs):
    full = runs("full", [0.1, 0.2, 0.3])
    part = runs("part", [0.3, 0.5], seed=1, steps=(10, 30))
    going = runs("going", [0.2], seed=2, steps=(10,), finished=False)
    comparison = compare_runs([full, part], axis="steps")
    arm = comparison.arms[0]
    assert [point.step for point in arm.points] == [10, 30] and arm.end.values == [0.3, 0.5]
    assert any(
        "left out are evaluations that not all of its 2 runs have (steps 20)" in note for note in comparison.notes
    )
    comparison = compare_runs(arms={"all": [full, part, going]}, axis="steps")
    arm = comparison.arms[0]
    assert [(point.step, point.values) for point in arm.points] == [(10, [0.1, 0.3, 0.2])]
    assert arm.end.values == [0.3, 0.5]
    assert any("not finished and not part of the end" in note and "going" in note for note in comparison.notes)
    with pytest.raises(CompareError, match=r"going does not record its epochs \(is it finished\?\): choose --x steps"):
        compare_runs([going])


def test_arms_share_an_evaluation_where_it_is_less_than_half_a_step_away(runs):
    small = runs("small", [0.1, 0.2, 0.3], trained_on=80)  # 0.1 epochs a step
    large = runs("large", [0.4, 0.5, 0.6], "optim.batch_size=32", trained_on=81, steps=(3, 5, 10))  # 0.395 a step
    common = compare_runs([small, large]).common()
    places = [(round(row[0].x, 2), round(row[1].x, 2)) for row in common]
    assert places == [(1.0, 1.19), (2.0, 1.98)]
    assert compare_runs([small, large], axis="steps").common()[0][0].step == 10
    assert len(compare_runs([small, large], axis="steps").common()) == 1
    seconds = compare_runs([small, large], axis="seconds").arms[0].points
    assert [point.x for point in seconds] == pytest.approx([20, 40, 60])


def test_processes_count_in_epochs(runs):
    assert compare_runs([runs("two", [0.1, 0.2, 0.3], processes=2)]).arms[0].points[0].x == pytest.approx(2.0)


def test_different_evaluation_data_are_refused_unless_forced(runs):
    one, two = runs("one", [0.1, 0.2, 0.3]), runs("two", [0.1, 0.2, 0.3], "data.val=data/test.json", seed=1)
    with pytest.raises(CompareError, match=r"not evaluated on the same data.*data/val\.json.*data/test\.json.*--force"):
        compare_runs([one, two])
    comparison = compare_runs([one, two], force=True)
    assert len(comparison.arms) == 1 and "do not compare" in comparison.notes[0]
    fewer = runs("fewer", [0.1, 0.2, 0.3], images=49, seed=2)
    with pytest.raises(CompareError, match=r"images: 50 \(.*one\), 49 \(.*fewer\)"):
        compare_runs([one, fewer])
    agnostic = runs("agnostic", [0.1, 0.2, 0.3], "evaluation.class_agnostic=true", seed=3)
    with pytest.raises(CompareError, match=r"classes ignored: False .* True"):
        compare_runs([one, agnostic])


def test_the_numbers_of_evaluate_join_in(runs, tmp_path):
    trained = runs("trained", [0.1, 0.2, 0.3])
    numbers = {"AP": 0.9, "AP50": 1.0, "num_images": 50, "num_instances": 9, "class_agnostic": False}
    source = {"data": "data/val.json", "split": None}
    for name, model in (("own", trained), ("foreign", "someone/model")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({**numbers, **source, "model": str(model)}))
    arm = compare_runs([tmp_path / "own"]).arms[0]
    assert [(point.x, point.values) for point in arm.points] == [(pytest.approx(3.0), [0.9])] and arm.end.mean == 0.9
    both = compare_runs([trained, tmp_path / "foreign"], axis="steps")
    assert both.arms[1].end.mean == 0.9 and len(both.arms) == 2
    with pytest.raises(CompareError, match="same settings and the same seed 0"):
        compare_runs([trained, tmp_path / "own"])


def test_metrics_are_never_mixed(runs, tmp_path):
    run = runs("one", [0.1, 0.2, 0.3])
    numbers = {"AP": 0.9, "data": "data/val.json", "split": None, "model": str(run), "metric": "cityscapes"}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(numbers))
        numbers["metric"] = "coco"
    arms = {"x": [tmp_path / "first"], "y": [tmp_path / "second"]}
    for given in ({"folders": [tmp_path / "first", tmp_path / "second"]}, {"arms": arms}):
        with pytest.raises(CompareError, match=r"different metrics: cityscapes \(.*first\), coco \(.*second\)"):
            compare_runs(**given, force=True)


def test_arms_by_name_may_hold_unlike_runs_and_say_so(two_arms):
    comparison = compare_runs(arms={"slow": two_arms[:3], "fast": two_arms[3:4], "both": [two_arms[4]]})
    assert [arm.name for arm in comparison.arms] == ["slow", "fast", "both"]
    mixed = compare_runs(arms={"mixed": [two_arms[0], two_arms[4]]})
    assert "mixed: its runs differ in more than their seeds: optim.lr." in mixed.notes


def test_arms_that_differ_in_much_are_called_by_their_folders(runs):
    words = ["optim.lr=1e-3", "optim.clip=4", "optim.schedule=cosine", "optim.warmup=77", "data.flip=0.125"]
    comparison = compare_runs([runs("plain_seed0", [0.1, 0.2, 0.3]), runs("tuned_seed0", [0.1, 0.2, 0.3], *words)])
    assert [arm.name for arm in comparison.arms] == ["plain", "tuned"]
    assert set(comparison.arms[1].differences) == {
        "optim.lr",
        "optim.clip",
        "optim.schedule",
        "optim.warmup",
        "data.flip",
    }


def test_what_cannot_be_compared_is_explained(runs, tmp_path):
    one = runs("one", [0.1, 0.2, 0.3])
    with pytest.raises(CompareError, match="No runs to compare"):
        compare_runs([])
    with pytest.raises(CompareError, match=r"one is given twice"):
        compare_runs([one, tmp_path / "." / "one"])
    with pytest.raises(CompareError, match=r"nowhere: no such folder"):
        compare_runs([tmp_path / "nowhere"])
    with pytest.raises(CompareError, match=r"holds no run and no metrics\.json.* Its subfolders do: one; pass .*/\*"):
        compare_runs([tmp_path])
    with pytest.raises(CompareError, match=r"one has no AP75; it has AP, AP50"):
        compare_runs([one], metric="AP75")
    copy = runs("copy", [0.1, 0.2, 0.3])
    with pytest.raises(CompareError, match=r"one and .*copy have the same settings and the same seed 0.*--arm"):
        compare_runs([one, copy])
    never = runs("never", [0.1, 0.2, 0.3], seed=5)
    summary = json.loads((one / "training_summary.json").read_text())
    (never / "training_summary.json").write_text(json.dumps({**summary, "evaluations": {}, "metrics": None}))
    with pytest.raises(CompareError, match=r"never was never evaluated: set `data.val`"):
        compare_runs([never])
    del summary["images"]
    (never / "training_summary.json").write_text(json.dumps(summary))
    with pytest.raises(CompareError, match=r"never does not record 'images': another version wrote it"):
        compare_runs([never])
    (never / "training_summary.json").write_text("{")
    with pytest.raises(CompareError, match=r"never/training_summary\.json is not valid JSON"):
        compare_runs([never])
