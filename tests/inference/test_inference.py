"""`load(...).predict(...)`, the forms of its results, and `uplvp predict` from kill to resume."""

import json
import os
import shutil

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from uplvp_hf.commands import predict
from uplvp_hf.data import ImageError, load_dataset_rows
from uplvp_hf.evaluation import load_segmenter, predict_dataset, to_coco_results
from uplvp_hf.files import only_run
from uplvp_hf.inference import load
from uplvp_hf.inference.journal import NAME


@pytest.fixture(scope="module")
def predictor(tiny_model_dir):
    return load(tiny_model_dir, "cpu")


@pytest.fixture(scope="module")
def scenes(scenes_dir):
    return load_dataset_rows(scenes_dir)


@pytest.fixture(scope="module")
def found(predictor, scenes):
    return predictor.predict([row["image"] for row in scenes.rows], threshold=0.02)


def test_predictions_are_those_of_the_data_set(tiny_model_dir, scenes, found):
    model, processor = load_segmenter(str(tiny_model_dir), "cpu")
    expected = list(predict_dataset(model, processor, scenes, threshold=0.02, progress=False))
    assert len(expected) == len(found) == 6 and sum(map(len, found)) > 0
    for (row, result), instances in zip(expected, found):
        assert instances.rle == result["rle"] and torch.equal(instances.scores, result["scores"])
        assert torch.equal(instances.boxes, result["boxes"]) and instances.source == row["image"]
        assert instances.names == [model.config.id2label[k] for k in result["labels"].tolist()]
        entries = to_coco_results(row, result, model.config.category_ids)
        for ours, theirs in zip(instances.to_coco(row["image_id"], first_id=5), entries, strict=True):
            assert {key: ours[key] for key in theirs} == theirs
            assert ours["area"] == coco_mask.area(theirs["segmentation"]) and ours["iscrowd"] == 0


def test_images_in_any_form(predictor, scenes, found):
    image = scenes.load_image(0)
    for given in (image, np.asarray(image), scenes[0]["image"]):
        one = predictor.predict(given, threshold=0.02)
        assert one.rle == found[0].rle, type(given)
    assert predictor.predict([], threshold=0.5) == []
    with pytest.raises(ImageError, match=r"images\[0\]: an array of shape \(4, 4, 2\)"):
        predictor.predict(np.zeros((4, 4, 2)))
    with pytest.raises(ImageError, match="no such image"):
        predictor.predict("none.png")
    with pytest.raises(ValueError, match="threshold 2"):
        predictor.predict(image, threshold=2)
    small = type(predictor)(predictor.model, predictor.processor, max_pixels=100)
    for given in (image, scenes[0]["image"]):
        with pytest.raises(ImageError, match="max_pixels"):
            small.predict(given)


def test_arrays_of_any_depth_are_seen_alike(predictor, scenes, found):
    pixels = np.asarray(scenes.load_image(0))
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    for given in (pixels / 255.0, pixels.astype(np.uint16) * 257, opaque):
        assert predictor.predict(given, threshold=0.02).rle == found[0].rle, given.dtype


