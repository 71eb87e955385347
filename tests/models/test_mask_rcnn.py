"""Mask R-CNN: equal to torchvision's own model, padding left out, labels, loading and transfer."""

import re

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import AutoConfig, AutoModel, AutoModelForInstanceSegmentation

from uplvp_hf import MaskRcnnConfig, MaskRcnnForInstanceSegmentation, UplvpImageProcessor
from uplvp_hf.conversion.resnet import resnet_name
from uplvp_hf.hub.push import prepare_folder
from uplvp_hf.models.losses import Normalizers

CLASSES = {0: "cat", 1: "dog", 2: "horse"}
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_mask_layers": 1, "anchor_sizes": [16, 24, 32, 48, 64],
    "proposals": [60, 40], "detections_per_image": 20, "score_threshold": 0.0,
}  # fmt: skip
# So many that all are taken: nothing is left to chance.
ALL = {"sampled_anchors": 10**6, "sampled_proposals": 10**6}


@pytest.fixture
def make_model(tiny_segmenter):
    def make(id2label=CLASSES, **settings):
        torch.manual_seed(0)
        config = MaskRcnnConfig(
            backbone_config=tiny_segmenter()["backbone_config"], id2label=id2label, **{**SMALL, **settings}
        )
        return MaskRcnnForInstanceSegmentation(config).eval()

    return make


# --------------------------------------------------------------------------------------------------- torchvision's


def our_name(name):
    """Name of a tensor in torchvision's model -> in ours."""
    if name.startswith("backbone.body."):
        return "backbone." + resnet_name(name.removeprefix("backbone.body."))
    name = re.sub(r"backbone\.fpn\.inner_blocks\.(\d)\.0", r"neck.lateral.\1", name)
    return re.sub(r"backbone\.fpn\.layer_blocks\.(\d)\.0", r"neck.output.\1", name)


SAME_PIXELS = {"min_size": 128, "max_size": 192, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}


def torchvision_model(kind):
    """A Mask R-CNN of torchvision for three classes, and the settings of its backbone."""
    torch.manual_seed(0)
    if kind == "resnet50":
        model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, **SAME_PIXELS)
        return model, None
    backbone = _resnet_fpn_extractor(ResNet(BasicBlock, [1, 1, 1, 1]), 5)
    few = {"rpn_post_nms_top_n_train": 200, "rpn_post_nms_top_n_test": 100, "box_batch_size_per_image": 64}
    return MaskRCNN(backbone, 4, **SAME_PIXELS, **few), {
        "model_type": "resnet", "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [1, 1, 1, 1],
        "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["basic", "resnet50"])
def test_losses_and_detections_are_torchvisions(kind):
    theirs, backbone = torchvision_model(kind)
    few = {"proposals": [200, 100], "sampled_proposals": 64} if kind == "basic" else {}
    config = MaskRcnnConfig(backbone_config=backbone, id2label=CLASSES, score_threshold=0.0, **few)
    ours = MaskRcnnForInstanceSegmentation(config)
    ours.load_state_dict({our_name(name): tensor for name, tensor in theirs.state_dict().items()}, strict=True)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1] and (kind == "basic" or counts[0] == 43_986_279)

    pixels = torch.randn(2, 3, 128, 192)
    masks = [torch.zeros(2, 128, 192, dtype=torch.bool), torch.zeros(0, 128, 192, dtype=torch.bool)]
    masks[0][0, 10:60, 20:90] = masks[0][1, 70:120, 100:150] = True
    labels = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.int64)]
    boxes = [torch.tensor([[20.0, 10, 90, 60], [100, 70, 150, 120]]), torch.zeros(0, 4)]
    targets = [
        {"boxes": box, "labels": label + 1, "masks": mask}
        for box, label, mask in zip(boxes, labels, masks, strict=True)
    ]
    # The same anchors and proposals are sampled; torchvision draws random numbers before that, too.
    for model in (ours, theirs):
        model.rpn.register_forward_pre_hook(lambda *_: (torch.manual_seed(5), None)[1])
    expected = theirs.train()(list(pixels), targets)
    found = ours.train()(pixels, mask_labels=masks, class_labels=labels)
    assert len(expected) == 5
    assert {f"loss_{name}": value.item() for name, value in found.losses.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )
    assert found.loss.item() == pytest.approx(sum(value.item() for value in expected.values()), rel=1e-4)

    theirs.eval().roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = ours.eval()(pixels)
        images, _ = theirs.transform(list(pixels))
        maps = theirs.backbone(images.tensors)  # without pasting the masks, which is done otherwise here
        detections, _ = theirs.roi_heads(maps, theirs.rpn(images, maps)[0], images.image_sizes)
    for index, expected in enumerate(detections):
        scores, classes = found.class_scores[index].max(-1)
        count = len(expected["scores"])
        assert count > 50 and torch.equal(classes[:count] + 1, expected["labels"])
        assert torch.allclose(scores[:count], expected["scores"], atol=1e-4)
        assert torch.allclose(found.boxes[index, :count], expected["boxes"], atol=1e-4)
        grids = found.roi_mask_logits[index, :count, 0].sigmoid()
        assert torch.allclose(grids, expected["masks"][:, 0], atol=1e-4)


