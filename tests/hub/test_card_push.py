"""The card says what the files say, and the folder that would be pushed works by itself."""

import configparser
import json
import os
from pathlib import Path

import processes
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import uplvp_hf
from uplvp_hf.commands import push
from uplvp_hf.hub import build_card, check_repo_id, prepare_folder

SUMMARY = {
    "stage": "finetune",
    "settings": {
        "seed": 3,
        "mixed_precision": "no",
        "data": {"train": "/somebody/home/animals7", "val": "/somebody/home/animals7", "val_split": "val",
                 "labels_per_class": 10, "split_seed": 1},
        "model": {"init": "/somebody/home/runs/pretrain", "prompt_matching": "cosine"},
        "optim": {"steps": 500, "batch_size": 8, "accumulation": 2, "lr": 1e-4},
    },
    "images": 70,
    "seconds": 812.4,
    "hardware": "1 x CPU (x86_64, 2 threads)",
    "metrics": {"AP": 0.31234, "AP50": 0.5, "AP75": None, "AP_S": None, "AP_M": 0.2, "AP_L": 0.4, "AR100": 0.45,
                "per_class": {"cat": 0.4, "dog": None}, "num_images": 140, "failures": []},
}  # fmt: skip


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    """A copy of the model's folder to write into."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_card_with_metrics(model_dir):
    (model_dir / "training_summary.json").write_text(json.dumps(SUMMARY))
    text = str(build_card(model_dir, "user/animals"))
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-segmentation"
    assert card.data.license == "apache-2.0" and {"instance-segmentation", "mask2former"} <= set(card.data.tags)
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "animals"
    values = {result.metric_type: result.metric_value for result in results}
    assert values == {"mask_ap": 0.3123, "mask_ap50": 0.5, "mask_ap_m": 0.2, "mask_ap_l": 0.4, "mask_ar100": 0.45}
    assert {(result.dataset_name, result.dataset_split) for result in results} == {("animals7 (val)", "val")}
    assert "| 31.2 | 50.0 | - | - | 20.0 | 40.0 | 45.0 |" in text
    assert "uplvp evaluate user/animals animals7 --split val" in text
    assert "10 (seed 1)" in text and "| Batch per process | 16 |" in text and "| dog | - |" in text
    assert "/somebody" not in text and "2405.13388" in text and "2302.01171" in text


def test_card_without_metrics_has_no_model_index(model_dir):
    text = str(build_card(model_dir, "user/animals"))
    assert "model-index" not in ModelCard(text).data.to_dict() and "Not evaluated" in text
    assert "No record of the training" in text and "None" not in text


def test_measured_metrics_replace_those_of_the_training(model_dir, tmp_path):
    (model_dir / "training_summary.json").write_text(json.dumps(SUMMARY))
    measured = {**SUMMARY["metrics"], "AP": 0.5, "data": "/somebody/test7", "split": None, "class_agnostic": True}
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(measured))
    card = ModelCard(str(build_card(model_dir, "user/animals", metrics_file=file)))
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert results[0].metric_value == 0.5 and results[0].dataset_name == "test7"
    assert "uplvp evaluate user/animals test7 --class-agnostic" in card.text
    file.write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        build_card(model_dir, "user/animals", metrics_file=file)


def test_dry_run_folder_is_complete(model_dir, scenes_dir, tmp_path, capsys):
    (model_dir / "training_summary.json").write_text(json.dumps(SUMMARY))
    (model_dir / "log.jsonl").write_text("{}")
    example = sorted((scenes_dir / "images").iterdir())[0]
    output = tmp_path / "repository"
    arguments = [str(model_dir), "--repo-id", "user/animals", "--dry-run", "--output", str(output)]
    assert push.main([*arguments, "--example", str(example)]) == 0
    assert "Nothing was pushed" in capsys.readouterr().out
    files = {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()}
    assert {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"} <= files
    assert {"assets/example_1.jpg", "assets/example_1_masks.png", "modeling_uplvp.py"} <= files
    assert {"handler.py", "requirements.txt", "LICENSE"} <= files
    assert "](assets/example_1_masks.png)" in (output / "README.md").read_text()
    assert not files & {"log.jsonl", "training_summary.json"}
    card = ModelCard.load(output / "README.md")
    assert card.data.widget[0]["src"] in files and card.data.widget[0]["output"]["url"] in files
    assert push.main(arguments) == 2 and "not an empty folder" in capsys.readouterr().err


def test_requirements_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    ours = set(setup["options"]["install_requires"].split())
    hub = Path(uplvp_hf.__path__[0]) / "hub"
    for file in (hub / "templates" / "requirements.txt", hub / "space" / "requirements.txt"):
        further = {line for line in file.read_text().split() if line not in ours}
        assert further <= {"httpx", "gradio>=6,<7"}, further


def test_rights_are_those_of_new_files(model_dir, tmp_path):
    os.chmod(model_dir / "model.safetensors", 0o600)  # as safetensors leaves it
    folder = prepare_folder(model_dir, tmp_path / "repository", "user/animals")
    (tmp_path / "new").write_text("")
    usual = (tmp_path / "new").stat().st_mode
    assert {file.stat().st_mode for file in folder.rglob("*") if file.is_file()} == {usual}


def test_license_text_is_that_of_the_license(model_dir, tmp_path):
    ours = (Path(__file__).parents[2] / "LICENSE").read_text()
    assert (prepare_folder(model_dir, tmp_path / "a", "user/animals") / "LICENSE").read_text() == ours
    assert not (prepare_folder(model_dir, tmp_path / "b", "user/animals", license="cc-by-4.0") / "LICENSE").exists()
    (model_dir / "LICENSE").write_text("mine")
    folder = prepare_folder(model_dir, tmp_path / "c", "user/animals", license="other")
    assert (folder / "LICENSE").read_text() == "mine"


def test_links_and_names_out_of_the_model_folder_are_refused(model_dir, tmp_path):
    weights = model_dir / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors leads out of .*elsewhere"):
        prepare_folder(model_dir, tmp_path / "repository", "user/animals")
    weights.unlink()
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leads out of"):
        prepare_folder(model_dir, tmp_path / "repository", "user/animals")
    assert not (tmp_path / "repository").exists()


def test_a_pickle_only_is_refused_with_a_remedy(model_dir, tmp_path):
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which is not opened"):
        prepare_folder(model_dir, tmp_path / "repository", "user/animals")


def test_a_pretraining_checkpoint_is_no_endpoint(model_dir, tmp_path):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "architectures": ["UplvpForPreTraining"]}))
    folder = prepare_folder(model_dir, tmp_path / "repository", "user/animals")
    assert not (folder / "handler.py").exists() and (folder / "modeling_uplvp.py").exists()
    assert "Inference Endpoint" not in (folder / "README.md").read_text()


def test_paths_of_runs_are_no_base_models(model_dir, tmp_path, monkeypatch):
    def base_of(init):
        summary = {**SUMMARY, "settings": {**SUMMARY["settings"], "model": {"init": init}}}
        (model_dir / "training_summary.json").write_text(json.dumps(summary))
        return build_card(model_dir, "user/animals").data.base_model

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert base_of("facebook/some-model") == "facebook/some-model"
    assert base_of("runs/pretrain") is None and base_of("../x/y") is None and base_of("/a/b") is None


REMOTE = """
from PIL import Image
from transformers import pipeline

