"""What `uplvp auto` decides, and from what, without training anything."""

import pytest

from uplvp_hf.auto.advice import advise, noise
from uplvp_hf.auto.estimate import in_words, minutes
from uplvp_hf.auto.parts import cut_folds, held_out
from uplvp_hf.auto.request import Request
from uplvp_hf.auto.starts import MOBILENET, possible_starts
from uplvp_hf.auto.trials import BASELINE, Source, candidate_sources, choose, try_sources
from uplvp_hf.commands.auto import main
from uplvp_hf.data import DataError, InstanceDataset, Row
from uplvp_hf.models.errors import UserError


def labels(*classes):
    """A dataset with one image for each tuple of class ids."""
    categories = [{"id": k, "name": f"c{k}"} for k in sorted({k for one in classes for k in one})]
    rows = [Row(image_id=n, file_name=f"{n}.jpg", objects={"category_id": list(one)}) for n, one in enumerate(classes)]
    return InstanceDataset(rows, categories, "few.json")


def test_no_class_is_lost_to_the_held_out_part():
    dataset = labels((1,), (1, 2), (2,), (3,), (1,), (2, 1), (1,), (2,))
    train, held = held_out(dataset)
    assert sorted(train + held) == list(range(8)) and len(held) == 2 and 3 in train
    assert held_out(dataset) == (train, held)  # drawn the same way every time
    with pytest.raises(DataError, match=r"few\.json: no image can be kept aside .*Label one more image"):
        held_out(labels((1,), (2,), (3, 4)))


def test_folds_part_the_images():
    assert sorted(k for fold in cut_folds(list(range(7))) for k in fold) == list(range(7))
    assert [len(fold) for fold in cut_folds(list(range(7)))] == [3, 2, 2] and cut_folds([5]) == [[5]]


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({"foreground": 0.4, "ncut": 0.5, BASELINE: 0.3}, "ncut"),
        ({"foreground": 0.25, BASELINE: 0.3}, None),  # a box in the middle finds more
        ({"foreground": 0.05, BASELINE: 0.0}, None),  # better than the box, but hardly anything
        ({"foreground": 0.4, BASELINE: None}, "foreground"),
        ({BASELINE: 0.9}, None),
    ],
)
def test_a_source_has_to_beat_a_box_in_the_middle(scores, chosen):
    trials = [{"name": name, **({"error": "no"} if f1 is None else {"f1": f1})} for name, f1 in scores.items()]
    taken = choose(sorted(trials, key=lambda trial: -trial.get("f1", -1.0)))
    assert (taken and taken["name"]) == chosen


def test_what_is_named_can_be_tried():
    def names(**given):
        request = Request("photos", "few.json", **given)
        return [source.name for source in candidate_sources(request, {"backbone": "timm:x"}, ["a", "b"])]

    assert names() == ["foreground", "foreground, split", "saliency", "ncut", BASELINE]
    assert names(clip="c", masks="m.json", model="sam")[4:8] == [
        "clip",
        "clip, named by examples",
        "sam",
        "masks of the file",
    ]
    assert names(sources=("ncut",)) == ["ncut", BASELINE]
    with pytest.raises(UserError, match=r"no mask source 'clip' among those that are named here: foreground"):
        names(sources=("clip",))


def test_starts_suit_the_hardware(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    request = Request("photos", "few.json", backbone_weights="w.safetensors", pad_type="same")
    assert list(possible_starts(request)) == ["small"]
    small = possible_starts(request)["small"]
    assert small.settings["model.backbone_weights"] == small.backbone["backbone_weights"] == "w.safetensors"
    assert small.settings["data.image_mean"] == [0.5] * 3 and small.backbone["settings"] == {
        "networks.pad_type": "same"
    }
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert next(iter(possible_starts(Request("photos", "few.json")))) == "swin_large"
    assert list(possible_starts(Request("photos", "few.json", device="cpu"))) == ["small"]
    assert MOBILENET in possible_starts(Request("photos", "few.json"))["small"].settings["model.backbone_weights"]
    with pytest.raises(UserError, match="--start huge is unknown"):
        possible_starts(Request("photos", "few.json", start="huge"))


def test_advice_is_what_the_runs_measured():
    def row(end, half):
        return {"metrics": {"AP": end}, "curve": {"50": half, "100": end}}

    rows = {"pre-trained": row(0.30, 0.28), "no pre-training": row(0.22, 0.1), "half the labels": row(0.18, 0.1)}
    advice = advise({"images": 256}, rows, "pre-trained")
    assert [one["what"] for one in advice] == ["labels", "time", "images"]
    assert [one["gain"] for one in advice] == pytest.approx([0.12, 0.02, 0.01])
    assert noise(100) == pytest.approx(0.1)


def test_an_estimate_in_words():
    assert [minutes(one) for one in (40, 150, 9000)] == ["40 s", "2 min", "2.5 h"]
    seconds = {"labels/chosen": 120, "pretrain/small": 420, "runs/a": 400, "runs/b": 500, "refit": 500}
    text = in_words({"seconds": seconds, "all": sum(seconds.values()), "memory_gb": 1.23})
    assert text == (
        "About 32 min (labeling 2 min, pre-training 7 min, fine-tuning 15 min, training on all labels 8 min) and "
        "1.2 GB of memory"
    )


def test_an_output_belongs_to_one_request(tmp_path):
    request = Request("photos", "few.json", words=("a=1",))
    request.claim(tmp_path)
    request.claim(tmp_path)
    Request("photos", "few.json", words=("a=1",), device="cpu").claim(tmp_path)  # elsewhere, the same
    with pytest.raises(UserError, match=r"begun with other arguments \(words: \['a=1'\], now \['a=2'\]\)"):
        Request("photos", "few.json", words=("a=2",)).claim(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="not of `uplvp auto`"):
        request.claim(tmp_path / "other")


def test_a_mistyped_call_leaves_the_output_free(tmp_path, capsys):
    (tmp_path / "empty.json").write_text('{"images": [], "annotations": [], "categories": []}')
    output = tmp_path / "out"
    for labels_file in ("nothing.json", "empty.json"):
        assert main([str(tmp_path), "--labels", str(tmp_path / labels_file), "--output", str(output)]) == 2
        assert labels_file in capsys.readouterr().err  # about the file, not about an output that is begun already
    assert not [file for file in output.rglob("*") if file.name != ".lock"]


def test_a_source_that_could_not_run_is_tried_again(tmp_path, monkeypatch):
    source, tried = Source("foreground", {"labeler": "foreground"}), []

    def measure(*arguments):
        tried.append(arguments[0].name)
        if len(tried) == 1:
            raise OSError("no network")
        quality = {"recall": 0.5, "recall_named": 0.5, "precision_named": 0.5}
        return {"f1": 0.5, "quality": quality, "seconds_per_image": 0.1, "load_seconds": 1.0}

    monkeypatch.setattr("uplvp_hf.auto.trials._measure", measure)
    request = Request("photos", "few.json")
    first, second, third = (try_sources([source], request, tmp_path, tmp_path, 1)[0] for _ in range(3))
    assert first["error"] == "no network" and second == third and second["f1"] == 0.5 and len(tried) == 2
