"""The recipes of the papers' experiments: settings as published, comments true to them, models of the known size."""

import dataclasses
import json
import math
import re
from importlib import resources

import pytest
import torch

from uplvp_hf.data import InstanceDataset
from uplvp_hf.data.coco_classes import COCO_CLASSES
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.training.build import build_model
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.recipes_file import shipped_recipes

TEACHERS = [name for name in shipped_recipes() if name.startswith("paper/") and "_teacher_" in name]
SEMANTIC = [name for name in shipped_recipes() if name.startswith("paper/icpc_")]
PAPER = [name for name in shipped_recipes() if name.startswith("paper/") and name not in (*TEACHERS, *SEMANTIC)]
SEGMENTERS, DATA = ("knet", "queryinst", "mask2former"), ("coco5", "coco10", "coco_full", "cityscapes", "ctw1500")
IMAGES = {"coco5": 5914, "coco10": 11828, "coco_full": 118287, "cityscapes": 2975, "ctw1500": 1000}
CLASSES = {"coco": 80, "cityscapes": 8, "ctw1500": 1}

# The released configurations: epochs, epochs at which the rate falls, images a GPU, warm-up, its first factor.
RELEASED = {
    "knet_coco5": (92, (72, 88), 8, 100, 1e-4), "knet_coco5_uplvp": (42, (22, 34), 8, 100, 1e-3),
    "knet_coco10": (48, (36, 44), 8, 100, 1e-3), "knet_coco10_uplvp": (48, (22, 34), 8, 100, 1e-3),
    "knet_coco_full": (3 * 12, (3 * 9, 3 * 11), 2, 1000, 1e-3),
    "knet_cityscapes": (8 * 24, (8 * 16, 8 * 22), 4, 100, 1e-3), "knet_ctw1500": (92, (72, 88), 4, 100, 1e-4),
    "queryinst_coco10": (48, (32, 44), 8, 1000, 1e-3), "queryinst_coco10_uplvp": (48, (36, 44), 8, 100, 1e-3),
    "queryinst_coco_full": (12, (8, 11), 2, 1000, 1e-3), "queryinst_cityscapes": (24, (18, 22), 4, 0, None),
    "queryinst_ctw1500": (80, (60, 72), 4, 0, None), "queryinst_ctw1500_uplvp": (20, (12, 18), 4, 0, None),
    "queryinst_ctw1500_sp": (20, (12, 18), 4, 0, None), "mask2former_coco10": (24, (18, 22), 4, 0, None),
    "mask2former_cityscapes": (24, (18, 22), 4, 0, None), "mask2former_ctw1500_uplvp": (20, (12, 18), 4, 0, None),
    "mask2former_ctw1500_sp": (20, (12, 18), 4, 0, None), "mask_rcnn_coco10": (12, (8, 11), 4, 50, 1e-3),
    "mask_rcnn_cityscapes": (24, (16, 22), 4, 100, 1e-3), "mask_rcnn_ctw1500": (92, (72, 88), 4, 100, 1e-4),
}  # fmt: skip
# Weight decay, multiplier of the backbone's rate, clipping, frozen stages.
OPTIMIZERS = {
    "knet": (0.05, 0.25, 4.0, 1), "queryinst": (1e-4, 0.1, 0.1, 1), "mask2former": (0.05, 0.25, 0.01, 0),
    "mask_rcnn": (0.05, 0.25, 4.0, 1), "mask_rcnn_cityscapes": (1e-4, 0.25, 4.0, 1),
}  # fmt: skip
# Pre-training: images a GPU with and without classes, weight decay, clipping, warm-up, dropped prompts.
PRETRAINING = {
    "knet": (2, 6, 0.05, 1.0, 1000, 0.1), "queryinst": (2, 6, 1e-4, 0.1, 1000, 0.05),
    "mask2former": (4, 4, 0.05, 0.01, 0, 0.05),
}  # fmt: skip


def data_of(name):
    return next(data for data in DATA if f"_{data}_" in name)


def segmenter_of(name):
    return next(segmenter for segmenter in (*SEGMENTERS, "mask_rcnn") if name.startswith(f"paper/{segmenter}_"))


def comment_of(name):
    text = (resources.files("uplvp_hf.training") / "recipes" / f"{name}.yaml").read_text()
    return " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))


def milestones(optim):
    return [epoch * optim.epochs for epoch in optim.milestones]


