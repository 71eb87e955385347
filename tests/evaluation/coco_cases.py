"""Random images for evaluators, and pycocotools' numbers for them."""

import contextlib
import io

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = ["AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L"]
CATEGORIES = [3, 17, 44, 90]  # sparse; 90 has no annotation


def random_rle(generator, height, width, box=None):
    mask = np.zeros((height, width), dtype=np.uint8)
    if box is None:
        h, w = generator.integers(4, height), generator.integers(4, width)
        y, x = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
        box = [y, x, h, w]
    y, x, h, w = box
    mask[y : y + h, x : x + w] = generator.random((h, w)) < 0.9
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [height, width], "counts": rle["counts"].decode()}, box


def random_data(seed, images=40, many=False):
    """Pairs for the metric. Scores have two digits, so that many are equal; half the detections are near an object."""
    generator = np.random.default_rng(seed)
    pairs = []
    for image_id in generator.permutation(np.arange(images) * 7 + 2).tolist():
        height, width = generator.integers(40, 200, 2).tolist()
        boxes, reference = [], {"image_id": image_id, "category_id": [], "segmentation": [], "iscrowd": [], "area": []}
        for _ in range(generator.integers(0, 7)):
            rle, box = random_rle(generator, height, width)
            category = int(generator.choice(CATEGORIES[:3]))
            boxes.append((box, category))
            reference["category_id"].append(category)
            reference["segmentation"].append(rle)
            reference["iscrowd"].append(int(generator.random() < 0.15))
            reference["area"].append(float(coco_mask.area(rle)) * generator.uniform(0.8, 1.2))
        prediction = {"image_id": image_id, "scores": [], "labels": [], "rle": []}
        for _ in range(generator.integers(0, 260 if many else 14)):
            box, category = None, int(generator.choice(CATEGORIES))
            if boxes and generator.random() < 0.6:
                (y, x, h, w), near = boxes[generator.integers(len(boxes))]
                category = near if generator.random() < 0.9 else category
                box = [y, x, max(1, h - generator.integers(0, 3)), max(1, w - generator.integers(0, 3))]
            prediction["rle"].append(random_rle(generator, height, width, box)[0])
            prediction["labels"].append(category)
            prediction["scores"].append(round(float(generator.random()), 2))
        pairs.append((prediction, reference))
    return pairs


def pycocotools_stats(pairs, class_agnostic=False):
    """The 12 numbers and AP by category, through the public interface only."""
    annotations, results = [], []
    for prediction, reference in pairs:
        keys = ("category_id", "segmentation", "iscrowd", "area")
        for values in zip(*(reference[key] for key in keys)):
            annotations.append(dict(zip(keys, values), image_id=reference["image_id"], id=len(annotations) + 1))
        for score, label, rle in zip(prediction["scores"], prediction["labels"], prediction["rle"]):
            results.append(
                {"image_id": prediction["image_id"], "category_id": label, "segmentation": dict(rle), "score": score}
            )
    truth = COCO()
    truth.dataset = {
        "images": [{"id": reference["image_id"], "height": 1, "width": 1} for _, reference in pairs],
        "annotations": [dict(annotation, segmentation=dict(annotation["segmentation"])) for annotation in annotations],
        "categories": [{"id": category, "name": str(category)} for category in CATEGORIES],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), "segm")
        evaluator.params.useCats = int(not class_agnostic)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    per_class = {}
    if not class_agnostic:
        for index, category in enumerate(CATEGORIES):
            values = evaluator.eval["precision"][:, :, index, 0, 2]
            per_class[category] = float(np.mean(values[values > -1])) if (values > -1).any() else None
    return evaluator.stats, per_class


def hard_data(seed, images=20):
    """As `random_data`, with what evaluators differ over: many equal scores, the same mask several times as annotation
    and as detection, more than 100 detections of one class, empty masks, areas at the edges of the ranges, images of
    crowds only, detections without annotations and the reverse."""
    generator = np.random.default_rng(seed)
    pairs = random_data(seed, images)
    for number, (prediction, reference) in enumerate(pairs):
        size = next((rle["size"] for rle in (*reference["segmentation"], *prediction["rle"])), [60, 80])
        prediction["scores"] = [round(score, 1) for score in prediction["scores"]]
        for _ in range(min(2, len(reference["segmentation"]))):  # duplicates of an annotation, also in another class
            k = int(generator.integers(len(reference["segmentation"])))
            for key in ("segmentation", "area"):
                reference[key].append(reference[key][k])
            reference["category_id"].append(int(generator.choice(CATEGORIES[:3])))
            reference["iscrowd"].append(int(generator.random() < 0.3))
            for _ in range(3):
                prediction["rle"].append(reference["segmentation"][k])
                prediction["labels"].append(reference["category_id"][int(generator.choice([k, -1]))])
                prediction["scores"].append(float(generator.choice([0.3, 0.7, 0.7])))
        reference["area"] = [float(generator.choice([area, 1024.0, 9216.0, 9217.0])) for area in reference["area"]]
        if number % 3 == 0:
            many = [random_rle(generator, *size)[0] for _ in range(130)]
            prediction["rle"] += many
            prediction["labels"] += [CATEGORIES[0]] * len(many)
            prediction["scores"] += [float(score) for score in generator.integers(0, 4, len(many)) / 4]
        if number % 3 == 1:
            nothing = coco_mask.encode(np.zeros(size, dtype=np.uint8, order="F"))
            nothing = {"size": list(size), "counts": nothing["counts"].decode()}
            prediction["rle"].append(nothing)
            prediction["labels"].append(CATEGORIES[1])
            prediction["scores"].append(0.9)
            reference["segmentation"].append(nothing)
            reference["category_id"].append(CATEGORIES[1])
            reference["iscrowd"].append(0)
            reference["area"].append(0.0)
        if number % 7 == 5:
            reference["iscrowd"] = [1] * len(reference["iscrowd"])
        if number % 7 == 6:
            reference |= {key: [] for key in ("category_id", "segmentation", "iscrowd", "area")}
        if number % 7 == 4:
            prediction |= {key: [] for key in ("scores", "labels", "rle")}
    return pairs
