"""Rows of a card from what runs and stores leave."""

import json

import pytest

from uplvp_hf.commands import push
from uplvp_hf.hub.run_record import earlier_stages, known_licenses, settings_yaml, training_rows


def rows_of(split=None, **summary):
    return dict(training_rows({"stage": "pretrain", **summary}, split or {}))


def test_steps_say_what_was_asked_for_and_what_is_kept():
    optim = {"settings": {"optim": {"steps": 500}}}
    assert rows_of(**optim)["Steps"] == "500"
    assert rows_of(**optim, steps=420)["Steps"] == "420"  # stopped early
    assert rows_of(**optim, steps=500, model_step=400)["Steps"] == "500; weights of step 400, the best"
    epochs = {"settings": {"optim": {"steps": None, "epochs": 12}}}
    assert rows_of(**epochs, steps=300, model_step=300)["Steps"] == "300; 12 epochs asked for"
    assert "Steps" not in rows_of()


def test_parameters_and_average():
    rows = rows_of(parameters=1000, parameters_trained=400, settings={"optim": {"ema": 0.999}})
    assert rows["Parameters"] == "1,000, of which 400 were trained" and "0.999" in rows["Average of the weights"]
    assert rows_of(parameters=1000, parameters_trained=1000)["Parameters"] == "1,000"


def test_nothing_is_said_without_a_record():
    assert training_rows({}, {"name": "1@10"}) == [] and settings_yaml({}) is None and earlier_stages({}) == []


def test_folders_of_the_machine_are_left_out():
    settings = {"output": "/home/a/runs", "data": {"train": "/home/a/photos", "val": None}, "model": {"init": "a/b"}}
    assert settings_yaml({"settings": settings}) == "data:\n  train: photos\nmodel:\n  init: a/b"


def test_labels_of_unknown_license_are_said_to_be(tmp_path):
    header = {"labeler": "clip", "encoder": "/models/some", "license": None, "vocabulary": [f"c{i}" for i in range(25)]}
    (tmp_path / "header.json").write_text(json.dumps(header))
    ((title, rows),) = earlier_stages({"settings": {"data": {"train": str(tmp_path)}}})
    rows = dict(rows)
    assert title == "Pseudo labels" and rows["License of the encoder"].startswith("not known")
    assert rows["Encoder"] == "some" and rows["Vocabulary"].endswith("c19 and 5 more")


@pytest.fixture
def trained(tmp_path):
    """trained(license): the folder of a model that was pre-trained on a store whose networks have this license."""

    def make(license):
        for name, data in (("model", {"train": "few.json"}), ("pretrain", {"train": str(tmp_path / "labels")})):
            (tmp_path / name).mkdir(exist_ok=True)
            settings = {"data": data, "model": {"init": str(tmp_path / "pretrain") if name == "model" else None}}
            (tmp_path / name / "training_summary.json").write_text(json.dumps({"settings": settings}))
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / "header.json").write_text(json.dumps({"license": license}))
        return tmp_path / "model"

    return make


def test_push_takes_the_license_that_the_record_of_the_labels_knows(trained, monkeypatch):
    license, remark = push._license(trained("mit (facebook/some), mit (timm/other)"))
    assert license == "mit" and remark.startswith("License: mit, that of the network")
    assert known_licenses(trained("mit (a), cc-by-nc-4.0 (b)")) == ["mit", "cc-by-nc-4.0"]
    monkeypatch.setattr("sys.stdin", None)
    license, remark = push._license(trained("mit (a), cc-by-nc-4.0 (b)"))
    assert license == "other" and "come under mit, cc-by-nc-4.0" in remark
    license, remark = push._license(trained(None))
    assert license == "apache-2.0" and "--license sets it" in remark


def test_push_asks_where_no_record_knows_the_license(trained, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or " cc-by-4.0 ")
    assert push._license(trained(None)) == ("cc-by-4.0", "") and "no record knows" in asked[0]
