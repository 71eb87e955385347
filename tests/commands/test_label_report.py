"""`uplvp label --report`: while labeling, and of a finished store."""

import json

from uplvp_hf.cli import main as uplvp
from uplvp_hf.commands.label import main


def test_a_report_with_truth_at_once_and_afterwards(label, scenes_dir, tmp_path, capsys):
    store, page = tmp_path / "labels", tmp_path / "page.html"
    assert uplvp([*label(scenes_dir / "images", store), f"output.truth={scenes_dir}", "--report"]) == 0
    output = capsys.readouterr()
    summary = json.loads(output.out.splitlines()[-1])
    assert summary["report"] == str(store / "report.html") and 0 <= summary["quality"]["recall"] <= 1
    assert list(summary["licenses"].values()) == ["apache-2.0"] and output.err == ""
    assert json.loads((store / "header.json").read_text())["license"] == "apache-2.0"
    assert uplvp(["label", str(store), f"output.truth={scenes_dir}", "--report", str(page)]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == {"output": str(store), "report": str(page), "quality": summary["quality"]}
    loud = [word for word in label(scenes_dir / "images", store) if word != "--quiet"]
    assert uplvp(loud) == 0
    assert "synthetic_clip: apache-2.0" in capsys.readouterr().out.splitlines()[0]
    assert page.read_bytes() == (store / "report.html").read_bytes()
    for words, message in [
        ([str(store), "--report", "--clip", "x"], "--clip has no effect on a finished store"),
        ([str(scenes_dir), "--report"], "only a pseudo-label store can be reported on"),
        ([str(store)], "--output is needed"),
        (["--report", str(store), "--output", "x"], "write it last"),
        (["--output", "x"], "no images are named"),
    ]:
        assert main(words) == 2
        assert message in capsys.readouterr().err
