"""Duplicates that the script leaves out are those that the models' own setting leaves out; thresholds are a grid."""

import pytest
import torch

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.evaluation import load_segmenter, predict_dataset


def test_duplicates_and_tables(load_script, tiny_model_dir, scenes_dir):
    script, dataset = load_script("measure_threshold"), load_dataset_rows(scenes_dir).subset([0, 1])
    model, processor = load_segmenter(str(tiny_model_dir), "cpu")
    every = list(predict_dataset(model, processor, dataset, progress=False))
    model.config.duplicate_iou = 0.4
    fewer = list(predict_dataset(model, processor, dataset, progress=False))
    assert sum(len(found["rle"]) for _, found in fewer) < sum(len(found["rle"]) for _, found in every)
    for (_, whole), (_, expected) in zip(every, fewer, strict=True):
        left = script.without(whole, 0.4)
        assert left["rle"] == expected["rle"] and torch.equal(left["scores"], expected["scores"])
        assert script.without(whole, 1.0) is whole
    measured = script.measure(tiny_model_dir, str(scenes_dir), [1.0, 0.4])
    assert [len(metrics["findings"]["curve"]["f1"]) for metrics in measured] == [101, 101]
    text = script.duplicates_table([("tiny", measured), ("again", measured)], ["all", "IoU 0.4"]).splitlines()
    assert text[0] == "| model | all | IoU 0.4 |" and text[2][7:] == text[3][8:] and len(text) == 5
    best = [100 * metrics["findings"]["at"][-1]["f1"] for metrics in measured]
    assert [float(cell.split("/")[2]) for cell in text[2].split("|")[2:-1]] == pytest.approx(best, abs=0.05)
