"""Saving, loading, wrapping, transferring and exporting models; what transformers' auto classes find."""

import json

import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, pipeline

from uplvp_hf.export import to_native
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining

BOTH = pytest.mark.parametrize("cls", [UplvpForInstanceSegmentation, UplvpForPreTraining])


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@BOTH
def test_round_trip(make_config, make_batch, tmp_path, cls):
    torch.manual_seed(0)
    model = cls(make_config(category_ids=[7, 3, 90], prompt_drop=0.2, prompt_matching="sequential")).eval()
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()
    assert equal_states(model, loaded)
    ours, theirs = model.config.to_dict(), loaded.config.to_dict()
    assert {k for k in ours if ours[k] != theirs[k]} <= {"architectures", "dtype", "segmenter_config", "_name_or_path"}
    assert loaded.config.category_ids == [7, 3, 90] and loaded.config.id2label == {0: "cat", 1: "dog", 2: "horse"}
    assert loaded.config.segmenter_config.num_labels == 3 and loaded.config.prompt_drop == 0.2
    pixels = make_batch()["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixels).masks_queries_logits, loaded(pixels).masks_queries_logits)
    half = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():  # images need not be cast
        assert half(pixels).class_queries_logits.dtype == torch.bfloat16


def test_timm_backbone_with_arguments_of_timm_round_trip(make_config, make_batch, tmp_path):
    backbone = {
        "model_type": "timm_backbone", "backbone": "mobilenetv2_035", "out_indices": [1, 2, 3, 4],
        "timm_kwargs": {"pad_type": "same"},
    }  # fmt: skip
    torch.manual_seed(0)
    model = UplvpForInstanceSegmentation(make_config(segmenter={"backbone_config": backbone})).eval()
    with torch.no_grad():
        for name, buffer in model.segmenter.backbone.named_buffers():
            if "running_var" in name:
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    loaded = UplvpForInstanceSegmentation.from_pretrained(tmp_path).eval()
    assert equal_states(model, loaded)
    pixels = make_batch()["pixel_values"]
    with torch.no_grad():
        prediction = model(pixels).class_queries_logits
        assert torch.equal(loaded(pixels).class_queries_logits, prediction)
        # Without the arguments the same weights give something else: they do reach timm.
        config = UplvpConfig.from_pretrained(tmp_path)
        config.segmenter_config.backbone_config.timm_kwargs = None
        other = UplvpForInstanceSegmentation.from_pretrained(tmp_path, config=config).eval()
        assert not torch.allclose(other(pixels).class_queries_logits, prediction, atol=1e-4)
    with pytest.raises(ValueError, match="timm_kwargs"):
        to_native(model, tmp_path / "plain")


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_missing_tensors_are_initialized_as_in_a_new_model(make_config, tmp_path, backbone):
    torch.manual_seed(0)
    config = make_config(backbone)
    fresh = UplvpForPreTraining(config)
    fresh.save_pretrained(tmp_path)
    kept = "segmenter.class_predictor.bias"
    save_file({kept: torch.full((4,), 5.0)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for seed in range(2):
        torch.manual_seed(seed)
        loaded = UplvpForPreTraining.from_pretrained(tmp_path).state_dict()
        assert (loaded.pop(kept) == 5).all()
        for name, expected in fresh.state_dict().items():
            if name == kept or not expected.is_floating_point():
                continue
            value = loaded[name]
            if expected.numel() == 1 or expected.std() == 0:
                assert torch.equal(value, expected), name
            else:
                assert torch.isfinite(value).all() and value.std() == pytest.approx(expected.std().item(), rel=0.6), (
                    name
                )
                assert abs(value.mean()) <= abs(expected.mean()) + 4 * expected.std() / expected.numel() ** 0.5, name


def test_pretraining_from_a_plain_checkpoint_starts_with_an_orthogonal_projection(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    model = UplvpForPreTraining.from_pretrained(tmp_path)
    weight = model.prompt_projection.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)
    assert (model.prompt_projection.bias == 0).all()
    assert all(torch.equal(v, model.segmenter.state_dict()[k]) for k, v in plain.segmenter.state_dict().items())


@pytest.fixture
def official_dir(tiny_segmenter, tmp_path):
    torch.manual_seed(0)
    settings = tiny_segmenter("swin")
    settings.pop("model_type")
    config = Mask2FormerConfig(**settings, id2label={0: "cat", 1: "dog"})
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "official")
    return tmp_path / "official"


@BOTH
def test_wrapping_an_official_checkpoint_and_exporting_it_back(official_dir, make_batch, tmp_path, cls):
    official = Mask2FormerForUniversalSegmentation.from_pretrained(official_dir).eval()
    model = cls.from_segmenter_pretrained(str(official_dir), prompt_drop=0.5).eval()
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.config.prompt_drop == 0.5
    pixels = make_batch()["pixel_values"]
    with torch.no_grad():
        theirs = official(pixels)
        ours = model(pixels)
        for name in ("masks_queries_logits", "class_queries_logits"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    if cls is UplvpForInstanceSegmentation:
        to_native(model, tmp_path / "plain")
        written, read = (
            load_file(tmp_path / "plain" / "model.safetensors"),
            load_file(official_dir / "model.safetensors"),
        )
        assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in read)
        exported = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "plain").eval()
        with torch.no_grad():
            assert torch.equal(exported(pixels).masks_queries_logits, theirs.masks_queries_logits)
        config = json.loads((tmp_path / "plain" / "config.json").read_text())
        assert config["model_type"] == "mask2former" and "auto_map" not in config
    half = cls.from_segmenter_pretrained(str(official_dir), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="`uplvp` model"):
        cls.from_segmenter_pretrained(str(tmp_path / "ours"))


def test_transfer_to_other_classes(make_config, make_batch, tmp_path):
    torch.manual_seed(0)
    source = UplvpForPreTraining(make_config(prompt_drop=0.3, category_ids=[1, 5, 9]))
    source.save_pretrained(tmp_path)
    new = {0: "zebra", 1: "Horse", 2: "cow", 3: "cat"}
    model = UplvpForInstanceSegmentation.from_pretraining(str(tmp_path), new, [11, 22, 33, 44])
    assert model.config.id2label == new and model.config.category_ids == [11, 22, 33, 44]
    assert model.config.prompt_drop == 0.3
    old, weights = source.state_dict(), model.state_dict()
    head = [f"segmenter.{n}" for n in ("class_predictor.weight", "class_predictor.bias", "criterion.empty_weight")]
    for name in head[:2]:
        assert torch.equal(weights[name][[1, 3, 4]], old[name][[2, 0, 3]])  # horse, cat, no object
        assert len(weights[name]) == 5
    rows = weights[head[0]]
    assert torch.isfinite(rows).all() and not any(torch.equal(rows[k], row) for k in (0, 2) for row in old[head[0]])
    assert rows[[0, 2]].abs().sum() > 0 and weights[head[2]].tolist() == pytest.approx([1, 1, 1, 1, 0.1])
    for name, value in weights.items():
        assert name in head or torch.equal(value, old[name]), name
    report = model.transfer_report
    assert sorted(report.remapped) == sorted(head) and report.reinitialized == []
    assert report.ignored == ["prompt_projection.weight", "prompt_projection.bias"]
    assert set(report.kept) == set(weights) - set(head) and report.classes == ["Horse", "cat"]
    assert f"kept {len(weights) - 3} tensors" in str(report) and "Horse, cat" in str(report)
    batch = make_batch(counts=(3,))
    assert torch.isfinite(model(**{**batch, "class_labels": [torch.tensor([3, 0, 2])]}).loss)

    afresh = UplvpForInstanceSegmentation.from_pretraining(str(tmp_path), new, class_head="new")
    assert sorted(afresh.transfer_report.reinitialized) == sorted(head) and afresh.transfer_report.remapped == []
    assert not torch.equal(afresh.state_dict()[head[0]][[1, 3]], old[head[0]][[2, 0]])
    assert afresh.config.category_ids == [1, 2, 3, 4]
    unknown = UplvpForInstanceSegmentation.from_pretraining(str(tmp_path), {0: "car"})
    assert sorted(unknown.transfer_report.reinitialized) == sorted(head)
    with pytest.raises(ValueError, match="class_head"):
        UplvpForInstanceSegmentation.from_pretraining(str(tmp_path), new, class_head="keep")
    same = UplvpForPreTraining.from_pretraining(str(tmp_path), dict(source.config.id2label), prompt_drop=0.0)
    assert equal_states(same, source) and same.config.prompt_drop == 0.0


def test_classes_given_to_from_pretrained_reach_the_head(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    names = {0: "a", 1: "b", 2: "c", 3: "d"}
    model = UplvpForInstanceSegmentation.from_pretrained(tmp_path, id2label=names, ignore_mismatched_sizes=True)
    assert model.segmenter.class_predictor.out_features == 5 and len(model.segmenter.criterion.empty_weight) == 5
    assert model.config.segmenter_config.id2label == names and model.config.category_ids == [1, 2, 3, 4]


def test_configuration_refuses_what_it_does_not_know(tiny_segmenter):
    with pytest.raises(ValueError, match=r"no setting `promt_drop`. Did you mean `prompt_drop`"):
        UplvpConfig(promt_drop=0.1)
    for wrong, message in [
        ({"prompt_matching": "best"}, "prompt_matching must be one of"),
        ({"prompt_pooling": "max"}, "prompt_pooling must be one of"),
        ({"prompt_drop": 1.5}, "between 0 and 1"),
        ({"prompt_injection": "sum"}, "prompt_injection must be one of"),
        ({"text_dim": 0}, "at least 1"),
        ({"text_temperature": 0.0}, "must be positive"),
        ({"num_prompts": 0}, "at least 1"),
        ({"kernel_supervision_weight": -1.0}, "not be negative"),
        ({"id2label": {0: "a", 2: "b"}}, r"must map 0\.\.1"),
        ({"id2label": {0: "a", 1: "b"}, "category_ids": [1]}, "2 different ids"),
        ({"id2label": {0: "a", 1: "b"}, "category_ids": [4, 4]}, "2 different ids"),
    ]:
        with pytest.raises(ValueError, match=message):
            UplvpConfig(**wrong)
    assert UplvpConfig(num_labels=3).category_ids == [1, 2, 3]
    config = UplvpConfig(segmenter_config=tiny_segmenter(), id2label={"0": "a", "1": "b"})
    assert config.segmenter_config.num_labels == config.num_labels == 2 and config.label2id == {"a": 0, "b": 1}
    again = UplvpConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="works on: mask2former"):
        UplvpForInstanceSegmentation(UplvpConfig(segmenter_config={"model_type": "detr"}))


def test_importing_the_package_is_light():
    code = "import sys, uplvp_hf; print([n for n in ('torch', 'transformers', 'scipy') if n in sys.modules])"
    assert processes.anew(code).stdout.strip() == "[]"


@pytest.mark.slow
def test_stock_pipeline(tiny_model_dir, tmp_path):
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "image.png")
    code = """
import sys, uplvp_hf
from transformers import pipeline
pipe = pipeline("image-segmentation", model=sys.argv[1])
for result in pipe(sys.argv[2], threshold=0.0, overlap_mask_area_threshold=0.0):
    print(result["label"], round(result["score"], 3), result["mask"].size)
"""
    done = processes.run(code, tiny_model_dir, tmp_path / "image.png")
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "(90, 70)" in output and "not supported for" not in output, output


