"""The demo's HTML report: one self-contained page with pseudo masks, learning curves and predictions."""

from __future__ import annotations

import base64
import io
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ..data import InstanceDataset, decode_segmentation
from ..evaluation.visualize import draw_instances
from ..files import write_text

CELL = 288  # px, displayed width of an image


def write_report(
    path: Path, summary: dict, names: dict[str, str], curves: dict[str, dict[int, float]], samples: dict
) -> None:
    """Writes the page atomically. `curves`: AP (0..1) by optimizer steps, for every arm; `samples`: see `_samples`."""
    template = (resources.files("uplvp_hf.demo") / "report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True)
    environment.filters["share"] = share
    page = environment.from_string(template).render(
        summary=summary,
        names=names,
        curves=_curves(curves, names),
        pseudo=_pairs(samples["pseudo"], _truth(samples)),
        predictions=_predictions(samples),
        cell=CELL,
    )
    write_text(path, page)


def share(value: float | None) -> str:
    """Two decimals; "none" for a share of nothing."""
    return "none" if value is None else f"{value:.2f}"


def _curves(curves: dict[str, dict[int, float]], names: dict[str, str]) -> str:
    """AP against optimizer steps of all arms, as inline SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    for index, (name, curve) in enumerate(curves.items()):
        steps = sorted(curve)
        marker = {"marker": "*", "markersize": 14} if len(steps) == 1 else {"marker": "o", "markersize": 4}
        axes.plot(steps, [100 * curve[step] for step in steps], label=names[name], color=f"C{index}", **marker)
    axes.set_xlabel("optimizer steps in all (pre-training included)")
    axes.set_ylabel("mask AP on the test scenes")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _truth(samples: dict) -> InstanceDataset:
    """The hidden truth of the pseudo-labeled images, in their order."""
    pseudo = samples["pseudo"]
    rows = [samples["pseudo_truth"][row["file_name"].split("/")[-1]] for row in pseudo.rows]
    return InstanceDataset(rows=rows, categories=pseudo.categories)


def _pairs(left: InstanceDataset, right: InstanceDataset) -> list[tuple[str, str]]:
    return [
        tuple(_overlay(left.load_image(index), dataset, index) for dataset in (left, right))
        for index in range(len(left))
    ]


def _overlay(image: Image.Image, dataset: InstanceDataset, index: int) -> str:
    objects = dataset[index]["objects"]
    order = {category: place for place, category in enumerate(dataset.category_ids)}
    labels = [order[category] for category in objects["category_id"]]
    masks = [dataset.mask(index, k) for k in range(len(labels))]
    return _image(draw_instances(_enlarged(image), _enlarged_masks(masks, image), labels, None, dataset.id2label))


def _predictions(samples: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for index, prediction in enumerate(samples["predictions"]):
        image = samples["test"].load_image(index)
        masks = [decode_segmentation(rle, image.height, image.width) for rle in prediction["rle"]]
        drawn = draw_instances(
            _enlarged(image),
            _enlarged_masks(masks, image),
            prediction["labels"].tolist(),
            prediction["scores"].tolist(),
            samples["id2label"],
        )
        pairs.append((_image(drawn), _overlay(image, samples["test"], index)))
    return pairs


def _enlarged(image: Image.Image) -> Image.Image:
    """Small images are drawn larger, so that the captions can be read."""
    factor = max(1, round(2 * CELL / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _enlarged_masks(masks: list, image: Image.Image) -> list:
    factor = max(1, round(2 * CELL / image.width))
    return [mask.repeat(factor, 0).repeat(factor, 1) for mask in masks]


def _image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
