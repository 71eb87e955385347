"""What a long command says where there is no terminal."""

import re

import pytest

from uplvp_hf import progress as progress_module
from uplvp_hf.progress import Progress, with_progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_soon_and_then_one_a_minute_where_there_is_no_terminal(clock, caplog, capsys):
    with caplog.at_level("INFO"), Progress("labeling", 1000, True) as bar:
        for _ in range(25):
            clock[0] += 5.0
            bar.update(10, instances=3, failed=1)
    assert [record.message for record in caplog.records] == [
        "labeling: 20 of 1000 images, 2.00 images/s, 08:10 left, 3 instances, 1 failed",
        "labeling: 140 of 1000 images, 2.00 images/s, 07:10 left, 3 instances, 1 failed",
    ]
    assert capsys.readouterr().err == ""


def test_the_first_estimate_is_right_although_the_first_piece_is_slow(clock, caplog):
    """Setting up takes as long as twelve steps here: counted in, it would make the estimate four times too long."""
    with caplog.at_level("INFO"), Progress("finetune", 500, True, "steps") as bar:
        clock[0] += 12.0
        bar.update()
        for _ in range(3):
            clock[0] += 1.0
            bar.update(loss=2.345)
    (line,) = caplog.messages[:1]
    assert line == "finetune: 2 of 500 steps, 1.00 steps/s, 08:18 left, loss 2.35"


def test_a_stream_has_no_end_to_wait_for_and_quiet_is_quiet(clock, caplog):
    bar, silent = Progress("labeling", None, True), Progress("labeling", 9, False)
    with caplog.at_level("INFO"):
        for _ in range(2):
            clock[0] += 70.0
            silent.update(4)
            bar.update(7)
    assert caplog.messages == ["labeling: 14 images, 0.10 images/s"]


def test_items_keep_their_order_and_a_resumed_run_its_count(clock, caplog):
    assert list(with_progress(range(3), "checking", True)) == [0, 1, 2]
    bar = Progress("pretrain", 100, True, "steps", initial=90)
    with caplog.at_level("INFO"):
        for _ in range(3):
            clock[0] += 6.0
            bar.update()
    assert re.match(r"pretrain: 92 of 100 steps, 0\.17 steps/s, 00:48 left", caplog.messages[0])
