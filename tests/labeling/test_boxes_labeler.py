"""Boxes of detectors, people and examples become masks. Tiny random models of transformers' own classes."""

import json
import shutil

import numpy as np
import prompt_models
import pytest
import torch
from PIL import Image
from torchvision.ops import nms

from uplvp_hf.data import DataError, load_dataset_rows
from uplvp_hf.data.dataset import InstanceDataset
from uplvp_hf.labeling import label_images
from uplvp_hf.labeling.labelers import box_segmenter
from uplvp_hf.labeling.labelers.box_segmenter import BoxSegmenter
from uplvp_hf.labeling.labelers.boxes import BoxesLabeler, read_boxes
from uplvp_hf.labeling.labelers.detectors import load_detector
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.masks import encode_masks

SAMS = ("sam", "sam_hq", "sam2")
DETECTORS = {
    "grounding-dino": prompt_models.grounding_dino,
    "mm-grounding-dino": lambda folder: prompt_models.grounding_dino(folder, "mm-grounding-dino"),
    "owlv2": prompt_models.owl,
    "owlvit": lambda folder: prompt_models.owl(folder, "owlvit"),
    "omdet-turbo": prompt_models.omdet,
}
PHRASES = [["bear", "brown bear"], ["deer"], ["otter"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder of a model, made once."""
    made = {}

    def folder(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            made[kind] = prompt_models.sam(path, kind) if kind in SAMS else DETECTORS[kind](path)
        return made[kind]

    return folder


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


IMAGES = pictures((80, 60), (80, 60), (90, 50))
BOXES = [
    np.array([[5, 5, 40, 40], [10, 10, 60, 50], [30, 2, 70, 20]], dtype=np.float32),
    np.zeros((0, 4), dtype=np.float32),
    np.array([[5, 5, 40, 40]], dtype=np.float32),
]


@pytest.mark.parametrize("kind", SAMS)
def test_masks_of_boxes_equal_transformers_own_one_image_at_a_time(folders, kind, monkeypatch):
    monkeypatch.setattr(box_segmenter, "MASK_BYTES", 4 * 1024 * 1024)  # one mask at a time
    segmenter = BoxSegmenter(folders(kind), boxes_per_pass=2)
    assert segmenter.license == "apache-2.0"
    found = segmenter(IMAGES, BOXES)
    assert [masks.shape for masks, _ in found] == [(3, 60, 80), (0, 60, 80), (1, 50, 90)]
    for (masks, scores), image, boxes in zip(found, IMAGES, BOXES):
        if not len(boxes):
            continue
        inputs = segmenter.processor(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
        inputs["input_boxes"] = inputs["input_boxes"].float()
        with torch.inference_mode():
            output = segmenter.model(**inputs, multimask_output=False)
        sizes = [inputs[key] for key in ("original_sizes", "reshaped_input_sizes") if key in inputs]
        expected = segmenter.processor.post_process_masks(output.pred_masks, *sizes)[0][:, 0].numpy()
        assert (masks == expected).mean() > 0.999  # of pixels on the very edge the rounding of batches decides
        assert scores.tolist() == pytest.approx(output.iou_scores[0, :, 0].clamp(0, 1).tolist(), abs=1e-5)
    assert not np.array_equal(found[0][0][0], found[0][0][1])
    assert [masks.shape for masks, _ in segmenter(IMAGES, [BOXES[1]] * 3)] == [(0, 60, 80), (0, 60, 80), (0, 50, 90)]


@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_alone_and_in_batches_find_the_same(folders, kind):
    detector, license = load_detector(folders(kind), PHRASES)
    assert license == "apache-2.0"
    together = detector(IMAGES, threshold=0.0)
    for image, found in zip(IMAGES, together):
        alone = detector([image], threshold=0.0)[0]
        assert len(found.scores) == len(alone.scores) > 0
        assert np.allclose(found.xyxy, alone.xyxy, atol=1e-2)
        assert np.allclose(found.scores, alone.scores, atol=1e-4)
        assert found.labels.tolist() == alone.labels.tolist()
    assert [len(found.scores) for found in detector(IMAGES, threshold=1.0)] == [0, 0, 0]


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_order_of_classes_and_phrases_does_not_matter(folders, kind):
    first, _ = load_detector(folders(kind), PHRASES)
    second, _ = load_detector(folders(kind), [PHRASES[2], PHRASES[0][::-1], PHRASES[1]])
    for a, b in zip(first(IMAGES, threshold=0.0), second(IMAGES, threshold=0.0)):
        assert np.array_equal(a.xyxy, b.xyxy) and np.array_equal(a.scores, b.scores)
        assert np.array([1, 2, 0])[a.labels].tolist() == b.labels.tolist()


@pytest.mark.parametrize("kind", ["owlv2", "owlvit"])
def test_owl_equals_transformers_own_post_processing(folders, kind):
    detector, _ = load_detector(folders(kind), [["bear"], ["deer"], ["otter"]])
    processor = detector.processor
    for image in (IMAGES[0], IMAGES[2]):
        inputs = processor(text=[["bear", "deer", "otter"]], images=[image], return_tensors="pt")
        with torch.inference_mode():
            output = detector.model(**inputs)
        sizes = [(image.height, image.width)]
        expected = processor.post_process_grounded_object_detection(output, threshold=0.3, target_sizes=sizes)[0]
        found = detector([image], threshold=0.3)[0]
        assert len(found.scores) == len(expected["scores"]) > 0
        assert np.allclose(found.xyxy, expected["boxes"].numpy(), atol=1e-2)
        assert np.allclose(found.scores, expected["scores"].numpy(), atol=1e-5)
        assert found.labels.tolist() == expected["labels"].tolist()


def test_omdet_equals_transformers_own_post_processing(folders):
    detector, _ = load_detector(folders("omdet-turbo"), [["bear"], ["deer"]])
    image = IMAGES[2]
    inputs = detector.processor(images=image, text=["bear", "deer"], return_tensors="pt")
    with torch.inference_mode():
        output = detector.model(**inputs)
    expected = detector.processor.post_process_grounded_object_detection(
        output, target_sizes=[(image.height, image.width)], threshold=0.0, nms_threshold=1.0, max_num_det=20
    )[0]
    found = detector([image], threshold=0.0)[0]
    for box, score, label in zip(found.xyxy, found.scores, found.labels):
        match = np.isclose(expected["scores"].numpy(), score, atol=1e-5) & (expected["labels"].numpy() == label)
        cut = torch.from_numpy(box).clamp(torch.zeros(4), torch.tensor([90.0, 50, 90, 50])).numpy()
        assert np.abs(expected["boxes"].numpy()[match] - cut).max(axis=1).min() < 0.1


@pytest.mark.parametrize("kind", ["grounding-dino", "mm-grounding-dino"])
def test_grounding_dino_finds_the_boxes_of_transformers_post_processing(folders, kind):
    detector, _ = load_detector(folders(kind), [["bear"], ["red deer"]])
    image = IMAGES[0]
    inputs = detector.processor(images=image, text=[["bear", "red deer"]], return_tensors="pt")
    with torch.inference_mode():
        output = detector.model(**inputs)
    sizes = [(image.height, image.width)]
    expected = detector.processor.post_process_grounded_object_detection(output, threshold=0.0, target_sizes=sizes)[0]
    found = detector([image], threshold=0.0)[0]
    assert np.allclose(found.xyxy, expected["boxes"].numpy(), atol=1e-2)
    # Theirs is the likeliest token of the whole text, ours of a phrase: without the full stops between them.
    assert (found.scores <= expected["scores"].numpy() + 1e-5).all()
    tokens = output.logits[0].sigmoid()[:, : inputs["input_ids"].shape[1]]  # [CLS] bear . red deer . [SEP]
    by_hand = torch.stack([tokens[:, 1], tokens[:, 3:5].amax(dim=1)], dim=1)
    assert found.labels.tolist() == by_hand.argmax(dim=1).tolist()
    assert found.scores.tolist() == pytest.approx(by_hand.amax(dim=1).tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", DETECTORS)
def test_phrases_in_chunks(folders, kind):
    whole, _ = load_detector(folders(kind), PHRASES)
    chunks, _ = load_detector(folders(kind), PHRASES, phrases_per_pass=1)
    found, parts = whole(IMAGES[:1], threshold=0.0)[0], chunks(IMAGES[:1], threshold=0.0)[0]
    assert set(parts.labels) == {0, 1, 2} or kind.startswith("owl")
    if kind.startswith("owl"):  # each phrase is compared with the image by itself
        assert np.allclose(found.scores, parts.scores, atol=1e-5)
    else:  # each pass has queries of its own
        assert len(parts.scores) == 4 * len(found.scores)


def test_many_phrases_take_several_texts(folders):
    many = [[f"brown bear {'big ' * k}deer"] for k in range(10)]  # 75 words; the text takes 64 tokens with its ends
    detector, _ = load_detector(folders("grounding-dino"), many)
    passes = [detector.phrases[part] for part in detector._passes()]
    assert len(passes) == 2 and [*passes[0], *passes[1]] == detector.phrases
    assert len(detector(IMAGES[:1], threshold=0.0)[0].scores) == 24


def test_full_stops_in_phrases_end_no_phrase(folders):
    detector, _ = load_detector(folders("grounding-dino"), [["bear?"], ["St. deer"]])
    assert len(detector(IMAGES[:1], threshold=0.0)[0].scores) == 12


def test_crops_of_examples_are_queries_of_owlv2(folders):
    crop = IMAGES[0].crop((10, 10, 50, 50))
    detector, _ = load_detector(folders("owlv2"), [["bear"], []], [(crop, 1)])
    inputs = detector.processor(images=[IMAGES[2]], query_images=[crop], return_tensors="pt")
    with torch.inference_mode():
        output = detector.model.image_guided_detection(**inputs)
    logits, owners, _ = next(detector.look([IMAGES[2]]))
    assert owners == [0, 1]
    assert torch.allclose(logits[0, :, 1], output.logits[0, :, 0], atol=1e-4)
    with pytest.raises(UserError, match="OWLv2 also takes example crops"):
        load_detector(folders("owlvit"), [["bear"]], [(crop, 0)])


def test_what_is_no_detector_or_has_nothing_to_find_is_refused(folders):
    with pytest.raises(UserError, match="is a sam model, no zero-shot detector"):
        load_detector(folders("sam"), [["bear"]])
    with pytest.raises(UserError, match="is a owlv2 model, which makes no masks of boxes"):
        BoxSegmenter(folders("owlv2"))
    with pytest.raises(UserError, match="give a vocabulary"):
        load_detector(folders("owlv2"), [])
    with pytest.raises(UserError, match="either a detector"):
        BoxesLabeler(folders("sam"))


def test_a_checkpoint_without_some_tensors_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders("sam"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(f"{folders('sam')}/model.safetensors")
    del tensors["mask_decoder.iou_token.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are not in the checkpoint, such as mask_decoder\.iou_token"):
        BoxSegmenter(str(tmp_path))


def test_a_labeler_of_words(folders, tmp_path):
    folder = image_dir(tmp_path, 5)
    labeler = BoxesLabeler(
        folders("sam"), detector=folders("owlv2"), entries=["bear, brown bear", "deer"], threshold=0.3, mask_nms=0.95
    )
    assert labeler.vocabulary == ["bear", "deer"]
    assert labeler.license == f"apache-2.0 ({folders('owlv2')}), apache-2.0 ({folders('sam')})"
    dataset = load_dataset_rows(folder)
    image = dataset.load_image(0)
    proposals = labeler([image])[0]
    boxes = labeler.detector([image], 0.3)[0]
    assert 0 < len(proposals) <= len(boxes.scores)
    assert set(proposals.confidences.tolist()) <= set(boxes.scores.tolist())
    label_images(dataset, labeler, None, tmp_path / "labels", progress=False, batch_size=2, min_confidence=0.6)
    header = json.loads((tmp_path / "labels" / "header.json").read_text())
    assert header["settings"]["detector"] == folders("owlv2") and header["settings"]["threshold"] == 0.3
    confidences = [c for row in load_dataset_rows(tmp_path / "labels").rows for c in stored(tmp_path, row)]
    assert confidences and min(confidences) >= 0.6


def stored(tmp_path, row):
    lines = [line for file in (tmp_path / "labels").glob("rows-*.jsonl") for line in file.read_text().splitlines()]
    found = next(json.loads(line) for line in lines if json.loads(line)["image_id"] == row["image_id"])
    return found["objects"]["confidence"]


def image_dir(tmp_path, count):
    (tmp_path / "images").mkdir()
    for k, image in enumerate(pictures(*[(80, 60)] * count)):
        image.save(tmp_path / "images" / f"{k}.png")
    return tmp_path / "images"


def boxes_json(tmp_path, annotations, **more):
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 80, "height": 60} for k in range(2)],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "bear"}, {"id": 7, "name": "deer"}],
    }
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content | more))
    return path


def test_boxes_from_a_person_become_masks_with_their_names(folders, tmp_path):
    folder = image_dir(tmp_path, 3)
    path = boxes_json(
        tmp_path,
        [
            {"id": 1, "image_id": 0, "category_id": 7, "bbox": [5, 5, 35, 35], "iscrowd": 0},
            {"id": 2, "image_id": 0, "category_id": 3, "bbox": [60, 40, 40, 40]},  # leaves the image
            {"id": 3, "image_id": 0, "category_id": 3, "bbox": [100, 100, 10, 10]},  # lies outside
            {"id": 4, "image_id": 0, "category_id": 3, "bbox": [10, 10, 0, 10]},  # has no area
            {"id": 5, "image_id": 0, "category_id": 3, "bbox": [1, 1, 30, 30], "iscrowd": 1},
        ],
    )
    labeler = BoxesLabeler(folders("sam"), boxes=path, mask_nms=1.0)
    assert labeler.vocabulary == ["bear", "deer"]
    dataset = load_dataset_rows(folder)
    image = dataset.load_image(0)
    proposals = labeler([image, dataset.load_image(1)], dataset.rows[:2])
    expected, _ = BoxSegmenter(folders("sam"))([image], [np.array([[5, 5, 40, 40], [60, 40, 80, 60]])])[0]
    assert sorted(proposals[0].labels.tolist()) == [0, 1] and len(proposals[1]) == 0
    for mask, label in zip(proposals[0].masks, proposals[0].labels):
        assert np.array_equal(mask, expected[0 if label == 1 else 1])
    assert [note for note in labeler.notes if note.startswith("2 boxes lie outside")]
    assert [note for note in labeler.notes if note.startswith("1 images have no box")]
    summary = label_images(dataset, labeler, None, tmp_path / "labels", progress=False)
    assert (summary.done, summary.failed) == (2, 1)  # 2.png is not in the file
    with pytest.raises(DataError, match=r"2\.png: is not in .*boxes\.json"):
        labeler([image], [dataset.rows[2]])


def test_lists_of_boxes_and_stores_are_read_too(folders, tmp_path):
    folder = image_dir(tmp_path, 2)
    path = tmp_path / "list.json"
    entries = [{"image_id": "1.png", "category_id": 7, "bbox": [5, 5, 30, 30], "score": score} for score in (0.2, 0.9)]
    path.write_text(json.dumps(entries))
    (tmp_path / "names.json").write_text(json.dumps({"categories": [{"id": 7, "name": "deer"}]}))
    labeler = BoxesLabeler(folders("sam"), boxes=path, categories=str(tmp_path / "names.json"), threshold=0.5)
    dataset = load_dataset_rows(folder)
    found = labeler([dataset.load_image(k) for k in range(2)], dataset.rows)
    assert [len(p) for p in found] == [0, 1] and labeler.vocabulary == ["deer"]
    assert found[1].confidences.tolist() == pytest.approx([0.9])
    label_images(dataset, labeler, None, tmp_path / "labels", progress=False)
    again = BoxesLabeler(folders("sam"), boxes=tmp_path / "labels")
    assert [len(p) for p in again([dataset.load_image(k) for k in range(2)], dataset.rows)] == [0, 1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 0, "category_id": 3}, "entry 0: has no 'bbox'"),
        ({"image_id": 0, "category_id": 3, "bbox": [1, 2, 3]}, "four finite numbers"),
        ({"image_id": 0, "category_id": 3, "bbox": [1, 2, 3, None]}, "four finite numbers"),
        ({"image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 7}, "from 0 to 1, got 7"),
        ({"image_id": 9, "category_id": 3, "bbox": [1, 2, 3, 4]}, "image 9, which the file does not list"),
        ({"image_id": 0, "category_id": 4, "bbox": [1, 2, 3, 4]}, "names no category 4"),
    ],
)
def test_faults_of_a_boxes_file_are_named(tmp_path, entry, message):
    with pytest.raises(DataError, match=message):
        read_boxes(boxes_json(tmp_path, [entry]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"images": [{"id": 0}]}, "image 0: has no 'file_name'"),
        ({"annotations": 3}, "annotations are no list but int"),
    ],
)
def test_other_faults_of_a_boxes_file_are_named(tmp_path, more, message):
    with pytest.raises(DataError, match=message):
        read_boxes(boxes_json(tmp_path, **{"annotations": []} | more))


def test_a_boxes_file_need_not_know_the_sizes_of_its_images(folders, tmp_path):
    folder = image_dir(tmp_path, 1)
    entry = {"image_id": 4, "category_id": 3, "bbox": [5, 5, 35, 35]}
    path = boxes_json(tmp_path, [entry], images=[{"id": 4, "file_name": "0.png", "width": None}])
    dataset = load_dataset_rows(folder)
    assert len(BoxesLabeler(folders("sam"), boxes=path)([dataset.load_image(0)], dataset.rows)[0]) == 1


def test_a_detector_that_finds_nothing(folders, tmp_path):
    folder = image_dir(tmp_path, 3)
    labeler = BoxesLabeler(folders("sam"), detector=folders("omdet-turbo"), entries=["bear"], threshold=1.0)
    summary = label_images(load_dataset_rows(folder), labeler, None, tmp_path / "labels", progress=False)
    assert (summary.done, summary.instances) == (3, 0)
    assert labeler.notes == ["3 images have no box and got no masks"]


def test_boxes_that_repeat_a_better_one_are_dropped_whatever_their_class(folders, tmp_path):
    folder = image_dir(tmp_path, 1)
    rng = np.random.default_rng(3)
    corners = rng.uniform(0, 30, (12, 2))
    annotations = [
        {"image_id": 0, "category_id": 3 + 4 * (k % 2), "bbox": [*corners[k], *rng.uniform(20, 30, 2)], "score": k / 12}
        for k in range(12)
    ]
    labeler = BoxesLabeler(folders("sam"), boxes=boxes_json(tmp_path, annotations), box_nms=0.4, mask_nms=1.0)
    dataset = load_dataset_rows(folder)
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in annotations)])
    kept = nms(boxes.float(), torch.tensor([entry["score"] for entry in annotations]), 0.4).tolist()
    found = labeler([dataset.load_image(0)], dataset.rows)[0]
    assert 1 < len(kept) < 12
    assert sorted(found.confidences.tolist()) == pytest.approx(sorted(k / 12 for k in kept))


def test_examples_alone_tell_owlv2_what_to_find(folders, tmp_path):
    folder = image_dir(tmp_path, 3)
    mask = np.zeros((1, 60, 80), dtype=bool)
    mask[0, 10:40, 20:60] = True
    objects = {"segmentation": encode_masks(mask), "category_id": [2], "bbox": [[20, 10, 40, 30]], "area": [1200]}
    objects |= {"iscrowd": [0], "score": [1.0]}
    row = {"image": str(folder / "0.png"), "image_id": 0, "file_name": "0.png", "width": 80, "height": 60}
    few = InstanceDataset([row | {"objects": objects}], [{"id": 2, "name": "gizmo"}], "few")
    labeler = BoxesLabeler(folders("sam"), detector=folders("owlv2"), examples=few, threshold=0.0)
    assert labeler.vocabulary == ["gizmo"] and "examples" in labeler.settings
    found = labeler([Image.open(folder / "1.png").convert("RGB")])[0]
    assert len(found) > 0 and set(found.labels.tolist()) == {0}
    both = BoxesLabeler(folders("sam"), detector=folders("owlv2"), entries=["bear"], examples=few)
    assert both.vocabulary == ["bear", "gizmo"]


def test_runs_are_resumed_to_the_byte(folders, tmp_path):
    folder = image_dir(tmp_path, 6)

    def run(output, limit=None):
        labeler = BoxesLabeler(
            folders("sam"), detector=folders("grounding-dino"), entries=["bear", "deer"], threshold=0
        )
        options = {"batch_size": 2, "shard_size": 2, "progress": False, "limit": limit}
        label_images(load_dataset_rows(folder), labeler, None, output, **options)
        return [line for file in sorted(output.glob("rows-*.jsonl")) for line in file.read_text().splitlines()]

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", limit=2)
    assert run(tmp_path / "parts") == whole and len(whole) == 6
