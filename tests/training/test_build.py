"""From settings to data, model and processor: what is taken over from a checkpoint and what is refused."""

import json
import shutil

import pytest

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.modeling_uplvp import UplvpForPreTraining
from uplvp_hf.training.build import _unasked, build_data, build_model, build_processor, with_image_settings
from uplvp_hf.training.config import ConfigError, load_settings


@pytest.fixture
def scenes(tmp_path):
    return write_scenes(tmp_path / "scenes", count=3, seed=0, size=64)


@pytest.fixture
def checkpoint(tmp_path, tiny_segmenter):
    """A pre-training checkpoint with its processor, as a run leaves it."""
    folder = tmp_path / "checkpoint"
    config = UplvpConfig(segmenter_config=tiny_segmenter(), prompt_drop=0.3, prompt_matching="sequential")
    UplvpForPreTraining(config).save_pretrained(folder)
    UplvpImageProcessor(
        size={"longest_edge": 96}, pad_size={"height": 96, "width": 96}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)
    return folder


def build(*words, **defaults):
    settings = with_image_settings(load_settings(None, [str(word) for word in words], **defaults))
    train, _ = build_data(settings)
    return settings, build_model(settings, train)


def test_a_checkpoint_brings_its_image_and_prompt_settings(scenes, checkpoint):
    settings, model = build(f"data.train={scenes}", f"model.init={checkpoint}", "stage=pretrain")
    assert settings.data.size == 96 and settings.data.image_mean == [0.4, 0.5, 0.6]
    assert build_processor(settings.data).size["longest_edge"] == 96
    assert model.config.prompt_drop == 0.3 and model.config.prompt_matching == "sequential"
    words = ("data.size=64", "model.prompt_drop=0.1", "stage=pretrain")
    settings, model = build(f"data.train={scenes}", f"model.init={checkpoint}", *words)
    assert settings.data.size == 64
    assert model.config.prompt_drop == 0.1 and model.config.prompt_matching == "sequential"


def test_other_normalization_than_the_checkpoint_is_refused(scenes, checkpoint):
    with pytest.raises(ConfigError, match=r"image_mean.*trained with"):
        build(f"data.train={scenes}", f"model.init={checkpoint}", "data.image_mean=[0.5, 0.5, 0.5]")


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "cannot be read"),
        ('{"image_mean": [0.5, "x", 0.5]}', "image_mean is .*three numbers"),
        ('{"image_std": 0.5}', "image_std is 0.5"),
        ('{"size": 512}', "size is 512"),
    ],
)
def test_broken_image_settings_of_a_checkpoint_are_refused(scenes, checkpoint, content, said):
    file = checkpoint / "preprocessor_config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=rf"model\.init.*{said}.*Restore its preprocessor_config\.json"):
        build(f"data.train={scenes}", f"model.init={checkpoint}")
    file.unlink()
    settings, _ = build(f"data.train={scenes}", f"model.init={checkpoint}")
    assert settings.data.size == 512 and settings.data.image_mean == [0.485, 0.456, 0.406]


def test_another_segmenter_than_the_checkpoint_holds_is_refused(scenes, checkpoint, tiny_segmenter):
    same = {"segmenter": tiny_segmenter(), "init": str(checkpoint)}
    build(f"data.train={scenes}", model=same)
    with pytest.raises(ConfigError, match=r"model\.segmenter\.num_queries is 5, there 12"):
        build(f"data.train={scenes}", model=same | {"segmenter": tiny_segmenter(num_queries=5)})


def test_misspelled_segmenter_settings_are_refused(scenes, tiny_segmenter):
    with pytest.raises(ConfigError, match=r"num_querys.*Did you mean `model\.segmenter\.num_queries`"):
        build(f"data.train={scenes}", model={"segmenter": tiny_segmenter(num_querys=5)})


def test_a_frozen_random_backbone_is_refused(scenes, tiny_segmenter):
    with pytest.raises(ConfigError, match="randomly initialized"):
        build(f"data.train={scenes}", model={"segmenter": tiny_segmenter(), "freeze_backbone": True})