def test_instances_of_a_file_are_drawn_on_the_upright_image(predictor, scenes, tmp_path):
    image = scenes.load_image(0).resize((64, 64))
    exif = Image.Exif()
    exif[0x0112] = 3  # a half turn: both frames have one size
    image.rotate(180).save(tmp_path / "turned.png", exif=exif)
    of_file = predictor.predict(tmp_path / "turned.png", threshold=0.02)
    of_memory = predictor.predict(image, threshold=0.02)
    assert of_file.rle == of_memory.rle and of_memory.source is None and of_file.source == str(tmp_path / "turned.png")
    drawn = of_file.draw(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(np.asarray(drawn), np.asarray(of_memory.draw(image)))


def test_an_image_in_memory_is_taken_as_it_stands(predictor, scenes):
    """Results are in the pixels of the image that was handed over, whatever its EXIF says; files are turned."""
    image = scenes.load_image(0).resize((64, 64))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.info["exif"] = exif.tobytes()
    plain = image.copy()
    plain.info = {}
    assert predictor.predict(image, threshold=0.02).rle == predictor.predict(plain, threshold=0.02).rle


def test_masks_and_choice(found):
    instances = found[0]
    masks = instances.masks()
    assert masks.shape == (len(instances), *instances.size) and masks.dtype == bool
    assert (masks.sum((1, 2)) == instances.areas()).all()
    assert all((mask == stacked).all() for mask, stacked in zip(instances.iter_masks(), masks))
    half = float(instances.scores.median())
    assert instances.above(half).rle == [r for r, s in zip(instances.rle, instances.scores) if s >= half]
    assert len(instances[:0].masks()) == 0 and instances[[1, 0]].rle == [instances.rle[1], instances.rle[0]]
    assert instances[-1].names == [instances.names[-1]]


def test_supervision(found):
    supervision = pytest.importorskip("supervision")
    for instances in (found[0], found[0][:0]):
        compact, dense = instances.to_supervision(), instances.to_supervision(compact=False)
        assert isinstance(compact.mask, supervision.CompactMask) and isinstance(dense.mask, np.ndarray)
        assert (np.asarray(compact.mask) == instances.masks()).all() and (dense.mask == instances.masks()).all()
        assert (
            compact.xyxy == instances.boxes.numpy()
        ).all() and compact.class_id.tolist() == instances.labels.tolist()
        assert compact.data["class_name"].tolist() == instances.names


@pytest.mark.slow
def test_drawing(found, scenes):
    image = scenes.load_image(0)
    drawn = found[0].draw(image)
    assert max(drawn.size) >= 480 and np.asarray(drawn).std() > 0
    with pytest.raises(ValueError, match="drawn on"):
        found[0].draw(image.resize((10, 10)))
    # Scaled down, the tint stays where the mask is.
    scaled = found[0][:1].draw(image.resize(image.size), longest_edge=48)
    assert scaled.size == (480, 480)
    plain = image.resize((48, 48), Image.Resampling.LANCZOS).resize((480, 480), Image.Resampling.BICUBIC)
    changed = np.abs(np.asarray(scaled).astype(int) - np.asarray(plain)).sum(2) > 12
    mask = np.asarray(Image.fromarray(found[0].mask(0)).resize((480, 480)))
    inside = mask.copy()
    inside[:80] = False  # the caption stands there
    assert (changed & inside).sum() > 0.8 * inside.sum()


def words(model, output, *more):
    return [str(word) for word in (model, "--output", output, "--threshold", "0.02", "--device", "cpu", *more)]


def content(output):
    return json.loads((output / "predictions.json").read_text())


def test_command_with_patterns_addresses_and_odd_names(tiny_model_dir, scenes_dir, tmp_path, web, monkeypatch, capsys):
    base = tmp_path / "base"
    (base / "in" / "deep").mkdir(parents=True)
    names = ["a b;c$(x).png", "x..png", "\u00e4\n.png"]
    for name, file in zip(names, sorted((scenes_dir / "images").iterdir())):
        shutil.copy(file, base / "in" / name)
    shutil.copy(base / "in" / names[0], base / "up.png")
    monkeypatch.chdir(base / "in" / "deep")
    sources = ["../../up.png", "../*.png", f"{web.address}/good.png", f"{web.address}/text.png"]
    output = tmp_path / "out"
    assert predict.main([*words(tiny_model_dir, output, "--quiet", "--top-k", 5), *sources]) == 0
    result = content(output)
    assert [image["id"] for image in result["images"]] == [1, 2, 3, 4, 5]
    assert result["images"][0]["file_name"] == "up.png" and result["images"][4]["file_name"] == sources[2]
    assert {a["image_id"] for a in result["annotations"]} <= {1, 2, 3, 4, 5} and result["annotations"]
    assert [a["id"] for a in result["annotations"]] == list(range(1, len(result["annotations"]) + 1))
    overlays = sorted(file.name for file in (output / "overlays").iterdir())
    assert overlays[0] == "000001_up.png" and len(overlays) == 5 and overlays[4] == "000005_good.png"
    assert sorted(file.name for file in output.iterdir()) == ["failures.jsonl", "overlays", "predictions.json"]
    (failure,) = [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]
    assert failure["file"] == sources[3] and "is not an image" in failure["reason"]
    # and nothing beside the output folder
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "out"]
    assert sorted(file.name for file in base.iterdir()) == ["in", "up.png"]


def test_command_in_tiles(tiny_model_dir, scenes_dir, tmp_path, capsys):
    images = str(scenes_dir / "images")
    plain = ("--quiet", "--no-overlays")
    tiled = (*plain, "--tiles", 64, "--overlap", 0.3, "--tiles-with-full", "--top-k", 9)
    assert predict.main([*words(tiny_model_dir, tmp_path / "tiled", *tiled), images]) == 0
    assert predict.main([*words(tiny_model_dir, tmp_path / "one", *plain, "--tiles", 96), images]) == 0
    assert predict.main([*words(tiny_model_dir, tmp_path / "whole", *plain, "--batch-size", 1), images]) == 0
    assert content(tmp_path / "one") == content(tmp_path / "whole") != content(tmp_path / "tiled")
    assert all(a["segmentation"]["size"] == [96, 96] for a in content(tmp_path / "tiled")["annotations"])


