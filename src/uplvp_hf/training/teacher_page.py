"""`teacher.html` of a run: unlabeled images as the teacher and its student see them, side by side.

One image file a drawn step lies in `teacher/`, so a run that is resumed goes on with the page, and draws what it draws
again to the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..evaluation.visualize import contact_sheet, draw_instances
from ..files import replacing, write_text
from .config import DataSettings
from .pseudo_labels import PseudoInstances
from .student_batch import Lesson

MOST = 8  # images of a step
COLUMNS = ("the teacher finds", "the student is taught", "the student finds")
_HEAD = """<!DOCTYPE html>
<meta charset="utf-8">
<title>Teacher and student</title>
<style>body { font: 15px sans-serif; margin: 2em; } img { max-width: 100%; }</style>
<h1>Teacher and student</h1>
<p>Unlabeled images of single steps. Left: the weak view with what the teacher finds. Middle: the strong view with what
the student is taught of it. Right: the same view with what the student itself finds at that moment, at the same
thresholds. Numbers are the probability of the class.</p>
"""


class TeacherPage:
    """Draws batches into an output folder. names: {class: name}."""

    def __init__(self, output: str, data: DataSettings, names: dict[int, str]) -> None:
        self.output, self.folder, self.names = Path(output), Path(output) / "teacher", names
        assert data.image_mean is not None and data.image_std is not None
        self.mean, self.std = (torch.tensor(one).view(3, 1, 1) for one in (data.image_mean, data.image_std))

    def add(
        self,
        step: int,
        views: dict[str, Any],
        found: list[PseudoInstances],
        lessons: list[Lesson],
        own: list[PseudoInstances],
    ) -> None:
        """Draws the batch of `collate_views` of an update (0-based). found, own: what teacher and student find in the
        weak views and in those of `lessons`. Raises OSError naming the file that cannot be written."""
        images, captions = [], []
        for index, (lesson, teacher, student) in enumerate(list(zip(lessons, found, own, strict=True))[:MOST]):
            weak, _ = views["windows"][index]
            seen = views["weak"]["pixel_values"][index, :, : weak.height, : weak.width]
            images += [
                self._drawn(seen, teacher.rles, teacher.labels, teacher.scores),
                self._drawn(lesson.pixels, lesson.masks.dense(), lesson.labels, lesson.scores),
                self._drawn(lesson.pixels, student.rles, student.labels, student.scores),
            ]
            captions += [f"image {views['image_ids'][index]}: {text}" for text in COLUMNS]
        sheet = contact_sheet(images, len(COLUMNS), captions)
        with replacing(self.folder / f"step-{step + 1:07d}.jpg", "wb") as stream:
            sheet.save(stream, format="JPEG", quality=85)
        files = sorted(self.folder.glob("step-*.jpg"))
        sections = (f'<h2>Step {int(file.stem[5:])}</h2>\n<img src="teacher/{file.name}">' for file in files)
        write_text(self.output / "teacher.html", _HEAD + "\n".join(sections) + "\n")

    def _drawn(self, pixels: Tensor, masks: Any, labels: Tensor, scores: Tensor) -> Image.Image:
        values = (pixels * self.std + self.mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        image = Image.fromarray(values.permute(1, 2, 0).numpy())
        return draw_instances(image, masks, labels.tolist(), scores.tolist(), self.names)


__all__ = ["TeacherPage"]