def test_images_may_lie_elsewhere(scenes, tmp_path, tiny_segmenter):
    (tmp_path / "elsewhere").mkdir()
    annotations = shutil.copy(scenes / "annotations" / "instances.json", tmp_path / "elsewhere" / "few.json")
    assert json.loads((tmp_path / "elsewhere" / "few.json").read_text())["images"]
    model = {"segmenter": tiny_segmenter()}
    with pytest.raises(ConfigError, match=r"data\.train_images"):
        build(f"data.train={annotations}", model=model)
    build(f"data.train={annotations}", f"data.train_images={scenes / 'images'}", model=model)


@pytest.mark.parametrize("name", ["no_such_run", "./no_such/run", "{}/pretrain"])
def test_a_missing_start_is_not_looked_up_on_the_hub(scenes, tmp_path, name):
    with pytest.raises(ConfigError, match="no such folder"):
        build(f"data.train={scenes}", f"model.init={name.format(tmp_path)}")


def test_a_start_without_a_model_is_named(scenes):
    with pytest.raises(ConfigError, match=r"scenes: no config\.json"):
        build(f"data.train={scenes}", f"model.init={scenes}")


def test_prompts_in_a_fine_tuning_are_reported(scenes_dir, tiny_segmenter, caplog):
    rows = load_dataset_rows(scenes_dir)
    for stage, told in {"finetune": True, "pretrain": False}.items():
        words = [f"stage={stage}", "model.num_prompts=5", "model.prompt_drop=0.2", "data.size=64"]
        build_model(load_settings(None, words, model={"segmenter": tiny_segmenter("swin")}), rows)
        message = "Without effect in fine-tuning, as they are about prompts: `model.num_prompts`, `model.prompt_drop`."
        assert (message in caplog.text) is told
        caplog.clear()


def test_the_seed_of_the_run_draws_the_labeled_images_too(tmp_path):
    """Unless the split has a seed of its own."""
    write_scenes(tmp_path / "scenes", 40, seed=3)

    def drawn(seed, *words):
        words = [f"seed={seed}", f"data.train={tmp_path / 'scenes'}", "data.labels_per_class=1", *words]
        train, _ = build_data(load_settings(overrides=words))
        return train.manifest["seed"], [train.image_id(index) for index in range(len(train))]

    assert drawn(7) == drawn(0, "data.split_seed=7") and drawn(7)[0] == 7
    assert drawn(7, "data.split_seed=0") == drawn(0) != drawn(7)


OFF = {"prompt_matching": "none", "kernel_supervision_weight": 0.0}


@pytest.mark.parametrize(
    ("words", "found", "off"),
    [
        ([], None, OFF),
        (["model.prompt_drop=0.1"], None, {"kernel_supervision_weight": 0.0}),
        (["model.kernel_target=labeler"], None, {"prompt_matching": "none"}),
        (["model.prompt_matching=cosine", "model.kernel_loss=contrastive"], None, {}),
        ([], "UplvpForPreTraining", {}),  # goes on as it was
        ([], "UplvpForInstanceSegmentation", OFF),  # converted, or fine-tuned: nobody asked for prompts
    ],
)
def test_a_new_pretraining_leaves_off_what_nobody_asked_for(words, found, off):
    config = (
        None if found is None else UplvpConfig(segmenter_config={"model_type": "mask2former"}, architectures=[found])
    )
    assert _unasked(load_settings(None, words, stage="pretrain"), config) == off
    assert _unasked(load_settings(None, words, stage="finetune"), config) == {}


def test_a_teacher_with_prompts_has_them_after_a_plain_pretraining():
    plain = UplvpConfig(segmenter_config={"model_type": "mask2former"}, architectures=["UplvpForPreTraining"], **OFF)
    words = ["data.unlabeled=images", "teacher.prompts=true"]
    assert _unasked(load_settings(None, words, stage="finetune"), plain) == {
        "prompt_matching": "cosine",
        "kernel_supervision_weight": 1.0,
    }
