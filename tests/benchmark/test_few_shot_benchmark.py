"""Few-shot benchmarks: what is trained from what, what is asked, and what a second call does."""

import json

import pytest
import yaml

from uplvp_hf.benchmark.few_shot import FewShotBenchmark, few_shot_jobs, run_few_shot_benchmark
from uplvp_hf.benchmark.recipe import load_benchmark, read_benchmark
from uplvp_hf.settings import ConfigError
from uplvp_hf.training.config import load_settings


@pytest.fixture
def recipe(tmp_path, tiny_segmenter):
    training = {"stage": "fewshot", "data": {"size": 64}, "model": {"segmenter": tiny_segmenter("resnet")}}
    training |= {"optim": {"steps": 1, "batch_size": 2}, "fewshot": {"least_share": 0.0}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(training))
    content = {
        "kind": "fewshot", "name": "tiny", "data": {"scenes": {"train": 30, "pool": 40, "val": 12}},
        "segmenters": {"mask2former": {"recipe": str(tmp_path / "tiny.yaml")}},
        "arms": {
            "prototype": {"settings": {"fewshot.conditioning": "prototype"}, "about": "named by similarity"},
            "prompts": {"init": "prototype", "settings": {"fewshot.conditioning": "prompt"}},
            "head": {"same": "prompts", "settings": {"fewshot.support_score": "head"}},
        },
        "shots": [1], "ask": ["open", "present"], "seeds": [0], "base": 2,
    }  # fmt: skip
    file = tmp_path / "bench.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def load(recipe, *words) -> FewShotBenchmark:
    return load_benchmark(str(recipe), words, kind=FewShotBenchmark)


def test_a_benchmark_of_three_arms(recipe, tmp_path, monkeypatch):
    text = run_few_shot_benchmark(load(recipe), str(tmp_path / "out"), progress=False)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    # 3 arms x novel and base x right and wrong x open and present.
    assert (
        len(rows) == 24
        and len({json.dumps([row[k] for k in ("arm", "part", "supports", "protocol")]) for row in rows}) == 24
    )
    assert {(row["part"], row["classes"]) for row in rows} == {("novel", 6), ("base", 2)}
    assert {row["novel_in_base"] for row in rows} == {"keep"} and all(len(row["supports_hash"]) == 64 for row in rows)
    for line in ("| prototype | open | novel |", "| head | present | base |", "* `prototype`: named by similarity"):
        assert line in text
    monkeypatch.setattr("uplvp_hf.training.loop.train", None)  # nothing is trained again
    assert run_few_shot_benchmark(load(recipe), str(tmp_path / "out"), progress=False) == text
    with pytest.raises(ConfigError, match=r"holds another benchmark"):
        run_few_shot_benchmark(load(recipe, "name=other"), str(tmp_path / "out"))


def test_arms_start_from_arms_before_them(recipe):
    with pytest.raises(ConfigError, match=r"`arms.prompts.init`: no arm `later` before it"):
        load(recipe, "arms.prompts.init=later")
    with pytest.raises(ConfigError, match=r"with `same` hold `fewshot.support_score` alone"):
        load(recipe, 'arms.head.settings={"optim.steps": 3}')


@pytest.mark.parametrize("name", ["fewshot_scenes_cpu", "fewshot_animals7_cpu"])
def test_shipped_recipes_make_trainings(name, tmp_path, monkeypatch):
    monkeypatch.setattr("uplvp_hf.benchmark.few_shot.write_scenes", lambda *args, **kwargs: None)
    variables = {
        key: str(tmp_path) for key, value in read_benchmark(name)[1].get("variables", {}).items() if value is None
    }
    benchmark = load_benchmark(name, variables=variables, kind=FewShotBenchmark)
    jobs = few_shot_jobs(benchmark, tmp_path / "out")
    folders = [job.folder for job in jobs]
    assert len(set(folders)) == len(folders)
    for place, job in enumerate(jobs):
        assert job.needs is None or job.needs in folders[:place]
        if job.settings is not None:
            assert job.settings.stage == "fewshot" and (job.settings.model.init is None) == (job.needs is None)
    assert {job.record["arm"] for job in jobs} == set(benchmark.arms)


@pytest.mark.parametrize("segmenter", ["knet", "mask2former"])
def test_the_recipes_of_coco2voc_are_two_stages(segmenter):
    first, second = (load_settings(f"fewshot/{segmenter}_coco2voc{kind}") for kind in ("_prototype", ""))
    assert (first.fewshot.conditioning, second.fewshot.conditioning) == ("prototype", "prompt")
    assert second.model.init == first.output
    assert first.fewshot.classes == second.fewshot.classes == "coco2voc"
    assert second.model.segmenter is None and second.model.backbone_weights is None
    assert first.model.segmenter["model_type"] == segmenter and first.model.backbone_weights.startswith(
        "models/densecl"
    )
    images = 118287
    for settings, epochs, steps in ((first, 12, 44358), (second, 6, 22179)):
        assert settings.optim.epochs == epochs and -(-epochs * images // (8 * settings.optim.batch_size)) == steps
