"""Blocks: every image in one block and one process, whatever the number of processes; what is calibrated on."""

import itertools

import pytest
from labeling_helpers import image_folder

from uplvp_hf.data.dataset import RowStream
from uplvp_hf.data.errors import ImageError
from uplvp_hf.labeling.blocks import Deal, block_count, calibration_blocks, iterate_blocks, load_blocks


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("calibration", [[], [0, 1, 2], [0, 2, 4, 6, 8, 10, 12], list(range(13))])
def test_every_block_has_one_process_and_shares_are_even(size, calibration):
    owners = [[rank for rank in range(size) if Deal(calibration, rank, size).mine(number)] for number in range(13)]
    assert all(len(found) == 1 for found in owners)
    for part in (calibration, sorted(set(range(13)) - set(calibration))):
        counts = [sum(owners[number] == [rank] for number in part) for rank in range(size)]
        assert max(counts) - min(counts) <= 1  # a spread of every second block does not fall to every second process


@pytest.mark.parametrize(
    ("images", "size", "wanted", "expected"),
    [
        (100, 10, 30, [0, 3, 6]),
        (100, 10, 200, list(range(10))),
        (25, 10, 11, [0, 1]),
        (0, 10, 200, []),
        (None, 8, 20, [0, 1, 2]),
        (100, 10, 0, []),
    ],
)
def test_calibration_blocks_are_whole_and_spread(images, size, wanted, expected):
    assert calibration_blocks(images, size, wanted) == expected


def test_blocks_of_a_set_and_of_a_stream_are_the_same(tmp_path):
    dataset = image_folder(tmp_path, 11)
    stream = RowStream(lambda: iter(dataset.rows))
    for size, limit in itertools.product((1, 3, 4, 20), (None, 0, 5, 11, 30)):
        for wanted in (lambda number: True, lambda number: number % 2 == 1):
            left, right = (list(iterate_blocks(data, size, limit, wanted)) for data in (dataset, stream))
            assert left == right
        covered = [k for block in iterate_blocks(dataset, size, limit, lambda number: True) for k in block.rows]
        assert covered == dataset.rows[:limit] and block_count(len(covered), size) == -(-len(covered) // size)


def test_blocks_are_decoded_in_order_and_whole_where_a_part_is_missing(tmp_path):
    dataset = image_folder(tmp_path, 9)
    (tmp_path / "004.png").write_bytes(b"broken")
    (tmp_path / "008.png").write_bytes(b"broken")
    finished = {"000.png", "001.png", "002.png", "003.png", "006.png", "007.png"}
    blocks = list(load_blocks(iterate_blocks(dataset, 3, None, lambda number: True), finished, workers=2))
    assert [block.block.number for block in blocks] == [0, 1, 2]
    assert [list(block.todo) for block in blocks] == [[], [1, 2], [2]]
    assert blocks[0].positions() == [] and blocks[2].positions() == []  # nothing to be done that could be done
    assert blocks[1].positions() == [0, 2] and isinstance(blocks[1].images[1], ImageError)
    images, rows = blocks[1].readable()
    for image, row in zip(images, rows):
        assert image.tobytes() == dataset.load_image(int(row["image_id"][:3])).tobytes()
