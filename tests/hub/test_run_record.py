"""Rows of a card from what runs and stores leave."""

import json

from uplvp_hf.hub.run_record import earlier_stages, settings_yaml, training_rows


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
