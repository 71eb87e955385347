"""`model.backbone_weights=hf-hub:OWNER/NAME` downloads from the Hub (here one on loopback)."""

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import nn

from uplvp_hf.training.backbone_weights import load_backbone_weights
from uplvp_hf.training.config import ConfigError


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_weights_of_a_repository(hub_client, tmp_path):
    source, target = small(), small()
    save_file({**source.state_dict(), "classifier.weight": torch.zeros(2, 4)}, tmp_path / "model.safetensors")
    api = HfApi()
    api.create_repo("uplvp/small")
    api.upload_file(
        path_or_fileobj=tmp_path / "model.safetensors", path_in_repo="model.safetensors", repo_id="uplvp/small"
    )
    assert load_backbone_weights(target, "hf-hub:uplvp/small") == ["classifier.weight"]
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_a_repository_that_is_not_there(hub_client):
    with pytest.raises(ConfigError, match=r"`model.backbone_weights`: hf-hub:uplvp/nothing, model.safetensors: "):
        load_backbone_weights(small(), "hf-hub:uplvp/nothing")
    with pytest.raises(ConfigError, match="A repository of the Hub is hf-hub:OWNER/NAME"):
        load_backbone_weights(small(), "uplvp/nothing")
