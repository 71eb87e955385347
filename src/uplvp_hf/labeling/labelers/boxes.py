"""Boxes of a detector, a person or another program, turned into masks by a SAM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import nms

from ...data import DataError, InstanceDataset, Row, empty_objects
from ...data.fields import read_json
from ...models.errors import UserError
from ..cutting.proposals import Proposals, filter_proposals, mask_nms, top_k
from ..encoders.text import split_synonyms
from ..encoders.weights import join_licenses
from ..fingerprint import fingerprint
from ..naming.crops import crop_box
from ..naming.examples import Examples, read_examples
from ..prompt_settings import BoxesSettings
from ..protocol import Labeler
from ..settings import MaskFileSettings
from .box_segmenter import BoxSegmenter
from .detectors import Boxes, load_detector
from .mask_file import MaskFileLabeler, is_number, named_categories, read_masks, rows_of_entries


class BoxesLabeler(Labeler):
    """Named boxes from a zero-shot detector or from a file, and a mask for each of them.

    Args:
        model: the SAM that turns boxes into masks, see `BoxSegmenter`.
        settings, changes: see `BoxesSettings`.
        detector: folder or Hub id, see `load_detector`. Either this or `boxes` has to be given.
        entries: of a vocabulary, for the detector; phrases for one class are separated by commas.
        boxes: a COCO JSON whose annotations have a `bbox`, a list of {"image_id", "category_id", "bbox"}, or whatever
            else `read_masks` reads; its boxes are used and its masks are not.
        examples: annotated images, for OWLv2: it also looks for what their crops show. Their classes come after those
            of `entries` that they do not share.
        device: where the networks run. dtype: of their weights; None: as stored.

    A mask's score is the IoU that the SAM predicts for it, its confidence the score of its box, so that
    `min_confidence` is about the box. Boxes are cut at the image; those that lie outside of it, or have no area, are
    left out and counted in `notes`, as are images in which nothing was found.

    Raises as `BoxSegmenter`, `load_detector` and `read_boxes` do, and UserError for both or none of detector and file.
    """

    name = "boxes"

    def __init__(
        self,
        model: str,
        settings: BoxesSettings | None = None,
        detector: str | None = None,
        entries: Sequence[str] = (),
        boxes: str | os.PathLike[str] | InstanceDataset | None = None,
        examples: str | os.PathLike[str] | InstanceDataset | Examples | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> None:
        self.config = config = BoxesSettings.of(settings, **changes)
        if (detector is None) == (boxes is None):
            raise UserError("the boxes labeler needs either a detector (--detector) or a file of boxes (--masks)")
        self.entries, self.detector, self.file = list(entries), None, None
        phrases = [split_synonyms(entry) for entry in entries]
        self.vocabulary = [names[0] for names in phrases]
        self._origin: dict[str, Any] = {"detector": detector, "entries": self.entries}
        licenses = []
        if detector is not None:
            crops = self._crops(examples)
            phrases += [[] for _ in self.vocabulary[len(phrases) :]]
            self.detector, known = load_detector(detector, phrases, crops, config.phrases_per_pass, device, dtype)
            licenses.append((detector, known))
        else:
            dataset = read_boxes(boxes, config.categories)
            self.file = MaskFileLabeler(dataset, MaskFileSettings(config.match, config.categories, config.missing))
            self.vocabulary = self.file.vocabulary
            self._origin = {"content": fingerprint(boxes)}
        self.segmenter = BoxSegmenter(model, device, dtype, config.boxes_per_pass)
        licenses.append((self.segmenter.name, self.segmenter.license))
        self.encoder_name = self.segmenter.name if detector is None else f"{detector} + {self.segmenter.name}"
        self.license = join_licenses({name: text for name, text in licenses if text is not None})
        self._outside, self._empty = 0, 0

    def _crops(self, examples: Any) -> list[tuple[Image.Image, int]]:
        """A crop of each example, with its class; classes that are not in the vocabulary are added to it."""
        if examples is None:
            return []
        examples = examples if isinstance(examples, Examples) else read_examples(examples)
        self._origin["examples"] = fingerprint(examples.dataset)
        self.vocabulary = self.vocabulary + [name for name in examples.names if name not in self.vocabulary]
        crops = []
        for example in examples.images():
            for box, label in zip(example.boxes(), example.labels):
                area = crop_box(box, example.image.width, example.image.height, 0.1)
                crops.append((example.image.crop(area), self.vocabulary.index(examples.names[label])))
        return crops

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header; `content` is a hash of the file of boxes."""
        return {**self._origin, "model": self.segmenter.name, **self.config.as_dict()}

    @property
    def notes(self) -> list[str]:
        """What the user should know after a run, one sentence each."""
        texts = [] if self.file is None else list(self.file.notes)
        if self._outside:
            texts.append(f"{self._outside} boxes lie outside of their image or have no area, and were left out")
        if self._empty:
            texts.append(f"{self._empty} images have no box and got no masks")
        return texts

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` with labels and confidences an image, masks at the image's size."""
        if self.file is None:
            found = self.detector(images, self.config.threshold)
        else:
            if rows is None:
                raise UserError("boxes of a file are looked up by the rows of the images: pass rows")
            found = [self._from_file(image, row) for image, row in zip(images, rows, strict=True)]
        found = [self._usable(image, boxes) for image, boxes in zip(images, found)]
        masks = self.segmenter(images, [boxes.xyxy for boxes in found])
        return [self._proposals(boxes, *made) for boxes, made in zip(found, masks)]

    def _from_file(self, image: Image.Image, row: Row) -> Boxes:
        index = self.file.locate(image, row)
        objects = empty_objects() if index is None else self.file.dataset[index]["objects"]
        keep = [k for k, crowd in enumerate(objects["iscrowd"]) if not crowd]
        xywh = np.array([objects["bbox"][k] for k in keep], dtype=np.float32).reshape(-1, 4)
        ids = self.file.dataset.category_ids
        labels = np.array([ids.index(objects["category_id"][k]) for k in keep], dtype=np.int64)
        scores = np.array([objects["score"][k] for k in keep], dtype=np.float32)
        boxes = Boxes(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1), scores, labels)
        return boxes.take(scores >= (self.config.threshold or 0))

    def _usable(self, image: Image.Image, boxes: Boxes) -> Boxes:
        """Cut at the image, without empty ones and repetitions, the best first."""
        limits = np.array([image.width, image.height] * 2, dtype=np.float32)
        xyxy = boxes.xyxy.clip(0, limits)
        inside = (xyxy[:, 2:] > xyxy[:, :2]).all(axis=1)
        self._outside += int((~inside).sum())
        boxes = Boxes(xyxy, boxes.scores, boxes.labels).take(inside)
        kept = nms(torch.from_numpy(boxes.xyxy), torch.from_numpy(boxes.scores), self.config.box_nms).numpy()
        self._empty += int(not len(kept))
        return boxes.take(kept[: 2 * self.config.top])

    def _proposals(self, boxes: Boxes, masks: np.ndarray, scores: np.ndarray) -> Proposals:
        proposals = Proposals(masks, scores * boxes.scores, boxes.labels, boxes.scores)
        filled = proposals.masks.any(axis=(1, 2))
        proposals, scores = proposals.take(filled), scores[filled]
        # Suppression goes by the product, which is also what a row's score will be.
        places = Proposals(proposals.masks, proposals.scores, np.arange(len(proposals)), proposals.confidences)
        places = filter_proposals(places, self.config.min_area, self.config.max_area)
        places = top_k(mask_nms(places, self.config.mask_nms, agnostic=True), self.config.top)
        order = places.labels
        return Proposals(places.masks, scores[order], proposals.labels[order], places.confidences)


def read_boxes(source: str | os.PathLike[str] | InstanceDataset, categories: str | None = None) -> InstanceDataset:
    """Rows whose objects have a `bbox` (x, y, width, height in pixels), from JSON as detectors and people write it, or
    from anything else that `read_masks` reads. Segmentations are not looked at.

    Raises DataError naming the entry for a box that is not four finite numbers, an unknown image or category.
    """
    if isinstance(source, InstanceDataset):
        return source
    path = os.fspath(source)
    if not path.lower().endswith(".json"):
        return read_masks(path, categories)
    content, rows = read_json(path), None
    if isinstance(content, dict):
        rows = {entry["id"]: _image_row(entry) for entry in _listed_images(content, path)}
    entries = content.get("annotations", []) if isinstance(content, dict) else content
    rows = rows_of_entries(path, entries, "bbox", rows)
    for row in rows.values():
        _check_boxes(row, path)
    if isinstance(content, dict):
        named = content, path
    else:
        named = (None, path) if categories is None else (read_json(categories), categories)
    return InstanceDataset(list(rows.values()), named_categories(rows, *named, path), path)


def _listed_images(content: dict[str, Any], path: str) -> list[dict[str, Any]]:
    images = content.get("images", [])
    for place, entry in enumerate(images):
        lacking = [key for key in ("id", "file_name") if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise DataError(f"has no {lacking[0]!r}", file=path, row=f"image {place}")
    return images


def _image_row(entry: dict[str, Any]) -> Row:
    """Of an image of a COCO file; sizes that are missing or no numbers are not known."""
    size = {key: int(entry[key]) for key in ("width", "height") if is_number(entry.get(key))}
    known = size if len(size) == 2 else {}
    return Row(image="", image_id=entry["id"], file_name=str(entry["file_name"]), objects=empty_objects(), **known)


def _check_boxes(row: Row, path: str) -> None:
    for box, score in zip(row["objects"]["bbox"], row["objects"]["score"]):
        where = {"file": path, "row": f"image {row['image_id']!r}"}
        if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
            raise DataError(f"a bbox is four finite numbers, got {box!r:.80}", **where)
        if not 0 <= score <= 1:
            raise DataError(f"the score of a box is a number from 0 to 1, got {score!r}", **where)
