"""`uplvp compare` on runs that were really trained."""

import json
import statistics

import pytest

from uplvp_hf.commands.compare import main, read_arms

STEPS = (2, 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_segmenter, scenes_dir):
    """Two rates x two seeds, four steps each."""
    from uplvp_hf.training.config import load_settings
    from uplvp_hf.training.loop import train

    folder = tmp_path_factory.mktemp("runs")
    for rate in (1e-3, 3e-3):
        for seed in (0, 1):
            words = [f"data.train={scenes_dir}", f"data.val={scenes_dir}", "data.size=64", "data.subset=50%"]
            words += [f"data.split_seed={seed}", f"optim.lr={rate}", "optim.steps=4", "optim.batch_size=2"]
            words += ["evaluation.at=[2]", "checkpoint.every=0", f"seed={seed}", f"output={folder}/lr{rate}_seed{seed}"]
            train(load_settings(None, words, model={"segmenter": tiny_segmenter()}), progress=False)
    return folder


@pytest.mark.slow
def test_runs_become_arms_curves_and_tables(trained, tmp_path, capsys):
    folders = sorted(str(path) for path in trained.iterdir())
    assert main([*folders, "--output", str(tmp_path / "out"), "--x", "steps", "--metric", "AP50"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [arm["name"] for arm in record["arms"]] == ["lr=0.001", "lr=0.003"] and record["notes"] == []
    for arm, rate in zip(record["arms"], ("0.001", "0.003")):
        summaries = [json.loads((trained / f"lr{rate}_seed{s}" / "training_summary.json").read_text()) for s in (0, 1)]
        for point, step in zip(arm["points"], STEPS, strict=True):
            values = [summary["evaluations"][str(step)]["AP50"] for summary in summaries]
            assert (point["step"], point["x"], point["values"]) == (step, step, values)
            assert point["mean"] == pytest.approx(statistics.mean(values))
            assert point["deviation"] == pytest.approx(statistics.stdev(values))
        assert arm["end"]["values"] == arm["points"][-1]["values"]
    assert "| optim.lr | 0.001 | 0.003 |" in printed and "compare.html" in printed
    epochs = [
        4 * 2 / json.loads((trained / f"lr0.001_seed{s}" / "training_summary.json").read_text())["images"]
        for s in (0, 1)
    ]
    assert main(["--arm", f"slow={trained}/lr0.001*", "--output", str(tmp_path / "named")]) == 0
    named = json.loads((tmp_path / "named" / "compare.json").read_text())["arms"]
    assert [arm["name"] for arm in named] == ["slow"] and named[0]["points"][-1]["x"] == pytest.approx(
        statistics.mean(epochs)
    )


def test_an_evaluation_on_other_images_is_refused(trained, scenes_dir, tmp_path, capsys):
    from uplvp_hf.commands.evaluate import main as evaluate
    from uplvp_hf.data.synthetic import write_scenes

    other = write_scenes(tmp_path / "other", count=2, seed=5, size=96)
    run, numbers = str(trained / "lr0.001_seed0"), str(tmp_path / "numbers")
    assert evaluate([run, str(other), "--output", numbers, "--quiet"]) == 0
    second = str(trained / "lr0.001_seed1")
    assert main([numbers, second, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "not evaluated on the same data" in error and "images: 2 " in error and "--force" in error
    assert main([numbers, second, "--output", str(tmp_path / "out"), "--force"]) == 0
    assert "do not compare" in (tmp_path / "out" / "compare.html").read_text()


def test_wrong_words_are_one_line(tmp_path, capsys):
    assert read_arms([]) == {}
    for words, message in {
        ("--arm", "x"): "write NAME=GLOB",
        ("--arm", f"x={tmp_path}/no*"): "no folder matches",
        ("--arm", f"x={tmp_path}", "--arm", f"x={tmp_path}"): "given twice",
        (): "No runs to compare",
    }.items():
        assert main(list(words)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
