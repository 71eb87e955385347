"""The page of a benchmark: what it shows while jobs run, and where nothing was found."""

import json
import re
import shutil

import pytest

from uplvp_hf.benchmark import report
from uplvp_hf.benchmark.plan import make_plan
from uplvp_hf.benchmark.recipe import load_benchmark
from uplvp_hf.benchmark.sources import prepare_sources
from uplvp_hf.files import write_json


@pytest.fixture
def planned(tmp_path):
    words = [f"data.scenes.{name}={count}" for name, count in (("unlabeled", 3), ("train", 8), ("val", 2))]
    benchmark = load_benchmark("demo", words)
    sources = prepare_sources(benchmark, tmp_path)
    return report.Report(benchmark, tmp_path, make_plan(benchmark, tmp_path, sources), sources)


def finish(planned, job, ap):
    stage = {"seconds": 2.0, "steps": 3}
    row = {**job.row, "metrics": {"AP": ap, "AP50": ap}, "class_agnostic": False, "curve": {"3": ap}}
    write_json(planned.folder / job.folder / "row.json", {**row, "pretrain": None, "finetune": stage})


def page(planned):
    return " ".join((planned.folder / "report.html").read_text().split())


@pytest.mark.slow
def test_the_page_grows_with_the_jobs(planned, caplog):
    """Without any mask there is no precision, and nothing falls over; the best row is the best, not the last."""
    caplog.set_level("INFO", logger="uplvp_hf.benchmark.report")
    planned.update([])
    assert not (planned.folder / "report.html").exists()
    label = planned.jobs[0]
    assert label.kind == "label"  # most arms wait for it
    store = planned.folder / label.folder
    shutil.copytree(planned.sources.unlabeled["path"], store)
    annotations = store / "annotations" / "instances.json"
    annotations.write_text(json.dumps({**json.loads(annotations.read_text()), "annotations": []}))
    planned.update([label])
    assert "0 masks on 3 images." in page(planned) and "precision none at IoU .5" in page(planned)
    assert page(planned).count("data:image/jpeg") == 6 and 'http-equiv="refresh"' in page(planned)
    first, second = [job for job in planned.jobs if job.kind == "finetune"][:2]
    for job, ap in ((first, 0.25), (second, 0.125)):
        finish(planned, job, ap)
        planned.update([label, first] if job is first else [label, first, second])
    lines = re.findall(r'<tr( class="best")?><td>([\w ]+)<', page(planned))
    assert lines == [(' class="best"', "scratch"), ("", "scratch total")]
    assert "The best is scratch (5 labels a class)" in page(planned) and "one run an arm" in page(planned)
    assert [record.message.split(":")[0] for record in caplog.records[1:]] == [
        "scratch, seed 0",
        "scratch total, seed 0",
    ]


def test_a_page_that_cannot_be_drawn_stops_nothing(planned, caplog):
    """Here the pseudo labels are gone."""
    planned.update([planned.jobs[0]])
    assert "report.html could not be written" in caplog.text
