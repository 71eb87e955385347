"""Few-shot evaluation: supports of a model, and which classes it is asked for on which image.

open       every class on every image: COCO's AP. What a user gets.
present    on an image, only the classes that are in it (FGN's and Siamese Mask R-CNN's protocol): no false positive
           on images without the class, so the AP is a multiple of the open one.
episodes   for every class of an image, that class and `ways` - 1 others drawn by seed, absent ones too, as an image
           of its own (iMTFA's N-way). Not comparable with `open`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..data import InstanceDataset, Row
from ..data.aliases import find_classes
from ..data.dataset import Objects
from ..data.errors import DataError
from ..data.supports import Entry, SupportSet, instances_of, keep_classes
from ..models.errors import UserError
from ..models.supports import class_vectors, fit_similarity
from ..models.thresholds import MASK_THRESHOLD
from .predictor import Pairs, evaluate_model, load_segmenter, predict_dataset

ASKS = ("open", "present", "episodes")


def is_few_shot(model: Any) -> bool:
    """Whether the classes of a model are given by supports."""
    return getattr(model.config, "model_type", None) == "uplvp_few_shot"


@torch.no_grad()
def object_vectors(model: Any, processor: Any, dataset: InstanceDataset, entries: Sequence[Entry]) -> torch.Tensor:
    """`encode_support` of objects (row, position), (S, C) on the model's device; every image goes through alone, once.

    Raises DataError for an image that cannot be read and an object that has no pixel at the model's input size.
    """
    by_row: dict[int, list[int]] = {}
    for place, (row, _) in enumerate(entries):
        by_row.setdefault(row, []).append(place)
    found: dict[int, torch.Tensor] = {}
    training, device = model.training, next(model.parameters()).device
    model.eval()
    for index, places in by_row.items():
        row = dataset[index]
        annotations = [
            {"segmentation": row["objects"]["segmentation"][entries[place][1]], "category_id": 0, "iscrowd": 0}
            for place in places
        ]
        record = {"image_id": 0, "annotations": annotations}
        inputs = processor(dataset.load_image(index), annotations=record, return_tensors="pt")
        masks = inputs["mask_labels"][0]
        if len(masks) < len(places):
            raise DataError(
                f"a support (one of the objects {[entries[place][1] for place in places]}) has no pixel at the model's "
                "input size",
                file=row["file_name"],
                row=f"row {index}",
                remedy="Choose a larger object.",
            )
        pixels = inputs["pixel_values"].to(device, next(model.parameters()).dtype)
        names = [row["file_name"]] * len(masks)
        vectors = model.encode_support(pixels, masks.to(device), inputs["pixel_mask"].to(device), names)
        found |= dict(zip(places, vectors, strict=True))
    model.train(training)
    return torch.stack([found[place] for place in range(len(entries))])


def use_supports(model: Any, processor: Any, supports: SupportSet, wrong: int | None = None) -> None:
    """Gives the model the classes of a support set. wrong: every class gets the examples of another one, by this seed:
    what a model finds then, it finds without looking at the supports. Raises UserError for `wrong` with one class."""
    names = supports.names
    entries = [entry for name in names for entry in supports.entries[name]]
    owner = [place for place, name in enumerate(names) for _ in supports.entries[name]]
    found = object_vectors(model, processor, supports.dataset, entries)
    vectors = class_vectors(found, torch.tensor(owner, device=found.device), len(names))
    if wrong is not None:
        if len(names) < 2:
            raise UserError("Wrong supports are those of another class: give at least two classes.")
        vectors = vectors.roll(int(np.random.default_rng(wrong).integers(1, len(names))), 0)
    model.set_supports(names, vectors, [len(supports.entries[name]) for name in names], supports.category_ids)


@torch.no_grad()
def fit_scores(model: Any, processor: Any, dataset: InstanceDataset, seed: int = 0, per_class: int = 20) -> None:
    """Fits the similarity score of a model on base classes: objects against prototypes of 1 and of 5 examples from
    others, up to `per_class` objects a class. A prototype model also takes the mean of these objects for its own.
    Leaves the model as it is where fewer than two classes have two objects."""
    rng = np.random.default_rng(seed)
    entries: list[Entry] = []
    labels: list[int] = []
    for found in instances_of(dataset, [category["name"] for category in dataset.categories]).values():
        if len(found) > 1:
            chosen = [found[place] for place in rng.permutation(len(found))[:per_class].tolist()]
            entries += chosen
            labels += [len(set(labels))] * len(chosen)
    if len(set(labels)) < 2:
        return
    vectors, of = object_vectors(model, processor, dataset, entries).cpu(), torch.tensor(labels)
    if model.config.conditioning == "prototype":
        model.support_mean.mean.copy_(vectors.mean(0))
        model.support_mean.batches.fill_(1)
    vectors = vectors - model.support_mean.mean.cpu()
    draws = [_compared(vectors, of, shots, rng) for shots in (1, 5) * 4]
    cosines, same = (torch.cat(parts) for parts in zip(*draws, strict=True))
    model.config.similarity_midpoint, model.config.similarity_temperature = fit_similarity(cosines, same)


def _compared(
    vectors: torch.Tensor, labels: torch.Tensor, shots: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of objects to the prototypes of all classes, each of `shots` other objects (all but one of a small
    class), and whether object and prototype are of one class."""
    classes = int(labels.max()) + 1
    own = [torch.nonzero(labels == label).flatten() for label in range(classes)]
    held = torch.cat([one[torch.from_numpy(rng.permutation(len(one)))[: min(shots, len(one) - 1)]] for one in own])
    prototypes = class_vectors(vectors[held], labels[held], classes)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held] = False
    cosines = F.normalize(vectors[rest], dim=-1) @ F.normalize(prototypes, dim=-1).T
    return cosines.flatten(), (labels[rest][:, None] == torch.arange(classes)).flatten()


