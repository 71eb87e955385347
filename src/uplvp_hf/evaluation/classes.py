"""Which category of a dataset each class of a model is, and whether there is anything to evaluate."""

from __future__ import annotations

from typing import Any

from uplvp_hf.data import DataError, InstanceDataset
from uplvp_hf.models.class_names import match_names


def match_category_ids(config: Any, dataset: InstanceDataset) -> list[int]:
    """The dataset's category id of every class of the model, matched by name.

    Names that are equal go together; of the others, those that differ only in case or in spaces around them.

    Raises:
        DataError: if the model and the dataset do not have the same class names, or it is not clear which of several
            goes with which; both are listed.
    """
    model_names = [config.id2label[index] for index in range(len(config.id2label))]
    data_names = [category["name"] for category in dataset.categories]
    if model_names == data_names:
        return list(dataset.category_ids)
    places = match_names(model_names, data_names)
    if len(model_names) != len(data_names) or len({*places} - {None}) < len(data_names):
        raise DataError(
            f"the model has {len(model_names)} classes {_some(model_names)}, the dataset {len(data_names)} "
            f"{_some(data_names)}",
            file=dataset.name or "dataset",
            remedy="Fine-tune on these classes, rename the categories of the annotations, or evaluate class-agnostic.",
        )
    return [dataset.category_ids[place] for place in places if place is not None]


def _some(names: list[str], limit: int = 12) -> str:
    return "[" + ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") + "]"


def evaluated_classes(config: Any, dataset: InstanceDataset, class_agnostic: bool = False) -> list[int]:
    """Category id of every class of the model, for `evaluate_model`, which calls this first.

    Raises:
        DataError: if the classes disagree (unless `class_agnostic`), nothing is annotated, or crowds only.
    """
    crowds = 0
    for row in dataset.rows:
        if not all(row["objects"]["iscrowd"]):
            break
        crowds += len(row["objects"]["iscrowd"])
    else:
        what = "annotated" if not crowds else f"annotated but by crowds (iscrowd = 1, {crowds} of them)"
        raise DataError(
            f"none of the {len(dataset)} images is {what}, so there is nothing to compare with",
            file=dataset.name or "dataset",
            remedy="If each crowd is one object, as CVAT writes brush masks, pass --crowds-as-objects "
            "(in training, data.crowds_as_objects=true)."
            if crowds
            else "Pass annotations, or use predict.",
        )
    return list(config.category_ids) if class_agnostic else match_category_ids(config, dataset)
