"""Stores of parts of the images, labeled apart, make the store of one run."""

import json
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
import yaml
from labeling_helpers import image_folder, tiny_encoder

from uplvp_hf.commands import label
from uplvp_hf.data import load_dataset_rows, read_failures, read_store
from uplvp_hf.data.dataset import RowStream
from uplvp_hf.data.store_features import ABOUT
from uplvp_hf.data.store_reader import shard_files
from uplvp_hf.data.synthetic import CLASSES, write_scenes
from uplvp_hf.demo.pipeline import synthetic_clip_path
from uplvp_hf.labeling import merge as merge_module
from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler
from uplvp_hf.labeling.merge import merge_stores
from uplvp_hf.labeling.part import Part
from uplvp_hf.labeling.pipeline import label_images
from uplvp_hf.labeling.report import write_report
from uplvp_hf.labeling.store import StoreError
from uplvp_hf.models.errors import UserError

QUIET = {"progress": False, "shard_size": 3, "batch_size": 2}
MERGE = {"progress": False, "shard_size": 3}


def foreground(**options):
    return ForegroundLabeler(
        tiny_encoder(), norm_sizes=(64,), component_sizes=(64,), grid=48, min_area=0.001, **options
    )


def labeled(dataset, folder, part=None, **options):
    label_images(dataset, foreground(), None, folder, part=part, **QUIET | options)
    return folder


def parts_of(dataset, folder, of, **options):
    return [labeled(dataset, folder / f"part{k}", Part(k, of), **options) for k in range(1, of + 1)]


def content(folder):
    """{name: bytes} of all files of a store."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rows_with_features(folder):
    """{image id: (row, vectors as bytes)}, in order."""
    rows = read_store(folder, features=folder).rows
    vectors = [[one.tobytes() for one in row["objects"].pop("features")] for row in rows]
    return {row["image_id"]: (row, own) for row, own in zip(rows, vectors)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Eleven images, the store of all of them and those of three parts."""
    folder = tmp_path_factory.mktemp("merge")
    dataset = image_folder(folder / "images", 11)
    return dataset, labeled(dataset, folder / "whole"), parts_of(dataset, folder, 3)


@pytest.fixture
def stores(made, tmp_path):
    """Copies of the three parts that a test may change."""
    return [Path(shutil.copytree(store, tmp_path / store.name)) for store in made[2]]


# The merged store is that of one run.


def test_the_merged_store_is_that_of_one_run_to_the_byte(made, tmp_path):
    dataset, whole, parts = made
    summary = merge_stores([parts[2], parts[0], parts[1]], tmp_path / "merged", **MERGE)  # in any order
    assert content(tmp_path / "merged") == content(whole)
    assert len(shard_files(whole)) > 2 and list(whole.glob("features-*.npy"))
    assert (summary.images, summary.repeated, summary.failed, summary.stores) == (11, 0, 0, 3)
    assert summary.instances == sum(len(row["objects"]["score"]) for row in read_store(whole).rows)
    # It is a finished store like any other: a run over all images finds nothing to do.
    assert label_images(dataset, foreground(), None, tmp_path / "merged", **QUIET).skipped == 11
    numbers = [write_report(store, tmp_path / "report.html") for store in (whole, tmp_path / "merged")]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 3


def test_failed_images_and_several_processes(tmp_path, monkeypatch):
    """Rows, vectors and failures are those of one run, image by image; the rows lie in other files."""
    dataset = image_folder(tmp_path / "images", 11)
    for name in ("001.png", "008.png"):
        file = tmp_path / "images" / name
        file.write_bytes(file.read_bytes()[:400])
    (tmp_path / "images" / "009.png").write_bytes(b"no image")
    dataset = load_dataset_rows(tmp_path / "images")  # the last one is left out when the folder is read
    whole = labeled(dataset, tmp_path / "whole")
    parts = parts_of(dataset, tmp_path, 3, max_failed=1.0)
    for number, store in enumerate(parts):
        shard = sorted(store.glob("*-00000-*"))
        if number == 1:  # as process 1 of a run in several processes names its files
            for file in shard:
                file.rename(str(file).replace("-00000-0", "-00001-0"))
    merged = tmp_path / "merged"
    summary = merge_stores(parts, merged, **MERGE)
    assert (summary.images, summary.failed) == (8, 3)
    assert rows_with_features(merged) == rows_with_features(whole)
    by_file = [sorted(read_failures(store), key=lambda entry: entry["file"]) for store in (merged, whole)]
    assert by_file[0] == by_file[1] and len(by_file[0]) == 3
    assert json.loads((merged / "complete.json").read_text()) == {"images": 11}