Views = Callable[[Row, dict[str, Any]], Pairs]


@dataclass(frozen=True)
class Asking:
    """Which classes count on which image. ask: one of `ASKS`. ways, seed: of episodes."""

    ask: str = "open"
    ways: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ask not in ASKS:
            raise UserError(f"ask must be one of {', '.join(ASKS)}, got {self.ask!r}.")
        if self.ways < 1 or (self.ways > 1 and self.ask != "episodes"):
            raise UserError(f"ways is a number of at least 1, above 1 with `episodes` only, got {self.ways}.")

    def views(self, category_ids: list[int]) -> Views:
        """For `evaluate_model`. category_ids: of the classes of the model, in its order."""
        if self.ways > len(category_ids):
            raise UserError(f"{self.ways} ways need as many classes, the model has {len(category_ids)}.")
        return lambda row, result: self._views(row, result, category_ids)

    def _views(self, row: Row, result: dict, category_ids: list[int]) -> Iterator[tuple[Row, dict]]:
        if self.ask == "open":
            yield row, _only(result, list(range(len(category_ids))))
            return
        there = [id_ for id_ in category_ids if id_ in set(row["objects"]["category_id"])]
        if self.ask == "present":
            yield row, _only(result, [category_ids.index(id_) for id_ in there])
            return
        for own in there:
            others = [id_ for id_ in category_ids if id_ != own]
            rng = np.random.default_rng([self.seed, own, *str(row["image_id"]).encode()])
            asked = [own, *(others[place] for place in rng.permutation(len(others))[: self.ways - 1].tolist())]
            kept = [k for k, id_ in enumerate(row["objects"]["category_id"]) if id_ in asked]
            objects: Objects = {key: [values[k] for k in kept] for key, values in row["objects"].items()}  # type: ignore
            seen = Row(**{**row, "objects": objects, "image_id": f"{row['image_id']}:{own}"})
            yield seen, _only(result, [category_ids.index(id_) for id_ in asked])

    @property
    def text(self) -> str:
        """For tables, such as `3-way episodes`."""
        return f"{self.ways}-way episodes" if self.ask == "episodes" else self.ask


def _only(result: dict[str, Any], labels: list[int], most: int = 100) -> dict[str, Any]:
    """The best 100 detections of these classes."""
    kept = [k for k, label in enumerate(result["labels"].tolist()) if label in labels][:most]
    return {key: [v[k] for k in kept] if isinstance(v, list) else v[kept] for key, v in result.items()}


