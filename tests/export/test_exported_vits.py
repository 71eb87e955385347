"""Segmenters on a ViT, exported: the same numbers for any number of images on their canvas."""

import pytest
import torch
from vit_segmenters import WHOLE

from uplvp_hf.export import export_model, to_native
from uplvp_hf.export.native import NATIVE, native_class
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation

PROCESSOR = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}, "size_divisor": 16}


@pytest.fixture(params=WHOLE)
def model(request):
    torch.manual_seed(0)
    segmenter = {"model_type": request.param, "num_queries": 10, **WHOLE[request.param]}
    config = UplvpConfig(segmenter_config=segmenter, id2label={0: "a", 1: "b"})
    return UplvpForInstanceSegmentation(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_graphs_give_what_the_model_gives(model, form, tmp_path):
    found = export_model(model, UplvpImageProcessor(**PROCESSOR), tmp_path, form, check=True)
    for name, difference in found["largest_difference"].items():
        assert difference < max(1e-4, 30 * found["own_rounding"][name]), name


def test_native_folders(model, tmp_path):
    name, processor = model.config.segmenter_config.model_type, UplvpImageProcessor(**PROCESSOR)
    if name not in NATIVE:
        with pytest.raises(UserError, match=f"`{name}` has no native class"):
            to_native(model, tmp_path)
        return
    found = export_model(model, processor, tmp_path / "plain", "native", check=True)
    assert found["class"] == native_class(name).__name__ and max(found["largest_difference"].values()) < 1e-5
    with pytest.raises(UserError, match="take the format `native`"):
        export_model(model, processor, tmp_path / "other", "mask2former")
    assert not (tmp_path / "other").exists()