# ------------------------------------------------------------------------------------------------------- padding


@pytest.fixture
def padded():
    """An image of 60 x 90 on the smallest canvas, and beside a larger one on a canvas that is no multiple of 64."""
    generator = torch.Generator().manual_seed(1)
    small = torch.randn(3, 60, 90, generator=generator)
    large = torch.randn(3, 128, 160, generator=generator)

    def on(canvas, *images):
        pixels = torch.full((len(images), 3, *canvas), 7.0)  # the padding's values must not matter
        mask = torch.zeros(len(images), *canvas, dtype=torch.int64)
        for index, image in enumerate(images):
            pixels[index, :, : image.shape[1], : image.shape[2]] = image
            mask[index, : image.shape[1], : image.shape[2]] = 1
        return {"pixel_values": pixels, "pixel_mask": mask}

    return on((64, 96), small), on((128, 160), small, large)


def test_detections_do_not_depend_on_the_batch(make_model, padded, assert_close):
    alone, together = padded
    model = make_model()
    with torch.no_grad():
        model(**alone)  # what is remembered of the first batch must not matter either
        one, both = model(**alone), model(**together)
        large = model(together["pixel_values"][1:])
    assert (one.class_scores.amax(-1) > 0).sum() > 10
    for name in ("class_scores", "boxes", "roi_mask_logits"):
        # Masks as probabilities: their logits are steep near 0 and 1.
        same = torch.sigmoid if name == "roi_mask_logits" else torch.Tensor.clone
        assert torch.allclose(same(one[name][0]), same(both[name][0]), atol=1e-3), name
        assert torch.allclose(same(large[name][0]), same(both[name][1]), atol=1e-3), name
    right, bottom = both.boxes[0, :, 2].max(), both.boxes[0, :, 3].max()
    assert right <= 90 and bottom <= 60
    assert_close(one.masks_queries_logits[0], both.masks_queries_logits[0, :, :16, :24], 1e-3, "masks")


def test_losses_do_not_depend_on_the_canvas(make_model, padded):
    alone, together = padded
    model = make_model(**ALL)
    losses = []
    for batch in (alone, {name: value[:1] for name, value in together.items()}):
        height, width = batch["pixel_mask"].shape[1:]
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 5:40, 10:50] = masks[1, 20:60, 60:90] = True
        with torch.no_grad():
            losses.append(model(**batch, mask_labels=[masks], class_labels=[torch.tensor([0, 2])]).losses)
    assert {name: value.item() for name, value in losses[0].items()} == pytest.approx(
        {name: value.item() for name, value in losses[1].items()}, rel=1e-3
    )


