"""Fills the model card from what a run left in its folder. Every claim comes from a file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..models.errors import UserError
from ..models.remote_code import OWN_MODELS, SEMANTIC
from ..models.thresholds import SCORE_THRESHOLD
from .run_record import base_model, earlier_stages, plain, public, read_json, settings_yaml, training_rows

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
FEW_SHOT = "uplvp_few_shot"
SEMANTIC_HEADLINE = ("mIoU", "mAcc", "aAcc")
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
        model_dir: its folder. The records in it give data, settings, seconds and metrics; those of the runs that it
            started from are shown too, where their folders still exist.
        repo_id, license: USER/NAME, and that of the weights, as the Hub names them.
        metrics_file: of `uplvp evaluate`, in place of the training's own numbers; default: the one in `model_dir`.
        examples: (image, image with masks) paths inside the repository, for the widget.
        remote_code: whether the repository carries the code: snippets then say `trust_remote_code=True`.

    A model-index is there only if there are metrics; of paths only the last part is shown. Raises FileNotFoundError or
    UserError for a missing or malformed file, which is named.
    """
    model_dir = Path(model_dir)
    config = read_json(model_dir / "config.json")
    processor = read_json(model_dir / "preprocessor_config.json")
    summary = read_json(model_dir / "training_summary.json", optional=True)
    if metrics_file is None and (model_dir / "metrics.json").is_file():
        metrics_file = model_dir / "metrics.json"
    results = _results(repo_id, summary, metrics_file)
    segmenter = config.get("segmenter_config") or config  # a segmenter alone describes itself
    names = _class_names(config)
    pretrained_only = "UplvpForPreTraining" in (config.get("architectures") or [])
    architecture = segmenter.get("model_type", "unknown")
    semantic, measured = architecture in SEMANTIC, config.get("default_threshold")
    return ModelCard.from_template(
        _metadata(repo_id, license, architecture, summary, results, examples, remote_code),
        template_path=str(TEMPLATE),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        kind=f"{_kind(config, pretrained_only)} ({architecture})",
        num_classes=len(names),
        classes=", ".join(map(plain, names)),
        facts=[*_facts(architecture, segmenter, processor), *_support_facts(config)],
        pretrained_only=pretrained_only,
        remote_code=remote_code,
        native=config.get("model_type") not in OWN_MODELS,
        trust=", trust_remote_code=True" if remote_code else "",
        endpoint=remote_code and not pretrained_only,
        semantic=semantic,
        examples=examples,
        threshold=SCORE_THRESHOLD if measured is None else measured,
        measured=measured is not None,
        training=training_rows(summary, read_json(model_dir / "split.json", optional=True)),
        earlier=earlier_stages(summary),
        settings=settings_yaml(summary),
        results=results,
        num_queries=segmenter.get("num_queries"),
        size=_size_text(processor.get("size") or {}),
    )


def _class_names(config: dict[str, Any]) -> list[str]:
    default = {} if config.get("model_type") == FEW_SHOT else {"0": "LABEL_0", "1": "LABEL_1"}
    labels = config.get("id2label") or default  # transformers leaves its default out
    return [name for _, name in sorted((int(key), name) for key, name in labels.items())]


def _kind(config: dict[str, Any], pretrained_only: bool) -> str:
    if pretrained_only:
        return "A pre-training checkpoint"
    kinds = dict.fromkeys(SEMANTIC, "A semantic segmenter") | {FEW_SHOT: "A few-shot instance segmenter"}
    return kinds.get(config.get("model_type", ""), "An instance segmenter")


def _support_facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Of a few-shot model: what its classes are given by."""
    if config.get("model_type") != FEW_SHOT:
        return []
    counts = zip(_class_names(config), config.get("support_counts") or [])
    how = {
        "prompt": "the classes' prompts go into all queries",
        "prototype": "similarity names the masks of any object",
    }
    return [
        ("Supports", ", ".join(f"{plain(name)} ({count})" for name, count in counts) or "none yet"),
        ("Conditioning", f"{config['conditioning']}: {how[config['conditioning']]}"),
    ]


def _metadata(
    repo_id: str,
    license: str,
    architecture: str,
    summary: dict[str, Any],
    results: dict[str, Any] | None,
    examples: Sequence[tuple[str, str]],
    remote_code: bool,
) -> ModelCardData:
    """The YAML head of the card."""
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=license,
        base_model=base_model(summary),
        tags=[
            f"{'semantic' if architecture in SEMANTIC else 'instance'}-segmentation",
            "uplvp",
            architecture,
            "vision",
            *(["custom_code"] if remote_code else []),
        ],
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(results),
        widget=[
            {"src": image, "example_title": Path(image).stem, "output": {"url": masks}} for image, masks in examples
        ]
        or None,
    )


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


def _results(repo_id: str, summary: dict[str, Any], metrics_file: str | os.PathLike | None) -> dict[str, Any] | None:
    """The card's accuracy: the numbers of `uplvp evaluate` if it was run, else of the last evaluation in training."""
    settings = summary.get("settings") or {}
    if metrics_file is not None:
        measured = read_json(Path(metrics_file), what="`uplvp evaluate` writes it")
        metrics, data, split = measured, measured.get("data"), measured.get("split")
        class_agnostic = bool(measured.get("class_agnostic"))
        origin = "Measured by `scripts/evaluate.py`:"
    else:
        metrics = summary.get("metrics")
        data, split = ((settings.get("data") or {}).get(key) for key in ("val", "val_split"))
        class_agnostic = bool((settings.get("evaluation") or {}).get("class_agnostic"))
        class_agnostic |= bool((settings.get("model") or {}).get("class_agnostic"))
        origin = "Measured in training, on these weights. To measure it again with `scripts/evaluate.py`:"
    if not metrics:
        return None
    headline = SEMANTIC_HEADLINE if "mIoU" in metrics else HEADLINE
    if headline[0] not in metrics:
        raise UserError(
            f"{metrics_file or 'training_summary.json'}: no 'AP', only {sorted(metrics)}. `uplvp evaluate` writes a "
            "metrics.json that has it."
        )
    name = "the validation data" if data is None else public(data)
    flags = (f" --split {split}" if split else "") + (" --class-agnostic" if class_agnostic else "")
    return {
        "data": name + (f" ({split})" if split else ""),
        "dataset": name,
        "split": split,
        "class_agnostic": class_agnostic,
        "metrics": {key: metrics[key] for key in headline if metrics.get(key) is not None},
        "names": list(headline),
        "cells": ["-" if metrics.get(key) is None else f"{100 * metrics[key]:.1f}" for key in headline],
        "per_class": [
            (plain(key), "-" if value is None else f"{100 * value:.1f}")
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
            task_name="Semantic Segmentation" if name in SEMANTIC_HEADLINE else "Instance Segmentation",
            dataset_type=re.sub(r"[^a-z0-9._-]+", "-", results["dataset"].lower()).strip("-") or "custom",
            dataset_name=results["data"],
            dataset_split=results["split"],
            metric_type=name.lower() if name in SEMANTIC_HEADLINE else "mask_" + name.lower(),
            metric_name=name
            if name in SEMANTIC_HEADLINE
            else "mask " + name + (" (class-agnostic)" if results["class_agnostic"] else ""),
            metric_value=round(value, 4),
        )
        for name, value in results["metrics"].items()
    ] or None
