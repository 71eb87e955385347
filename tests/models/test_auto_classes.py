"""K-Net and QueryInst through transformers' auto classes, as our own package or none of it is imported by name."""

import json

import processes
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
    pipeline,
)

import uplvp_hf
from uplvp_hf.models.modeling_base_uplvp import SEGMENTERS, UplvpPreTrainedModel

SETTINGS = {
    "knet": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "norm_groups": 8, "num_stages": 2},
    "queryinst": {
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "dynamic_channels": 8, "num_stages": 2,
        "num_mask_layers": 1,
    },
}  # fmt: skip
NAMES = {"knet": "KNet", "queryinst": "QueryInst"}


@pytest.fixture(params=list(SETTINGS))
def model_type(request):
    return request.param


@pytest.fixture
def config(model_type, tiny_segmenter):
    backbone = tiny_segmenter()["backbone_config"]
    return AutoConfig.for_model(
        model_type, backbone_config=backbone, num_queries=12, id2label={0: "cat", 1: "dog"}, **SETTINGS[model_type]
    )


def test_auto_classes_know_the_segmenters(model_type, config, tmp_path):
    name = NAMES[model_type]
    assert type(config) is getattr(uplvp_hf, f"{name}Config") and name + "Config" in dir(uplvp_hf)
    assert type(AutoModel.from_config(config)) is getattr(uplvp_hf, f"{name}Model")
    whole = getattr(uplvp_hf, f"{name}ForInstanceSegmentation")
    for auto in (AutoModelForImageSegmentation, AutoModelForInstanceSegmentation, AutoModelForUniversalSegmentation):
        assert type(auto.from_config(config)) is whole
    model = whole(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForInstanceSegmentation.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).class_queries_logits, model(pixels).class_queries_logits)
        body = AutoModel.from_pretrained(tmp_path)  # the same names below `model.`
    assert torch.equal(body.backbone.state_dict()[next(iter(body.backbone.state_dict()))],
                       next(iter(model.backbone.state_dict().values())))  # fmt: skip


def test_the_stock_pipeline_segments(config, tmp_path):
    torch.manual_seed(0)
    AutoModelForInstanceSegmentation.from_config(config).save_pretrained(tmp_path)
    uplvp_hf.UplvpImageProcessor(size={"longest_edge": 64}).save_pretrained(tmp_path)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), uplvp_hf.UplvpImageProcessor)
    found = pipeline("image-segmentation", str(tmp_path))(Image.new("RGB", (90, 60), "red"), threshold=0.0)
    assert all(one["mask"].size == (90, 60) and one["label"] in ("cat", "dog") for one in found)
    assert all(0 <= one["score"] <= 1 for one in found)


def test_a_wrapped_segmenter_is_the_one_that_its_settings_name(config, model_type):
    model = uplvp_hf.UplvpForInstanceSegmentation(
        uplvp_hf.UplvpConfig(segmenter_config=config.to_dict(), id2label=config.id2label)
    )
    assert type(model.segmenter) is SEGMENTERS[model_type] and type(model.config.segmenter_config) is type(config)
    assert set(type(model.segmenter)._no_split_modules) <= set(UplvpPreTrainedModel._no_split_modules)
    with pytest.raises(ValueError, match=r"no setting `hiden_size`. Did you mean `hidden_size`"):
        type(config)(hiden_size=32)


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="UPLVP works on: mask2former, knet, queryinst"):
        uplvp_hf.UplvpForInstanceSegmentation(uplvp_hf.UplvpConfig(segmenter_config={"model_type": "resnet"}))


def test_misspelled_settings_of_a_segmenter_are_refused_but_those_in_files_are_read(config, tmp_path):
    given = {**config.to_dict(), "num_query": 7}
    with pytest.raises(ValueError, match=r"no setting `num_query`\. Did you mean `num_queries`"):
        uplvp_hf.UplvpConfig(segmenter_config=given)
    whole = uplvp_hf.UplvpConfig(segmenter_config=config.to_dict())
    whole.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["segmenter_config"]["of_a_later_version"] = 3
    (tmp_path / "config.json").write_text(json.dumps(content))
    read = uplvp_hf.UplvpConfig.from_pretrained(tmp_path)
    assert read.segmenter_config.to_dict() == whole.segmenter_config.to_dict()


def test_auto_model_of_a_wrapped_segmenter_is_the_whole_model(config):
    whole = uplvp_hf.UplvpConfig(segmenter_config=config.to_dict(), id2label=config.id2label)
    assert type(AutoModel.from_config(whole)) is uplvp_hf.UplvpForInstanceSegmentation


AUTO = """
import sys
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageSegmentation, AutoModelForPreTraining
assert type(AutoConfig.from_pretrained(sys.argv[1])).__name__ == "UplvpConfig"
assert type(AutoModelForImageSegmentation.from_pretrained(sys.argv[1])).__name__ == "UplvpForInstanceSegmentation"
assert type(AutoModelForPreTraining.from_pretrained(sys.argv[1])).__name__ == "UplvpForPreTraining"
assert type(AutoImageProcessor.from_pretrained(sys.argv[1])).__name__ == "UplvpImageProcessor"
"""
PIPELINE = """
from transformers.pipelines import PIPELINE_REGISTRY
from transformers import AutoConfig
found = PIPELINE_REGISTRY.check_task("instance-segmentation")[1]["impl"]
assert found.__name__ == "UplvpInstanceSegmentationPipeline"
assert AutoConfig.for_model("knet").model_type == "knet"
"""
ORDERS = {
    "import uplvp_hf, transformers": AUTO + PIPELINE,
    "import transformers; import uplvp_hf": AUTO + PIPELINE,
    "from transformers import AutoModel; import uplvp_hf": AUTO + PIPELINE,
    "from uplvp_hf import UplvpForInstanceSegmentation": AUTO + PIPELINE,
    "import uplvp_hf; from transformers import pipeline": PIPELINE + AUTO,
    "from transformers import pipeline; import uplvp_hf": PIPELINE + AUTO,
    "from transformers import AutoConfig; import uplvp_hf; from transformers import pipeline": PIPELINE + AUTO,
    "from uplvp_hf.models import pipeline_uplvp": PIPELINE + AUTO,
}
# Imports what takes longest, but neither transformers nor our library. Each order has a child process of its own.
IN_CHILDREN = """
import json, os, sys, traceback
import torch, torchvision, timm, scipy.optimize
assert not {"transformers", "uplvp_hf"} & set(sys.modules)
ends = {}
for imports, check in json.loads(sys.argv[2]).items():
    child = os.fork()
    if child == 0:
        try:
            exec(imports + check, {"__name__": "__main__"})
            os._exit(0)
        except BaseException:
            print(imports, traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(1)
    ends[imports] = os.waitpid(child, 0)[1]
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends(tiny_model_dir):
    """The exit status of every order of imports, and what was said."""
    done = processes.anew(IN_CHILDREN, tiny_model_dir, json.dumps(ORDERS), cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS)
def test_models_and_pipeline_are_known_after_imports_in_any_order(ends, imports):
    assert ends[0][imports] == 0, ends[1]
