"""SAM 3 masks what words name. A tiny random model of transformers' own class."""

import json

import numpy as np
import prompt_models
import pytest
import torch
from test_boxes_labeler import image_dir, pictures

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.labeling import label_images
from uplvp_hf.labeling.labelers import concept
from uplvp_hf.labeling.labelers.concept import ConceptLabeler
from uplvp_hf.models.errors import UserError

IMAGES = pictures((80, 60), (90, 50))
ALL = {"threshold": 0.0, "mask_nms": 1.0, "top": 1000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prompt_models.sam3(tmp_path_factory.mktemp("sam3"))


def equal(first, second, order=None):
    for a, b in zip(first, second, strict=True):
        labels = a.labels if order is None else np.asarray(order)[a.labels]
        assert len(a) == len(b) > 0
        keys = [np.lexsort((p.masks.sum(axis=(1, 2)), p.scores)) for p in (a, b)]
        assert np.allclose(a.scores[keys[0]], b.scores[keys[1]], atol=1e-5)
        assert labels[keys[0]].tolist() == b.labels[keys[1]].tolist()
        assert (a.masks[keys[0]] == b.masks[keys[1]]).mean() > 0.999


def test_scores_and_masks_equal_transformers_own(folder):
    labeler = ConceptLabeler(folder, ["bear", "deer"], **ALL)
    assert labeler.license == "apache-2.0"
    for image, found in zip(IMAGES, labeler(IMAGES)):
        count = 0
        for label, phrase in enumerate(("bear", "deer")):
            inputs = labeler.processor.image_processor(images=image, return_tensors="pt")
            text = labeler.processor.tokenizer(phrase, padding="max_length", max_length=16, return_tensors="pt")
            with torch.inference_mode():
                output = labeler.model(
                    pixel_values=inputs["pixel_values"],
                    input_ids=text["input_ids"],
                    attention_mask=text["attention_mask"],
                )
            expected = labeler.processor.post_process_instance_segmentation(
                output, threshold=0.0, mask_threshold=0.5, target_sizes=[(image.height, image.width)]
            )[0]
            assert torch.allclose(
                expected["scores"], (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0], atol=1e-6
            )
            filled = expected["masks"].flatten(1).any(dim=1)
            own = np.flatnonzero(found.labels == label)
            order = expected["scores"][filled].argsort(descending=True)
            assert found.scores[own].tolist() == pytest.approx(expected["scores"][filled][order].tolist(), abs=1e-5)
            masks = expected["masks"][filled][order].bool().numpy()
            assert (found.masks[own] == masks).mean() > 0.999
            count += len(own)
        assert count == len(found) > 0


def test_single_images_and_batches_and_chunks_of_phrases_are_equal(folder):
    entries = ["bear, grizzly", "deer", "sky"]
    whole = ConceptLabeler(folder, entries, **ALL)
    together = whole(IMAGES)
    equal(together, [whole([image])[0] for image in IMAGES])
    equal(together, ConceptLabeler(folder, entries, phrases_per_pass=1, **ALL)(IMAGES))


def test_the_order_of_classes_does_not_matter(folder):
    first = ConceptLabeler(folder, ["bear, grizzly", "deer", "sky"], **ALL)(IMAGES)
    second = ConceptLabeler(folder, ["sky", "bear, grizzly", "deer"], **ALL)(IMAGES)
    equal(first, second, order=[1, 2, 0])


def test_a_mask_found_by_several_phrases_is_kept_once_under_the_best(folder):
    alone = ConceptLabeler(folder, ["bear"], threshold=0.0, mask_nms=0.9)
    doubled = ConceptLabeler(folder, ["bear", "bear"], threshold=0.0, mask_nms=0.9)
    assert [len(p) for p in doubled(IMAGES)] == [len(p) for p in alone(IMAGES)]
    assert alone.vocabulary == ["bear"]


def test_no_more_masks_are_held_than_are_needed(folder, monkeypatch):
    monkeypatch.setattr(concept, "MASK_BYTES", 1)  # one mask at a time at full size
    few = ConceptLabeler(folder, ["bear", "deer", "sky"], threshold=0.0, mask_nms=1.0, top=2, phrases_per_pass=1)
    every = ConceptLabeler(folder, ["bear", "deer", "sky"], **ALL)
    for a, b in zip(few(IMAGES), every(IMAGES)):
        assert a.scores.tolist() == pytest.approx(b.scores[:2].tolist(), abs=1e-6)


def test_nothing_found_is_an_image_without_masks(folder, tmp_path):
    images = load_dataset_rows(image_dir(tmp_path, 3))
    labeler = ConceptLabeler(folder, ["bear", "deer"], threshold=1.0)
    summary = label_images(images, labeler, None, tmp_path / "labels", progress=False)
    assert (summary.done, summary.instances, summary.failed) == (3, 0, 0)
    header = json.loads((tmp_path / "labels" / "header.json").read_text())
    assert header["vocabulary"] == ["bear", "deer"] and header["license"] == "apache-2.0"
    assert header["settings"]["entries"] == ["bear", "deer"] and header["settings"]["threshold"] == 1.0


def test_text_is_read_once_a_run_and_an_image_once(folder, monkeypatch):
    labeler = ConceptLabeler(folder, ["bear", "deer", "sky"], threshold=0.0, phrases_per_pass=1)
    calls = []

    def counted(name):
        own = getattr(labeler.model, name)
        return lambda *args, **kwargs: (calls.append(name), own(*args, **kwargs))[1]

    for name in ("get_vision_features", "get_text_features"):
        monkeypatch.setattr(labeler.model, name, counted(name))
    labeler(IMAGES)
    assert calls == ["get_vision_features"] * 2


def test_what_is_no_sam_3_or_has_no_words_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="needs a vocabulary"):
        ConceptLabeler(folder, [])
    with pytest.raises(UserError, match="is a sam model, which masks no words"):
        ConceptLabeler(prompt_models.sam(tmp_path), ["bear"])


def test_runs_are_resumed_to_the_byte(folder, tmp_path):
    images = load_dataset_rows(image_dir(tmp_path, 6))

    def run(output, limit=None):
        labeler = ConceptLabeler(folder, ["bear", "deer"], threshold=0.0)
        options = {"batch_size": 2, "shard_size": 2, "progress": False, "limit": limit}
        label_images(images, labeler, None, output, **options)
        return [line for file in sorted(output.glob("rows-*.jsonl")) for line in file.read_text().splitlines()]

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", limit=2)
    assert run(tmp_path / "parts") == whole and len(whole) == 6