def test_more_parts_than_blocks(tmp_path):
    dataset = image_folder(tmp_path / "images", 3)
    whole, parts = labeled(dataset, tmp_path / "whole"), parts_of(dataset, tmp_path, 5)
    assert sum(not shard_files(store) for store in parts) == 3
    merge_stores(parts, tmp_path / "merged", **MERGE)
    assert content(tmp_path / "merged") == content(whole)


def stream(count):
    """Images that are in no file, as a streamed dataset has them."""
    from labeling_helpers import blob_image

    def rows():
        for k in range(count):
            image = blob_image(k)
            yield {"image": image, "image_id": k, "file_name": str(k), "width": image.width, "height": image.height,
                   "objects": {"segmentation": [], "category_id": []}}  # fmt: skip

    return RowStream(rows, [], "stream")


def test_a_stream_and_its_saved_images(tmp_path):
    """Every second block; the images go along, also when the stores lie elsewhere now."""
    whole = labeled(stream(9), tmp_path / "whole")
    parts = parts_of(stream(9), tmp_path, 2)
    moved = [store.rename(tmp_path / f"moved{k}") for k, store in enumerate(parts)]
    merged = tmp_path / "merged"
    merge_stores(moved, merged, **MERGE)
    shutil.rmtree(moved[0]), shutil.rmtree(moved[1])
    found, expected = rows_with_features(merged), rows_with_features(whole)
    assert found.keys() == expected.keys() == set(range(9))
    for image_id, (row, vectors) in found.items():
        before, own = expected[image_id]
        assert {**row, "image": ""} == {**before, "image": ""} and vectors == own
        assert Path(row["image"]).parent == merged / "images"
        assert Path(row["image"]).read_bytes() == Path(before["image"]).read_bytes()


@pytest.mark.slow
def test_two_machines_with_the_small_clip(tmp_path, tiny_segmenter):
    """Two processes at the same time, each with its own copy of the images; then a pre-training on the merged store."""
    scenes = write_scenes(tmp_path / "here", 9, 3, 96) / "images"
    copies = [Path(shutil.copytree(scenes, tmp_path / name / "photos")) for name in "ab"]

    def words(images, output, *more):
        network = ["--clip", synthetic_clip_path(), "--vocabulary", ",".join(CLASSES), "--device", "cpu", "--quiet"]
        options = ["run.batch_size=2", "run.workers=1", "labeler.threshold=0.5", f"run.image_root={images}"]
        return ["label", images, "--output", output, *network, *options, *more]

    machines = [
        processes.Child(processes.COMMAND, *words(images, tmp_path / f"store{k}", "--shard", f"{k}/2"))
        for k, images in enumerate(copies, start=1)
    ]
    whole = processes.run(processes.COMMAND, *words(scenes, tmp_path / "whole"))
    for ended in (whole, *(machine.wait() for machine in machines)):
        assert ended.returncode == 0, ended.stderr
    call = ["--merge", tmp_path / "store1", tmp_path / "store2", "--output", tmp_path / "merged", "--quiet", "--report"]
    assert label.main([str(word) for word in [*call, f"run.image_root={scenes}"]]) == 0
    report = (tmp_path / "merged" / "report.html").read_bytes()
    assert len(report) > 1000
    (tmp_path / "merged" / "report.html").unlink()
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    assert (tmp_path / "whole" / ABOUT).is_file() and json.loads((tmp_path / "merged/header.json").read_text())["state"]

    recipe = {"data": {"size": 64}, "model": {"segmenter": tiny_segmenter()}, "optim": {"steps": 2, "batch_size": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    call = [
        "pretrain",
        "--recipe",
        tmp_path / "recipe.yaml",
        f"data.train={tmp_path / 'merged'}",
        "model.num_prompts=4",
    ]
    call += ["model.kernel_target=labeler", "model.kernel_loss_share=0.1", "--output", tmp_path / "run", "--quiet"]
    ended = processes.run(processes.COMMAND, *call)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()


# What is refused.


def change(store, name="header.json", **values):
    file = store / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"labeler": "ncut"}, r"part1 and .*part2 .*labeler: 'foreground' in .*part1, 'ncut' in .*part2"),
        ({"vocabulary": ["bear"]}, r"vocabulary: \['object'\] in .*part1, \['bear'\] in .*part2"),
        ({"categories": [{"id": 1, "name": "bear"}]}, r"categories: .*'object'.* in .*part1, .*'bear'.* in .*part2"),
        ({"settings_hash": "0"}, "edited by hand"),
        ({"state": {"mean": list(range(999))}}, r"state.*run\.calibration="),
        ({"image_root": "/photos"}, r"image_root: None in .*part1, '/photos' in .*part2; .*run\.image_root=FOLDER"),
        ({"batch_size": 4}, r"run\.batch_size: 2 in .*part1, 4 in .*part2"),
        ({"license": "mit"}, None),
    ],
)
def test_stores_that_do_not_fit_are_refused(stores, tmp_path, values, message):
    change(stores[1], **values)
    if message is None:
        merge_stores(stores, tmp_path / "merged", **MERGE)
        assert json.loads((tmp_path / "merged" / "header.json").read_text())["license"] == values["license"]
        return
    with pytest.raises(StoreError, match=message) as refused:
        merge_stores(stores, tmp_path / "merged", **MERGE)
    assert len(str(refused.value)) < 1500
    assert not (tmp_path / "merged").exists() and len(list(tmp_path.iterdir())) == 3


