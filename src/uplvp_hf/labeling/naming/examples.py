"""A few annotated images name the masks of any labeler."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ...data.dataset import InstanceDataset, RowStream
from ...data.errors import DataError
from ...data.rows import load_dataset_rows
from ...models.errors import UserError
from ...models.masks import mask_iou_matrix, tight_boxes
from ..cutting.proposals import Proposals
from ..encoders.backbone import Encoder
from ..features import shortened, split
from ..fingerprint import fingerprint
from ..prompt_settings import ExamplesSettings, look
from .mask_features import MaskFeatures
from .prototypes import Prototypes

if TYPE_CHECKING:
    from ..encoders.clip import Clip


@dataclass
class ExampleImage:
    """number: of the image in its dataset. covered: (H, W) bool, pixels that any annotation covers, crowd regions
    included. masks: (H, W) bool of each example. labels: their classes."""

    number: int
    image: Image.Image
    covered: np.ndarray
    masks: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def boxes(self) -> list[list[float]]:
        """x1, y1, x2, y2 of each example."""
        return tight_boxes(np.stack(self.masks)).astype(float).tolist()


@dataclass
class Examples:
    """Annotated images, the classes that they have examples of, and what could not be used.

    dataset: the images. names: classes with at least one usable object, in the order of the dataset's categories.
    notes: sentences about what was left out.
    """

    dataset: InstanceDataset
    names: list[str]
    notes: list[str] = field(default_factory=list)

    def refuse_unseen(self, seen: Sequence[bool]) -> None:
        """Raises UserError where of some class not one example could be read; seen: whether one was, by class."""
        lacking = [name for name, known in zip(self.names, seen) if not known]
        if lacking:
            raise UserError(
                f"examples {self.dataset.name}: no example of class {lacking[0]!r} can be read; "
                + "; ".join(self.notes[:3])
            )

    def images(self) -> Iterator[ExampleImage]:
        """The images that have usable examples, one after the other."""
        categories = {category["id"]: category["name"] for category in self.dataset.categories}
        for number, row in enumerate(self.dataset.rows):
            if not row["objects"]["category_id"]:
                continue
            try:
                image = self.dataset.load_image(number)
            except DataError as error:
                self.notes.append(f"the example image {row['file_name']} cannot be read ({error.reason})")
                continue
            example = ExampleImage(number, image, np.zeros((image.height, image.width), dtype=bool))
            for k, category in enumerate(row["objects"]["category_id"]):
                try:
                    mask = self.dataset.mask(number, k)
                except DataError as error:
                    self.notes.append(f"an example cannot be used: {error}")
                    continue
                example.covered |= mask
                if row["objects"]["iscrowd"][k] or categories[category] not in self.names:
                    continue
                if not mask.any():
                    self.notes.append(f"an example cannot be used: {row['file_name']}, object {k} covers no pixel")
                    continue
                example.masks.append(mask)
                example.labels.append(self.names.index(categories[category]))
            if example.masks:
                yield example


def read_examples(
    source: str | os.PathLike[str] | InstanceDataset, vocabulary: Sequence[str] | None = None
) -> Examples:
    """The annotated images that `load_dataset_rows` reads from a path, or that a dataset holds.

    vocabulary: the classes that are wanted, by name; None: all that have examples. Crowd regions are no examples; a
    class that has nothing else is left out, and `notes` says so.
    Raises UserError when no class has an example, and for a class of the vocabulary that has none.
    """
    dataset = source if isinstance(source, InstanceDataset) else load_dataset_rows(source)
    if isinstance(dataset, RowStream):
        raise UserError(f"examples {dataset.name}: a stream cannot be read twice; save the few examples as a file")
    categories = {category["id"]: category["name"] for category in dataset.categories}
    single, crowds = dict.fromkeys(categories.values(), 0), dict.fromkeys(categories.values(), 0)
    for row in dataset.rows:
        objects = row["objects"]
        for category, crowd in zip(objects["category_id"], objects["iscrowd"]):
            (crowds if crowd else single)[categories[category]] += 1
    wanted = list(single) if vocabulary is None else list(vocabulary)
    names, notes = [name for name in wanted if single.get(name)], []
    for name in wanted:
        if not single.get(name):
            why = "only crowd regions of it" if crowds.get(name) else "no object of it"
            if vocabulary is not None:
                raise UserError(
                    f"examples {dataset.name}: class {name!r} has no example ({why}). Outline at least one object of "
                    "it, or leave the class out of the vocabulary"
                )
            notes.append(f"class {name!r} has no example ({why}) and will not be named")
    if not names:
        raise UserError(f"examples {dataset.name}: no class has an outlined object. Outline at least one of each class")
    return Examples(dataset, names, notes)


def shared_images(examples: InstanceDataset, dataset: InstanceDataset | RowStream) -> int:
    """How many of the example images are also among those of `dataset`, by file; 0 for a stream."""
    if isinstance(dataset, RowStream):
        return 0
    files = [
        {os.path.realpath(row["image"]) for row in rows if isinstance(row["image"], (str, os.PathLike))}
        for rows in (examples.rows, dataset.rows)
    ]
    return len(files[0] & files[1])


@dataclass(frozen=True)
class Described:
    """Vectors of examples (N, D), their classes `labels` (N,) into `names` and their images `groups` (N,); vectors of
    the ground around them (M, D) and its images (M,)."""

    names: list[str]
    vectors: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    ground: torch.Tensor
    ground_groups: torch.Tensor


def describe(examples: Examples, features: MaskFeatures, ground: int = 4) -> Described:
    """The vectors of examples and of up to `ground` places without an object in each image, one image at a time."""
    vectors: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    labels: list[int] = []
    groups: list[int] = []
    rest_groups: list[int] = []
    for example in examples.images():
        masks = np.stack(example.masks)
        vectors.append(features([example.image], [_unscored(masks)]))
        labels += example.labels
        groups += [example.number] * len(masks)
        empty = ground_masks(masks, example.covered, ground, seed=example.number)
        if len(empty):
            rest.append(features([example.image], [_unscored(empty)]))
            rest_groups += [example.number] * len(empty)
    every = torch.cat(vectors) if vectors else torch.zeros(0, 1)
    return Described(
        examples.names,
        every,
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(groups, dtype=torch.int64),
        torch.cat(rest) if rest else every[:0],
        torch.tensor(rest_groups, dtype=torch.int64),
    )


class ExamplesNamer:
    """Names masks after the annotated examples that look most like them; no class names are needed, and no training.

    network: a backbone (`load_encoder`), or a CLIP or SigLIP (`load_clip`). examples: the path of a COCO JSON or of
    anything else that `load_dataset_rows` reads, a dataset, or what `read_examples` made of it. settings, changes: see
    `ExamplesSettings`.

    A confidence is the probability of the class among all classes and the ground, so that `min_confidence` can drop
    masks of what is no object. `names` are the classes that have examples.
    Raises as `read_examples` and `MaskFeatures` do, and UserError when a class's examples cannot be read.
    """

    name = "examples"

    def __init__(
        self,
        network: Encoder | Clip,
        examples: str | os.PathLike[str] | InstanceDataset | Examples,
        settings: ExamplesSettings | None = None,
        **changes: Any,
    ) -> None:
        self.config = config = ExamplesSettings.of(settings, **changes)
        self.encoder = network
        self.examples = examples if isinstance(examples, Examples) else read_examples(examples, config.classes)
        self.names = self.examples.names
        self.features = MaskFeatures(network, look(config))
        self.prototypes = self._learn()
        self.calibration = self.prototypes.calibrate()
        if config.temperature is not None:
            self.calibration = replace(self.calibration, temperature=config.temperature)
        if config.min_similarity is not None:
            self.calibration = replace(self.calibration, floor=config.min_similarity, most_ground=1.0)

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header; `examples` is a hash of the annotations and their images' names."""
        own = {**self.config.as_dict(), "image_size": self.features.image_size, "encoder": self.encoder.name}
        del own["batch_size"]
        return own | {"classes": list(self.names), "examples": fingerprint(self.examples.dataset)}

    @property
    def about_features(self) -> dict[str, Any]:
        """Of the vectors that are kept of the masks."""
        look_at = {name: getattr(self.config, name) for name in ("view", "context", "surroundings")}
        return {"network": self.encoder.name, "of": "examples", **look_at, "image_size": self.features.image_size}

    @property
    def notes(self) -> list[str]:
        """What the user should know before a run: examples a class, and what could not be used."""
        counts = torch.bincount(self.prototypes.labels, minlength=len(self.names)).tolist()
        listed = ", ".join(f"{name} {count}" for name, count in zip(self.names, counts))
        return [f"examples a class: {listed}", *dict.fromkeys(self.examples.notes)]

    def _learn(self) -> Prototypes:
        found = describe(self.examples, self.features, self.config.ground)
        self.examples.refuse_unseen([k in found.labels for k in range(len(self.names))])
        rest = (found.ground, found.ground_groups)
        return Prototypes(found.vectors, found.labels, found.groups, *rest, self.config.neighbors)

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]:
        """Name the masks; the labeler's own labels are replaced. Masks like no example get the label -1."""
        if not any(len(p) for p in proposals):
            return [_named(p, np.zeros(0, np.int64), np.zeros(0, np.float32)) for p in proposals]
        vectors = self.features(images, proposals)
        labels, confidences = self.prototypes.name(vectors, self.calibration)
        named, start = [], 0
        for p, seen in zip(proposals, split(shortened(vectors), proposals)):
            part = slice(start, start + len(p))
            start += len(p)
            result = _named(replace(p, features=seen), labels[part].numpy(), confidences[part].float().numpy())
            named.append(result if self.config.nms is None else resolve_overlaps(result, self.config.nms))
        return named


