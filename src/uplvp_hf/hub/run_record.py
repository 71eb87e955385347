"""Reads what a run recorded about itself, as rows of a card: data, split, settings, time, hardware, labels.

Of paths only the last part is shown: folders of somebody's machine are nobody's business.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from ..models.errors import UserError

Rows = list[tuple[str, Any]]


def read_json(path: Path, optional: bool = False, what: str = "a model folder holds it") -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError or ValueError, which name the file."""
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; {what}.") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is needed, this is a {type(content).__name__}.")
    return content


def public(value: Any) -> str:
    """Reduces a path to its last part, and leaves any other value as it is."""
    text = str(value)
    return Path(text).name if os.sep in text and not is_repository(text) else text


def plain(text: Any) -> str:
    """Escapes a name from a user's data for a card: one line, with no meaning in Markdown tables or HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;").replace("|", "\\|")


def is_repository(name: str) -> bool:
    """Whether a name looks like USER/NAME on the Hub and is neither a local folder nor a missing one beside others."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not os.path.isdir(os.path.dirname(name))


def base_model(summary: dict[str, Any]) -> str | None:
    """The Hub repository that the run started from, if it was one."""
    init = _section(summary, "model").get("init")
    return init if init and is_repository(init) else None


def _split_seed(data: dict[str, Any], settings: dict[str, Any]) -> Any:
    seed = data.get("split_seed")
    return settings.get("seed", 0) if seed is None else seed


def _mixed_in(summary: dict[str, Any], data: dict[str, Any]) -> str | None:
    """What `data.extra` added to the labeled images, and in which share of every step."""
    found = summary.get("extra_share") or data.get("extra_share") or []
    if not summary.get("extra_images") or not any(found):
        return None
    given = data.get("extra")
    source = "the labels of its pre-training" if given == "pretraining" else public(given)
    shares = " falling to ".join(f"{share:.0%}" for share in found)
    return f"{summary['extra_images']} images of {source}, in {shares} of every step"


def training_rows(summary: dict[str, Any], split: dict[str, Any]) -> Rows:
    """Data, settings, time and hardware of `training_summary.json`, and the split of `split.json`."""
    if not summary:
        return []
    data, model, optim = (_section(summary, section) for section in ("data", "model", "optim"))
    settings = summary.get("settings") or {}
    labels, seconds = data.get("labels_per_class"), summary.get("seconds")
    rows = [
        ("Stage", summary.get("stage")),
        ("Data", None if data.get("train") is None else public(data["train"])),
        ("Split", data.get("train_split")),
        ("Labeled subset", _split(split) or (None if data.get("subset") is None else public(data["subset"]))),
        ("Labels per class", None if labels is None else f"{labels} (seed {_split_seed(data, settings)})"),
        ("Images", summary.get("images")),
        ("Mixed in", _mixed_in(summary, data)),
        ("Unlabeled images, for a teacher", None if data.get("unlabeled") is None else public(data["unlabeled"])),
        ("Prompts of the student", "masks of the teacher" if _section(summary, "teacher").get("prompts") else None),
        ("Started from", None if model.get("init") is None else public(model["init"])),
        ("Backbone weights", None if model.get("backbone_weights") is None else public(model["backbone_weights"])),
        ("Prompts", f"{model['prompt_matching']} matching" if model.get("prompt_matching") else None),
        ("Steps", _steps(summary)),
        (
            "Batch per process",
            None if "batch_size" not in optim else optim["batch_size"] * (optim.get("accumulation") or 1),
        ),
        ("Learning rate", optim.get("lr")),
        ("Average of the weights", f"decay {optim['ema']}" if optim.get("ema") else None),
        ("Precision", settings.get("mixed_precision")),
        ("Seed", settings.get("seed")),
        ("Parameters", _parameters(summary)),
        ("Time", None if seconds is None else f"{seconds:.0f} s of training steps"),
        ("Hardware", summary.get("hardware")),
    ]
    if summary.get("stage") == "finetune":
        rows = [row for row in rows if row[0] != "Prompts"]
    return [(name, value) for name, value in rows if value is not None]


