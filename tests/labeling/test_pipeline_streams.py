"""Labeling a stream of rows: like its files, resumed, in bounded memory."""

import io
import json
from pathlib import Path

import datasets
import label_tiny
import pytest
from labeling_helpers import blob_image, image_folder
from test_pipeline import QUIET, foreground

from uplvp_hf.data import load_dataset_rows, read_store, stream_dataset_rows
from uplvp_hf.data.dataset import RowStream, empty_objects
from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler
from uplvp_hf.labeling.pipeline import label_images
from uplvp_hf.labeling.store import StoreError


def streamed(count, broken=()):
    """Images of `image_folder` in no file, as a stream that counts how far it was read."""
    rows, read = [], []
    for k in range(count):
        content = io.BytesIO()
        blob_image(k).save(content, "PNG")
        content = content.getvalue()[: 2000 if k in broken else None]
        sides = {"width": 0 if k in broken else 96, "height": 0 if k in broken else 64}
        rows.append({"image": content, "image_id": k, "file_name": f"{k}", **sides, "objects": empty_objects()})

    def source():
        for row in rows:
            read.append(row["image_id"])
            yield row

    return RowStream(source, name="streamed"), read


def test_a_stream_is_labeled_like_its_files_and_resumed(tmp_path):
    files = image_folder(tmp_path / "images", 9)
    label_images(files, foreground(), None, tmp_path / "files", **QUIET)
    stream, _ = streamed(9, broken=(4,))
    first = label_images(stream, foreground(), None, tmp_path / "labels", limit=3, **QUIET)
    assert (first.done, first.failed) == (3, 0)
    rest = label_images(stream, foreground(), None, tmp_path / "labels", **QUIET)
    assert (rest.done, rest.skipped, rest.failed) == (5, 3, 1)
    want, stored = read_store(tmp_path / "files"), read_store(tmp_path / "labels")
    assert [row["image_id"] for row in stored.rows] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [failure["file"] for failure in stored.failures] == ["4"]
    for index, row in enumerate(stored.rows):
        assert row["objects"] == want[row["image_id"]]["objects"]
        assert row["image"] == str(tmp_path / "labels" / "images" / f"{row['image_id']:09d}.png")
        assert stored.load_image(index).tobytes() == want.load_image(row["image_id"]).tobytes()
    with pytest.raises(StoreError, match="the image is in no file"):
        label_images(stream, foreground(), None, tmp_path / "unsaved", save_images=False, **QUIET)


def test_a_stream_is_calibrated_on_its_beginning_alone(tmp_path):
    stream, read = streamed(12)
    labeler = label_tiny.tiny_labeler()
    label_images(stream, labeler, None, tmp_path / "labels", calibration_images=3, **QUIET)
    assert read == [0, 1, 2, 3, *range(12)]
    state = json.loads((tmp_path / "labels" / "header.json").read_text())["state"]
    assert state["calibration"]["images"] == 4  # whole batches


def test_memory_holds_a_few_blocks_whatever_the_number_of_images(tmp_path):
    stream, read = streamed(40)
    ahead = []

    class Watching(ForegroundLabeler):
        def begin(self, images, rows=None):
            ahead.append(read[-1] - rows[-1]["image_id"])
            return super().begin(images, rows)

    labeler = foreground()
    labeler.__class__ = Watching
    label_images(stream, labeler, None, tmp_path / "labels", **QUIET)
    assert len(ahead) == 20 and 0 < max(ahead) <= 2 * QUIET["batch_size"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_datasets_library_is_labeled_and_resumed(tmp_path, streaming):
    files = image_folder(tmp_path / "images", 5)
    rows = [{"bytes": Path(row["image"]).read_bytes(), "path": None} for row in files.rows]
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(tmp_path / "data.parquet")
    dataset = (stream_dataset_rows if streaming else load_dataset_rows)(tmp_path / "data.parquet")
    assert label_images(dataset, foreground(), None, tmp_path / "labels", limit=2, **QUIET).done == 2
    rest = label_images(dataset, foreground(), None, tmp_path / "labels", **QUIET)
    assert (rest.done, rest.skipped) == (3, 2)
    label_images(files, foreground(), None, tmp_path / "files", **QUIET)
    stored, want = read_store(tmp_path / "labels"), read_store(tmp_path / "files")
    assert [row["image_id"] for row in stored.rows] == [0, 1, 2, 3, 4]
    assert [row["objects"] for row in stored.rows] == [row["objects"] for row in want.rows]
    assert Path(stored[3]["image"]).read_bytes() == rows[3]["bytes"]
