"""A small batch with labels, and models to run it through."""

import pytest
import torch

from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining


def rectangles(count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """(count, height, width) bool, one rectangle of at least 8 x 8 pixels each."""
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        top = int(torch.randint(0, height - 8, (), generator=generator))
        left = int(torch.randint(0, width - 8, (), generator=generator))
        tall, wide = (int(n) for n in torch.randint(8, 40, (2,), generator=generator))
        mask[top : top + tall, left : left + wide] = True
    return masks


@pytest.fixture
def make_batch():
    """Images with `counts` objects each, classes 0..2: keyword arguments of `forward`."""

    def make(counts=(3, 0, 2), height=64, width=96, seed=0, scores=False, dtype=torch.int64):
        generator = torch.Generator().manual_seed(seed)
        batch = {
            "pixel_values": torch.randn(len(counts), 3, height, width, generator=generator),
            "mask_labels": [rectangles(count, height, width, generator) for count in counts],
            "class_labels": [torch.randint(0, 3, (count,), generator=generator).to(dtype) for count in counts],
        }
        if scores:
            batch["prompt_scores"] = [torch.rand(count, generator=generator) for count in counts]
        return batch

    return make


@pytest.fixture
def batch(make_batch):
    """Three images, the second without an object."""
    return make_batch(counts=(3, 0, 2))


@pytest.fixture
def make_config(tiny_segmenter):
    def make(backbone="resnet", segmenter=None, **settings):
        settings.setdefault("id2label", {0: "cat", 1: "dog", 2: "horse"})
        auxiliary = {"output_auxiliary_logits": True}
        return UplvpConfig(segmenter_config=tiny_segmenter(backbone, **auxiliary, **(segmenter or {})), **settings)

    return make


@pytest.fixture
def plain(make_config):
    torch.manual_seed(0)
    return UplvpForInstanceSegmentation(make_config()).eval()


@pytest.fixture
def pretraining(make_config):
    torch.manual_seed(0)
    return UplvpForPreTraining(make_config()).eval()
