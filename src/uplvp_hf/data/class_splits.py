"""Which classes a few-shot model is trained on (base) and which it is asked for later (novel).

coco2voc          base: the 60 classes of COCO that Pascal VOC lacks; novel: VOC's 20 (FGN, arXiv 2004.00204)
coco20i-0 ... -3  novel: the 20 classes of COCO whose place in its list is F mod 4 (Siamese Mask R-CNN)
looks24           novel: the six looks of generated scenes whose hues no base look has
holdout:2         novel: 2 classes drawn with seed 0; holdout:2@5 with seed 5
FILE.yaml         `novel: [names]` and perhaps `base: [names]`, else all others
all               no novel class
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import yaml

from ..models.errors import reading
from .aliases import VOC_CLASSES, canonical, find_classes
from .coco_classes import COCO_CLASSES
from .errors import DataError
from .synthetic import NOVEL_LOOKS

_HOLDOUT = re.compile(r"holdout:(\d+)(?:@(\d+))?")
_FOLD = re.compile(r"coco20i-([0-3])")
_KNOWN = "coco2voc, coco20i-0 to coco20i-3, looks24, holdout:K, holdout:K@SEED, all, or a .yaml or .json file"


@dataclass(frozen=True)
class ClassSplit:
    """Names as the dataset spells them, in its order. A dataset may have classes of one part only."""

    name: str
    base: tuple[str, ...]
    novel: tuple[str, ...]


def class_split(text: str, names: Sequence[str], file: str | None = None) -> ClassSplit:
    """The split of that name (see the head of this file) for a dataset with these classes.

    file: the dataset, for errors. Raises DataError for an unknown split, and for a class that the split does not know.
    """
    holdout, fold = _HOLDOUT.fullmatch(text), _FOLD.fullmatch(text)
    if text == "all":
        novel: set[str] = set()
    elif text == "coco2voc" or fold:
        order = [canonical(name) for name in find_classes(names, COCO_CLASSES, file)]
        wanted = set(VOC_CLASSES) if fold is None else set(COCO_CLASSES[int(fold[1]) :: 4])
        novel = {name for name, known in zip(names, order, strict=True) if known in wanted}
    elif text == "looks24":
        novel = set(names) & set(NOVEL_LOOKS)
    elif holdout:
        count, seed = int(holdout[1]), int(holdout[2] or 0)
        if not 0 < count < len(names):
            raise DataError(f"holdout:{count} of {len(names)} classes leaves a part empty", file=file)
        order = np.random.default_rng(seed).permutation(len(names))
        novel = {sorted(names)[place] for place in order[:count].tolist()}
    elif text.endswith((".yaml", ".yml", ".json")):
        return _from_file(text, names, file)
    else:
        raise DataError(f"no class split {text!r}", remedy=f"Choose one of {_KNOWN}.")
    return ClassSplit(text, tuple(n for n in names if n not in novel), tuple(n for n in names if n in novel))


def _from_file(path: str, names: Sequence[str], file: str | None) -> ClassSplit:
    with reading(path), open(path, encoding="utf-8") as stream:
        content = yaml.safe_load(stream)
    if not isinstance(content, dict) or not {"novel"} <= set(content) <= {"novel", "base"}:
        raise DataError("must hold `novel: [names]`, and perhaps `base: [names]`", file=path)
    novel = find_classes([str(name) for name in content["novel"] or []], names, path)
    rest = [name for name in names if name not in novel]
    base = find_classes([str(name) for name in content.get("base") or rest], names, path)
    both = sorted(set(base) & set(novel))
    if both:
        raise DataError(f"class {both[0]!r} is base and novel", file=path)
    return ClassSplit(os.path.basename(path), tuple(base), tuple(novel))
