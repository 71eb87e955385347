"""Every segmenter on every backbone: compiled, exported and in two processes."""

import os
from functools import partial

import pytest
import torch
from test_sweep import CANVASES, CLASSES, KINDS, even, make_model, quiet, tensors_of, trained
from torch import nn

from uplvp_hf.models.losses import Normalizers
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation

# A graph is that of the backbone and that of the segmenter behind it: the second backbone needs one segmenter.
GRAPHS = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] != "mobilenet" or kind[0] == "knet"])


@pytest.fixture
def make_batch(make_batch, request):
    kind = request.node.callspec.params["kind"] if hasattr(request.node, "callspec") else ("", "")
    return partial(make_batch, **CANVASES.get(kind[0], {}))


@GRAPHS
@pytest.mark.slow
def test_compiled_model_equals_the_eager_one(kind, batch):
    torch._dynamo.reset()
    model = make_model(kind, UplvpForInstanceSegmentation).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected, actual = model(batch["pixel_values"]), compiled(batch["pixel_values"])
    for name, value in tensors_of(expected).items():
        torch.testing.assert_close(tensors_of(actual)[name], value, rtol=1e-4, atol=1e-4, msg=name)


@GRAPHS
@pytest.mark.slow
def test_exported_model_takes_any_batch(kind, batch):
    model = make_model(kind, UplvpForInstanceSegmentation).eval()
    names = ["class_queries_logits", "masks_queries_logits", "queries"]

    class Predictions(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            output = self.model(pixel_values)
            return [getattr(output, name) for name in names]

    pixels = batch["pixel_values"]
    sizes = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=16)}}
    with torch.no_grad():
        exported = torch.export.export(Predictions(), (pixels,), dynamic_shapes=sizes).module()
        for count in (2, 3, 5):
            chosen = pixels[torch.arange(count) % 3]
            expected = model(chosen)
            for name, value in zip(names, exported(chosen), strict=True):
                torch.testing.assert_close(value, getattr(expected, name), rtol=1e-4, atol=1e-4, msg=name)


# ---- processes -------------------------------------------------------------------------------------------------------

COUNTS = (3, 0)  # one process has nothing to find


def gradients_of(model, batch, normalizers) -> dict[str, torch.Tensor]:
    model(**batch, draw=even, normalizers=normalizers).loss.backward()
    plain = getattr(model, "module", model)
    return {name: parameter.grad for name, parameter in trained(plain)}


def divisors(model, batch, processes: int) -> Normalizers:
    """Those of the whole batch, averaged over processes, as the training loop passes them."""
    counts = [len(masks) for masks in batch["mask_labels"]]
    known = vars(model.segmenter.normalizers(counts, model.config.num_prompts, batch["mask_labels"]))
    return Normalizers(**{name: max(value / processes, 1.0) for name, value in known.items() if value is not None})


def one_of_two(rank: int, folder: str, batches: dict) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for kind in KINDS:
        batch = batches[kind]
        model = quiet(make_model(kind, text_dim=16, prompt_injection="concat").train())
        model.set_text_features(torch.eye(3, 16), list(CLASSES.values()))
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False, broadcast_buffers=False)
        own = {name: value[rank : rank + 1] for name, value in batch.items()}
        for _ in range(2):  # an unused parameter is reported by the second step
            model.zero_grad()
            gradients = gradients_of(parallel, own, divisors(model, batch, 2))
        if rank == 0:
            torch.save(gradients, f"{folder}/{'-'.join(kind)}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(make_batch, tmp_path):
    """An image each, with fixed batch statistics: the averaged gradients are those of the batch in one process."""
    batches = {kind: make_batch(counts=COUNTS, **CANVASES.get(kind[0], {})) for kind in KINDS}
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path), batches), nprocs=2, start_method="forkserver")
    for kind in KINDS:
        batch = batches[kind]
        model = quiet(make_model(kind, text_dim=16, prompt_injection="concat").train())
        model.set_text_features(torch.eye(3, 16), list(CLASSES.values()))
        expected = gradients_of(model, batch, divisors(model, batch, 1))
        found = torch.load(tmp_path / f"{'-'.join(kind)}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 1e-3 * value.abs().max().item() + 1e-5
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=f"{kind} {name}")
