"""Few-shot training from the command line, and the proof that prompts do the work."""

import json

import pytest
import torch
from training_helpers import log_of

from uplvp_hf.cli import main
from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.class_splits import class_split
from uplvp_hf.data.synthetic import LOOKS, NOVEL_LOOKS, write_scenes
from uplvp_hf.evaluation.few_shot import Asking, load_few_shot
from uplvp_hf.evaluation.few_shot_table import Questions, few_shot_rows
from uplvp_hf.hub.push import prepare_folder
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.few_shot_task import FewShotTask
from uplvp_hf.training.loop import train


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """Folders train (base looks), pool and val (all 24) of tiny scenes."""
    folder = tmp_path_factory.mktemp("looks")
    base = [name for name in LOOKS[24] if name not in NOVEL_LOOKS]
    write_scenes(folder / "train", 30, 0, size=64, looks=24, classes=base)
    write_scenes(folder / "pool", 40, 1, size=64, looks=24)
    write_scenes(folder / "val", 4, 2, size=64, looks=24)
    return folder


@pytest.fixture
def words(looks, tiny_segmenter, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    content = {"data": {"train": str(looks / "train"), "size": 64}, "model": {"segmenter": tiny_segmenter("resnet")}}
    content |= {"optim": {"steps": 2, "batch_size": 2, "lr": 1e-3}, "fewshot": {"least_share": 0.001}, "log_every": 1}
    recipe.write_text(json.dumps(content))
    return ["--recipe", str(recipe), "classes=looks24", "--quiet"]


@pytest.mark.slow
def test_from_base_classes_to_a_pushed_model(looks, words, tmp_path, capsys):
    """train, train on, draw, add, evaluate, predict, table, push: as docs/few_shot.md has it."""
    proto, prompt, model = (str(tmp_path / name) for name in ("proto", "prompt", "model"))
    assert main(["fewshot", "train", *words, "fewshot.conditioning=prototype", "--output", proto]) == 0
    more = [f"model.init={proto}", "fewshot.conditioning=prompt", f"data.val={looks / 'val'}"]
    assert main(["fewshot", "train", *words, *more, "--output", prompt]) == 0
    assert any("val_AP" in line for line in log_of(tmp_path / "prompt"))
    trained, _ = load_few_shot(prompt)
    start, _ = load_few_shot(proto)
    assert trained.config.id2label == {} and trained.config.conditioning == "prompt"
    for one, other in zip(trained.segmenter.encoder, start.segmenter.encoder, strict=True):
        for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(value, expected), name  # frozen, its norms too

    supports = str(tmp_path / "supports.json")
    draw = ["fewshot", "draw", str(looks / "pool"), "--shots", "2", "--seed", "3", "--classes", "looks24"]
    assert main([*draw, "--least-share", "0.001", "-o", supports]) == 0
    assert main(["fewshot", "add", prompt, "--supports", supports, "--output", model]) == 0
    assert main(["fewshot", "add", model, "--supports", supports, "--output", str(tmp_path / "twice")]) == 2
    assert "already: remove it first" in capsys.readouterr().err
    for ask in (["open"], ["present"], ["episodes", "--ways", "3"]):
        assert main(["evaluate", model, str(looks / "val"), "--quiet", "--ask", *ask]) == 0
    output = tmp_path / "predictions"
    assert main(["predict", model, str(looks / "val" / "images"), "--output", str(output), "--quiet"]) == 0
    table = ["fewshot", "table", prompt, proto, "--pool", str(looks / "pool"), "--data", str(looks / "val")]
    table += ["--classes", "looks24", "--shots", "1", "--seeds", "0", "--output", str(tmp_path / "table"), "--quiet"]
    assert main(table) == 0
    rows = [json.loads(line) for line in (tmp_path / "table" / "rows.jsonl").read_text().splitlines()]
    assert {(row["model"], row["protocol"], row["supports"]) for row in rows} >= {
        ("prompt", "open", "right"), ("prompt", "present", "wrong"), ("proto", "open", "wrong"),
    }  # fmt: skip
    pushed = prepare_folder(model, tmp_path / "pushed", "me/looks")
    config = json.loads((pushed / "config.json").read_text())
    assert config["auto_map"]["AutoModelForInstanceSegmentation"].endswith("UplvpForFewShotSegmentation")
    assert "lime disc (2)" in (pushed / "README.md").read_text()


def test_novel_objects_are_taken_out_and_their_images_if_asked(looks, words):
    words = [word.replace("classes=", "fewshot.classes=") for word in words[2:3]]
    changes = [*words, f"data.train={looks / 'pool'}", "stage=fewshot"]
    kept = FewShotTask().data(load_settings(None, changes))[0]
    dropped = FewShotTask().data(load_settings(None, [*changes, "fewshot.novel_in_base=drop"]))[0]
    everything = load_dataset_rows(looks / "pool")
    base = class_split("looks24", list(LOOKS[24])).base
    assert [category["name"] for category in kept.categories] == list(base) and len(kept) == len(everything)
    assert 0 < len(dropped) < len(kept)
    novel = {category["id"] for category in everything.categories} - set(kept.category_ids)
    assert not novel & {id_ for row in kept.rows for id_ in row["objects"]["category_id"]}
    ids = {row["image_id"] for row in dropped.rows}
    assert not any(novel & set(row["objects"]["category_id"]) for row in everything.rows if row["image_id"] in ids)


@pytest.mark.parametrize(
    "word, message",
    [
        ("model.class_agnostic=true", "Not for few-shot training: leave out `model.class_agnostic`"),
        ("fewshot.shots=[3,1]", "must be one or two numbers, the lower first"),
        ("fewshot.support_bank=5", "needs a frozen encoder"),
        ("model.freeze_backbone=true", "would freeze a randomly initialized backbone"),
    ],
)
def test_settings_that_make_no_sense_are_refused(looks, tiny_segmenter, tmp_path, word, message):
    words = [f"data.train={looks / 'train'}", "data.size=64", "stage=fewshot", f"output={tmp_path / 'run'}", word]
    settings = load_settings(None, [*words, f"model.segmenter={json.dumps(tiny_segmenter('resnet'))}"])
    with pytest.raises(ConfigError, match=message):
        train(settings, progress=False)


@pytest.mark.slow
def test_right_supports_beat_wrong_ones_on_held_out_classes(tmp_path):
    """The test that the prompts, and not the head, do the work: the same model, the same images, other supports."""
    base = [name for name in LOOKS[24] if name not in NOVEL_LOOKS]
    write_scenes(tmp_path / "train", 200, 0, looks=24, classes=base)
    write_scenes(tmp_path / "pool", 60, 1, looks=24)
    write_scenes(tmp_path / "val", 30, 2, looks=24)
    words = [f"data.train={tmp_path / 'train'}", "fewshot.classes=looks24", "stage=fewshot", "checkpoint.every=0"]
    words += ["optim.steps=150"]
    first = [*words, "fewshot.conditioning=prototype", f"output={tmp_path / 'proto'}"]
    train(load_settings("scenes_finetune", first), progress=False)
    second = [
        *words,
        "fewshot.conditioning=prompt",
        f"model.init={tmp_path / 'proto'}",
        f"output={tmp_path / 'prompt'}",
    ]
    second += ["fewshot.support_bank=20", "fewshot.support_score=head"]
    train(load_settings("scenes_finetune", second), progress=False)
    pool, val = load_dataset_rows(tmp_path / "pool"), load_dataset_rows(tmp_path / "val")
    questions = Questions(NOVEL_LOOKS, shots=(5,), seeds=(0,), askings=(Asking("present"),))
    rows = few_shot_rows(*load_few_shot(str(tmp_path / "prompt")), pool, val, questions)
    found = {row["supports"]: row["metrics"]["AP50"] for row in rows}
    assert found["right"] > 1.25 * found["wrong"] > 0, found
