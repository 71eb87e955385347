"""The image processor without torchvision, against the one with it."""

import json

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from uplvp_hf.models.image_processing_pil_uplvp import UplvpImageProcessorPil
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

SIZES = [(60, 100), (100, 60), (75, 75), (33, 97)]  # (height, width)
BOTH = pytest.mark.parametrize("kind", [UplvpImageProcessor, UplvpImageProcessorPil])


def random_image(height, width, seed=0):
    """Smooth, as photographs are: noise would measure the rounding of the resizing alone."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def record(width, height):
    polygon = [0.2 * width, 0.1 * height, 0.9 * width, 0.3 * height, 0.5 * width, 0.9 * height]
    return {"image_id": 1, "annotations": [{"segmentation": [polygon], "category_id": 7}]}


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"longest_edge": 128}},
        {"size": {"longest_edge": 50}, "size_divisor": 16},
        {"size": {"shortest_edge": 64, "longest_edge": 96}},
        {"size": {"height": 40, "width": 72}},
        {"do_resize": False},
        {"do_resize": False, "do_pad": False},
    ],
)
def test_backends_equivalence(settings):
    """Equal shapes and masks; pixels within the rounding of the resizing, which Pillow does in 8 bits."""
    first, second = UplvpImageProcessor(**settings), UplvpImageProcessorPil(**settings)
    images = [
        random_image(*size, seed) for seed, size in enumerate(SIZES if settings.get("do_pad", True) else SIZES[:1])
    ]
    records = [record(image.width, image.height) for image in images]
    a, b = (one(images, annotations=records, label_map={7: 0}, return_tensors="pt") for one in (first, second))
    assert a.keys() == b.keys() == {"pixel_values", "pixel_mask", "mask_labels", "class_labels"}
    assert all(a[name].dtype == b[name].dtype for name in ("pixel_values", "pixel_mask"))
    assert torch.equal(a["pixel_mask"], b["pixel_mask"]) and a["pixel_values"].shape == b["pixel_values"].shape
    for name in ("mask_labels", "class_labels"):
        assert all(torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True))
    assert all(masks.any() for masks in a["mask_labels"])
    difference = (a["pixel_values"] - b["pixel_values"]).abs() * torch.tensor(first.image_std)[:, None, None] * 255
    assert difference.mean() < 1 and difference.max() < 3
    if settings.get("do_resize") is False:
        assert difference.max() < 1e-3


def test_results_are_the_same():
    processors = UplvpImageProcessor(size={"longest_edge": 96}), UplvpImageProcessorPil(size={"longest_edge": 96})
    generator = torch.Generator().manual_seed(0)
    from types import SimpleNamespace

    outputs = SimpleNamespace(
        class_queries_logits=torch.randn(1, 6, 4, generator=generator),
        masks_queries_logits=torch.randn(1, 6, 24, 24, generator=generator),
    )
    results = [
        one.post_process_instance_segmentation(outputs, threshold=0.1, target_sizes=[(50, 70)])[0] for one in processors
    ]
    assert len(results[0]["scores"]) > 0 and torch.equal(results[0]["masks"], results[1]["masks"])


@BOTH
def test_input_kinds_agree(kind):
    processor = kind(size={"longest_edge": 64})
    image = random_image(40, 70)
    array = np.array(image)
    reference = processor(image, return_tensors="pt")["pixel_values"]
    for other in ([image], array, [array], torch.from_numpy(array).permute(2, 0, 1), image.convert("RGBA")):
        assert torch.equal(processor(other, return_tensors="pt")["pixel_values"], reference)


@BOTH
def test_gigapixel_images_are_refused_unless_allowed(kind):
    processor = kind(size={"longest_edge": 64}, max_pixels=5000)
    small, large = random_image(70, 70), random_image(50, 101)
    assert processor([small], return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    for given in (large, np.array(large)):
        with pytest.raises(ValueError, match="An image of 50 x 101 has 5050 pixels, more than max_pixels=5000"):
            processor([small, given], return_tensors="pt")
    with pytest.raises(ValueError, match="An image of 0 x 0 has no pixel"):
        processor(np.zeros((0, 0, 3), dtype=np.uint8), return_tensors="pt")
    assert processor(large, max_pixels=10_000, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 64)
    # What Pillow has only opened is not decoded for it.
    lazy = Image.new("RGB", (2, 2))
    lazy._size = (40_000, 40_000)
    with pytest.raises(ValueError, match="An image of 40000 x 40000"):
        kind()(lazy)


@pytest.mark.parametrize("saved", [UplvpImageProcessor, UplvpImageProcessorPil])
def test_settings_of_either_load_into_either(saved, tmp_path, tiny_model_dir):
    processor = saved(size={"longest_edge": 96}, size_divisor=64)
    processor.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == "UplvpImageProcessor"
    )
    for backend, kind in (
        ("torchvision", UplvpImageProcessor),
        ("pil", UplvpImageProcessorPil),
        (None, UplvpImageProcessor),
    ):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert type(loaded) is kind and loaded.to_dict() == processor.to_dict() and loaded.size_divisor == 64


HIDDEN = """
import importlib.machinery, json, sys
inner = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "torchvision" else inner(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.mark.slow
def test_without_torchvision(tiny_model_dir, tmp_path):
    """Module, auto class, stock pipeline and the model in a process in which torchvision cannot be found."""
    random_image(50, 90).save(tmp_path / "image.png")
    code = (
        HIDDEN
        + """
from uplvp_hf.models import image_processing_pil_uplvp
import uplvp_hf
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation, pipeline
model, image = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(model)
found = pipeline("image-segmentation", model)(image, threshold=0.0, overlap_mask_area_threshold=0.0)
entries = pipeline("instance-segmentation", model)(image, threshold=0.0, top_k=5)
try:
    uplvp_hf.UplvpImageProcessor()
    refusal = ""
except ImportError as error:
    refusal = str(error)
print(json.dumps({"type": type(processor).__name__, "sizes": [e["mask"].size for e in found], "entries": len(entries),
                  "refusal": refusal, "torchvision": "torchvision" in sys.modules}))
"""
    )
    done = processes.anew(code, tiny_model_dir, tmp_path / "image.png", cwd="/")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["type"] == "UplvpImageProcessorPil" and not seen["torchvision"]
    assert seen["sizes"] and all(size == [90, 50] for size in seen["sizes"]) and 0 < seen["entries"] <= 5
    assert "UplvpImageProcessor requires the Torchvision library" in seen["refusal"]
