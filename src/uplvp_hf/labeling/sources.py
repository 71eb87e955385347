"""Masks from elsewhere: a file, a mask generator such as SAM, a trained segmenter (self-training).

All are labelers (`pipeline.Labeler`). A source of one's own is a function or a class in Python: see `plugins`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data import DataError, InstanceDataset, Row, decode_segmentation, empty_objects, load_dataset_rows, shard_files
from ..data.rle import mask_area
from ..models.errors import UserError
from .instances import Proposals, filter_proposals, mask_nms, top_k
from .license import weights_license
from .pipeline import LabelerBase


class MaskFileSource(LabelerBase):
    """Masks that another program wrote: a COCO JSON, a COCO results list, a pseudo-label store.

    Args:
        dataset: the path of one of these, or an `InstanceDataset`.
        match: what ties the file's images to those being labeled: "file_name" (the whole name, or the last part of
            it where that is unambiguous), "image_id", or "auto": the file name, else the id of an image of equal size.
        categories: a COCO JSON that names the categories of a results list, which has ids only. None: the ids.
        missing: what becomes of images that the file does not have: "fail" lists them among the failures, "empty"
            gives them no masks and counts them in `notes`. None: "empty" for results lists, which leave out images
            without results, otherwise "fail".
        min_score: masks of a lower score are left out. min_area: masks of fewer pixels are left out.
        top: most masks an image, best scores first.

    Crowd regions are left out. Raises DataError for a file that cannot be read, and ValueError for an unknown option;
    when called, DataError for an image that is missing or has another size in the file.
    """

    name = "file"

    def __init__(
        self,
        dataset: str | os.PathLike[str] | InstanceDataset,
        match: str = "auto",
        categories: str | None = None,
        missing: str | None = None,
        min_score: float = 0.0,
        min_area: int = 1,
        top: int = 100,
    ) -> None:
        if missing not in (None, "fail", "empty"):
            raise UserError(f"missing {missing!r} is unknown; use 'fail' or 'empty'")
        if match not in ("auto", "file_name", "image_id"):
            raise UserError(f"match {match!r} is unknown; use 'auto', 'file_name' or 'image_id'")
        self.match, self.min_score, self.min_area, self.top = match, min_score, min_area, top
        self.fingerprint = _fingerprint(dataset)
        self.dataset = dataset if isinstance(dataset, InstanceDataset) else read_masks(dataset, categories)
        self.encoder_name = f"file:{os.path.basename(os.path.normpath(self.dataset.name)) or 'rows'}"
        self.vocabulary = list(self.dataset.id2label.values())
        self._class_of = {category_id: index for index, category_id in enumerate(self.dataset.category_ids)}
        self._by_id, self._by_name, self._by_base = _indices(self.dataset.rows)
        has_sizes = not self.dataset.rows or _size(self.dataset[0]) is not None
        self.missing = missing or ("fail" if has_sizes else "empty")
        self._absent: set[int | str] = set()
        self._malformed: set[tuple[int, int]] = set()

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header; `content` is a hash of the file."""
        own = {name: getattr(self, name) for name in ("match", "missing", "min_score", "min_area", "top")}
        return {"content": self.fingerprint, **own}

    @property
    def notes(self) -> list[str]:
        """What the user should know after a run, one sentence each."""
        texts = []
        if self._absent:
            texts.append(f"{len(self._absent)} images are not in {self.dataset.name}: they got no masks")
        if self._malformed:
            texts.append(f"{len(self._malformed)} masks of {self.dataset.name} are malformed and were left out")
        return texts

    def find(self, row: Row) -> int | None:
        """Index of the file's image for a dataset's row, or None."""
        name, size = row["file_name"].replace(os.sep, "/"), (row["width"], row["height"])
        if self.match != "image_id":
            for table, key in ((self._by_name, name), (self._by_base, os.path.basename(name))):
                if table.get(key) is not None:
                    return table[key]
        if self.match != "file_name":
            index = self._by_id.get(row["image_id"])
            if index is not None and (self.match == "image_id" or _size(self.dataset[index]) in (None, size)):
                return index
        return None

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` with labels an image. Raises UserError without rows."""
        if rows is None:
            raise UserError("masks of a file are looked up by the rows of the images: pass rows")
        return [self._proposals(image, row) for image, row in zip(images, rows, strict=True)]

    def _proposals(self, image: Image.Image, row: Row) -> Proposals:
        size = (image.height, image.width)
        index = self.find(row)
        if index is None:
            if self.missing == "fail":
                raise DataError(f"is not in {self.dataset.name}", file=row["file_name"])
            self._absent.add(row["image_id"])
            return Proposals.build([], [], size, labels=[])
        known = _size(self.dataset[index])
        if known not in (None, image.size):
            raise DataError(
                f"has {image.width}x{image.height} pixels, but {known[0]}x{known[1]} in {self.dataset.name}",
                file=row["file_name"],
            )
        objects = self.dataset[index]["objects"]
        order = np.argsort(-np.asarray(objects["score"], dtype=np.float64), kind="stable")
        masks, scores, labels = [], [], []
        for k in order:
            if len(masks) == self.top or objects["score"][k] < self.min_score:
                break
            if objects["iscrowd"][k]:
                continue
            try:
                mask = decode_segmentation(objects["segmentation"][k], *size)
            except DataError:
                self._malformed.add((index, int(k)))
                continue
            if mask.sum() >= max(1, self.min_area):
                masks.append(mask)
                scores.append(objects["score"][k])
                labels.append(self._class_of[objects["category_id"][k]])
        return Proposals.build(masks, scores, size, labels)


def read_masks(path: str | os.PathLike[str], categories: str | None = None) -> InstanceDataset:
    """What `MaskFileSource` reads: anything of `load_dataset_rows`, and COCO results lists ([{"image_id",
    "category_id", "segmentation", "score"}, ...]), whose images have no names and no size.

    Raises DataError as `load_dataset_rows` does, and for entries of a results list that lack a key.
    """
    path = os.fspath(path)
    if os.path.isfile(path) and path.lower().endswith(".json"):
        with open(path, encoding="utf-8") as stream:
            start = stream.read(1024).lstrip()
        if start.startswith("["):
            return _read_results(path, categories)
    return load_dataset_rows(path)


def _read_results(path: str, categories: str | None) -> InstanceDataset:
    entries = _read_json(path)
    rows: dict[int | str, Row] = {}
    for place, entry in enumerate(entries):
        needed = ("image_id", "category_id", "segmentation")
        lacking = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise DataError(
                f"has no {lacking[0]!r}",
                file=path,
                row=f"entry {place}",
                remedy="A COCO results list has image_id, category_id, segmentation and score in each entry.",
            )
        key = entry["image_id"]
        row = rows.setdefault(key, Row(image="", image_id=key, file_name=str(key), objects=empty_objects()))
        score = entry.get("score", 1.0)
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not np.isfinite(score):
            raise DataError(f"a score must be a finite number, got {score!r}", file=path, row=f"entry {place}")
        for name, value in (("segmentation", entry["segmentation"]), ("score", float(score)), ("iscrowd", 0)):
            row["objects"][name].append(value)
        row["objects"]["category_id"].append(entry["category_id"])
    ids = sorted({number for row in rows.values() for number in row["objects"]["category_id"]})
    names = {number: str(number) for number in ids}
    if categories is not None:
        known = {entry["id"]: entry["name"] for entry in _read_json(categories).get("categories", [])}
        unknown = [number for number in ids if number not in known]
        if unknown:
            raise DataError(f"names no category {unknown[0]!r}, which {path} has", file=categories)
        names = known
    return InstanceDataset(list(rows.values()), [{"id": number, "name": name} for number, name in names.items()], path)


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("no such file", file=path) from error
    except ValueError as error:
        raise DataError(f"is not valid JSON ({error})", file=path) from error


def _size(row: Row) -> tuple[int, int] | None:
    """(width, height), or None for an image of a results list."""
    return (row["width"], row["height"]) if "width" in row else None


def _indices(rows: Sequence[Row]) -> tuple[dict, dict[str, int], dict[str, int | None]]:
    """Rows by image id, by file name, and by the last part of it: None where several share that."""
    by_id, by_name, by_base = {}, {}, {}
    for index, row in enumerate(rows):
        name = row["file_name"].replace(os.sep, "/")
        base = os.path.basename(name)
        by_id[row["image_id"]] = index
        by_name[name] = index
        by_base[base] = None if base in by_base else index
    return by_id, by_name, by_base


def _fingerprint(source: str | os.PathLike[str] | InstanceDataset) -> str:
    """sha256 of what the masks are read from, so that a run is not continued with other masks."""
    digest = hashlib.sha256()
    if isinstance(source, InstanceDataset):
        for row in source.rows:
            digest.update(repr((row["image_id"], row["file_name"], row["objects"])).encode())
        return digest.hexdigest()
    path = Path(source)
    if (path / "header.json").is_file():
        files = [path / "header.json", *map(Path, shard_files(path))]
    elif (path / "annotations").is_dir():
        files = sorted((path / "annotations").glob("*.json"))
    elif path.is_dir():
        files = sorted(file for kind in ("*.parquet", "*.arrow", "*.json") for file in path.rglob(kind))
    else:
        files = [path] if path.is_file() else []
    return _hash_files(files)


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class MaskGeneratorSource(LabelerBase):
    """Class-agnostic masks of a model of transformers' "mask-generation" task: SAM, SAM-HQ, SAM 2, SAM 3, EdgeTAM.

    Args:
        model: folder or Hub id. device: where it runs. dtype: of its weights; None: as stored.
        points: points along each side of the grid that the model is prompted with.
        points_batch: points a forward pass of the mask decoder.
        min_iou: least IoU that the model predicts for its own mask, 0 to 1; it becomes the score.
        min_stability: least IoU between the masks at a higher and a lower cut-off.
        crop_layers: how many times finer crops of the image are looked at too; costs 4^layers passes.
        nms: box IoU above which the worse of two masks is dropped, by the model's own suppression.
        min_area: share of the image. max_area: share of the image. max_border: share of the image's border.
        mask_nms: mask IoU above which the worse of two masks is dropped.
        top: most masks an image.

    Raises OSError when the model cannot be found, ValueError when it generates no masks.
    """

    name = "sam"

    def __init__(
        self,
        model: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        points: int = 32,
        points_batch: int = 64,
        min_iou: float = 0.88,
        min_stability: float = 0.95,
        crop_layers: int = 0,
        nms: float = 0.7,
        min_area: float = 0.001,
        max_area: float = 0.9,
        max_border: float = 1.0,
        mask_nms: float = 0.9,
        top: int = 100,
    ) -> None:
        self.encoder_name, self.license = str(model), weights_license(model)
        self.generator = _load_generator(model, device, dtype)
        self.points_batch, self.mask_nms, self.top = points_batch, mask_nms, top
        self.options = {
            "points_per_crop": points,
            "pred_iou_thresh": min_iou,
            "stability_score_thresh": min_stability,
            "crops_n_layers": crop_layers,
            "crops_nms_thresh": nms,
        }
        self.filters = {"min_area": min_area, "max_area": max_area, "max_border": max_border}

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        return {**self.options, **self.filters, "mask_nms": self.mask_nms, "top": self.top}

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One class-agnostic `Proposals` an image, masks at the image's size."""
        return [self._proposals(image) for image in images]

    def _proposals(self, image: Image.Image) -> Proposals:
        size = (image.height, image.width)
        found = self.generator(image, points_per_batch=self.points_batch, **self.options)
        masks = [np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask, dtype=bool) for mask in found["masks"]]
        scores = np.clip(np.asarray(torch.as_tensor(found["scores"]).float().cpu()), 0, 1)
        proposals = filter_proposals(Proposals.build(masks, scores, size), **self.filters)
        return top_k(mask_nms(proposals, self.mask_nms), self.top)


def _load_generator(model: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
    from transformers import AutoConfig, pipeline
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES as KINDS

    kind = AutoConfig.from_pretrained(model).model_type
    if kind not in KINDS:
        raise UserError(f"{model} is a {kind} model, which generates no masks; known are {', '.join(KINDS)}")
    extra = {} if dtype is None else {"dtype": dtype}
    return pipeline("mask-generation", model=model, device=device, **extra)


class SegmenterSource(LabelerBase):
    """Predictions of a trained segmenter of this library as labels for another round (self-training).

    Args:
        model: folder or Hub id of a model of `uplvp pretrain` or `uplvp finetune`. device: where it runs.
        min_score: least score, 0 to 1. min_area: pixels of the image. Both as in the reference's own second round.
        nms: mask IoU above which the worse of two masks of a class is dropped; None keeps them all.
        class_agnostic: forget the classes.
        top: most masks an image.

    Raises FileNotFoundError and DataError as `evaluation.load_segmenter` does.
    """

    name = "segmenter"

    def __init__(
        self,
        model: str | os.PathLike[str],
        device: str | torch.device | None = None,
        min_score: float = 0.5,
        min_area: int = 32,
        nms: float | None = None,
        class_agnostic: bool = False,
        top: int = 100,
    ) -> None:
        from ..evaluation.predictor import load_segmenter

        self.model, self.processor = load_segmenter(os.fspath(model), device)
        self.encoder_name, self.license = os.fspath(model), weights_license(model)
        self.min_score, self.min_area, self.nms = min_score, min_area, nms
        self.class_agnostic, self.top = class_agnostic, top
        id2label = self.model.config.id2label
        self.vocabulary = [] if class_agnostic else [id2label[index] for index in range(len(id2label))]
        # The same folder can be trained again between two runs.
        self.fingerprint = _hash_files(sorted(Path(model).glob("*.safetensors"))) if os.path.isdir(model) else None

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header; `weights` is a hash of the model's files, None for a Hub id."""
        own = ("min_score", "min_area", "nms", "class_agnostic", "top")
        return {"weights": self.fingerprint} | {name: getattr(self, name) for name in own}

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` an image. A prediction does not depend on the images beside it."""
        from ..evaluation.predictor import predict_dataset

        waiting = [
            Row(image=i, image_id=k, file_name=str(k), width=i.width, height=i.height, objects=empty_objects())
            for k, i in enumerate(images)
        ]
        found = predict_dataset(
            self.model,
            self.processor,
            InstanceDataset(waiting, []),
            batch_size=max(1, len(images)),
            threshold=self.min_score,
            top_k=self.top,
            progress=False,
        )
        return [self._proposals(result, (row["height"], row["width"])) for row, result in found]

    def _proposals(self, result: Mapping[str, Any], size: tuple[int, int]) -> Proposals:
        masks = [decode_segmentation(rle, *size) for rle in result["rle"]]
        labels = None if self.class_agnostic else result["labels"].tolist()
        proposals = Proposals.build(masks, result["scores"].tolist(), size, labels)
        keep = (mask_area(proposals.masks) >= self.min_area) & (proposals.scores >= self.min_score)
        proposals = proposals.take(keep)
        return proposals if self.nms is None else mask_nms(proposals, self.nms)
