"""mIoU against the `evaluate` package, windows and flips against plain loops, and evaluation of a dataset."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from uplvp_hf.evaluation.semantic import MeanIoU, segment_image, window_logits, window_starts
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.image_processing_icpc import IcpcImageProcessor


def their_mean_iou(predictions, references, num_labels, ignore_index):
    """The function of the `evaluate` package, whose module lies on the Hub; its arithmetic, for where it cannot be
    loaded: intersections and unions by histograms over (0, K - 1)."""
    intersect, union, label = np.zeros(num_labels), np.zeros(num_labels), np.zeros(num_labels)
    for prediction, reference in zip(predictions, references, strict=True):
        valid = reference != ignore_index
        prediction, reference = prediction[valid], reference[valid]
        bins = {"bins": num_labels, "range": (0, num_labels - 1)}
        hit, found, true = (
            np.histogram(values, **bins)[0] for values in (prediction[prediction == reference], prediction, reference)
        )
        intersect, union, label = intersect + hit, union + found + true - hit, label + true
    with np.errstate(invalid="ignore"):
        return np.nanmean(intersect / union), np.nanmean(intersect / label), intersect.sum() / label.sum()


@pytest.mark.parametrize("classes, absent", [(2, 0), (19, 3), (150, 10), (250, 0)])
def test_mean_iou_is_theirs(classes, absent):
    rng = np.random.default_rng(classes)
    present = classes - absent
    references = [rng.integers(0, present, (40, 50)) for _ in range(4)]
    predictions = [np.where(rng.random(r.shape) < 0.6, r, rng.integers(0, present, r.shape)) for r in references]
    for reference in references:
        reference[rng.random(reference.shape) < 0.1] = 255
    metric = MeanIoU(classes, 255)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction, reference)
    found = metric.compute()
    expected = their_mean_iou(predictions, references, classes, 255)
    assert [found[name] for name in ("mIoU", "mAcc", "aAcc")] == pytest.approx(expected)
    assert found["absent"] >= absent


def test_more_classes_than_bytes_hold():
    reference = np.array([[254, 255, 256, 846, 65535]])
    metric = MeanIoU(847, 65535)
    metric.add(reference.clip(max=846), reference)
    assert metric.compute()["mIoU"] == 1 and metric.compute()["absent"] == 843
    with pytest.raises(UserError, match="ids from 900 to 900"):
        metric.add(np.array([[900]]), np.array([[3]]))


def test_an_image_without_a_label_counts_nothing():
    metric = MeanIoU(3, 255)
    metric.add(np.zeros((2, 2), int), np.full((2, 2), 255))
    assert metric.compute()["mIoU"] is None and metric.compute()["aAcc"] is None


class Means(torch.nn.Module):
    """Logits that depend on where a pixel lies in its own window."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 3)[:, None])

    def forward(self, pixels):
        values = F.avg_pool2d(pixels, 4) + torch.arange(pixels.shape[-1] // 4) / 100
        return type("Output", (), {"logits": torch.einsum("kc,bchw->bkhw", self.weight.expand(3, 3), values)})


def test_windows():
    assert window_starts(683, 512, 341) == [0, 171] and window_starts(512, 512, 341) == [0]
    assert window_starts(300, 512, 341) == [0] and window_starts(1200, 512, 341) == [0, 341, 682, 688]
    torch.manual_seed(0)
    model, pixels = Means(), torch.randn(2, 3, 96, 160)
    whole = window_logits(model, pixels)
    assert torch.equal(window_logits(model, pixels, 160, 100), whole)
    total, count = torch.zeros(2, 3, 96, 160), torch.zeros(96, 160)
    for top in (0, 32):
        for left in (0, 43, 86, 96):
            crop = pixels[..., top : top + 64, left : left + 64]
            total[..., top : top + 64, left : left + 64] += F.interpolate(
                model(crop).logits, size=(64, 64), mode="bilinear", align_corners=False
            )
            count[top : top + 64, left : left + 64] += 1
    assert torch.allclose(window_logits(model, pixels, 64), total / count, atol=1e-6)


def test_flips_and_scales_are_means_of_probabilities():
    model = Means()
    processor = IcpcImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 75, 3), dtype=np.uint8))
    with torch.no_grad():
        scores = segment_image(model, processor, image, scales=(1.0, 1.5), flip=True)
        assert scores.shape == (3, 50, 75) and torch.allclose(scores.sum(0), torch.ones(50, 75), atol=1e-5)
        parts = [segment_image(model, processor, image, scales=(scale, scale), flip=True) for scale in (1.0, 1.5)]
        assert torch.allclose(scores, (parts[0] + parts[1]) / 2, atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["denseclip_resnet", "denseclip_vit"])
def test_windows_of_the_original(golden, name, assert_close):
    from uplvp_hf.conversion.denseclip import build_denseclip

    tensors, info = golden(name)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    end, heads = len(state["text_encoder.token_embedding.weight"]) - 1, {"num_attention_heads": 4}
    settings = {"class_token_ids": [row[1 : row.index(end)] for row in tensors["input.texts"].tolist()]}
    settings |= {"text_config": heads, **({"vision_config": heads} if name.endswith("vit") else {})}
    model = build_denseclip(state, list("abcde"), None, settings, None)[0].eval()
    with torch.no_grad():
        ours = window_logits(model, tensors["input.img_slide"], info["slide"]["crop"][0], info["slide"]["stride"][0])
        assert_close(ours, tensors["test.slide_logits"], 1e-5)
        small = window_logits(model, tensors["input.img_small"], 64, 42)
        assert_close(small, tensors["test.slide_small_logits"], 1e-5)
        several = 0
        for part in ("img_scale0", "img_scale1"):
            for flip in (False, True):
                pixels = tensors[f"input.{part}"]
                logits = window_logits(model, pixels.flip(-1) if flip else pixels)
                logits = F.interpolate(logits, size=info["ori_shape"], mode="bilinear", align_corners=False)
                probabilities = logits.softmax(1)
                several = several + (probabilities.flip(-1) if flip else probabilities) / 4
        assert_close(several, tensors["test.aug_prob_ori"], 1e-5)
