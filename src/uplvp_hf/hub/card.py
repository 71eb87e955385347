"""The model card, filled from what a run left in its folder. Nothing is claimed that no file says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
HEADLINE = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR100")


def build_card(
    model_dir: str | os.PathLike,
    repo_id: str,
    license: str = "apache-2.0",
    metrics_file: str | os.PathLike | None = None,
    examples: Sequence[tuple[str, str]] = (),
    remote_code: bool = True,
) -> ModelCard:
    """The card of a trained model.

    Args:
        model_dir: its folder. `config.json` and `preprocessor_config.json` are needed; `training_summary.json`, which
            the training loop writes, gives data, settings, seconds and the metrics of its last evaluation.
        repo_id: USER/NAME, as the snippets and results name it.
        license: of the weights, an identifier of the Hub.
        metrics_file: `metrics.json` of `uplvp evaluate`, to be shown in the place of the training's own numbers.
            Default: the one in `model_dir`, if any.
        examples: (picture, picture with masks) paths inside the repository, for the widget.
        remote_code: whether the repository carries the code, so that snippets must say `trust_remote_code=True`.

    Returns:
        `ModelCard`, with a model-index only if there are metrics. Of paths only the last part is shown.

    Raises:
        FileNotFoundError, ValueError: for a missing or malformed file, which is named.
    """
    model_dir = Path(model_dir)
    config = read_json(model_dir / "config.json")
    processor = read_json(model_dir / "preprocessor_config.json")
    summary = read_json(model_dir / "training_summary.json", optional=True)
    if metrics_file is None and (model_dir / "metrics.json").is_file():
        metrics_file = model_dir / "metrics.json"
    results = _results(repo_id, summary, None if metrics_file is None else read_json(Path(metrics_file)))
    segmenter = config.get("segmenter_config") or config  # a segmenter alone describes itself
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves its default out
    names = [name for _, name in sorted((int(key), name) for key, name in labels.items())]
    pretrained_only = "UplvpForPreTraining" in (config.get("architectures") or [])
    architecture = segmenter.get("model_type", "unknown")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=license,
        base_model=_base_model(summary),
        tags=["instance-segmentation", "uplvp", architecture, "vision", *(["custom_code"] if remote_code else [])],
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(results),
        widget=[
            {"src": picture, "example_title": Path(picture).stem, "output": {"url": masks}}
            for picture, masks in examples
        ]
        or None,
    )
    kind = "A pre-training checkpoint" if pretrained_only else "An instance segmenter"
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        kind=f"{kind} ({architecture})",
        num_classes=len(names),
        classes=", ".join(names),
        facts=_facts(architecture, segmenter, processor),
        pretrained_only=pretrained_only,
        remote_code=remote_code,
        training=_training(summary),
        results=results,
        num_queries=segmenter.get("num_queries", "A fixed number of"),
        size=_size_text(processor.get("size") or {}),
    )


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError or ValueError, which name the file."""
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; a model folder holds it.") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is needed, this is a {type(content).__name__}.")
    return content


def _public(value: Any) -> str:
    """The last part of a path: folders of somebody's machine are nobody's business."""
    text = str(value)
    return Path(text).name if os.sep in text else text


def _base_model(summary: dict[str, Any]) -> str | None:
    init = (summary.get("settings") or {}).get("model", {}).get("init")
    is_repository = bool(init) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", init)) and not os.path.exists(init)
    return init if is_repository and not init.startswith(".") else None


def _size_text(size: dict[str, int]) -> str:
    if set(size) == {"longest_edge"}:
        return f"{size['longest_edge']} pixels on the longer side"
    return " and ".join(f"{key.replace('_', ' ')} {value}" for key, value in size.items()) or "their own size"