def test_a_setting_that_differs_is_named_with_both_values(made, stores, tmp_path):
    label_images(made[0], foreground(strength=0.5), None, tmp_path / "other", part=Part(2, 3), **QUIET)
    with pytest.raises(StoreError, match=r"settings\.strength: 3\.0 in .*part1, 0\.5 in .*other"):
        merge_stores([stores[0], tmp_path / "other"], tmp_path / "merged", **MERGE)


def test_parts_of_other_images_are_refused(made, stores, tmp_path):
    fewer = made[0].subset(range(9))
    labeled(fewer, tmp_path / "fewer", Part(3, 3))
    with pytest.raises(StoreError, match=r"part 2/3 of 11 images, .*part 3/3 of 9 images"):
        merge_stores([*stores[:2], tmp_path / "fewer"], tmp_path / "merged", **MERGE)
    others = made[0].subset([*range(1, 11), 0])
    labeled(others, tmp_path / "others", Part(3, 3))
    with pytest.raises(StoreError, match="lists of image ids differ"):
        merge_stores([*stores[:2], tmp_path / "others"], tmp_path / "merged", **MERGE)
    with pytest.raises(StoreError, match=r"is for part 3/3 of 11 images, not for part 2/3"):
        labeled(made[0], stores[2], Part(2, 3))
    with pytest.raises(StoreError, match=r"not for part 3/3 of 11 images \(the images are others than before\)"):
        labeled(others, stores[2], Part(3, 3))


def test_an_unfinished_store_is_named_with_what_it_lacks(made, stores, tmp_path):
    (stores[1] / "complete.json").unlink()
    Path(shard_files(stores[1])[-1]).unlink()
    with pytest.raises(StoreError, match=r"part2 is not finished: \d of its 4 images .*--shard 2/3.*Use --force"):
        merge_stores(stores, tmp_path / "merged", **MERGE)
    with pytest.raises(StoreError, match=r"no store is for part 1/3, 3/3"):
        merge_stores([stores[1], made[1]], tmp_path / "merged", **MERGE)
    whole = Path(shutil.copytree(made[1], tmp_path / "whole"))
    (whole / "complete.json").unlink()
    with pytest.raises(StoreError, match="whole is not finished: it has 11 images, and its run did not come to an end"):
        merge_stores([*made[2], whole], tmp_path / "merged", **MERGE)
    merged = tmp_path / "merged"
    assert merge_stores([stores[1], stores[0]], merged, force=True, **MERGE).images < 11
    assert not (merged / "complete.json").exists()  # whoever merges it again is told
    # A run over all images makes what is missing, to the same rows.
    labeled(made[0], merged)
    assert rows_with_features(merged) == rows_with_features(made[1])


def test_an_image_in_two_stores(made, stores, tmp_path):
    """Equal labels are kept once; others are an error that names the image."""
    summary = merge_stores([*stores, made[1]], tmp_path / "merged", **MERGE)
    assert (summary.images, summary.repeated) == (11, 11)
    assert rows_with_features(tmp_path / "merged") == rows_with_features(made[1])
    shard = Path(shard_files(stores[1])[0])
    lines = shard.read_text().splitlines()
    row = json.loads(lines[0])
    row["objects"]["score"] = [0.123 for _ in row["objects"]["score"]]
    shard.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    with pytest.raises(StoreError, match=rf"image '{row['image_id']}' .*other labels in .*part2 than in .*whole"):
        merge_stores([*stores, made[1]], tmp_path / "again", **MERGE)
    row["image_id"] = "another name"
    shard.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    with pytest.raises(StoreError, match=rf"{row['file_name']} is image .*'another name'"):
        merge_stores([*stores, made[1]], tmp_path / "again", **MERGE)
    assert not (tmp_path / "again").exists()