def test_anchors_of_the_image_are_torchvisions(make_model):
    """And those of the padding have no area; none is sampled for the loss."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList

    model = make_model()
    own = model.rpn.anchor_generator
    maps = [torch.zeros(1, 1, 128 // stride, 192 // stride, dtype=torch.bfloat16) for stride in (4, 8, 16, 32, 64)]
    images = ImageList(torch.zeros(1, 3, 128, 192), [(50, 100)])
    expected = AnchorGenerator(own.sizes, own.aspect_ratios)(images, [map_.float() for map_ in maps])[0]
    (anchors,) = own(images, maps)
    middle = (expected[:, :2] + expected[:, 2:]) / 2
    inside = (middle[:, 0] < 100) & (middle[:, 1] < 50)
    assert anchors.dtype == torch.float32 and torch.equal(anchors[inside], expected[inside])
    assert not anchors[~inside].any() and 0 < inside.sum() < len(inside)
    for boxes in (torch.zeros(0, 4), torch.tensor([[90.0, 40, 100, 50]])):
        (labels,), _ = model.rpn.assign_targets_to_anchors([anchors], [{"boxes": boxes}])
        assert (labels[~inside] == -1).all() and (labels[inside] >= 0).any()


# -------------------------------------------------------------------------------------------------------- labels


def test_empty_images_and_masks(make_model, make_batch):
    model = make_model().train()
    batch = make_batch(counts=(0, 2))
    batch["mask_labels"][1] = torch.cat([batch["mask_labels"][1], torch.zeros(1, 64, 96, dtype=torch.bool)])
    batch["class_labels"][1] = torch.cat([batch["class_labels"][1], torch.tensor([1])])
    targets = model._targets(model.encode(batch["pixel_values"]).images, batch["mask_labels"], batch["class_labels"])
    assert [len(one["boxes"]) for one in targets] == [0, 2]
    for box, mask in zip(targets[1]["boxes"].tolist(), batch["mask_labels"][1], strict=False):
        rows, columns = mask.nonzero().unbind(1)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    output = model(**batch)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    only = model(**make_batch(counts=(0,)))
    assert torch.isfinite(only.loss) and only.losses["mask"] == 0 and only.class_scores is None


def test_labels_that_do_not_fit_are_refused(make_model, make_batch):
    model, batch = make_model(), make_batch(counts=(2,))
    with pytest.raises(ValueError, match="need class_labels"):
        model(batch["pixel_values"], mask_labels=batch["mask_labels"])
    with pytest.raises(ValueError, match="2 masks but 1 class labels"):
        model(**{**batch, "class_labels": [torch.tensor([0])]})
    with pytest.raises(ValueError, match=r"the model has 3 classes \(0..2\)"):
        model(**{**batch, "class_labels": [torch.tensor([0, 3])]})


def test_labels_at_inference_add_the_loss(make_model, make_batch):
    model, batch = make_model(**ALL), make_batch(counts=(2, 1))
    with torch.no_grad():
        output, plain = model(**batch), model(batch["pixel_values"])
        assert not model.rpn.training and not model.roi_heads.training
        trained = model.train()(**batch)
    assert plain.loss is None and trained.class_scores is None and output.loss > 0
    assert torch.equal(output.class_scores, plain.class_scores) and torch.equal(output.boxes, plain.boxes)
    assert isinstance(model.eval()(batch["pixel_values"], return_dict=False), tuple)


def test_a_batch_counts_in_a_step_as_its_images_do(make_model, make_batch):
    model, batch = make_model(**ALL), make_batch(counts=(2, 1))
    assert model.normalizers([2, 1, 0], 20) == Normalizers(images=3)
    with torch.no_grad():
        whole, part = (model(**batch, normalizers=Normalizers(images=count)).losses for count in (2, 8))
    assert all(torch.allclose(part[name], whole[name] / 4) for name in whole)


# ------------------------------------------------------------------------------------------------- results, dtypes


def test_results_are_the_detections(make_model):
    model = make_model(score_threshold=0.2)
    with torch.no_grad():
        model.roi_heads.mask_predictor.mask_fcn_logits.bias.fill_(50.0)  # masks fill their boxes
        output = model(torch.randn(1, 3, 64, 96))
    count = int((output.class_scores >= 0).sum())
    assert 0 < count <= 20 and ((output.class_scores >= 0).sum(-1) <= 1).all()
    (result,) = UplvpImageProcessor().post_process_instance_segmentation(
        output, threshold=0.0, target_sizes=[(128, 192)], input_sizes=[(64, 96)], return_segmentation=False
    )
    assert len(result["scores"]) == count  # neither empty places nor the columns of other classes
    assert torch.allclose(result["boxes"], 2 * output.boxes[0, :count])
    for mask, box in zip(result["masks"], result["boxes"].tolist(), strict=True):
        filled = mask.sum().item() / ((box[2] - box[0]) * (box[3] - box[1]))
        assert filled == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(make_model, make_batch, autocast):
    model, batch = make_model(), make_batch(counts=(2, 0))
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.train()(**batch)
        output.loss.backward()
        with torch.no_grad():
            found = model.eval()(batch["pixel_values"])
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in output.losses.values())
    assert {found[name].dtype for name in ("class_scores", "boxes", "roi_mask_logits")} == {torch.float32}
    assert (found.boxes != found.boxes.round()).any()  # not cut to whole numbers, as coordinates in half precision are


# ---------------------------------------------------------------------------------------------- configuration, loading


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hiden_size": 3}, r"no setting `hiden_size`. Did you mean `hidden_size`"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"nms_threshold": 1.5}, "nms_threshold must lie between 0 and 1, got 1.5"),
        ({"anchor_sizes": [8, 16]}, r"anchor_sizes must hold 5 numbers from 1 on, got \[8, 16\]"),
        ({"anchor_ratios": [0.0]}, "anchor_ratios must be positive"),
        ({"category_ids": [1]}, "category_ids must hold 3 different ids"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskRcnnConfig(id2label=CLASSES, **settings)


def test_auto_classes_load_what_was_saved(make_model, tmp_path):
    model = make_model(category_ids=[5, 2, 9])
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MaskRcnnConfig
    loaded = AutoModelForInstanceSegmentation.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(AutoModel.from_pretrained(tmp_path)) is MaskRcnnForInstanceSegmentation
    assert loaded.config.category_ids == [5, 2, 9] and loaded.config.id2label == CLASSES
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        one, other = model(pixels), loaded(pixels)
    assert torch.equal(one.boxes, other.boxes) and torch.equal(one.roi_mask_logits, other.roi_mask_logits)
    renamed = MaskRcnnConfig.from_pretrained(tmp_path, id2label={0: "a"})
    assert renamed.category_ids == [1] and renamed.num_labels == 1


def test_what_a_file_lacks_is_initialized_as_in_torchvision(tmp_path):
    """Compared with torchvision's own parts at their full width: means and deviations of every tensor."""
    theirs, backbone = torchvision_model("basic")
    model = MaskRcnnForInstanceSegmentation(MaskRcnnConfig(backbone_config=backbone, id2label=CLASSES))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if not k.startswith(("rpn", "roi_heads"))}, file, {"format": "pt"})
    loaded = MaskRcnnForInstanceSegmentation.from_pretrained(tmp_path).state_dict()
    expected = {our_name(name): tensor for name, tensor in theirs.state_dict().items()}
    compared = [name for name in expected if name.startswith(("rpn", "roi_heads"))]
    assert len(compared) == 26 and loaded.keys() == expected.keys()
    for name in compared:
        if name.endswith("weight"):
            assert loaded[name].std().item() == pytest.approx(expected[name].std().item(), rel=0.1), name
        elif "mask_predictor" not in name:  # there torchvision leaves torch's own biases
            assert loaded[name].abs().max() <= max(2 * expected[name].abs().max(), 1e-6), name


