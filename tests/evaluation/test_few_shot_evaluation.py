"""Protocols of few-shot evaluation on detections that are known, and supports of a model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from uplvp_hf.commands import evaluate as evaluate_command, fewshot as fewshot_command
from uplvp_hf.data import InstanceDataset, encode_mask, load_dataset_rows
from uplvp_hf.data.dataset import empty_objects
from uplvp_hf.data.supports import draw_supports
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.evaluation.few_shot import ASKS, Asking, add_supports, evaluate_few_shot, fit_scores, use_supports
from uplvp_hf.evaluation.few_shot_table import Questions, few_shot_rows, few_shot_table
from uplvp_hf.evaluation.predictor import evaluate_model
from uplvp_hf.models.configuration_few_shot import UplvpFewShotConfig
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.modeling_few_shot import UplvpForFewShotSegmentation

NAMES = ["airplane", "cat", "couch"]
CATEGORIES = [{"id": 5, "name": "aeroplane"}, {"id": 8, "name": "cat"}, {"id": 18, "name": "sofa"}]


def square(place: int) -> dict:
    mask = np.zeros((20, 60), dtype=bool)
    mask[5:15, 12 * place : 12 * place + 10] = True
    return encode_mask(mask)


def image(number: int, *category_ids: int) -> dict:
    row = {"image": f"{number}.png", "image_id": number, "file_name": f"{number}.png", "width": 60, "height": 20}
    objects = empty_objects()
    for place, category_id in enumerate(category_ids):
        values = {"segmentation": square(place), "category_id": category_id, "bbox": [12 * place, 5, 10, 10]}
        for key, value in {**values, "area": 100.0, "iscrowd": 0, "score": 1.0}.items():
            objects[key].append(value)
    return {**row, "objects": objects}


@pytest.fixture
def known():
    """Four images, and detections: every object of every image for every class, its own first where sure."""
    dataset = InstanceDataset([image(1, 5, 8), image(2, 8), image(3, 18, 5), image(4, 5)], CATEGORIES, "voc")
    rng = np.random.default_rng(0)
    pairs = []
    for row in dataset.rows:
        scores, labels, masks = [], [], []
        for place, category_id in enumerate(row["objects"]["category_id"]):
            for label, own in enumerate((5, 8, 18)):
                scores.append(float(rng.uniform(0.3, 0.9) + (0.25 if own == category_id else 0.0)))
                labels.append(label)
                masks.append(square(place))
        order = np.argsort(scores)[::-1]
        result = {"scores": torch.tensor(scores)[order.copy()], "labels": torch.tensor(labels)[order.copy()]}
        pairs.append((row, result | {"rle": [masks[place] for place in order], "boxes": torch.zeros(len(order), 4)}))
    config = SimpleNamespace(id2label=dict(enumerate(c["name"] for c in CATEGORIES)), category_ids=[5, 8, 18])
    return SimpleNamespace(config=config), dataset, pairs


def measured(known, asking: Asking) -> dict:
    model, dataset, pairs = known
    return evaluate_model(model, None, dataset, views=asking.views([5, 8, 18]), pairs=pairs, progress=False)


def test_asking_for_what_is_there_cannot_be_worse(known):
    plain = evaluate_model(known[0], None, known[1], pairs=known[2], progress=False)
    asked = {ask: measured(known, Asking(ask)) for ask in ASKS}
    assert asked["open"]["AP"] == plain["AP"] < asked["present"]["AP"]
    for name, value in asked["present"]["per_class"].items():
        assert value >= asked["open"]["per_class"][name]
    # One way: an image of its own for each of its classes, so that what is seen of a class is the same.
    assert asked["episodes"]["AP"] == pytest.approx(asked["present"]["AP"])
    assert asked["episodes"]["num_instances"] == 6


def test_more_ways_bring_false_positives(known):
    three = measured(known, Asking("episodes", ways=3))
    assert three["AP"] < measured(known, Asking("episodes", ways=1))["AP"]
    assert three["num_instances"] == 10  # the objects of all classes, once for each class of the image
    views = Asking("episodes", ways=2, seed=1).views([5, 8, 18])
    pairs = known[2]
    seen = list(views(*pairs[0]))
    assert [row["image_id"] for row, _ in seen] == ["1:5", "1:8"]
    assert all(len(set(result["labels"].tolist())) == 2 for _, result in seen)
    assert [result["labels"].tolist() for _, result in views(*pairs[0])] == [one["labels"].tolist() for _, one in seen]


def test_wrong_questions_are_refused():
    with pytest.raises(UserError, match=r"ask must be one of open, present, episodes"):
        Asking("all")
    with pytest.raises(UserError, match=r"above 1 with `episodes` only"):
        Asking("present", ways=3)
    with pytest.raises(UserError, match=r"4 ways need as many classes, the model has 3"):
        Asking("episodes", ways=4).views([5, 8, 18])
    assert evaluate_command.ASKS == fewshot_command.ASKS == ASKS


# ---- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = write_scenes(tmp_path_factory.mktemp("few") / "scenes", count=24, seed=1, size=64)
    return load_dataset_rows(folder)


@pytest.fixture
def model(tiny_segmenter):
    torch.manual_seed(0)
    return UplvpForFewShotSegmentation(UplvpFewShotConfig(segmenter_config=tiny_segmenter("resnet"))).eval()


@pytest.fixture(scope="module")
def processor():
    return UplvpImageProcessor(size={"longest_edge": 64})


def names_of(dataset, least: int = 6) -> list[str]:
    counts = {
        c["name"]: sum(row["objects"]["category_id"].count(c["id"]) for row in dataset.rows) for c in dataset.categories
    }
    return [name for name, count in counts.items() if count >= least]


def test_supports_are_means_and_wrong_ones_are_those_of_others(model, processor, scenes):
    supports = draw_supports(scenes, names_of(scenes)[:3], 2)
    use_supports(model, processor, supports)
    right = model.supports.clone()
    assert model.config.id2label == dict(enumerate(supports.names)) and model.config.support_counts == [2, 2, 2]
    for label, found in enumerate(supports.entries.values()):
        single = []
        for row, k in found:
            inputs = processor(scenes.load_image(row), return_tensors="pt")
            mask = torch.from_numpy(scenes.mask(row, k))[None]  # scenes are as large as the model's input
            with torch.no_grad():
                single.append(model.encode_support(inputs["pixel_values"], mask)[0])
        torch.testing.assert_close(right[label], torch.stack(single).mean(0), rtol=1e-4, atol=1e-5)
    use_supports(model, processor, supports, wrong=3)
    assert model.config.id2label == dict(enumerate(supports.names))
    assert sorted(map(tuple, model.supports.tolist())) == sorted(map(tuple, right.tolist()))
    assert not any(torch.equal(a, b) for a, b in zip(model.supports, right, strict=True))
    with pytest.raises(UserError, match=r"give at least two classes"):
        use_supports(model, processor, supports.only(supports.names[:1]), wrong=0)


def test_classes_are_added_to_those_that_are_there(model, processor, scenes):
    names = names_of(scenes)[:3]
    supports = draw_supports(scenes, names, 1)
    use_supports(model, processor, supports)
    together = model.supports.clone()
    use_supports(model, processor, supports.only(names[:2]))
    add_supports(model, processor, supports.only(names[2:]))
    assert list(model.config.id2label.values()) == names and torch.equal(model.supports, together)
    with pytest.raises(UserError, match=r"already: remove it first"):
        add_supports(model, processor, supports.only(names[:1]))


def test_scores_are_fitted_on_base_classes(model, processor, scenes):
    before = (model.config.similarity_midpoint, model.config.similarity_temperature)
    fit_scores(model, processor, scenes)
    assert (model.config.similarity_midpoint, model.config.similarity_temperature) != before
    assert not model.support_mean.mean.any()  # of a prompted model, training decides
    model.config.conditioning = "prototype"
    fit_scores(model, processor, scenes)
    assert model.support_mean.mean.any() and -1 < model.config.similarity_midpoint < 1


def test_rows_say_what_was_asked(model, processor, scenes):
    names = names_of(scenes)[:3]
    pool, val = scenes.subset(range(20)), scenes.subset(range(20, 24))
    questions = Questions(
        names, "novel", (1,), (0, 1), (Asking("open"), Asking("episodes", ways=2)), record={"model": "x"}
    )
    rows = list(few_shot_rows(model, processor, pool, val, questions))
    assert len(rows) == 2 * 2 * 2
    said = ("model", "conditioning", "protocol", "ways", "part", "shots", "seed", "supports", "supports_hash")
    assert len({tuple(row[key] for key in said) for row in rows}) == 8
    for row in rows:
        row["metrics"] = {"AP": {"right": 0.3, "wrong": 0.1}[row["supports"]] + 0.02 * row["seed"], "AP50": 0.5}
    table = few_shot_table(rows).splitlines()
    assert table[0] == "| model | asked | classes | K = 1, right | K = 1, wrong | seeds |"
    assert table[2] == "| x | open | novel | **31.0 (1.4) / 50.0 (0.0)** | 11.0 (1.4) / 50.0 (0.0) | 2 |"
    assert table[3].startswith("| x | 2-way episodes | novel |")


def test_other_classes_do_not_count_and_names_are_matched(model, processor, scenes):
    names = names_of(scenes)[:2]
    use_supports(model, processor, draw_supports(scenes, names, 1))
    (metrics,) = evaluate_few_shot(model, processor, scenes.subset(range(4)), progress=False)
    assert set(metrics["per_class"]) == set(names) and (metrics["protocol"], metrics["shots"]) == ("open", 1)
    own = {c["id"] for c in scenes.categories if c["name"] in names}
    assert metrics["num_instances"] == sum(
        id_ in own for row in scenes.rows[:4] for id_ in row["objects"]["category_id"]
    )
    model.set_supports([], model.supports[:0])
    with pytest.raises(UserError, match=r"The model has no supports"):
        evaluate_few_shot(model, processor, scenes)