def for_classes(dataset: InstanceDataset, names: Sequence[str]) -> InstanceDataset:
    """The dataset with the classes of that name alone, spelled so (VOC's `sofa` is COCO's `couch`). Raises DataError
    for a class that the dataset does not have."""
    own = find_classes(names, [category["name"] for category in dataset.categories], dataset.name or None)
    kept, spelled = keep_classes(dataset, own), dict(zip(own, names, strict=True))
    categories = [{**category, "name": spelled[category["name"]]} for category in kept.categories]
    return InstanceDataset(kept.rows, categories, kept.name, kept.failures, manifest=kept.manifest)


def asked_rows(model: Any, dataset: InstanceDataset) -> tuple[InstanceDataset, list[int]]:
    """The dataset with the classes of the model alone, and their category ids in the model's order.

    Raises UserError for a model without supports, DataError for a class that the dataset does not have.
    """
    names = [model.config.id2label[label] for label in range(len(model.config.id2label))]
    if not names:
        raise UserError("The model has no supports: give it some with `uplvp fewshot add`.")
    rows = for_classes(dataset, names)
    ids = {category["name"]: category["id"] for category in rows.categories}
    return rows, [ids[name] for name in names]


def keep_every_class(model: Any) -> int:
    """Lets the model keep, and returns, so many masks of an image that what is not asked for does not take the place of
    what is."""
    model.config.max_masks = 100 * max(1, len(model.config.id2label))
    return model.config.max_masks


def evaluate_few_shot(
    model: Any,
    processor: Any,
    dataset: InstanceDataset,
    askings: Sequence[Asking] = (Asking(),),
    batch_size: int = 8,
    progress: bool = True,
    mask_threshold: float = MASK_THRESHOLD,
    **options: Any,
) -> list[dict[str, Any]]:
    """`evaluate_model` for every protocol, on the classes that the model has supports of; objects of other classes do
    not count. Images are predicted once.

    options: of `evaluate_model`. The results also say `protocol`, `ways` and `shots`. Raises as `asked_rows` and
    `evaluate_model` do.
    """
    rows, ids = asked_rows(model, dataset)
    views = [asking.views(ids) for asking in askings]
    shared: dict[str, Any] = {"progress": progress, "mask_threshold": mask_threshold, "batch_size": batch_size}
    shots, found, pairs = max(model.config.support_counts), [], None
    limit, most = model.config.max_masks, keep_every_class(model)
    failures: list[dict[str, Any]] = []
    try:
        if len(askings) > 1:
            pairs = list(predict_dataset(model, processor, rows, top_k=most, failures=failures, **shared))
        for asking, view in zip(askings, views, strict=True):
            metrics = evaluate_model(model, processor, rows, views=view, pairs=pairs, top_k=most, **shared, **options)
            metrics["failures"] += failures
            metrics["num_images"] -= len(failures)
            found.append({**metrics, "protocol": asking.ask, "ways": asking.ways, "shots": shots})
    finally:
        model.config.max_masks = limit
    return found


def load_few_shot(name_or_dir: str) -> tuple[Any, Any]:
    """Model and image processor. Raises DataError for another kind of model, and as `load_segmenter` does."""
    model, processor = load_segmenter(name_or_dir)
    if not is_few_shot(model):
        raise DataError(
            f"holds a `{model.config.model_type}` model, whose classes are those that it was trained on",
            file=name_or_dir,
            remedy="Train one that takes supports: `uplvp fewshot train model.init=...`.",
        )
    return model, processor


def add_supports(model: Any, processor: Any, supports: SupportSet) -> None:
    """Adds the classes of a support set to those that the model has. Raises UserError for one that is there already."""
    before = {name: (model.supports[label], model.config.support_counts[label], model.config.category_ids[label])
              for label, name in model.config.id2label.items()}  # fmt: skip
    again = sorted(set(before) & set(supports.names))
    if again:
        raise UserError(f"The model has a class {again[0]!r} already: remove it first (`--remove`), or leave it out.")
    use_supports(model, processor, supports)
    if not before:
        return
    names = [*before, *supports.names]
    vectors = torch.cat([torch.stack([vector for vector, _, _ in before.values()]), model.supports])
    counts = [*(count for _, count, _ in before.values()), *model.config.support_counts]
    ids = [*(id_ for _, _, id_ in before.values()), *model.config.category_ids]
    model.set_supports(names, vectors, counts, ids if len(set(ids)) == len(ids) else None)