def test_every_experiment_has_a_recipe():
    for segmenter in SEGMENTERS:
        for data in DATA:
            assert {f"paper/{segmenter}_{data}{kind}_finetune" for kind in ("", "_uplvp")} <= set(PAPER)
        assert {f"paper/{segmenter}{kind}_pretrain" for kind in ("", "_sp")} <= set(PAPER)
    assert {f"paper/mask_rcnn_{data}_finetune" for data in DATA if data != "coco_full"} <= set(PAPER)
    published = ("knet_coco5", "knet_coco10", *(f"{s}_{d}" for s in SEGMENTERS[1:] for d in DATA[3:]))
    assert {f"paper/{row}_sp_finetune" for row in published} <= set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_is_what_its_name_and_comment_say(name):
    settings, comment = load_settings(name), comment_of(name)
    optim, model = settings.optim, settings.model
    assert name.endswith(f"_{settings.stage}") and settings.output == f"runs/{name}"
    segmenter = segmenter_of(name)
    assert model.segmenter["model_type"] == segmenter
    assert model.segmenter.get("num_queries") == (None if segmenter == "mask_rcnn" else 100)
    pattern = (
        r"Rate: / 10 after epochs ([\d.]+) and ([\d.]+)\. "
        r"Cost: (\d+) epochs x ([\d,]+) images, batch (\d+) \(8 GPUs x (\d+)\): ([\d,]+) steps\."
    )
    said = [float(value.replace(",", "")) for value in re.search(pattern, comment).groups()]
    images = IMAGES[data_of(name)] if settings.stage == "finetune" else IMAGES["coco_full"]
    batch = 8 * optim.batch_size * optim.accumulation
    steps = math.ceil(optim.epochs * images / batch)
    assert said[2:] == [optim.epochs, images, batch, optim.batch_size, steps]
    assert said[:2] == pytest.approx(milestones(optim), abs=0.001)
    assert "Source: " in comment and optim.schedule == "step" and optim.ema == 0
    sgd = name == "paper/mask_rcnn_cityscapes_finetune"
    assert (optim.optimizer, optim.lr) == (("sgd", 0.02) if sgd else ("adamw", 1e-4))
    if settings.stage == "finetune":
        check_finetuning(name, segmenter, settings)
    else:
        check_pretraining(name, segmenter, settings)


@pytest.mark.parametrize("name", SEMANTIC)
def test_semantic_recipes_have_the_schedule_of_denseclip(name):
    settings, comment = load_settings(name), comment_of(name)
    optim = settings.optim
    assert settings.output == f"runs/{name}" and "Not run here" in comment and "inferred" in comment
    _, backbone, data = name.removesuffix("_finetune").split("_", 2)
    steps, size = 40_000 if data == "cocostuff10k" else 80_000, 640 if (backbone, data) == ("vitb", "ade20k") else 512
    clip = {"vitb": "openai/clip-vit-base-patch16", "r50": "models/clip/RN50.pt", "r101": "models/clip/RN101.pt"}
    assert settings.model.segmenter["clip"] == clip[backbone] and settings.data.train == f"data/{data}"
    assert (optim.steps, settings.data.size, 8 * optim.batch_size) == (steps, size, 32)
    assert (optim.lr, optim.weight_decay, optim.backbone_multiplier) == (1e-4, 1e-4, 0.1)
    assert (optim.schedule, optim.power, optim.warmup, optim.warmup_factor) == ("poly", 0.9, 1500, 1e-6)
    assert settings.data.scale_range == [0.5, 2.0] and settings.data.color_jitter == 0.5


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_have_the_settings_of_the_released_code(name):
    settings, comment = load_settings(name), comment_of(name)
    share = re.search(r"coco(\d+)_teacher", name)[1]
    assert settings.output == f"runs/{name}" and settings.data.subset == f"1@{share}"
    assert f"on {share} % of COCO" in comment and "Never run here." in comment
    teacher, optim = settings.teacher, settings.optim
    assert (teacher.class_threshold, teacher.weight, teacher.burn_in, settings.average_decay) == (
        0.7,
        2.0,
        50000,
        0.9996,
    )
    assert (teacher.color, teacher.hue, teacher.gray, teacher.blur, teacher.cutouts) == (0.4, 0.1, 0.2, 0.5, 0)
    assert (optim.steps, 8 * optim.batch_size, optim.lr, optim.weight_decay) == (368750, 16, 1e-4, 0.05)
    assert [round(part * optim.steps) for part in optim.milestones] == pytest.approx([327778, 355093], abs=1)
    assert settings.data.unlabeled == settings.data.train and settings.data.scale_range == [0.1, 2.0]


def test_every_published_share_has_a_teacher():
    assert set(TEACHERS) == {f"paper/mask2former_coco{share}_teacher_finetune" for share in (1, 2, 5, 10)}


