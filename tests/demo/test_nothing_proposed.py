"""The demo when CLIP finds nothing: no number is made up, and nothing falls over."""

import pytest

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.demo import pipeline
from uplvp_hf.demo.report import write_report
from uplvp_hf.files import write_json


@pytest.mark.slow
def test_no_mask_at_all(tmp_path, monkeypatch):
    real = pipeline.label_images
    monkeypatch.setattr(pipeline, "label_images", lambda *a, **k: real(*a, **{**k, "min_confidence": 1.1}))
    scenes = write_scenes(tmp_path / "scenes", 2, seed=0, size=96)
    proposals = pipeline.label_scenes(str(scenes), tmp_path / "labels")
    assert (proposals["masks"], proposals["images"], proposals["recall"]) == (0, 2, 0)
    assert proposals["precision"] is None and proposals["precision_named"] is None
    arms = {name: {"AP": 0.0, "AP50": 0.0, "seconds": 1.0} for name in pipeline.ARMS}
    summary = {"arms": arms, "seed": 0, "sizes": vars(pipeline.DemoSizes()), "proposals": proposals}
    write_json(tmp_path / "results.json", summary)
    truth, pseudo = load_dataset_rows(scenes), load_dataset_rows(tmp_path / "labels")
    samples = {"pseudo": pseudo, "pseudo_truth": {row["file_name"].split("/")[-1]: row for row in truth.rows}}
    samples |= {"test": truth.subset([]), "predictions": [], "id2label": truth.id2label}
    curves = {name: {4: 0.0} for name in pipeline.ARMS}
    write_report(tmp_path / "report.html", summary, pipeline.ARMS, curves, samples)
    page = (tmp_path / "report.html").read_text()
    assert "0 masks on 2 images" in " ".join(page.split()) and "precision\nnone at IoU .5" in page
