"""The "instance-segmentation" pipeline, and both pipelines in fresh processes: package installed, and hidden."""

import base64
import io
import json
from functools import partial

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoConfig, AutoModelForInstanceSegmentation, pipeline

import uplvp_hf
from uplvp_hf.data import open_image
from uplvp_hf.hub.push import prepare_folder
from uplvp_hf.models.thresholds import SCORE_THRESHOLD

SHAPES = [(90, 50), (40, 70), (64, 64), (31, 80)]  # (width, height)


def image(size, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def segmenter(tiny_model_dir):
    return pipeline("instance-segmentation", str(tiny_model_dir), threshold=0.0, top_k=6)


@pytest.fixture(scope="module")
def images():
    return [image(size, seed) for seed, size in enumerate(SHAPES)]


def same(first, second):
    """Entries with equal places, and scores up to the rounding of another batch."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and a["label"] == b["label"] and a["score"] == pytest.approx(b["score"], abs=1e-5)
        assert coco_mask.iou([a["rle"]], [b["rle"]], [0])[0, 0] > 0.99


def test_entries_are_what_the_processor_finds(segmenter, images):
    image = images[0]
    entries = segmenter(image)
    inputs = segmenter.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = segmenter.model(**inputs)
    expected = segmenter.image_processor.post_process_instance_segmentation(
        outputs, threshold=0.0, top_k=6, target_sizes=[(50, 90)], return_rle=True
    )[0]
    assert type(segmenter) is uplvp_hf.UplvpInstanceSegmentationPipeline and 0 < len(entries) == len(expected["rle"])
    config = segmenter.model.config
    for entry, score, label, box, rle in zip(entries, *(expected[k] for k in ("scores", "labels", "boxes", "rle"))):
        assert entry["score"] == pytest.approx(score.item(), abs=1e-6) and entry["rle"] == rle
        assert entry["label"] == config.id2label[label.item()] and entry["label_id"] == label
        assert entry["category_id"] == config.category_ids[label]
        assert list(entry["box"].values()) == box.tolist() and list(entry["box"]) == ["xmin", "ymin", "xmax", "ymax"]
        decoded = coco_mask.toBbox(entry["rle"])
        assert [decoded[0], decoded[1], decoded[0] + decoded[2], decoded[1] + decoded[3]] == box.tolist()
    assert json.loads(json.dumps(entries)) == entries


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batches_of_different_shapes(segmenter, images, batch_size):
    """To the bit in masks, with the window attention of Swin too, which sees padding."""
    together = segmenter(images, batch_size=batch_size)
    for image, entries in zip(images, together, strict=True):
        assert entries and entries[0]["rle"]["size"] == [image.height, image.width]
        alone = segmenter(image)
        same(entries, alone)
        assert [entry["rle"] for entry in entries] == [entry["rle"] for entry in alone]


def test_kinds_of_input(segmenter, images, tmp_path):
    image = images[0]
    image.save(tmp_path / "a.png")
    reference = segmenter(image)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    kinds = [str(tmp_path / "a.png"), np.array(image), base64.b64encode(buffer.getvalue()).decode()]
    for kind in kinds:
        same(segmenter(kind), reference)
    for entries in segmenter([kinds[0], kinds[0]]):
        same(entries, reference)
    stream = segmenter((one for one in images), batch_size=2)
    assert [entries[0]["rle"]["size"] for entries in stream] == [[h, w] for w, h in SHAPES]
    gray = np.array(image.convert("L"))
    same(segmenter(gray), segmenter(image.convert("L")))
    same(segmenter(np.array(image, dtype=np.float32) / 255), reference)
    with pytest.raises(ValueError, match=r"shape \(3, 20, 20\).*\(H, W, 3\)"):
        segmenter(np.zeros((3, 20, 20), dtype=np.float32))


def test_images_are_seen_as_in_training(segmenter, tmp_path, monkeypatch):
    """16-bit, transparent and rotated files, from each kind of input."""
    noise = np.random.default_rng(0).integers(0, 65536, (20, 30))
    Image.fromarray(noise.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((noise % 256).astype(np.uint8)).convert("RGBA").resize((9, 9)).rotate(45).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    image((30, 20)).save(tmp_path / "turned.jpg", exif=turned)
    seen = []
    process = segmenter.image_processor.preprocess
    monkeypatch.setattr(segmenter.image_processor, "preprocess", lambda x, **k: seen.append(x) or process(x, **k))
    for name in ("deep.png", "a.png", "turned.jpg"):
        file = tmp_path / name
        for kind in (str(file), file, file.read_bytes(), Image.open(file)):
            segmenter(kind)
            assert np.array_equal(np.asarray(seen.pop()), np.asarray(open_image(file))), (name, type(kind))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_stock_pipeline_takes_batches(tiny_model_dir, images, batch_size):
    stock = pipeline("image-segmentation", model=str(tiny_model_dir))
    answers = stock([images[0]] * 4, batch_size=batch_size, threshold=0.0)
    assert len(answers) == 4 and answers[0]
    for answer in answers:
        assert [(e["label"], e["score"]) for e in answer] == [
            (e["label"], pytest.approx(e["score"], abs=1e-5)) for e in answers[0]
        ]
        assert all(entry["mask"].size == images[0].size for entry in answer)


def test_what_is_no_image_is_refused(segmenter, tmp_path, monkeypatch):
    page = tmp_path / "page.png"
    page.write_text("<html>not here</html>")
    Image.new("1", (400, 500)).save(tmp_path / "large.png")
    damaged = base64.b64encode(b"no image" * 400).decode()
    for bad in (str(page), str(tmp_path / "none.png"), damaged, "http://127.0.0.1:9/a.png", 5):
        with pytest.raises(ValueError, match=r"cannot be read as an image .*Pass the path, address") as caught:
            segmenter(bad)
        assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match=r"500 x 400 has 200000 pixels, more than max_pixels=199999"):
        segmenter(str(tmp_path / "large.png"), max_pixels=199_999)
    assert segmenter(str(tmp_path / "large.png"), max_pixels=200_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90_000)  # Pillow refuses twice as many
    with pytest.raises(ValueError, match=r"cannot be read as an image .*DecompressionBombError"):
        segmenter(str(tmp_path / "large.png"))


def test_masks_as_images(segmenter, images):
    coded, drawn = segmenter(images[0]), segmenter(images[0], masks="pil")
    for a, b in zip(coded, drawn, strict=True):
        assert "rle" not in b and b["mask"].mode == "L" and b["mask"].size == images[0].size
        np.testing.assert_array_equal(np.asarray(b["mask"]), coco_mask.decode(a["rle"]) * 255)


def test_settings(tiny_model_dir, segmenter, images):
    found = segmenter(images[0])
    scores = [entry["score"] for entry in found]
    assert scores == sorted(scores, reverse=True)
    middle = scores[len(scores) // 2]
    assert len(segmenter(images[0], threshold=middle)) == sum(score >= middle for score in scores) < len(scores)
    assert len(segmenter(images[0], top_k=2)) <= 2
    assert segmenter(images[0], mask_threshold=1.0) == []
    plain = pipeline("instance-segmentation", str(tiny_model_dir))
    same(plain(images[0]), segmenter(images[0], threshold=SCORE_THRESHOLD, top_k=100))
    with pytest.raises(ValueError, match=r"No such setting of the pipeline: treshold"):
        segmenter(images[0], treshold=0.5)
    with pytest.raises(ValueError, match="masks must be one of rle, pil"):
        segmenter(images[0], masks="polygons")


@pytest.mark.parametrize("model_type", ["knet", "queryinst"])
def test_other_segmenters(model_type, tiny_segmenter, images):
    config = AutoConfig.for_model(
        model_type, backbone_config=tiny_segmenter()["backbone_config"], num_queries=8, hidden_size=32,
        num_attention_heads=4, intermediate_size=48, num_stages=2, id2label={0: "cat", 1: "dog"},
        **({"norm_groups": 8} if model_type == "knet" else {"dynamic_channels": 8, "num_mask_layers": 1}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForInstanceSegmentation.from_config(config).eval()
    processor = uplvp_hf.UplvpImageProcessor(size={"longest_edge": 64})
    segment = pipeline("instance-segmentation", model=model, image_processor=processor, threshold=0.0, top_k=5)
    together = segment(images[:2], batch_size=2)
    assert [entries[0]["rle"]["size"] for entries in together] == [[50, 90], [70, 40]]
    for image, entries in zip(images, together):
        same(entries, segment(image))


# ---- fresh processes -------------------------------------------------------------------------------------------------

RUN = """
import json, sys
folder, image, trust = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
from transformers import pipeline
words = {"trust_remote_code": True} if trust else {}
flat = pipeline("image-segmentation", folder, **words)
own = pipeline("instance-segmentation", folder, **words)
found = flat(image, threshold=0.0, overlap_mask_area_threshold=0.0)
entries = own([image, image], threshold=0.0, top_k=6, batch_size=2)[0]
print(json.dumps({"sizes": [e["mask"].size for e in found], "entries": entries, "pipeline": type(own).__module__,
                  "processor": type(own.image_processor).__module__ + "." + type(own.image_processor).__name__,
                  "model": type(own.model).__module__, "package": "uplvp_hf" in sys.modules}))
"""
HIDDEN = """
import importlib.machinery, sys
inner = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "torchvision" else inner(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def fresh(code, folder, file, trust, start=processes.run):
    done = start(code + RUN, folder, file, json.dumps(trust), cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def repository(tiny_model_dir, tmp_path_factory):
    return prepare_folder(tiny_model_dir, tmp_path_factory.mktemp("pushed") / "repository", "someone/model")


@pytest.fixture
def file(tmp_path, images):
    images[0].save(tmp_path / "image.png")
    return tmp_path / "image.png"


def check(seen, segmenter, images):
    same(seen["entries"], segmenter(images[0]))
    assert seen["sizes"] and all(size == [90, 50] for size in seen["sizes"])


@pytest.mark.slow
@pytest.mark.parametrize("pushed", [False, True])
def test_with_the_package(pushed, tiny_model_dir, repository, segmenter, images, file):
    """The folder of a run, and a pushed one, whose code is not asked for: nobody answers the question here."""
    folder = repository if pushed else tiny_model_dir
    seen, said = fresh("import uplvp_hf\n", folder, file, False)
    assert "is not supported for" not in said
    check(seen, segmenter, images)
    assert all(seen[key].startswith("uplvp_hf.models.") for key in ("pipeline", "processor", "model"))


@pytest.mark.slow
@pytest.mark.parametrize("torchvision", [True, False])
def test_without_the_package(without_library, torchvision, repository, segmenter, images, file, tmp_path):
    if torchvision:
        seen, _ = fresh(without_library, repository, file, True)
    else:  # a new interpreter: nobody has imported torchvision there
        start = partial(processes.anew, environment={"HF_MODULES_CACHE": str(tmp_path / "cache")})
        seen, _ = fresh(without_library + HIDDEN, repository, file, True, start)
    assert not seen["package"]
    assert all(seen[key].startswith("transformers_modules.") for key in ("pipeline", "processor", "model"))
    assert seen["processor"].endswith(".UplvpImageProcessor" if torchvision else ".UplvpImageProcessorPil")
    if torchvision:
        check(seen, segmenter, images)
    else:  # other pixels
        assert seen["sizes"] and seen["entries"][0]["rle"]["size"] == [50, 90]
