"""Low-data splits: which images, or which instances, are labeled. Drawn by seed, named in a few letters.

    10%         10 % of the images                     1@10       the same, Soft-Teacher's naming: seed 1, 10 %
    10%strat    the same, classes as in the whole set    1@10strat
    5images   every class in at least 5 images       3@5images (seed 3)
    5instances  at least 5 instances of every class, all instances of the images taken are kept
    5shot       exactly 5 instances of every class are kept, the others of these images are dropped

A smaller split is part of every larger one of its kind and seed. Only the naming is Soft-Teacher's: the images are
drawn here, and are not those of the lists that its authors published.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .dataset import InstanceDataset, Row
from .errors import DataError

KINDS = ("percent", "images", "instances", "shot")
_UNITS = {"": "percent", "%": "percent", "images": "images", "instances": "instances", "shot": "shot"}
_NAME = re.compile(r"(?:(?P<seed>\d+)@)?(?P<amount>\d+(?:\.\d+)?)(?P<unit>%|images|instances|shot)?(?P<strat>strat)?")
_CANDIDATES = 8  # images of the neediest class that a stratified draw compares


@dataclass(frozen=True)
class SplitSpec:
    """What to draw.

    Args:
        kind: "percent" of the images, "images" a class, "instances" a class, or K-"shot".
        amount: percent in (0, 100], else a whole number >= 1.
        seed: >= 0.
        stratified: of "percent": the shares of the classes among the instances stay as they are.
        allow_fewer: classes that have fewer than `amount` give what they have instead of raising.

    Raises DataError for values outside of these.
    """

    kind: str
    amount: float
    seed: int = 0
    stratified: bool = False
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"no split {self.kind!r}", remedy=f"Choose one of {', '.join(KINDS)}.")
        if self.seed < 0:
            raise DataError(f"the seed of a split must be >= 0, got {self.seed}")
        if self.kind == "percent" and not 0 < self.amount <= 100:
            raise DataError(f"a percentage of images lies above 0 and up to 100, got {self.amount:g}")
        if self.kind != "percent" and (self.amount < 1 or self.amount != int(self.amount)):
            raise DataError(f"{self.kind} a class must be a whole number >= 1, got {self.amount:g}")
        if self.stratified and self.kind != "percent":
            raise DataError(f"stratified is for percent; {self.kind} chooses by class anyway")

    @property
    def name(self) -> str:
        """As `parse_split` reads it, such as 1@10 or 0@5shot."""
        unit = "" if self.kind == "percent" else self.kind
        return f"{self.seed}@{self.amount:.15g}{unit}{'strat' if self.stratified else ''}"


def parse_split(name: str, seed: int = 0) -> SplitSpec:
    """The split of a name (see the head of this file); `seed` where the name has none. Raises DataError."""
    found = _NAME.fullmatch(name.strip())
    if found is None or (found["unit"] is None and found["seed"] is None):
        raise DataError(
            f"{name!r} is no name of a split",
            remedy="Write 1@10 (seed 1, 10 % of the images), 10%, 10%strat, 5images, 5instances, 5shot or 1@5shot; "
            "a manifest ends in .json.",
        )
    own = seed if found["seed"] is None else int(found["seed"])
    return SplitSpec(_UNITS[found["unit"] or ""], float(found["amount"]), own, bool(found["strat"]))


@dataclass(frozen=True)
class Contents:
    """What a draw needs to know of each image, in the order of the rows: the class of each object, None
    for crowds (`classes_of`); and of the set {category id: name}."""

    classes: list[list[int | None]]
    names: dict[int, str]
    source: str

    @classmethod
    def of(cls, dataset: InstanceDataset) -> Contents:
        names = {category["id"]: category["name"] for category in dataset.categories}
        return cls([classes_of(row) for row in dataset.rows], names, dataset.name)


def classes_of(row: Row) -> list[int | None]:
    """The category id of each object of a row, None for crowds."""
    objects = row["objects"]
    return [None if crowd else k for k, crowd in zip(objects["category_id"], objects["iscrowd"])]


def draw(contents: Contents, spec: SplitSpec) -> dict[int, list[int] | None]:
    """{index of a row: positions of the objects that are kept, None for all}, sorted.

    Raises DataError when there is nothing to draw from, and when a class has too little and `allow_fewer` is off.
    """
    if not contents.classes:
        raise DataError("holds no images to draw from", file=contents.source or None)
    order = np.random.default_rng(spec.seed).permutation(len(contents.classes)).tolist()
    if spec.kind == "percent":
        # At least one image; the exact share is rounded down, as 10 % of COCO's 118287 are 11828.
        count = max(1, math.floor(Fraction(str(spec.amount)) * len(order) / 100))
        chosen = _stratified(contents, order, count) if spec.stratified else order[:count]
        return dict.fromkeys(sorted(chosen))
    if not contents.names:
        raise DataError("has no classes to draw labels for", file=contents.source or None)
    if spec.kind == "shot":
        return _shots(contents, spec)
    return dict.fromkeys(sorted(_by_class(contents, order, spec)))


def _by_class(contents: Contents, order: list[int], spec: SplitSpec) -> set[int]:
    """Classes take turns, the rarest first, until each has 1, then 2, ... up to the amount."""
    weights = [_weights(classes, spec.kind == "instances") for classes in contents.classes]
    queues = {category_id: [i for i in order if category_id in weights[i]] for category_id in contents.names}
    available = {k: sum(weights[i][k] for i in queue) for k, queue in queues.items()}
    _check_enough(contents, available, spec)
    turns = sorted(queues, key=lambda category_id: (available[category_id], category_id))
    waiting = {category_id: iter(queue) for category_id, queue in queues.items()}
    counts = dict.fromkeys(queues, 0)
    picked: set[int] = set()
    for goal in range(1, int(spec.amount) + 1):
        for category_id in turns:
            while counts[category_id] < min(goal, available[category_id]):
                index = next(i for i in waiting[category_id] if i not in picked)
                picked.add(index)
                for other, weight in weights[index].items():
                    counts[other] = counts.get(other, 0) + weight
    return picked


def _weights(classes: list[int | None], by_instance: bool) -> dict[int, int]:
    """How much an image counts for each class that it holds."""
    present = [k for k in classes if k is not None]
    return {k: present.count(k) if by_instance else 1 for k in dict.fromkeys(present)}


def _check_enough(contents: Contents, available: dict[int, int], spec: SplitSpec) -> None:
    for category_id, name in contents.names.items():
        if available[category_id] < spec.amount and not spec.allow_fewer:
            number = available[category_id]
            there = f"is in {number} images" if spec.kind == "images" else f"has {number} instances"
            other = f"Ask for at most {number}" if number else "Remove the class from the categories"
            raise DataError(
                f"class {name!r} {there}, {spec.amount:g} were asked for",
                file=contents.source or None,
                remedy=f"{other}, or take fewer of it: `uplvp data split --allow-fewer`, data.allow_fewer=true.",
            )


def _shots(contents: Contents, spec: SplitSpec) -> dict[int, list[int] | None]:
    """The first K instances of every class in one random order of all instances."""
    instances = [(i, k) for i, classes in enumerate(contents.classes) for k, c in enumerate(classes) if c is not None]
    available = dict.fromkeys(contents.names, 0)
    for i, k in instances:
        available[contents.classes[i][k]] += 1
    _check_enough(contents, available, spec)
    counts = dict.fromkeys(contents.names, 0)
    kept: dict[int, list[int] | None] = {}
    for position in np.random.default_rng(spec.seed).permutation(len(instances)).tolist():
        i, k = instances[position]
        category_id = contents.classes[i][k]
        if counts[category_id] < spec.amount:
            counts[category_id] += 1
            kept.setdefault(i, []).append(k)
    return {i: sorted(kept[i]) for i in sorted(kept)}


def _stratified(contents: Contents, order: list[int], count: int) -> list[int]:
    """`count` images whose instances are spread over the classes as in the whole set.

    The next image always is for the class of which the smallest share was taken so far (images without instances
    are one more class): of its next few images in random order, the one after which all shares are closest to the
    share of the images taken.
    """
    index_of = {category_id: k for k, category_id in enumerate(contents.names)}
    empty = len(index_of)
    held = [_class_counts(classes, index_of, empty) for classes in contents.classes]
    totals = np.zeros(empty + 1)
    queues: list[list[int]] = [[] for _ in totals]
    for i in order:
        for k, number in held[i].items():
            totals[k] += number
            queues[k].append(i)
    known = np.flatnonzero(totals)
    waiting = {k: iter(queues[k]) for k in known.tolist()}
    ahead: dict[int, list[int]] = {k: [] for k in waiting}
    taken, exhausted = np.zeros(len(totals)), totals == 0
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        shares = np.where(exhausted, np.inf, taken / np.maximum(totals, 1))
        neediest = int(shares.argmin())
        candidates = ahead[neediest]
        if not _refill(candidates, waiting[neediest], chosen):
            exhausted[neediest] = True
            continue
        goal = totals[known] * (len(chosen) + 1) / len(order)
        after = np.tile(taken, (len(candidates), 1))
        for row, i in enumerate(candidates):
            after[row, list(held[i])] += list(held[i].values())
        best = (np.square(after[:, known] - goal) / totals[known]).sum(axis=1).argmin()
        chosen[candidates[best]] = None
        taken = after[best]
    return list(chosen)


def _class_counts(classes: list[int | None], index_of: dict[int, int], empty: int) -> dict[int, int]:
    weights = _weights(classes, by_instance=True)
    return {index_of[k]: number for k, number in weights.items()} or {empty: 1}


def _refill(ahead: list[int], waiting: Iterator[int], chosen: dict[int, None]) -> bool:
    """Whether a class has images left: the next few of its queue, less those that were chosen for another class."""
    ahead[:] = [i for i in ahead if i not in chosen]
    unchosen = (i for i in waiting if i not in chosen)
    ahead += itertools.islice(unchosen, _CANDIDATES - len(ahead))
    return bool(ahead)