def test_other_number_of_classes_by_keyword(tiny_segmenter, tmp_path):
    """The standard idiom of transformers works although the stored category ids no longer fit."""
    model = UplvpForInstanceSegmentation(
        UplvpConfig(segmenter_config=tiny_segmenter(), id2label={0: "a", 1: "b"}, category_ids=[7, 9])
    )
    model.save_pretrained(tmp_path)
    other = UplvpForInstanceSegmentation.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert other.segmenter.class_predictor.out_features == 4
    assert other.config.category_ids == [1, 2, 3]
    same = UplvpForInstanceSegmentation.from_pretrained(tmp_path)
    assert same.config.category_ids == [7, 9]


def test_unknown_settings_of_a_file_are_left_out(tiny_segmenter, tmp_path):
    """A configuration that a later transformers has written still loads; a misspelled keyword is an error."""
    UplvpConfig(segmenter_config=tiny_segmenter()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "setting_of_the_future": 1}))
    assert not hasattr(UplvpConfig.from_pretrained(tmp_path), "setting_of_the_future")
    with pytest.raises(ValueError, match="setting_of_the_future"):
        UplvpConfig(setting_of_the_future=1)


def test_two_classes_of_one_name_are_refused(tiny_segmenter):
    with pytest.raises(ValueError, match="same name: a"):
        UplvpConfig(segmenter_config=tiny_segmenter(), id2label={0: "a", 1: "a"})