def test_features_must_be_of_one_kind(stores, tmp_path):
    change(stores[1], ABOUT, network="another")
    with pytest.raises(StoreError, match=r"features: .*tiny.* in .*part1, .*another.* in .*part2"):
        merge_stores(stores, tmp_path / "merged", **MERGE)
    (stores[1] / ABOUT).unlink()
    with pytest.raises(StoreError, match=r"part1 has features of its masks, .*part2 has none: run `uplvp label"):
        merge_stores(stores, tmp_path / "merged", **MERGE)
    for store in stores:
        (store / ABOUT).unlink(missing_ok=True)
    merge_stores(stores, tmp_path / "merged", **MERGE)
    assert not list((tmp_path / "merged").glob("features*"))


def test_faulty_files_are_named(stores, tmp_path):
    features = next(stores[2].glob("features-*.npy"))
    np.save(features, np.zeros((1, 3), np.float16))
    with pytest.raises(UserError, match=str(features)):
        merge_stores(stores, tmp_path / "merged", **MERGE)
    shard = Path(shard_files(stores[1])[0])
    shard.write_text(shard.read_text()[:-30])
    with pytest.raises(UserError, match=rf"{shard}.*not valid JSON"):
        merge_stores(stores, tmp_path / "merged", **MERGE)
    (stores[0] / "complete.json").write_text("{}")
    with pytest.raises(UserError, match=r"complete\.json"):
        merge_stores(stores, tmp_path / "merged", **MERGE)
    assert not (tmp_path / "merged").exists()


def test_a_kill_leaves_no_output(stores, tmp_path, monkeypatch):
    """Whenever it comes: the output is complete or is not there."""

    class Killed(BaseException):
        pass

    for writes in range(1, 9):
        real, count = merge_module.StoreWriter.add_block, iter(range(writes))

        def dies(self, *arguments, real=real, count=count):
            if next(count, None) is None:
                raise Killed
            real(self, *arguments)

        monkeypatch.setattr(merge_module.StoreWriter, "add_block", dies)
        try:
            merge_stores(stores, tmp_path / "merged", **MERGE)
        except Killed:
            assert not (tmp_path / "merged").exists()
        else:
            break
        finally:
            monkeypatch.undo()
    else:
        pytest.fail("never finished")
    assert writes > 3 and len(read_store(tmp_path / "merged")) == 11


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_output(stores, tmp_path):
    child = processes.Child(
        "import sys, time\n"
        "from uplvp_hf.labeling import merge, merge_stores\n"
        "add = merge.StoreWriter.add_block\n"
        "merge.StoreWriter.add_block = lambda *words: (add(*words), time.sleep(1))\n"
        "merge_stores(sys.argv[2:], sys.argv[1], progress=False, shard_size=2)\n",
        tmp_path / "merged", *stores,
    )  # fmt: skip
    child.kill_when(lambda: list(tmp_path.glob(".merged.*/folder/rows-*")))
    assert not (tmp_path / "merged").exists()
    assert merge_stores(stores, tmp_path / "merged", **MERGE).images == 11


@pytest.mark.parametrize(
    "words, message",
    [
        (["--merge", "{0}", "{1}"], "--merge needs an --output"),
        (["--merge", "{0}", "--output", "{out}"], "two stores or more"),
        (["--merge", "{0}", "{0}/", "--output", "{out}"], "is named twice"),
        (["--merge", "{0}", "{0}/nothing", "--output", "{out}"], "no such folder"),
        (["--merge", "{0}", "{images}", "--output", "{out}"], "header.json"),
        (["--merge", "{0}", "{1}", "{2}", "--output", "{0}"], "already exists"),
        (["{images}", "--merge", "{0}", "{1}", "--output", "{out}"], "--merge labels no images"),
        (["--merge", "{0}", "{1}", "--output", "{out}", "--clip", "x"], "--clip has no effect with --merge"),
        (["--merge", "{0}", "{1}", "--output", "{out}", "--shard", "1/2"], "--shard has no effect with --merge"),
        (["--merge", "{0}", "{1}", "run.batch_size=3", "--output", "{out}"], "run.batch_size has no effect"),
        (["--merge", "{0}", "{1}", "labeler.top=3", "--output", "{out}"], "labeler has no effect with --merge"),
        (["--merge", "{0}", "{1}", "{2}", "run.image_root=/photos", "--output", "{out}"], "outside of run.image_root"),
        (["{images}", "--force", "--output", "{out}"], "--force goes with --merge"),
        (["{images}", "--shard", "3/2", "--output", "{out}", "--labeler", "center_box"], "--shard must be like 3/16"),
        (["{images}", "run.calibration=/no", "--output", "{out}", "--labeler", "center_box"], "is no pseudo-label"),
    ],
)  # fmt: skip
def test_bad_words_end_in_one_line(made, tmp_path, capsys, words, message):
    places = {"images": made[0].name, "out": tmp_path / "out"}
    given = [word.format(*made[2], **places) for word in words]
    assert label.main([*given, "--quiet"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("uplvp label: error: ") and message in error
    assert not (tmp_path / "out").exists()
