"""What `uplvp auto` was asked for, and the output folder that belongs to that request."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json
from ..models.errors import UserError, reading

_RECORD = "request.json"
_PATHS = ("images", "labels", "label_images", "val", "val_images", "examples", "masks", "backbone_weights")


@dataclass(frozen=True)
class Request:
    """
    images: what is to be labeled and pre-trained on. labels: the few labels; label_images: the folder of their images.
    val, val_images: labeled images to measure on; None: a part of the labels is held out. vocabulary, clip, examples,
    backbone, backbone_weights, pad_type, masks, model: what mask sources are made of, as of `uplvp label`. sources:
    names of those to try, of `trials.candidate_sources`; none: all. start: one of `starts.STARTS`; None: the first that
    fits. recipes: of pre-training and fine-tuning, in place of the start's.
    words: settings of the benchmark, such as finetune.optim.steps=200.
    """

    images: str
    labels: str
    label_images: str | None = None
    val: str | None = None
    val_images: str | None = None
    vocabulary: str | None = None
    clip: str | None = None
    examples: str | None = None
    backbone: str | None = None
    backbone_weights: str | None = None
    pad_type: str | None = None
    masks: str | None = None
    model: str | None = None
    sources: tuple[str, ...] = ()
    start: str | None = None
    recipes: tuple[str, str] | None = None
    words: tuple[str, ...] = ()
    seed: int = 0
    device: str | None = None

    def claim(self, folder: Path) -> None:
        """Makes the folder this request's own. Raises UserError when it holds another one, or something else."""
        given = {key: value for key, value in dataclasses.asdict(self).items() if key != "device"}
        record: dict[str, Any] = {key: list(one) if isinstance(one, tuple) else one for key, one in given.items()}
        record |= {key: os.path.abspath(record[key]) for key in _PATHS if record[key] is not None}
        file = folder / _RECORD
        if file.is_file():
            with reading(str(file), "Remove the folder, or choose another --output."):
                before = json.loads(file.read_text(encoding="utf-8"))
            unlike = [key for key in record if before.get(key) != record[key]]
            if unlike:
                key = unlike[0]
                raise UserError(
                    f"{folder} was begun with other arguments ({key}: {before.get(key)}, now {record[key]}): choose "
                    "another --output, or remove it"
                )
        elif any(entry.name != ".lock" for entry in folder.iterdir()):
            raise UserError(f"{folder} holds something that is not of `uplvp auto`: choose another --output")
        else:
            write_json(file, record)

    def release(self, folder: Path) -> None:
        """Gives up the folder, in which no stage has finished."""
        shutil.rmtree(folder / "data", ignore_errors=True)
        (folder / _RECORD).unlink(missing_ok=True)