def _section(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return (summary.get("settings") or {}).get(name) or {}


def _parameters(summary: dict[str, Any]) -> str | None:
    count, trained = summary.get("parameters"), summary.get("parameters_trained")
    if count is None:
        return None
    return f"{count:,}" + ("" if trained in (None, count) else f", of which {trained:,} were trained")


def _split(split: dict[str, Any]) -> str | None:
    """The manifest of a low-data split in words: its name, how much it holds, and its hash."""
    if not split:
        return None
    parts = [f"{split.get('name', 'unnamed')} ({split.get('kind')} {split.get('amount')}, seed {split.get('seed')})"]
    parts += [f"{count} {name}" for name, count in (split.get("counts") or {}).items()]
    return "; ".join([*parts, f"hash `{split.get('hash')}`"])


def _steps(summary: dict[str, Any]) -> str | None:
    """The steps taken, the epochs if they were asked for, and the step of the weights if it is not the last."""
    optim, taken = _section(summary, "optim"), summary.get("steps")
    steps, epochs = taken or optim.get("steps"), optim.get("epochs")
    text = [] if steps is None else [str(steps)]
    text += [] if epochs is None else [f"{epochs:g} epochs asked for"]
    best = summary.get("model_step")
    text += [f"weights of step {best}, the best"] if best is not None and best != steps else []
    return "; ".join(text) or None


def settings_yaml(summary: dict[str, Any]) -> str | None:
    """All settings of the run as YAML, without the output folder and with paths reduced to their last part."""
    settings = summary.get("settings")
    if not settings:
        return None

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(entry) for key, entry in value.items() if entry is not None and key != "output"}
        return public(value) if isinstance(value, str) else value

    return yaml.safe_dump(shown(settings), sort_keys=False, allow_unicode=True).strip()


def earlier_stages(summary: dict[str, Any]) -> list[tuple[str, Rows]]:
    """(title, rows) of what the run built on, if the folders still exist: the pre-training, then its labels."""
    init, before = _section(summary, "model").get("init"), _before(summary)
    stages: list[tuple[str, Rows]] = []
    if before:
        stages.append(("Pre-training", training_rows(before, read_json(Path(init) / "split.json", optional=True))))
    return stages + [("Pseudo labels", _label_rows(header)) for header in _label_headers(summary, before)]


def known_licenses(model_dir: Path) -> list[str]:
    """Licenses of what made the pseudo labels that a run learned from, as the Hub names them, each once: terms that
    its weights may come under. Empty where no record of them is there, or it names none."""
    summary = read_json(model_dir / "training_summary.json", optional=True)
    found = [header.get("license") for header in _label_headers(summary, _before(summary))]
    # Several networks are written as "mit (one), apache-2.0 (two)".
    parts = [part for text in found if text for part in re.split(r",\s+", re.sub(r"\s*\([^)]*\)", "", text))]
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _before(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of the run that a run started from, if its folder is still there."""
    init = _section(summary, "model").get("init")
    return read_json(Path(init) / "training_summary.json", optional=True) if init and os.path.isdir(init) else {}


def _label_headers(summary: dict[str, Any], before: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the pseudo-label stores that a run and the one before it were trained on, and are still there."""
    stores = dict.fromkeys(_section(run, "data").get(key) for run in (summary, before) for key in ("train", "extra"))
    files = [Path(store) / "header.json" for store in stores if store]
    return [read_json(file) for file in files if file.is_file()]


def _label_rows(header: dict[str, Any]) -> Rows:
    """Labeler, encoder with the license of its weights, and vocabulary of a store of pseudo labels."""
    names = header.get("vocabulary") or []
    shown = ", ".join(map(plain, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    rows = [
        ("Labeler", header.get("labeler")),
        ("Encoder", None if header.get("encoder") is None else public(header["encoder"])),
        ("License of the encoder", header.get("license") or "not known: look it up before commercial use"),
        ("Vocabulary", shown or None),
        ("Settings", f"hash `{header['settings_hash']}`" if header.get("settings_hash") else None),
    ]
    return [(name, value) for name, value in rows if value is not None]