def _facts(architecture: str, segmenter: dict[str, Any], processor: dict[str, Any]) -> list[tuple[str, Any]]:
    backbone = segmenter.get("backbone_config") or {}
    facts = [
        ("Segmenter", architecture),
        ("Backbone", backbone.get("backbone") or backbone.get("model_type")),
        ("Queries", segmenter.get("num_queries")),
        ("Input", _size_text(processor.get("size") or {})),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _training(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    if not summary:
        return []
    settings = summary.get("settings") or {}
    data, model, optim = (settings.get(section) or {} for section in ("data", "model", "optim"))
    labels = data.get("labels_per_class")
    seconds = summary.get("seconds")
    rows = [
        ("Stage", summary.get("stage")),
        ("Data", None if data.get("train") is None else _public(data["train"])),
        ("Split", data.get("train_split")),
        ("Labels per class", None if labels is None else f"{labels} (seed {data.get('split_seed', 0)})"),
        ("Pictures", summary.get("pictures")),
        ("Started from", None if model.get("init") is None else _public(model["init"])),
        ("Prompts", f"{model['prompt_matching']} matching" if model.get("prompt_matching") else None),
        ("Steps", optim.get("steps")),
        (
            "Batch per process",
            None if "batch_size" not in optim else optim["batch_size"] * (optim.get("accumulation") or 1),
        ),
        ("Learning rate", optim.get("lr")),
        ("Precision", settings.get("mixed_precision")),
        ("Seed", settings.get("seed")),
        ("Time", None if seconds is None else f"{seconds:.0f} s of training steps"),
        ("Hardware", summary.get("hardware")),
    ]
    if summary.get("stage") == "finetune":
        rows = [row for row in rows if row[0] != "Prompts"]
    return [(name, value) for name, value in rows if value is not None]


def _results(repo_id: str, summary: dict[str, Any], measured: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the card says about accuracy: of `uplvp evaluate` if it was run, else of the training's last evaluation."""
    settings = summary.get("settings") or {}
    if measured is not None:
        metrics, data, split = measured, measured.get("data"), measured.get("split")
        class_agnostic = bool(measured.get("class_agnostic"))
        origin = "Measured by:"
    else:
        metrics = summary.get("metrics")
        data, split = ((settings.get("data") or {}).get(key) for key in ("val", "val_split"))
        class_agnostic = bool((settings.get("evaluation") or {}).get("class_agnostic"))
        class_agnostic |= bool((settings.get("model") or {}).get("class_agnostic"))
        origin = "Measured after the last training step. To measure it again:"
    if not metrics:
        return None
    if "AP" not in metrics:
        raise ValueError(f"The metrics of {repo_id} have no 'AP', only {sorted(metrics)}.")
    name = "the validation data" if data is None else _public(data)
    flags = (f" --split {split}" if split else "") + (" --class-agnostic" if class_agnostic else "")
    return {
        "data": name + (f" ({split})" if split else ""),
        "dataset": name,
        "split": split,
        "class_agnostic": class_agnostic,
        "metrics": {key: metrics[key] for key in HEADLINE if metrics.get(key) is not None},
        "names": list(HEADLINE),
        "cells": ["-" if metrics.get(key) is None else f"{100 * metrics[key]:.1f}" for key in HEADLINE],
        "per_class": [
            (key, "-" if value is None else f"{100 * value:.1f}")
            for key, value in (metrics.get("per_class") or {}).items()
        ],
        "num_images": metrics.get("num_images", "an unknown number of"),
        "num_failed": len(metrics.get("failures") or []),
        "origin": origin,
        "command": f"uplvp evaluate {repo_id} {name if data is not None else 'path/to/coco_folder'}{flags}",
    }


def _eval_results(results: dict[str, Any] | None) -> list[EvalResult] | None:
    if results is None:
        return None
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Instance Segmentation",
            dataset_type=re.sub(r"[^a-z0-9._-]+", "-", results["dataset"].lower()).strip("-") or "custom",
            dataset_name=results["data"],
            dataset_split=results["split"],
            metric_type="mask_" + name.lower(),
            metric_name="mask " + name + (" (class-agnostic)" if results["class_agnostic"] else ""),
            metric_value=round(value, 4),
        )
        for name, value in results["metrics"].items()
    ] or None
