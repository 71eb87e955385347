"""Pre-training towards features of the masks that lie in the pseudo-label store."""

import json
import shutil

import numpy as np
import pytest
from training_helpers import assert_same_run, log_of, stop_at

from uplvp_hf.data import DataError, encode_mask, load_dataset_rows
from uplvp_hf.data.store_features import feature_file
from uplvp_hf.training.build import build_data, build_samples, kernel_features, with_image_settings
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.stream import make_loader

SHARD = "rows-00000-00000.jsonl"
FROZEN = [
    "stage=pretrain", "model.kernel_target=labeler", "model.kernel_loss=contrastive", "model.kernel_centering=0.5",
    "model.kernel_loss_share=0.2", "model.prompt_matching=none",
]  # fmt: skip


def write_features(folder, width=5, seed=0):
    """Random features of the store `folder`."""
    counts = [len(json.loads(line)["objects"]["category_id"]) for line in (folder / SHARD).read_text().splitlines()]
    vectors = np.random.default_rng(seed).normal(size=(sum(counts), width)).astype(np.float16)
    np.save(feature_file(folder, SHARD), vectors)
    return vectors


@pytest.fixture
def store(tmp_path, scenes_dir):
    """The scenes as a store of the earlier form: without features."""
    rows, folder = load_dataset_rows(scenes_dir), tmp_path / "store"
    folder.mkdir()
    header = {"schema_version": 1, "labeler": "truth", "settings": {}, "settings_hash": ""}
    (folder / "header.json").write_text(json.dumps({**header, "categories": rows.categories}))
    lines = []
    for index, row in enumerate(rows.rows):
        masks = [encode_mask(rows.mask(index, k)) for k in range(len(row["objects"]["category_id"]))]
        lines.append(json.dumps({**row, "objects": {**row["objects"], "segmentation": masks}}))
    (folder / SHARD).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bytes(run, tmp_path, monkeypatch, store):
    """The running mean of the targets is saved with the weights."""
    write_features(store)
    words = [*FROZEN, f"data.train={store}", "log_every=1"]
    run("whole", *words)
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run("parts", *words)
    model = run("parts", *words, resume=True).model
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert model.config.kernel_target_dim == 5 and model.kernel_supervision.center.batches == 6
    for line in log_of(tmp_path / "whole"):
        others = sum(value for name, value in line.items() if name.startswith(("class_", "mask_", "dice_")))
        assert line["kernel"] == pytest.approx(0.2 * others, rel=1e-3)


def test_batches_hold_the_features_of_the_store_or_of_a_folder(store, tmp_path):
    """Each is the vector of the mask that it lies at, after crops and flips, as its class shows."""
    vectors = write_features(store)
    other = shutil.copytree(store, tmp_path / "other")
    elsewhere = write_features(other, width=3, seed=1)
    known = {}
    for name, folder, expected in (("labeler", store, vectors), (str(other), other, elsewhere)):
        words = ["stage=pretrain", f"data.train={store}", "data.size=64", f"model.kernel_target={name}"]
        settings = with_image_settings(load_settings(None, words))
        assert kernel_features(settings) == str(folder)
        rows, _ = build_data(settings)
        loader = make_loader(build_samples(settings, rows), settings, 0, 0, 1)
        batch = next(iter(loader))
        scores = {}
        for row in rows.rows:
            for label, vector in zip(row["objects"]["category_id"], row["objects"]["features"], strict=True):
                scores.setdefault(tuple(np.float32(vector)), label)
        for labels, targets, masks in zip(batch["class_labels"], batch["kernel_targets"], batch["mask_labels"]):
            assert targets.shape == (len(masks), expected.shape[1])
            for label, target in zip(labels.tolist(), targets):
                assert scores[tuple(target.numpy())] == rows.category_ids[label]
        known[name] = sum(map(len, batch["kernel_targets"]))
    assert min(known.values()) > 0


def test_stores_of_the_earlier_form_load_and_say_what_is_missing(store, run, tmp_path, scenes_dir):
    words = ["stage=pretrain", f"data.train={store}", "model.segmenter={model_type: mask2former}"]
    rows, _ = build_data(load_settings(None, words))
    assert len(rows) > 0 and all("features" not in row["objects"] for row in rows.rows)
    with pytest.raises(DataError, match=r"no features of these masks.*uplvp label STORE --features"):
        build_data(load_settings(None, [*words, f"model.kernel_target={store}"]))
    with pytest.raises(ConfigError, match="asks for features of the masks"):
        run("a", *FROZEN, f"data.train={scenes_dir}")
    with pytest.raises(ConfigError, match="there is no /nowhere"):
        run("a", *FROZEN, f"data.train={store}", "model.kernel_target=/nowhere")
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").glob("*.json"))


@pytest.mark.slow
def test_what_comes_after_such_a_pre_training(store, run, tmp_path, scenes_dir):
    """Fine-tuning asks for no features and drops head and mean; another pre-training has to say what it is drawn to."""
    write_features(store)
    run("first", *FROZEN, f"data.train={store}", "optim.steps=1", "checkpoint.every=0")
    init = f"model.init={tmp_path / 'first'}"
    again = ["stage=pretrain", init, f"data.train={store}", "optim.steps=1", "checkpoint.every=0"]
    with pytest.raises(ConfigError, match=r"set `model\.kernel_target`"):
        run("second", *again)
    prompts = run("second", *again, "model.kernel_target=prompt", "model.prompt_matching=cosine").model
    assert prompts.config.kernel_target == "prompt" and prompts.kernel_supervision.head is None
    words = ["stage=finetune", init, f"data.train={scenes_dir}", "data.extra=null", "optim.steps=1"]
    tuned = run("third", *words, "checkpoint.every=0").model
    assert not [name for name in tuned.state_dict() if name.startswith("kernel_supervision")]
