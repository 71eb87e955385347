"""COCO results on the disk: the entries that were added, in the order asked for, all of them or none."""

import json
import tracemalloc

import pytest

from uplvp_hf.evaluation.results_file import ResultsFile


def entries(image_id, count):
    code = {"size": [3, 4], "counts": '0`1\n\\"'}
    return [{"image_id": image_id, "category_id": k, "segmentation": code, "score": k / 7} for k in range(count)]


def test_written_as_added_or_sorted_with_those_of_other_processes(tmp_path):
    counts = {"ä": 2, 5: 0, 7: 3, "x": 1, 2: 2}
    whole = [entry for image_id, count in counts.items() for entry in entries(image_id, count)]
    one, first, second = (ResultsFile(tmp_path / f"{name}.json") for name in ("one", "first", "second"))
    for number, (image_id, count) in enumerate(counts.items()):
        one.add(image_id, entries(image_id, count))
        (first, second)[number % 2].add(image_id, entries(image_id, count))
    first.merge(list(second.images()), {image_id: place for place, image_id in enumerate(counts)})
    for results in (one, first, ResultsFile(tmp_path / "none.json")):
        results.write()
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "first.json").read_text()) == whole
    assert json.loads((tmp_path / "none.json").read_text()) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first.json", "none.json", "one.json"]
    with pytest.raises(ValueError, match="JSON"):
        one.add(9, [{"score": float("nan")}])


def test_memory_does_not_grow_with_the_results(tmp_path):
    results = ResultsFile(tmp_path / "results.json")
    tracemalloc.start()
    for image_id in range(300):
        results.add(image_id, [{"image_id": image_id, "counts": "x" * 20_000}])
    results.write()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "results.json").stat().st_size > 6e6 and peak < 1e6
