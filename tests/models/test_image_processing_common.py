"""What transformers' common tests of image processors assert, for both of ours: its wheels do not hold those tests."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from uplvp_hf.models.image_processing_pil_uplvp import UplvpImageProcessorPil
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

BOTH = [UplvpImageProcessor, UplvpImageProcessorPil]
SETTINGS = {"size": {"shortest_edge": 40, "longest_edge": 70}, "image_mean": [0.4, 0.5, 0.6], "size_divisor": 16}
SIZES = [(30, 52), (47, 40), (64, 64), (33, 90)]


@pytest.fixture(params=BOTH, ids=["torchvision", "pil"])
def cls(request):
    return request.param


def pictures(channels: int = 3):
    """Smooth images of several sizes, (H, W, C) uint8: sharp edges would show the rounding of the resizing."""
    made = []
    for height, width in SIZES:
        y, x = np.mgrid[0:height, 0:width]
        planes = [x * 2, y * 2, x + y, np.full_like(x, 255)][:channels]
        made.append(np.stack(planes, -1).astype(np.uint8))
    return made


def values(processor, images, **options):
    return processor(images, return_tensors="pt", **options)["pixel_values"]


def test_settings_survive_text_files_and_folders(cls, tmp_path):
    processor = cls(**SETTINGS)
    stated = processor.to_dict()
    assert {key: json.loads(processor.to_json_string())[key] for key in SETTINGS} == SETTINGS
    processor.to_json_file(tmp_path / "settings.json")
    processor.save_pretrained(tmp_path)
    for again in (cls.from_json_file(tmp_path / "settings.json"), cls.from_pretrained(tmp_path), cls(**stated)):
        assert again.to_dict() == stated
        assert torch.equal(values(again, pictures()), values(processor, pictures()))
    assert cls.from_pretrained(tmp_path, size_divisor=64).size_divisor == 64


def test_from_dict_takes_further_settings(cls):
    processor = cls.from_dict(cls(**SETTINGS).to_dict())
    assert dict(processor.size) == SETTINGS["size"] and processor.size_divisor == 16
    changed = cls.from_dict(cls(**SETTINGS).to_dict(), size={"longest_edge": 42}, do_normalize=False)
    assert dict(changed.size) == {"longest_edge": 42} and changed.do_normalize is False
    assert values(changed, pictures()[0]).shape[-1] == 48


def test_without_settings_it_works(cls):
    assert values(cls(), Image.new("RGB", (8, 4))).shape == (1, 3, 512, 1024)


@pytest.mark.parametrize("kind", ["pil", "numpy", "numpy channels first", "torch"])
def test_every_kind_of_input_alone_and_in_a_list(cls, kind):
    make = {
        "pil": Image.fromarray,
        "numpy": lambda image: image,
        "numpy channels first": lambda image: image.transpose(2, 0, 1),
        "torch": lambda image: torch.from_numpy(image).permute(2, 0, 1),
    }[kind]
    processor, images = cls(**SETTINGS), [make(image) for image in pictures()]
    together = processor(images, return_tensors="pt")
    assert torch.equal(together["pixel_values"], values(processor, [Image.fromarray(image) for image in pictures()]))
    assert together["pixel_mask"].shape == together["pixel_values"][:, 0].shape
    for index, image in enumerate(images):
        for one in (values(processor, image), values(processor, [image])):
            assert one.shape[0] == 1
            height, width = one.shape[-2:]
            assert torch.equal(one[0], together["pixel_values"][index, :, :height, :width])
    assert isinstance(processor(images, return_tensors="np")["pixel_values"], np.ndarray)


@pytest.mark.parametrize("kind", ["pil", "numpy", "torch"])
@pytest.mark.parametrize("channels", [1, 4])
def test_gray_images_and_four_channels(cls, kind, channels):
    image = pictures(channels)[0]
    shown = Image.fromarray(image.squeeze()).convert("RGB")
    given = {
        "pil": Image.fromarray(image.squeeze()),
        "numpy": image,
        "torch": torch.from_numpy(image).permute(2, 0, 1),
    }[kind]
    assert torch.equal(values(cls(**SETTINGS), given), values(cls(**SETTINGS), shown))


@pytest.mark.parametrize("changes", [{}, {"do_resize": False}, {"do_normalize": False}, {"do_rescale": False}])
def test_both_backends_agree(changes):
    fast, slow = (values(cls(**SETTINGS, **changes), pictures()) for cls in BOTH)
    assert fast.shape == slow.shape and fast.dtype == slow.dtype == torch.float32
    scale = 1 if changes.get("do_rescale", True) else 255
    # A level of 255 by the rounding of the resizing, divided by the deviation of the normalization.
    assert (fast - slow).abs().max() <= scale * (1 / 255) / 0.2 + 1e-5


def test_settings_of_a_call_do_not_stay(cls):
    processor = cls(**SETTINGS)
    before, stated = values(processor, pictures()), processor.to_dict()
    assert values(processor, pictures(), size={"longest_edge": 32}).shape[-1] == 32
    assert processor.to_dict() == stated and torch.equal(values(processor, pictures()), before)