def test_results_are_not_overwritten_unasked(tiny_model_dir, scenes_dir, tmp_path, capsys):
    image = str(sorted((scenes_dir / "images").iterdir())[0])
    arguments = [*words(tiny_model_dir, tmp_path, "--quiet", "--no-overlays"), image]
    assert predict.main(arguments) == 0
    before = (tmp_path / "predictions.json").read_bytes()
    assert predict.main(arguments) == 2
    error = capsys.readouterr().err
    assert "there are results already" in error and "--overwrite" in error
    assert predict.main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "predictions.json").read_bytes() == before


@pytest.mark.slow
def test_overlays_among_the_images_are_not_predicted(tiny_model_dir, scenes_dir, tmp_path, capsys):
    for file in sorted((scenes_dir / "images").iterdir())[:2]:
        shutil.copy(file, tmp_path)
    output = tmp_path / "results"
    arguments = [*words(tiny_model_dir, output, "--quiet", "--overwrite"), str(tmp_path)]
    for _ in range(2):
        assert predict.main(arguments) == 0
        assert len(content(output)["images"]) == len(list((output / "overlays").iterdir())) == 2
    assert predict.main([*arguments[:-1], str(output / "overlays")]) == 2
    assert "overlays of an earlier run only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--overlap", "0.3"], "need --tiles"),
        (["--tiles", "8"], "at least 32"),
        (["--tiles", "64", "--overlap", "1"], "overlap of 1.0"),
        (["--top-k", "0"], "--top-k"),
        (["--max-pixels", "0"], "--max-pixels"),
        (["--max-bytes", "-1"], "--max-bytes"),
        (["--mask-threshold", "1"], "--mask-threshold"),
        (["--max-pixels", "99"], "--max-pixels N"),
    ],
)
def test_wrong_numbers(tiny_model_dir, scenes_dir, tmp_path, more, reason, capsys):
    assert predict.main([*words(tiny_model_dir, tmp_path / "out", *more), str(scenes_dir / "images")]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_and_started_again(tiny_model_dir, scenes_dir, tmp_path, capsys):
    """A process killed between images; the second run does the rest, and the file is that of an undisturbed run."""
    images = tmp_path / "images"
    images.mkdir()
    files = sorted((scenes_dir / "images").iterdir())
    for number in range(40):
        shutil.copy(files[number % 6], images / f"{number:02}.png")
    more = ("--no-overlays", "--quiet", "--batch-size", "1", images)
    assert predict.main(words(tiny_model_dir, tmp_path / "whole", *more)) == 0
    journal = tmp_path / "out" / NAME
    process = processes.Child(processes.COMMAND, "predict", *words(tiny_model_dir, tmp_path / "out", *more))
    process.kill_when(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 4)
    done = journal.read_bytes().count(b"\n") - 1
    assert 4 <= done < 40 and not (tmp_path / "out" / "predictions.json").exists()
    with journal.open("ab") as stream:
        stream.write(b'{"source": ["cut off in wri')
    # an image that changed since is predicted anew
    shutil.copy(files[5], images / "00.png")
    os.utime(images / "00.png", (1, 1))
    assert predict.main(words(tiny_model_dir, tmp_path / "out", "--threshold", "0.3", *more)) == 2
    assert "begun with other settings (threshold)" in capsys.readouterr().err
    assert predict.main(words(tiny_model_dir, tmp_path / "out", *more)) == 0
    capsys.readouterr()
    ours, whole = content(tmp_path / "out"), content(tmp_path / "whole")
    assert ours["images"] == whole["images"] and not journal.exists()

    def of(result, number):
        return [{**a, "id": 0, "image_id": 0} for a in result["annotations"] if a["image_id"] == number]

    assert all(of(ours, number) == of(whole, number) for number in range(2, 41))
    assert of(ours, 1) == of(whole, 6)


def test_a_second_run_into_one_output_is_refused(tiny_model_dir, scenes_dir, tmp_path, capsys):
    """While another run holds the folder, and without touching what that run has written so far."""
    output = tmp_path / "out"
    with only_run(output):
        (output / "predictions.partial.jsonl").write_text("of the first run")
        assert predict.main(words(tiny_model_dir, output, str(scenes_dir / "images"))) == 2
        assert "another run is writing into" in capsys.readouterr().err
        assert sorted(path.name for path in output.iterdir()) == [".lock", "predictions.partial.jsonl"]
        assert (output / "predictions.partial.jsonl").read_text() == "of the first run"
    (output / "predictions.partial.jsonl").unlink()
    assert predict.main(words(tiny_model_dir, output, str(scenes_dir / "images"))) == 0
    assert not (output / ".lock").exists()