def check_finetuning(name, segmenter, settings):
    data, model, optim = data_of(name), settings.model, settings.optim
    full, optimizer = data == "coco_full", OPTIMIZERS.get(f"{segmenter}_{data}", OPTIMIZERS[segmenter])
    assert (optim.weight_decay, optim.backbone_multiplier, optim.clip, model.freeze_stages) == (
        optimizer[0],
        0.1 if full and segmenter == "mask2former" else optimizer[1],
        1.0 if full and segmenter == "knet" else optimizer[2],
        optimizer[3],
    )
    assert model.freeze_backbone_norm and settings.checkpoint.best
    assert settings.data.subset == {"coco5": "1@5", "coco10": "1@10"}.get(data) and settings.data.flip == 0.5
    pretrained = next((kind for kind in ("_uplvp", "_sp") if f"{kind}_finetune" in name), None)
    if pretrained is None:
        assert model.init is None and model.backbone_weights == "models/imagenet/model.safetensors"
    else:
        start = load_settings(f"paper/{segmenter}{'_sp' if pretrained == '_sp' else ''}_pretrain")
        assert model.init == start.output and model.backbone_weights is None
        assert start.model.segmenter == model.segmenter
        assert model.class_head == ("new" if data in ("cityscapes", "ctw1500") else "remap")
    short_edges = {"cityscapes": [800, 1024]}.get(data, [640, 800] if full and segmenter == "knet" else [800])
    if segmenter == "mask2former":
        assert (settings.data.size, settings.data.scale_range, settings.data.short_edges) == (1024, [0.1, 2.0], None)
    else:
        assert settings.data.short_edges == short_edges and settings.data.keep_ratio
        assert settings.data.longest_edge == (2048 if data == "cityscapes" else 1333)
    low_data = data in ("coco5", "coco10")
    assert settings.data.rotate == (9 if low_data and segmenter != "mask2former" else 0)
    assert settings.evaluation.mask_threshold == (0.3 if low_data and segmenter == "knet" else 0.5)
    assert settings.evaluation.every_epochs == (8 if name.startswith("paper/knet_cityscapes") else 1)


def check_pretraining(name, segmenter, settings):
    with_classes, without, decay, clip, warmup, drop = PRETRAINING[segmenter]
    model, optim, agnostic = settings.model, settings.optim, "_sp_" in name
    assert model.class_agnostic == agnostic and optim.batch_size == (without if agnostic else with_classes)
    assert (optim.epochs, milestones(optim)) == (12, pytest.approx([8, 11], abs=0.001))
    assert (optim.weight_decay, optim.clip, optim.warmup, model.prompt_drop) == (decay, clip, warmup, drop)
    assert (model.prompt_matching, model.kernel_supervision_weight, model.num_prompts) == ("cosine", 1.0, 20)
    assert (model.kernel_target, model.kernel_loss, model.kernel_head) == ("prompt", "cosine", "none")
    assert (model.prompt_injection, model.kernel_queries, model.kernel_centering) == ("add", "all", 0.0)
    assert model.freeze_backbone == (segmenter != "queryinst") and settings.data.flip == 0.1
    assert (model.freeze_stages, model.freeze_backbone_norm) == ((1, True) if segmenter == "queryinst" else (0, False))
    assert (
        model.backbone_weights
        == f"models/{'densecl' if name == 'paper/knet_sp_pretrain' else 'mocov2'}/model.safetensors"
    )
    if segmenter == "mask2former":
        assert (settings.data.size, settings.data.scale_range) == (1024, [0.1, 2.0])
    else:
        data = settings.data
        assert (data.short_edges, data.longest_edge, data.keep_ratio) == ([800], 1333, False)


@pytest.mark.parametrize("row", RELEASED)
def test_schedules_are_the_released_ones(row):
    optim = load_settings(f"paper/{row}_finetune").optim
    epochs, falls, batch, warmup, factor = RELEASED[row]
    assert (optim.epochs, optim.batch_size, optim.warmup) == (epochs, batch, warmup)
    assert milestones(optim) == pytest.approx(falls, abs=0.001)
    assert factor is None or optim.warmup_factor == factor


@pytest.mark.parametrize("init", ["imagenet", "mocov2", "densecl", "swav"])
def test_an_initialization_is_a_recipe_on_top(init):
    plain = load_settings("paper/knet_coco10_finetune")
    chosen = load_settings(["paper/knet_coco10_finetune", f"paper/init_{init}"])
    assert chosen.model.backbone_weights == f"models/{init}/model.safetensors"
    assert f"models/{init}" in comment_of(f"paper/init_{init}")
    assert dataclasses.replace(chosen.model, backbone_weights=None) == dataclasses.replace(
        plain.model, backbone_weights=None
    )
    assert (chosen.optim, chosen.data) == (plain.optim, plain.data)


