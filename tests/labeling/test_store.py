"""The writer alone: one failure list, what a change of the batch size says, a folder that is not shared."""

import json
import logging

import pytest

from uplvp_hf.data import read_failures
from uplvp_hf.labeling.store import StoreError, StoreWriter, make_header


def header(**changes):
    values = {"labeler": "l", "encoder": "e", "vocabulary": ["a"], "settings": {"x": 1}, "license": "mit"}
    return make_header(**values | {"categories": [{"id": 1, "name": "a"}], "batch_size": 4} | changes)


def started(folder, rank=0, **changes):
    store = StoreWriter(folder, header(**changes), rank=rank, shard_size=2)
    store.start({})
    return store


def line(number):
    return json.dumps({"image_id": number})


def listed(folder):
    return {entry["file"]: entry["reason"] for entry in read_failures(folder)}


def test_failures_of_all_processes_end_in_one_list(tmp_path):
    first = started(tmp_path)
    others = [StoreWriter(tmp_path, header(), rank=rank) for rank in (1, 2)]
    first.fail("a.png", "row 0", "cut off")
    others[0].fail("b.png", "row 1", "cut off")
    others[1].fail("c.png", "row 2", "cut off")
    for store in (first, *others):
        store.flush()
    assert listed(tmp_path) == {"a.png": "cut off", "b.png": "cut off", "c.png": "cut off"}
    # Killed here. Two processes go on: one labels b, the other fails at c once more; a comes to nobody.
    first, second = (StoreWriter(tmp_path, header(), rank=rank) for rank in (0, 1))
    first.merge_failures()
    assert len(listed(tmp_path)) == 3 and [file.name for file in tmp_path.glob("failures*")] == ["failures.jsonl"]
    second.add_block([line(1)], ["b.png"])
    second.fail("c.png", "row 2", "is gone")
    first.flush()
    second.flush()
    first.merge_failures(first.repaired | second.repaired)
    second.flush()
    assert listed(tmp_path) == {"a.png": "cut off", "c.png": "is gone"}
    assert [file.name for file in tmp_path.glob("failures*")] == ["failures.jsonl"]


def test_shards_hold_whole_blocks(tmp_path):
    store = started(tmp_path)
    for block in ([0, 1, 2], [3], [4, 5], [6]):
        store.add_block([line(k) for k in block], [f"{k}.png" for k in block])
    store.flush()
    counts = [len(file.read_text().splitlines()) for file in sorted(tmp_path.glob("rows-*"))]
    assert counts == [3, 3, 1]
    assert StoreWriter(tmp_path, header()).finished == set(range(7))


def test_header(tmp_path, caplog):
    started(tmp_path)
    stored = json.loads((tmp_path / "header.json").read_text())
    assert (stored["license"], stored["batch_size"], stored["schema_version"]) == ("mit", 4, 1)
    with caplog.at_level(logging.WARNING):
        StoreWriter(tmp_path, header(batch_size=8))
    assert "batches of 4 images, now 8" in caplog.text
    with pytest.raises(StoreError, match=r"settings\.x: 1 in the store, 2 now"):
        StoreWriter(tmp_path, header(settings={"x": 2}))
    stored.pop("license"), stored.pop("batch_size")  # as the first release wrote it
    (tmp_path / "header.json").write_text(json.dumps(stored))
    assert StoreWriter(tmp_path, header()).resumed


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    other = StoreWriter(tmp_path / "here", header(), rank=1)
    other.start({})  # not the one who writes
    with pytest.raises(StoreError, match=r"here has no header\.json on the machine of process 1"):
        other.check_header_is_there()