def test_transfer_to_other_classes_goes_by_name(make_model, tmp_path):
    source = make_model()
    source.save_pretrained(tmp_path)
    new = {0: "zebra", 1: "Horse", 2: "bird", 3: "cat"}
    model = MaskRcnnForInstanceSegmentation.from_pretraining(tmp_path, new, [4, 3, 2, 1])
    report = model.transfer_report
    assert set(report.remapped) == set(model.class_sized) and not report.ignored
    assert report.classes == ["Horse", "cat"] and report.new_classes == ["zebra", "bird"]
    assert model.config.id2label == new and model.config.category_ids == [4, 3, 2, 1]
    before, after = source.state_dict(), model.state_dict()
    for name in model.class_sized:
        each = 4 if "bbox_pred" in name else 1
        for target, origin in {0: 0, 2: 3, 4: 1}.items():  # background, horse, cat
            rows = after[name][target * each : (target + 1) * each]
            assert torch.equal(rows, before[name][origin * each : (origin + 1) * each]), name
    kept = next(name for name in before if name.startswith("backbone"))
    assert torch.equal(before[kept], after[kept])
    fresh = MaskRcnnForInstanceSegmentation.from_pretraining(tmp_path, new, class_head="new").transfer_report
    assert set(fresh.reinitialized) == set(model.class_sized) and not fresh.remapped


REMOTE = """
import torch
from transformers import AutoModelForInstanceSegmentation
model = AutoModelForInstanceSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    print(model(torch.ones(1, 3, 64, 96)).boxes.double().sum().item())
"""


@pytest.mark.slow
def test_a_repository_loads_without_the_library(without_library, make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    UplvpImageProcessor().save_pretrained(tmp_path / "model")
    folder = prepare_folder(tmp_path / "model", tmp_path / "repository", "user/name")
    done = processes.run(without_library + REMOTE, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 64, 96)).boxes.double().sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5) and expected > 0
