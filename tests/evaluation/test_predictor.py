"""Prediction over a dataset, with an oracle in the place of the model."""

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from uplvp_hf.data import DataError, InstanceDataset, load_dataset_rows
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.evaluation import evaluate_model, match_category_ids, predict_dataset, to_coco_results
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor


class Oracle(torch.nn.Module):
    """Answers with the annotations of the dataset, in its order; scores fall with the size of the object."""

    def __init__(self, dataset, category_ids=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dataset, self.position = dataset, 0
        self.config = SimpleNamespace(id2label=dataset.id2label, category_ids=category_ids or dataset.category_ids)

    def forward(self, pixel_values, pixel_mask):
        batch, _, height, width = pixel_values.shape
        class_logits = torch.zeros(batch, 12, len(self.config.id2label) + 1)
        class_logits[..., -1] = 20
        mask_logits = torch.full((batch, 12, height // 4, width // 4), -20.0)
        for b in range(batch):
            index, self.position = self.position, self.position + 1
            h, w = int(pixel_mask[b, :, 0].sum()), int(pixel_mask[b, 0].sum())
            for k, category in enumerate(self.dataset[index]["objects"]["category_id"]):
                mask = torch.from_numpy(self.dataset.mask(index, k)).float()[None, None]
                canvas = torch.zeros(1, 1, height, width)
                canvas[..., :h, :w] = torch.nn.functional.interpolate(mask, (h, w), mode="bilinear")
                mask_logits[b, k] = torch.nn.functional.avg_pool2d(canvas * 40 - 20, 4)[0, 0]
                class_logits[b, k, self.dataset.category_ids.index(category)] = 25 + k
        return SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = write_scenes(tmp_path_factory.mktemp("scenes"), count=7, seed=0, size=96)
    return load_dataset_rows(folder)


@pytest.fixture
def processor():
    return UplvpImageProcessor(size={"longest_edge": 192})


def truncated(dataset, index, folder):
    """The dataset with one image cut off in the middle."""
    rows = [copy.copy(row) for row in dataset.rows]
    content = Path(rows[index]["image"]).read_bytes()
    file = folder / "cut.png"
    file.write_bytes(content[: len(content) // 2])
    rows[index] |= {"image": str(file), "file_name": "cut.png"}
    result = dataset.subset(range(len(dataset)))
    result.rows = rows
    return result


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_oracle_has_almost_perfect_ap(dataset, processor, batch_size):
    model = Oracle(dataset).train()
    metrics = evaluate_model(model, processor, dataset, batch_size=batch_size, progress=False)
    assert metrics["AP50"] > 0.99 and metrics["AP"] > 0.9
    assert metrics["num_images"] == 7 and metrics["failures"] == []
    assert metrics["num_instances"] == sum(len(row["objects"]["category_id"]) for row in dataset.rows)
    present = {c for row in dataset.rows for c in row["objects"]["category_id"]}
    names = {category["name"]: category["id"] for category in dataset.categories}
    assert set(metrics["per_class"]) == set(names)
    assert all((ap is not None) == (names[name] in present) for name, ap in metrics["per_class"].items())
    assert model.training


def test_results_come_in_order_in_original_pixels(dataset, processor):
    pairs = list(predict_dataset(Oracle(dataset), processor, dataset, batch_size=2, threshold=0.5, progress=False))
    assert [row["image_id"] for row, _ in pairs] == [row["image_id"] for row in dataset.rows]
    for row, result in pairs:
        assert all(rle["size"] == [row["height"], row["width"]] for rle in result["rle"])
        assert len(result["rle"]) == len(row["objects"]["category_id"])
        for entry in to_coco_results(row, result, dataset.category_ids):
            assert entry["category_id"] in row["objects"]["category_id"]
            np.testing.assert_allclose(entry["bbox"], coco_mask.toBbox(entry["segmentation"]))
            assert entry["image_id"] == row["image_id"] and isinstance(entry["score"], float)


def test_undecodable_image_is_left_out_and_listed(dataset, processor, tmp_path):
    broken = truncated(dataset, 2, tmp_path)
    failures = []
    whole = broken.subset([i for i in range(len(broken)) if i != 2])
    pairs = list(predict_dataset(Oracle(whole), processor, broken, 3, progress=False, failures=failures))
    assert [row["image_id"] for row, _ in pairs] == [row["image_id"] for row in whole.rows]
    assert [(Path(entry["file"]).name, entry["row"]) for entry in failures] == [("cut.png", "row 2")]
    metrics = evaluate_model(Oracle(whole), processor, broken, progress=False)
    assert metrics["num_images"] == 6 and metrics["AP50"] > 0.99 and len(metrics["failures"]) == 1
    only = broken.subset([2])
    with pytest.raises(DataError, match="none of the 1 images can be decoded"):
        evaluate_model(Oracle(only), processor, only, progress=False)


class Small(Oracle):
    """A machine that has memory for `batch` images, and none for the one of `faulty`."""

    def forward(self, pixel_values, pixel_mask):
        if len(pixel_values) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
        if self.position == self.faulty:
            self.position += 1
            raise MemoryError
        return super().forward(pixel_values, pixel_mask)


def test_an_image_that_needs_too_much_memory_is_left_out(dataset, processor):
    model = Small(dataset)
    model.faulty = 2
    metrics = evaluate_model(model, processor, dataset, batch_size=4, progress=False)
    assert metrics["num_images"] == 6 and metrics["AP50"] > 0.99
    (failure,) = metrics["failures"]
    assert failure["row"] == "row 2" and "not enough memory" in failure["reason"]


def test_an_image_that_the_processor_refuses_is_left_out(dataset, tmp_path):
    """A setting of the checkpoint that one image exceeds is no reason to lose the others."""
    rows = [copy.copy(row) for row in dataset.rows]
    large = dataset.load_image(1).resize((400, 400))
    rows[1] |= {"image": large, "width": 400, "height": 400, "objects": rows[1]["objects"] | {}}
    failures, limited = [], UplvpImageProcessor(size={"longest_edge": 192}, max_pixels=150_000)
    whole = dataset.subset([0, *range(2, 7)])
    mixed = InstanceDataset(rows, dataset.categories)
    pairs = list(predict_dataset(Oracle(whole), limited, mixed, progress=False, failures=failures))
    assert len(pairs) == 6 and failures[0]["row"] == "row 1" and "max_pixels=150000" in failures[0]["reason"]


def test_other_errors_are_raised(dataset, processor):
    class Faulty(Oracle):
        def forward(self, pixel_values, pixel_mask):
            raise RuntimeError("a fault of the model")

    with pytest.raises(RuntimeError, match="a fault of the model"):
        list(predict_dataset(Faulty(dataset), processor, dataset, progress=False))


def named(dataset, names):
    categories = [{"id": 10 + k, "name": name} for k, name in enumerate(names)]
    return InstanceDataset(dataset.rows, categories)


def test_names_that_differ_in_case_alone_are_not_swapped(dataset):
    config = SimpleNamespace(id2label={0: "Cat", 1: "cat", 2: "Dog"})
    assert match_category_ids(config, named(dataset, ["Cat", "cat", "Dog"])) == [10, 11, 12]
    assert match_category_ids(config, named(dataset, ["cat", "dog", "Cat"])) == [12, 10, 11]
    assert match_category_ids(config, named(dataset, ["dog", "CAT", "Cat"])) == [12, 11, 10]
    with pytest.raises(DataError, match="the model has 3 classes"):  # which is which?
        match_category_ids(config, named(dataset, ["CAT", "cAT", "dog"]))


def test_classes_are_matched_by_name(dataset):
    names = [category["name"] for category in dataset.categories]
    config = SimpleNamespace(id2label={i: name.upper() for i, name in enumerate(reversed(names))})
    assert match_category_ids(config, dataset) == list(reversed(dataset.category_ids))
    config = SimpleNamespace(id2label={0: "unicorn", 1: "griffin"})
    with pytest.raises(DataError) as error:
        match_category_ids(config, dataset)
    assert "2 classes [unicorn, griffin]" in str(error.value)
    assert f"{len(names)} [{names[0]}" in str(error.value)


def test_class_agnostic_ignores_the_classes(dataset, processor):
    model = Oracle(dataset)
    model.config.id2label = {index: f"thing {index}" for index in range(len(dataset.categories))}
    with pytest.raises(DataError, match="thing 0"):
        evaluate_model(model, processor, dataset, progress=False)
    metrics = evaluate_model(model, processor, dataset, class_agnostic=True, progress=False)
    assert metrics["AP50"] > 0.99 and metrics["per_class"] == {}


def test_nothing_annotated(dataset, processor):
    with pytest.raises(DataError, match="none of the 7 images is annotated"):
        evaluate_model(Oracle(dataset), processor, dataset.unlabeled(), progress=False)


def test_cityscapes_reads_the_void_of_the_rows(dataset, processor):
    options = {"metric": "cityscapes", "progress": False, "details": True}
    with pytest.warns(UserWarning, match="No row has a `void`"):
        plain = evaluate_model(Oracle(dataset), processor, dataset, **options)
    assert plain["AP50"] > 0.99 and plain["details"]["curves"] is None
    lost = copy.copy(dataset)  # one object is not annotated: its detection is false, unless it lies on void
    lost.rows = [copy.deepcopy(row) for row in dataset.rows]
    objects = lost.rows[0]["objects"]
    gone = {key: values.pop() for key, values in objects.items()}
    with pytest.warns(UserWarning, match="No row has a `void`"):
        worse = evaluate_model(Oracle(dataset), processor, lost, **options)
    lost.rows[0]["void"] = [gone["segmentation"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same = evaluate_model(Oracle(dataset), processor, lost, **options)
    name = dataset.id2label[dataset.category_ids.index(gone["category_id"])]
    assert worse["per_class"][name] < same["per_class"][name]
    counted = {row["name"]: row["annotations"] for row in same["details"]["classes"]}
    assert sum(counted.values()) == plain["num_instances"] - 1 == same["num_instances"]
