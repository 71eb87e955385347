"""Saved folders carry the model's source files and load without the library."""

import json

import processes
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation
from vit_segmenters import RF_DETR, WHOLE

from uplvp_hf import (
    KNetConfig,
    KNetForInstanceSegmentation,
    UplvpConfig,
    UplvpForInstanceSegmentation,
    UplvpImageProcessor,
)
from uplvp_hf.models.modeling_base_uplvp import SEGMENTERS
from uplvp_hf.models.remote_code import OWN_MODELS

BACKBONE = {
    "model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip

# Runs where nobody may import the library: loads, predicts, saves again, loads what was saved.
HIDDEN = """
from PIL import Image
from transformers import pipeline
folder, again = sys.argv[1:]
image = Image.new("RGB", (80, 60))
found = []
for place in (folder, again):
    stock = pipeline("image-segmentation", model=place, trust_remote_code=True)
    own = pipeline("instance-segmentation", model=place, trust_remote_code=True)
    stock(image, threshold=0.0)
    found.append([(one["score"], one["rle"]) for one in own(image, threshold=0.0)])
    if place == folder:
        stock.image_processor.save_pretrained(again)
        stock.model.save_pretrained(again)
assert found[0] and found[0] == found[1]
"""


def small() -> KNetForInstanceSegmentation:
    settings = {"hidden_size": 32, "intermediate_size": 32, "num_stages": 1, "num_queries": 5, "norm_groups": 8}
    return KNetForInstanceSegmentation(KNetConfig(backbone_config=BACKBONE, id2label={0: "a", 1: "b"}, **settings))


@pytest.fixture
def folder(tmp_path):
    small().save_pretrained(tmp_path / "model", with_code=True)
    UplvpImageProcessor(size={"longest_edge": 64}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_pipelines_of_a_saved_folder_without_the_library(without_library, folder, tmp_path):
    done = processes.run(without_library + HIDDEN, folder, tmp_path / "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


LOAD = """
import torch
from transformers import AutoModelForInstanceSegmentation
model = AutoModelForInstanceSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(type(model.segmenter).__name__, model(torch.ones(1, 3, 64, 64)).class_queries_logits.double().sum().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEGMENTERS)
def test_a_saved_model_carries_the_code_of_its_own_segmenter_only(without_library, kind, tiny_segmenter, tmp_path):
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_queries": 6, "num_stages": 1, "intermediate_size": 16}
    further = {"knet": {"norm_groups": 4}, "queryinst": {"dynamic_channels": 4, "num_mask_layers": 1}}
    settings = tiny_segmenter()
    if kind in further:
        settings = {"model_type": kind, "backbone_config": settings["backbone_config"], **small, **further[kind]}
    elif kind != "mask2former":
        settings = {"model_type": kind, "num_queries": 6, **{**WHOLE, "rf_detr": RF_DETR}[kind]}
    model = UplvpForInstanceSegmentation(UplvpConfig(segmenter_config=settings, id2label={0: "cat", 1: "dog"})).eval()
    model.save_pretrained(tmp_path / "model", with_code=True)
    files = {file.stem for file in (tmp_path / "model").glob("*.py")}
    modules = {name: one.__module__.rpartition(".")[2] for name, one in SEGMENTERS.items()}
    assert files & set(modules.values()) == {modules[kind]}
    done = processes.run(without_library + LOAD, tmp_path / "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name, total = done.stdout.split()[-2:]
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 64, 64)).class_queries_logits.double().sum().item()
    assert name == type(model.segmenter).__name__ and float(total) == pytest.approx(expected, rel=1e-5)


def test_every_file_that_is_named_is_there(folder):
    config = json.loads((folder / "config.json").read_text())
    named = [entry["impl"] for entry in config["custom_pipelines"].values()]
    for entry in config["auto_map"].values():
        named += entry.values() if isinstance(entry, dict) else [entry]
    for reference in named:
        module, name = reference.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()
    lines = [line for file in folder.glob("*.py") for line in file.read_text().splitlines()]
    imported = {line.split()[1][1:] for line in lines if line.startswith("from .")}
    assert imported and all((folder / f"{module}.py").is_file() for module in imported)


@pytest.mark.parametrize("processor_first", [False, True])
def test_the_order_of_saving_does_not_matter(tmp_path, processor_first):
    parts = [small(), UplvpImageProcessor()]
    for part in reversed(parts) if processor_first else parts:
        part.save_pretrained(tmp_path, **({} if isinstance(part, UplvpImageProcessor) else {"with_code": True}))
    assert "image_processor_type" not in json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is UplvpImageProcessor  # no question about remote code
    assert type(AutoModelForInstanceSegmentation.from_pretrained(tmp_path)) is KNetForInstanceSegmentation


def test_a_saved_folder_has_no_code_unless_asked(folder, tmp_path):
    model = KNetForInstanceSegmentation.from_pretrained(folder)
    model.save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert not list((tmp_path / "bare").glob("*.py")) and not {"auto_map", "custom_pipelines"} & set(config)
    UplvpImageProcessor().save_pretrained(tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / "preprocessor_config.json").read_text())["image_processor_type"]


def test_every_model_of_the_library_is_known():
    from uplvp_hf.models.configuration_few_shot import UplvpFewShotConfig
    from uplvp_hf.models.configuration_icpc import IcpcConfig
    from uplvp_hf.models.configuration_mask_rcnn import MaskRcnnConfig
    from uplvp_hf.models.configuration_queryinst import QueryInstConfig
    from uplvp_hf.models.configuration_uplvp import UplvpConfig

    configs = (UplvpConfig, UplvpFewShotConfig, KNetConfig, QueryInstConfig, MaskRcnnConfig, IcpcConfig)
    assert {config.model_type for config in configs} == set(OWN_MODELS)