def test_segmenters_are_the_same_in_all_recipes():
    for segmenter in (*SEGMENTERS, "mask_rcnn"):
        found = {json.dumps(load_settings(n).model.segmenter, sort_keys=True) for n in PAPER if f"/{segmenter}_" in n}
        assert len(found) == 1


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_the_recipes_for_one_gpu_take_any_segmenter(segmenter):
    wanted = load_settings(f"paper/{segmenter}_pretrain").model.segmenter
    for stage in ("pretrain", "finetune"):
        settings = load_settings([f"one_gpu_{stage}", f"parts/{segmenter}_r50"])
        assert settings.model.segmenter == wanted and settings.stage == stage
        assert settings.mixed_precision == "bf16" and settings.optim.batch_size * settings.optim.accumulation == 16
    assert settings.optim.epochs is None and settings.optim.steps == 5000


def queryinst_parameters(classes):
    """Counted from the layers that the paper and its release describe: 256 channels, 6 stages, 100 queries."""
    linear = lambda i, o, bias=True: i * o + o * bias  # noqa: E731
    norm = lambda width: 2 * width  # noqa: E731
    dynamic = linear(256, 2 * 256 * 64) + norm(64) + norm(256)
    box = linear(256, 3 * 256) + linear(256, 256) + norm(256)  # attention
    box += dynamic + linear(49 * 256, 256) + norm(256) + norm(256)
    box += linear(256, 2048) + linear(2048, 256) + norm(256)
    box += linear(256, 256, False) + norm(256) + linear(256, classes)
    box += 3 * (linear(256, 256, False) + norm(256)) + linear(256, 4)
    mask = dynamic + 4 * (9 * 256 * 256 + norm(256)) + 4 * 256 * 256 + 256 + linear(256, classes)
    pyramid = linear(256 + 512 + 1024 + 2048, 256, False) + 4 * 256 + 4 * linear(9 * 256, 256)
    resnet50 = 25_557_032 - linear(2048, 1000)  # torchvision's, without its classifier
    return resnet50 + pyramid + 100 * (4 + 256) + 6 * (box + mask)


@pytest.mark.parametrize("data", CLASSES)
@pytest.mark.parametrize("segmenter", [*SEGMENTERS, "mask_rcnn"])
def test_models_have_the_classes_of_the_data_and_the_published_size(segmenter, data):
    name = f"paper/{segmenter}_{'coco10' if data == 'coco' else data}_finetune"
    model = on_meta(load_settings(name), CLASSES[data])
    assert model.config.num_labels == CLASSES[data]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if segmenter == "queryinst":
        assert parameters == queryinst_parameters(CLASSES[data])
    elif segmenter == "mask_rcnn":
        # torchvision says 44,401,393 of maskrcnn_resnet50_fpn, with 90 classes and without the 53,120 numbers of the
        # batch norms; a class has five rows of 1024 weights and a bias, and one of 256 and a bias.
        assert parameters - 53_120 + (90 - CLASSES[data]) * (5 * 1025 + 257) == 44_401_393
    elif data == "coco":  # K-Net: 2106.14855, table 1; Mask2Former: 2112.01527, table 1
        assert parameters / 1e6 == pytest.approx({"knet": 37.3, "mask2former": 44.0}[segmenter], rel=0.01)


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_pretraining_without_classes_has_one(segmenter):
    settings = load_settings(f"paper/{segmenter}_sp_pretrain")
    model = on_meta(settings, 80)
    assert model.config.id2label == {0: "object"} and model.config.kernel_supervision_weight == 1.0
    assert model.config.prompt_drop == PRETRAINING[segmenter][-1]


def on_meta(settings, classes):
    """The model of a recipe for so many classes, without memory for its weights."""
    rows = InstanceDataset([], [{"id": i + 1, "name": COCO_CLASSES[i]} for i in range(classes)])
    model = dataclasses.replace(settings.model, backbone_weights=None, freeze_backbone=False, freeze_stages=0)
    settings = dataclasses.replace(settings, model=model, data=dataclasses.replace(settings.data, size=64))
    with torch.device("meta"):
        return build_model(settings, rows)