for name in sys.argv[1:]:
    segmenter = pipeline("image-segmentation", name, trust_remote_code=True)
    found = segmenter(Image.new("RGB", (90, 50), (90, 120, 30)), threshold=0.0, overlap_mask_area_threshold=0.0)
    assert type(segmenter.model).__name__ == f"{name}ForInstanceSegmentation", type(segmenter.model)
    assert type(segmenter.image_processor).__name__ == "UplvpImageProcessor", type(segmenter.image_processor)
    assert found and all(entry["mask"].size == (90, 50) for entry in found), found
"""


@pytest.fixture
def segmenter_alone(tiny_segmenter, tmp_path):
    """Saves a tiny K-Net or QueryInst of two classes; returns its folder."""

    def save(name):
        folder = tmp_path / f"{name}_model"
        config = getattr(uplvp_hf, f"{name}Config")(
            backbone_config=tiny_segmenter()["backbone_config"], id2label={0: "cat", 1: "dog"}, **SMALL[name]
        )
        getattr(uplvp_hf, f"{name}ForInstanceSegmentation")(config).save_pretrained(folder)
        uplvp_hf.UplvpImageProcessor(size={"longest_edge": 64}).save_pretrained(folder)
        return folder

    return save


COMMON = {"hidden_size": 16, "num_attention_heads": 2, "num_queries": 6, "num_stages": 1, "intermediate_size": 16}
SMALL = {
    "KNet": {**COMMON, "norm_groups": 4},
    "QueryInst": {**COMMON, "dynamic_channels": 4, "num_mask_layers": 1},
}


@pytest.mark.slow
def test_segmenters_alone_are_pushed_as_what_they_are(without_library, segmenter_alone, scenes_dir, tmp_path):
    example = sorted((scenes_dir / "images").iterdir())[0]
    for name in SMALL:
        folder = prepare_folder(segmenter_alone(name), tmp_path / name, "user/animals", examples=[example])
        card = ModelCard.load(folder / "README.md")
        assert name.lower() in card.data.tags and "cat, dog" in card.text and "unknown" not in card.text
        assert (folder / card.data.widget[0]["output"]["url"]).is_file()
    done = processes.run(without_library + REMOTE, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_model_of_transformers_gets_no_code(model_dir, tmp_path):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config["segmenter_config"], "id2label": {"0": "cat"}}))
    folder = prepare_folder(model_dir, tmp_path / "repository", "user/animals")
    text = (folder / "README.md").read_text()
    assert "trust_remote_code" not in text and "uplvp_hf\n" not in text and 'instance-segmentation", ' not in text
    assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()
    assert "custom_code" not in ModelCard.load(folder / "README.md").data.tags


def test_examples_of_a_model_of_transformers_are_refused(model_dir, scenes_dir, tmp_path):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config["segmenter_config"]))
    with pytest.raises(ValueError, match=r"`mask2former` model of transformers.*Leave them out"):
        prepare_folder(model_dir, tmp_path / "repository", "user/animals", examples=sorted(scenes_dir.glob("images/*")))
    assert not (tmp_path / "repository").exists()


def test_nothing_is_said_of_queries_that_a_model_has_not(model_dir):
    assert "12 queries: no more" in str(build_card(model_dir, "user/animals"))
    (model_dir / "config.json").write_text(json.dumps({"model_type": "mask_rcnn", "id2label": {"0": "cat"}}))
    text = str(build_card(model_dir, "user/animals"))
    assert "queries" not in text and "background.\n- Images are scaled to 64" in text


def test_names_of_classes_do_not_break_the_card(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    name = "cat | dog\n# <b>bold</b>"
    (model_dir / "config.json").write_text(json.dumps({**config, "id2label": {"0": name}}))
    summary = {**SUMMARY, "metrics": {"AP": 0.5, "per_class": {name: 0.5}}}
    (model_dir / "training_summary.json").write_text(json.dumps(summary))
    text = str(build_card(model_dir, "user/animals"))
    assert "| cat \\| dog # &lt;b>bold&lt;/b> | 50.0 |" in text and "\ncat \\| dog # &lt;b>bold" in text


def test_names_that_the_hub_would_not_take_are_refused_before_it_is_asked():
    for name in ("x", "../x", "a/b/c", "a/-b", "a/b c", "a/b.git", "a/é", "/b", "a/"):
        with pytest.raises(ValueError, match="not of the form USER/NAME"):
            check_repo_id(name)
    check_repo_id("user/some.model-1_b")


def test_files_that_are_no_metrics_are_named(model_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file; `uplvp evaluate` writes it"):
        build_card(model_dir, "user/animals", metrics_file=tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"loss": 1}')
    with pytest.raises(ValueError, match=r"other\.json: no 'AP', only \['loss'\]"):
        build_card(model_dir, "user/animals", metrics_file=tmp_path / "other.json")


def test_without_code_the_card_asks_for_the_library(model_dir, tmp_path):
    folder = prepare_folder(model_dir, tmp_path / "repository", "user/animals", remote_code=False)
    text = (folder / "README.md").read_text()
    assert "import uplvp_hf" in text and "trust_remote_code" not in text and "handler.py" not in text
    assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()


def test_wrong_input_fails_in_one_line(model_dir, tmp_path, capsys):
    output = ["--dry-run", "--output", str(tmp_path / "repository")]
    assert push.main([str(tmp_path / "none"), "--repo-id", "user/animals", *output]) == 2
    assert push.main([str(model_dir), "--repo-id", "animals", *output]) == 2
    (model_dir / "model.safetensors").unlink()
    assert push.main([str(model_dir), "--repo-id", "user/animals", *output]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "no such folder" in lines[0] and "USER/NAME" in lines[1] and "model.safetensors" in lines[2]
    assert not (tmp_path / "repository").exists()
    with pytest.raises(SystemExit):
        push.main([str(model_dir), "--repo-id", "user/animals", "--dry-run"])


def test_a_card_tells_what_was_mixed_in(model_dir):
    """Images without a human label take part in the training, so the card must not count the labeled ones alone."""
    data = SUMMARY["settings"]["data"] | {"extra": "pretraining", "extra_share": [0.75, 0.25], "unlabeled": "/a/photos"}
    summary = SUMMARY | {"extra_images": 500, "settings": SUMMARY["settings"] | {"data": data}}
    (model_dir / "training_summary.json").write_text(json.dumps(summary))
    card = str(build_card(model_dir, "me/animals"))
    assert "| Mixed in | 500 images of the labels of its pre-training, in 75% falling to 25% of every step |" in card
    assert "| Unlabeled images, for a teacher | photos |" in card
    (model_dir / "training_summary.json").write_text(json.dumps(SUMMARY))
    assert "Mixed in" not in str(build_card(model_dir, "me/animals"))