def _unscored(masks: np.ndarray) -> Proposals:
    return Proposals(masks, np.ones(len(masks), dtype=np.float32))


def _named(proposals: Proposals, labels: np.ndarray, confidences: np.ndarray) -> Proposals:
    return replace(proposals, labels=labels, confidences=confidences)


def resolve_overlaps(proposals: Proposals, iou: float, inside: float = 0.8) -> Proposals:
    """Keep the better of two masks that overlap by more than `iou`, or of which the worse lies to `inside` of its area
    in the other and has its class. Better: named, then score times confidence. The order of the masks stays."""
    if len(proposals) < 2:
        return proposals
    overlap = mask_iou_matrix(torch.from_numpy(proposals.masks)).numpy()
    area = proposals.masks.sum(axis=(1, 2)).astype(np.float64)
    shared = overlap * (area[:, None] + area[None]) / (1 + overlap)
    within = shared / np.maximum(area[:, None], 1)
    same = proposals.labels[:, None] == proposals.labels[None]
    worth = proposals.scores * proposals.confidences
    kept: list[int] = []
    for k in np.lexsort((-worth, proposals.labels < 0)):
        if not any(overlap[k, j] > iou or (same[k, j] and within[k, j] > inside) for j in kept):
            kept.append(int(k))
    return proposals.take(sorted(kept))


