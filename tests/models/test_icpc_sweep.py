"""ICPC in the sweep of behaviors: compiled, exported, built without storage, in two processes."""

import os

import pytest
import torch
from test_icpc import NAMES, build
from torch import nn

from uplvp_hf import IcpcConfig, IcpcForSemanticSegmentation
from uplvp_hf.models.losses import Normalizers

RESNET = {"resnet_config": {"width": 8, "depths": [1, 1, 1, 1], "pool_heads": 4, "pool_size": 2}, "projection_dim": 64}


def resnet(**settings):
    """A CLIP ResNet with random weights under the text tower of the small CLIP."""
    donor = build("names")
    torch.manual_seed(0)
    config = IcpcConfig.from_dict(
        {**donor.config.to_dict(), "vision_config": None, "out_layers": None, "dense_block": "vanilla", **RESNET,
         "prompt": "dynamic_concat", **settings}
    )  # fmt: skip
    return IcpcForSemanticSegmentation(config)


KINDS = {"vit": lambda **settings: build("dynamic_concat", post=True, **settings), "resnet": resnet}


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    found = torch.full((2, 64, 96), 255)
    found[0, :32], found[0, 32:, :48], found[1, :, 40:] = 0, 1, 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_exported(kind, pixels):
    torch._dynamo.reset()
    model = KINDS[kind]().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(pixels)
        torch.testing.assert_close(compiled(pixels).logits, expected.logits, rtol=1e-4, atol=1e-4)
        sizes = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=16)}}
        exported = torch.export.export(model, (pixels,), dynamic_shapes=sizes).module()
        three = torch.cat([pixels, pixels[:1]])
        torch.testing.assert_close(exported(three).logits, model(three).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_built_without_storage(kind, pixels, tmp_path):
    """On the meta device every parameter and buffer has a rule, and a loaded model is the one that was saved."""
    model = KINDS[kind]().eval()
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert empty(pixels.to("meta")).logits.shape == (2, len(NAMES), 16, 24)
    model.save_pretrained(tmp_path / "empty", state_dict={"nothing": torch.zeros(1)})
    drawn, info = type(model).from_pretrained(tmp_path / "empty", output_loading_info=True)
    assert info["missing_keys"] >= {name for name, _ in model.named_parameters()}
    assert all(tensor.isfinite().all() for tensor in (*drawn.parameters(), *drawn.buffers()))
    assert torch.equal(drawn.prompts.names.tokens, model.prompts.names.tokens)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels).logits, model(pixels).logits)


def gradients_of(model: nn.Module, pixels, labels, processes: int) -> dict[str, torch.Tensor]:
    plain = getattr(model, "module", model)
    whole = plain.normalizers(list(labels["all"]))
    divisors = Normalizers(pixels=whole.pixels / processes, images=whole.images / processes)
    model(pixel_values=pixels, labels=labels["own"], normalizers=divisors).loss.backward()
    return {name: one.grad for name, one in plain.named_parameters() if one.requires_grad}


def quiet(model: nn.Module) -> nn.Module:
    """In training, with the statistics of batch norms as they are."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def one_of_two(rank: int, folder: str, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for kind, make in KINDS.items():
        parallel = nn.parallel.DistributedDataParallel(quiet(make(contrastive="none")), broadcast_buffers=False)
        own = {"own": labels[rank : rank + 1], "all": labels}
        for _ in range(2):  # an unused parameter is reported by the second step
            parallel.zero_grad()
            gradients = gradients_of(parallel, pixels[rank : rank + 1], own, 2)
        if rank == 0:
            torch.save(gradients, f"{folder}/{kind}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(pixels, labels, tmp_path):
    """An image each; without the contrastive loss, whose cells are those of a process. Most pixels are one's."""
    arguments = (str(tmp_path), pixels, labels)
    torch.multiprocessing.start_processes(one_of_two, arguments, nprocs=2, start_method="forkserver")
    for kind, make in KINDS.items():
        expected = gradients_of(quiet(make(contrastive="none")), pixels, {"own": labels, "all": labels}, 1)
        found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 1e-3 * value.abs().max().item() + 1e-6
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=f"{kind} {name}")