def test_coco_classes_get_their_own_ids(tiny_segmenter, tmp_path):
    """Of the 80 classes the last is number 90, the thirteenth (parking meter) 14."""
    names = {index: f"class {index}" for index in range(80)} | {0: "person", 12: "parking meter", 79: "toothbrush"}
    config = UplvpConfig(segmenter_config=tiny_segmenter(), id2label=names).segmenter_config
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    ids = UplvpForInstanceSegmentation.from_segmenter_pretrained(str(tmp_path)).config.category_ids
    assert (ids[0], ids[12], ids[79], len(set(ids))) == (1, 14, 90, 80)


def test_exported_directory_works_in_the_stock_pipeline(tiny_segmenter, tmp_path):
    model = UplvpForInstanceSegmentation(UplvpConfig(segmenter_config=tiny_segmenter(), id2label={0: "a", 1: "b"}))
    processor = UplvpImageProcessor(size={"longest_edge": 64}, image_mean=[0.4] * 3)
    to_native(model, tmp_path, processor)
    plain = AutoImageProcessor.from_pretrained(tmp_path)
    inputs = plain(Image.new("RGB", (100, 50)), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (32, 64)
    pipe = pipeline("image-segmentation", model=str(tmp_path), subtask="instance")
    assert isinstance(pipe(Image.new("RGB", (100, 50)), threshold=0.0), list)


@BOTH
def test_an_official_checkpoint_for_other_classes_in_one_call(make_config, tmp_path, cls):
    official = Mask2FormerForUniversalSegmentation(make_config().segmenter_config)  # cat, dog, horse
    official.save_pretrained(tmp_path)
    model = cls.from_pretraining(str(tmp_path), id2label={0: "horse", 1: "fox"}, category_ids=[4, 8])
    head, before = model.segmenter.class_predictor.weight, official.class_predictor.weight
    assert torch.equal(head[0], before[2]) and torch.equal(head[2], before[3])  # horse, "no object"
    assert model.transfer_report.new_classes == ["fox"] and model.config.category_ids == [4, 8]
    for name, tensor in official.model.state_dict().items():
        assert torch.equal(model.segmenter.model.state_dict()[name], tensor), name


def test_classes_may_start_from_the_mean_of_the_old_ones(make_config, tmp_path):
    """`spread`: a class known by name keeps its row, the others get the mean, "no object" stays."""
    torch.manual_seed(0)
    source = UplvpForPreTraining(make_config())
    source.save_pretrained(tmp_path)
    new = {0: "zebra", 1: "Horse"}
    model = UplvpForInstanceSegmentation.from_pretraining(str(tmp_path), new, class_head="spread")
    old = source.state_dict()
    for name in ("segmenter.class_predictor.weight", "segmenter.class_predictor.bias"):
        rows, count = old[name], len(source.config.id2label)
        wanted = torch.stack([rows[:count].mean(0), rows[2], rows[count]])
        torch.testing.assert_close(model.state_dict()[name], wanted)
    assert model.transfer_report.classes == ["Horse"] and "mean over all classes there" in str(model.transfer_report)