def ground_masks(masks: np.ndarray, covered: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Places without an object, in the shapes of the objects: (N, H, W) masks, (H, W) covered -> (up to count, H, W).

    An object's mask is moved to where at most a tenth of it is covered, at full size, or at a half or a quarter of it
    where there is no room; pixels that are covered are taken out. The choice is random by `seed`.
    """
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    boxes = tight_boxes(masks)
    for k in rng.permutation(len(masks)).tolist() * count:
        if len(found) == count:
            break
        left, top, right, bottom = boxes[k]
        shape = masks[k, top:bottom, left:right]
        for shrink in (1, 2, 4):
            moved = _move(shape, covered, shrink, rng)
            if moved is not None:
                found.append(moved)
                break
    return np.stack(found) if found else np.zeros((0, *covered.shape), dtype=bool)


def _move(shape: np.ndarray, covered: np.ndarray, shrink: int, rng: np.random.Generator) -> np.ndarray | None:
    """`shape` at one `shrink`-th of its size at a random place that is at most a tenth covered, or None."""
    shape = shape[::shrink, ::shrink]
    (height, width), (rows, columns) = shape.shape, covered.shape
    if not shape.any() or height > rows or width > columns:
        return None
    places = rng.integers(0, [rows - height + 1, columns - width + 1], size=(16, 2))
    for top, left in places.tolist():
        window = covered[top : top + height, left : left + width]
        if (shape & window).sum() <= 0.1 * shape.sum():
            mask = np.zeros(covered.shape, dtype=bool)
            mask[top : top + height, left : left + width] = shape & ~window
            return mask
    return None
