"""A page for one model: upload an image, choose a threshold, see its instances and their table, download them as JSON.

Runs as a Space (`MODEL` names the repository) and locally:

    uplvp demo --app MODEL_DIR
    MODEL=USER/NAME TRUST_REMOTE_CODE=1 python app.py

The model's own code is run only with TRUST_REMOTE_CODE=1, which is not needed where `uplvp_hf` is installed.
MAX_PIXELS (default 50,000,000) is the largest image that is taken.
"""

import hashlib
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoImageProcessor, AutoModelForImageSegmentation

try:
    from uplvp_hf.evaluation.visualize import draw_instances
    from uplvp_hf.models.images import ImageError, as_rgb
    from uplvp_hf.models.thresholds import duplicate_iou, score_threshold
except ImportError:  # in a Space they lie beside this file
    from images import ImageError, as_rgb
    from thresholds import duplicate_iou, score_threshold
    from visualize import draw_instances

FLOOR = 0.05  # instances of smaller score are not kept, so that the slider needs no second run of the model
SHOWN_SIDE = 1280  # pixels of the overlay's longer side
COLUMNS = ["#", "label", "score", "x1, y1, x2, y2", "area"]
# Fonts of the visitor's own machine: the page fetches nothing from anywhere else.
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def load(name: str, trust_remote_code: bool = False):
    """(model, processor) of a folder or a repository."""
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    model = AutoModelForImageSegmentation.from_pretrained(name, trust_remote_code=trust_remote_code)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def open_image(path: str) -> Image.Image:
    """An upright 8-bit RGB image, as training sees it. Raises gr.Error, whose text the visitor sees."""
    limit = int(os.environ.get("MAX_PIXELS", "50000000"))
    try:
        with Image.open(path) as image:
            if image.width * image.height > limit:
                raise gr.Error(f"The image has {image.width} x {image.height} pixels; at most {limit:,} are taken.")
            return as_rgb(image, file=Path(path).name)
    except gr.Error:
        raise
    except ImageError as error:
        remedy = "" if error.remedy is None else f" {error.remedy}"
        raise gr.Error(f"This is not an image that can be read: {error.reason}.{remedy}") from error
    except Image.DecompressionBombError as error:
        raise gr.Error(f"The image is too large; at most {limit:,} pixels are taken.") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more
        raise gr.Error(f"This is not an image that can be read ({type(error).__name__}).") from error


class Segmenter:
    """Finds the instances of an image once, and shows those above a threshold as often as it is asked."""

    def __init__(self, model, processor, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.files = tempfile.TemporaryDirectory(prefix="uplvp_app_")
        self._found = lru_cache(maxsize=16)(self._find)  # by content: run lengths are small

    def __call__(self, path: str | None, threshold: float):
        """(overlay, rows of the table, path of the JSON file) of the image in `path`; blank without one."""
        if path is None:
            return None, [], None
        content = Path(path).read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        image = open_image(path)
        instances = [entry for entry in self._found(digest, path) if entry["score"] >= threshold]
        return self._overlay(image, instances), _rows(instances), self._file(digest, image, instances, threshold)

    def _find(self, digest: str, path: str) -> list[dict]:
        image = open_image(path)
        inputs = self.processor(image, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
        found = self.processor.post_process_instance_segmentation(
            outputs,
            threshold=FLOOR,
            duplicates=duplicate_iou(self.model.config),
            target_sizes=[(image.height, image.width)],
            return_rle=True,
            return_segmentation=False,
        )[0]
        values = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), found["rle"])
        return [
            {
                "label": self.model.config.id2label[label],
                "score": score,
                "box": [round(side, 1) for side in box],
                "area": int(coco_mask.area(rle)),
                "segmentation": {"size": list(rle["size"]), "counts": _text(rle["counts"])},
            }
            for score, label, box, rle in values
        ]

    @staticmethod
    def _overlay(image: Image.Image, instances: list[dict]) -> Image.Image:
        small = image.copy()
        small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        masks = [_shrunk(entry["segmentation"], small.size) for entry in instances]
        names = {index: f"{index + 1} {entry['label']}" for index, entry in enumerate(instances)}
        return draw_instances(small, masks, list(names), [entry["score"] for entry in instances], names)

    def _file(self, digest: str, image: Image.Image, instances: list[dict], threshold: float) -> str:
        content = {
            "model": self.name,
            "width": image.width,
            "height": image.height,
            "threshold": threshold,
            "instances": instances,
        }
        file = Path(self.files.name) / digest / f"instances_{threshold:.2f}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return str(file)


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def _shrunk(rle: dict, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a run-length coded mask, scaled to `size` = (width, height)."""
    image = Image.fromarray(coco_mask.decode(rle) * 255)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR)) > 127


def _rows(instances: list[dict]) -> list[list]:
    return [
        [
            number,
            entry["label"],
            round(entry["score"], 3),
            ", ".join(f"{side:.0f}" for side in entry["box"]),
            entry["area"],
        ]
        for number, entry in enumerate(instances, start=1)
    ]


def build(model, processor, name: str) -> gr.Blocks:
    """The page. Its one function is also an endpoint: `/segment(image, threshold)`."""
    segment = Segmenter(model, processor, name)
    with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            f"## {name}\n{len(model.config.id2label)} classes. Every instance has a mask of its own; masks may overlap."
        )
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image")
                threshold = gr.Slider(
                    FLOOR, 1.0, value=score_threshold(model.config), step=0.01, label="Least score", elem_id="threshold"
                )
                download = gr.DownloadButton("Download JSON", elem_id="download")
            with gr.Column():
                overlay = gr.Image(
                    label="Instances",
                    show_label=False,
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],  # no "share", which sends the image away
                    elem_id="overlay",
                )
        table = gr.Dataframe(
            headers=COLUMNS,
            datatype=["number", "str", "number", "str", "number"],
            interactive=False,
            label="Boxes and areas in pixels of the image",
            elem_id="table",
        )
        outputs = [overlay, table, download]
        image.change(segment, [image, threshold], outputs, api_name="segment")
        threshold.release(segment, [image, threshold], outputs, api_visibility="private")
    return app


if __name__ == "__main__":
    MODEL = os.environ.get("MODEL", "uplvp/mask2former-coco")
    build(*load(MODEL, os.environ.get("TRUST_REMOTE_CODE") == "1"), MODEL).launch(theme=THEME, ssr_mode=False)