@pytest.mark.slow
def test_a_recipe_without_its_weights_says_which_are_missing(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", count=1, seed=0, size=64)
    from uplvp_hf.training.loop import train

    words = [f"data.train={scenes}", f"data.val={scenes}", "data.train_images=", "data.val_images=", "data.subset="]
    settings = load_settings("paper/knet_coco10_finetune", [*words, "data.size=64", f"output={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"no file models/imagenet/model.safetensors"):
        train(settings, progress=False)


# ------------------------------------------------------------------------------------------- full-size networks


@pytest.fixture(scope="module")
def converted_resnet50(tmp_path_factory):
    """A ResNet-50 as MoCo keeps it, with random weights, and the folder that `uplvp convert` makes of it."""
    from torchvision.models import resnet50

    from uplvp_hf.commands.convert import main as convert

    folder = tmp_path_factory.mktemp("moco")
    torch.manual_seed(0)
    network = resnet50(weights=None, zero_init_residual=True)  # keeps activations small without statistics
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state}, folder / "moco_v2.pth.tar")
    assert convert([str(folder / "moco_v2.pth.tar"), str(folder / "mocov2")]) == 0
    return network, folder / "mocov2" / "model.safetensors"


SMALL = {
    "knet": ["data.short_edges=[64]", "data.longest_edge=96"],
    # Its six stages have 100 million weights that only take time here.
    "queryinst": ["data.short_edges=[64]", "data.longest_edge=96", "model.segmenter.num_stages=2"],
    "mask2former": ["data.size=96", "model.segmenter.train_num_points=256"],
    "mask_rcnn": ["data.short_edges=[64]", "data.longest_edge=96", "model.segmenter.proposals=[100,50]"],
}


def run_small(verb, recipe, scenes, output, *words):
    """One step of a recipe on small images, as the command runs it."""
    segmenter = segmenter_of(recipe)
    common = [f"data.train={scenes}", "data.train_images=", "data.train_split=", "data.workers=0", "optim.epochs="]
    common += ["optim.steps=1", "optim.batch_size=1", "checkpoint.every=0", *SMALL[segmenter], f"output={output}"]
    assert verb(["--recipe", recipe, *common, *words, "--quiet"]) == 0
    return json.loads((output / "training_summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_a_full_size_network_trains_from_converted_weights(segmenter, converted_resnet50, tmp_path):
    from safetensors import safe_open

    from uplvp_hf.commands.finetune import main as finetune
    from uplvp_hf.commands.pretrain import main as pretrain

    network, weights = converted_resnet50
    scenes = write_scenes(tmp_path / "scenes", count=2, seed=0, size=96)
    init = tmp_path / "init.yaml"
    init.write_text(f"model:\n  backbone_weights: {weights}\n")
    last = tmp_path / "pretrained"
    run_small(pretrain, f"paper/{segmenter}_pretrain", scenes, last, "--recipe", str(init))
    if segmenter != "queryinst":  # the slowest on a CPU
        val = [f"data.val={scenes}", "data.val_images=", "data.val_split=", "evaluation.every_epochs="]
        recipe, output = f"paper/{segmenter}_cityscapes_uplvp_finetune", tmp_path / "tuned"
        summary = run_small(finetune, recipe, scenes, output, *val, f"model.init={last}")
        assert summary["metrics"]["num_images"] == 2 and "kept" in summary["transfer"]
        last = output
    with safe_open(last / "model.safetensors", "pt") as file:
        (name,) = (key for key in sorted(file.keys()) if key.endswith("embedder.embedder.convolution.weight"))
        stem = file.get_tensor(name)
    if segmenter == "mask2former":  # its fine-tuning freezes nothing; a step moves a weight by its rate at most
        assert not torch.equal(stem, network.conv1.weight)
    assert torch.allclose(stem, network.conv1.weight, atol=1e-4 if segmenter == "mask2former" else 0, rtol=0)


@pytest.mark.slow
def test_a_full_size_mask_rcnn_trains_from_converted_weights(converted_resnet50, tmp_path):
    from safetensors import safe_open

    from uplvp_hf.commands.finetune import main as finetune

    network, weights = converted_resnet50
    scenes = write_scenes(tmp_path / "scenes", count=2, seed=0, size=96)
    words = [f"data.val={scenes}", "data.val_images=", "data.val_split=", "evaluation.every_epochs="]
    output = tmp_path / "run"
    summary = run_small(
        finetune, "paper/mask_rcnn_cityscapes_finetune", scenes, output, *words, f"model.backbone_weights={weights}"
    )
    assert summary["metrics"]["num_images"] == 2 and summary["skipped_steps"] == 0
    with safe_open(output / "model.safetensors", "pt") as file:
        stem = file.get_tensor("backbone.embedder.embedder.convolution.weight")
    assert torch.equal(stem, network.conv1.weight)  # frozen
