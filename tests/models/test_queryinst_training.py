"""QueryInst compiled, exported, in two processes, and learning one image."""

import pytest
import torch
from test_queryinst import make

from uplvp_hf.models.losses import Normalizers
from uplvp_hf.models.roi_masks import paste_masks


@pytest.mark.slow
def test_export_with_any_number_of_images():
    model = make().eval()
    count = torch.export.Dim("count", min=1, max=16)
    masks = torch.ones(2, 64, 96, dtype=torch.int64)
    masks[1, 40:], masks[1, :, 70:] = 0, 0
    images, more = torch.randn(2, 3, 64, 96), torch.randn(5, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(
            model, (images, masks), dynamic_shapes={"pixel_values": {0: count}, "pixel_mask": {0: count}}
        )
        ours, exported = model(more, masks[[1, 0, 1, 1, 0]]), program.module()(more, masks[[1, 0, 1, 1, 0]])
    for name in ("class_scores", "boxes", "roi_mask_logits", "masks_queries_logits"):
        torch.testing.assert_close(exported[name], ours[name], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_compiles_in_one_piece():
    model = make().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    for name in ("class_scores", "boxes", "masks_queries_logits"):
        torch.testing.assert_close(compiled[name], expected[name], rtol=1e-4, atol=1e-3)


def fixed_norms(model):
    """Statistics over the regions of one process are not those over all regions."""
    model.train().backbone.eval()
    model.model.mask_heads.eval()
    return model


def one_of_two(rank, folder, batch):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(fixed_norms(make()))
    own = {name: value[rank : rank + 1] for name, value in batch.items()}
    for _ in range(2):  # the second forward complains when the first backward has missed a parameter
        model.zero_grad()
        model(**own, normalizers=Normalizers(masks=1.5)).loss.backward()  # the mean over processes
    if rank == 0:
        torch.save({name: p.grad for name, p in model.module.named_parameters()}, f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path, make_batch):
    """The second process has no object at all."""
    batch = make_batch((3, 0))
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path), batch), nprocs=2, start_method="forkserver")
    theirs = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model = fixed_norms(make())
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max().item()
        torch.testing.assert_close(theirs[name], parameter.grad, rtol=1e-4, atol=1e-4 * largest + 1e-7)


@pytest.mark.slow
def test_learns_one_image():
    torch.manual_seed(0)
    model = make(num_stages=3, num_queries=6, finest_scale=28).train()
    model.backbone.eval()
    mask = torch.zeros(3, 96, 96, dtype=torch.bool)
    mask[0, 8:40, 8:40] = True
    mask[1, 50:90, 20:50] = True
    yy, xx = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    mask[2] = (yy - 40) ** 2 + (xx - 70) ** 2 < 300
    image = torch.zeros(1, 3, 96, 96)
    for channel, one in enumerate(mask):
        image[0, channel][one] = 1
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    found = []
    for step in range(1, 251):
        loss = model(image, mask_labels=[mask], class_labels=[labels]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            found = what_is_found(model, image, mask)
            if len(found) == 3 and min(map(min, found.values())) > 0.8:
                break
    assert sorted(found) == [0, 1, 2]
    assert all(score > 0.5 and overlap > 0.8 for score, overlap in found.values()), found


def what_is_found(model, image, mask):
    """{class: (score, IoU with its mask)} of the three surest predictions."""
    with torch.no_grad():
        output = model.eval()(image)
    model.train().backbone.eval()
    scores, place = output.class_scores[0].flatten().topk(3)
    query, label = place // 3, place % 3
    pasted = paste_masks(output.roi_mask_logits[0, query, label].sigmoid(), output.boxes[0, query], (96, 96)) > 0.5
    overlaps = [(one & mask[kind]).sum() / (one | mask[kind]).sum() for one, kind in zip(pasted, label, strict=True)]
    return {int(kind): (float(s), float(o)) for kind, s, o in zip(label, scores, overlaps, strict=True)}
