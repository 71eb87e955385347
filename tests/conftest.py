"""What tests of several rooms need."""

import importlib.util
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

# Before transformers is imported: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """Files with the most slow tests first: at the end, only quick ones are left to share among the workers."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """Tests compare bits between runs, and several workers may share the cores."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def load_script():
    """Imports a script of the repository anew: `load_script("render_results")`, `load_script("hooks", "docs")`."""

    def load(name: str, folder: str = "scripts"):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def without_library():
    """First lines of a program in whose process nobody can import the library: what a saved model carries is used."""
    return """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "uplvp_hf":
            raise ImportError("hidden")
sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture(scope="session")
def assert_close():
    """`assert_close(actual, expected, share)`: no value differs by more than this share of the largest expected one.

    Processors sum in different orders, so float32 agrees to a share of the scale of the tensor, not to a fixed number.
    `whole` is the scale of what the tensor is a part of, for parts that may cancel to nothing: the gradient of a bias
    in front of a normalization is zero but for the rounding of the whole gradient, a loss term may be zero but for
    that of the sum. It adds float32's precision of that scale.
    """
    import torch

    def check(actual, expected, share: float, message: str = "", whole: float = 0.0) -> None:
        actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).detach().double()
        assert actual.shape == expected.shape, f"{message} has the shape {tuple(actual.shape)}"
        if not expected.numel():
            return
        difference, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
        allowed = share * scale + torch.finfo(torch.float32).eps * whole
        assert difference <= allowed, f"{message} differs by {difference:.3g} where the scale is {scale:.3g}"

    return check


@pytest.fixture(scope="session")
def close(assert_close):
    """`assert_close` with the agreement of float32 sums in another order: 1e-5 of the scale."""
    return partial(assert_close, share=1e-5)


@pytest.fixture(scope="session")
def golden():
    """Reads a recorded fixture: `golden("mask2former")` -> (tensors by name, description)."""
    from safetensors.torch import load_file

    folder = Path(os.environ.get("UPLVP_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))

    def read(name: str):
        if not (folder / f"{name}.safetensors").is_file():
            pytest.skip(f"no recorded tensors at {folder} (set UPLVP_GOLDEN to their folder)")
        return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())

    return read


SWIN = {
    "model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
    "window_size": 4, "drop_path_rate": 0.0, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 40], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_segmenter():
    """Settings of a Mask2Former of a few 10k weights; keywords replace some. `backbone`: "resnet" or "swin"."""

    def make(backbone: str = "resnet", **changes) -> dict:
        return {
            "model_type": "mask2former", "backbone_config": dict({"resnet": RESNET, "swin": SWIN}[backbone]),
            "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 48,
            "dim_feedforward": 48, "encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 4,
            "num_queries": 12, "train_num_points": 96, **changes,
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory):
    """Six labeled synthetic scenes as a COCO folder."""
    from uplvp_hf.data.synthetic import write_scenes

    return write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", count=6, seed=0, size=96)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, scenes_dir):
    """A saved segmenter with random weights for the classes of the scenes, and its image processor."""
    import torch

    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.models.configuration_uplvp import UplvpConfig
    from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
    from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation

    dataset = load_dataset_rows(scenes_dir)
    backbone = {
        "model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
        "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }  # fmt: skip
    segmenter = {
        "model_type": "mask2former", "backbone_config": backbone, "feature_size": 32, "mask_feature_size": 32,
        "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 1,
        "decoder_layers": 3, "num_attention_heads": 2, "num_queries": 12,
    }  # fmt: skip
    torch.manual_seed(0)
    config = UplvpConfig(
        id2label=dataset.id2label, category_ids=[10 * i for i in dataset.category_ids], segmenter_config=segmenter
    )
    folder = tmp_path_factory.mktemp("model")
    UplvpForInstanceSegmentation(config).save_pretrained(folder)
    UplvpImageProcessor(size={"longest_edge": 64}).save_pretrained(folder)
    return folder
