"""Benchmarks of semantic segmenters: a real tiny run, its controls, tables and claims."""

import pytest
import yaml

from uplvp_hf.benchmark.claims import judge
from uplvp_hf.benchmark.figures import results_table, write_results
from uplvp_hf.benchmark.plan import Sources, make_plan
from uplvp_hf.benchmark.prompt_claims import FORMS, PROMPT_CLAIMS
from uplvp_hf.benchmark.recipe import load_benchmark
from uplvp_hf.benchmark.rows import read_rows
from uplvp_hf.benchmark.semantic import SWAPPED
from uplvp_hf.commands.benchmark import main


@pytest.mark.slow
def test_rows_tables_and_page(tmp_path, capsys):
    segment = "model.segmenter."
    content = {
        "name": "tiny", "data": {"scenes": {"train": 6, "val": 3, "size": 64, "cast": 0.5}}, "curve": [],
        "segmenters": {"icpc": {"finetune": "scenes_icpc"}}, "labels_per_class": ["50%"], "seeds": [0],
        "finetune": {
            "data.size": 64, "optim.steps": 2, "optim.warmup": 0, "optim.batch_size": 2, "checkpoint.every": 0,
            f"{segment}fpn_channels": 16, f"{segment}head_channels": 16, f"{segment}align_strides": [],
        },
        "arms": {
            "dynamic_concat": {"order": 1, "finetune": {f"{segment}prompt": "dynamic_concat"}},
            "none": {"finetune": {f"{segment}prompt": "none"}},
            "static 9": {"finetune": {f"{segment}prompt": "static", f"{segment}num_context": 9}},
        },
    }  # fmt: skip
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["--recipe", str(recipe), "--output", str(output), "--quiet"]) == 0
    printed = capsys.readouterr().out
    rows = read_rows(output / "rows.jsonl")
    assert [row["arm"] for row in rows] == ["none", "static 9", "dynamic_concat"]  # by `order`, then as written
    assert [(row["swapped"] is None, row["score_map"] is None) for row in rows] == [
        (True, True), (True, False), (False, False),
    ]  # fmt: skip
    assert rows[0]["metrics"].keys() == {"mIoU", "mAcc", "aAcc"} and "background" in rows[0]["per_class"]
    for word in (f"{SWAPPED}, split 50%", "score map alone, split 50%", "difference in mIoU", "| 2 | 1 |"):
        assert word in printed
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg") == 6 and "<th>mIoU</th><th>aAcc</th>" in page and "Scores above" not in page
    assert (output / "data" / "train").is_dir() and not (output / "data" / "unlabeled").exists()
    assert main(["--rows", str(output / "rows.jsonl"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "results.md").read_text() == (output / "results.md").read_text()


def row(arm, seed, value, swapped=None, count="10%"):
    numbers = {"mIoU": value, "mAcc": value, "aAcc": value}
    controls = {"swapped": swapped and {**numbers, "mIoU": swapped}, "score_map": None}
    return {
        "benchmark": "b", "segmenter": "icpc", "arm": arm, "labels_per_class": count, "seed": seed, "metrics": numbers,
        "class_agnostic": False, "curve": {"2": value}, "finetune": {"steps": 2}, **controls,
    }  # fmt: skip


def test_swapped_prompts_are_a_claim(tmp_path):
    rows = [row("dynamic_concat", seed, 0.5 + seed / 100, 0.4 + seed / 50) for seed in range(3)]
    rows += [row("static 9", seed, 0.52 + seed / 100) for seed in range(3)]
    verdicts = {(one.better, one.worse): one for one in judge(rows)}
    own = verdicts["dynamic_concat", f"dynamic_concat, {SWAPPED}"]
    assert own.mean == pytest.approx(0.09) and own.word == "supported"
    assert verdicts["dynamic_concat", "static 9"].word == "contradicted"
    table = results_table(rows, "icpc")
    assert "| dynamic_concat | 51.0 (1.0) / 51.0 (1.0) | 42.0 (2.0) | 2 | 3 |" in table.splitlines()
    assert "| static 9 | 53.0 (1.0) / 53.0 (1.0) | - | 2 | 3 |" in table.splitlines()
    assert not list(tmp_path.iterdir()) and "difference in mIoU" in write_results(rows, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"results.md"}  # no curve of one point, no bars of two arms


def test_the_recipe_has_what_is_claimed(tmp_path):
    """Every form of prompt with and without either contrastive loss, at one scale and at several, for 20 and 160 images
    and three seeds; and every arm of a claim."""
    benchmark = load_benchmark("scenes_icpc")
    kinds = ("", " + contrast", " + text only", " multi", " multi + contrast", " multi + text only")
    assert set(benchmark.arms) == {"none", *(form + kind for form in FORMS for kind in kinds)}
    arms = {arm.partition(", ")[0] for _, better, worse in PROMPT_CLAIMS for arm in (better, worse)}
    assert arms <= set(benchmark.arms)
    train = benchmark.data.scenes["train"]
    assert [round(train * float(count[:-1]) / 100) for count in benchmark.labels_per_class] == [20, 160]
    jobs = make_plan(benchmark, tmp_path, Sources({"train": "x"}, {"val": "x"}, {"path": "x"}))
    assert len(jobs) == len({job.fingerprint for job in jobs} | {job.folder for job in jobs}) / 2
    assert len(jobs) == (8 + 11) * 2 * 3 + (12 + 12) * 3
    first = jobs[: 8 * 2 * 3]
    assert {job.row["seed"] for job in first} == {0, 1, 2} and "post" in {job.row["arm"] for job in first}
    by_arm = {job.row["arm"]: job.settings.model.segmenter for job in jobs}
    for arm, settings in by_arm.items():
        assert settings["contrastive"] == (
            "align_guided" if "contrast" in arm else "text_only" if "text only" in arm else "none"
        )
        assert settings["align_strides"] == ([8, 16, 32] if "multi" in arm else [])
        assert settings["prompt"] == arm.split()[0] and settings.get("num_context", 8) == (9 if " 9" in arm else 8)
