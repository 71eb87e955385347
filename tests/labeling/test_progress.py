import re

from uplvp_hf.labeling import progress as progress_module
from uplvp_hf.labeling.processes import Processes
from uplvp_hf.labeling.progress import Progress


def test_a_line_a_minute_where_there_is_no_terminal(monkeypatch, caplog, capsys):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO"), Progress("labeling", 1000, True, Processes()) as bar:
        for _ in range(25):
            now[0] += 5.0
            bar.update(10, instances=3, failed=1)
    assert [record.message for record in caplog.records] == [
        "labeling: 120 of 1000 images, 2.00 images/s, 07:20 left, 3 instances, 1 failed",
        "labeling: 240 of 1000 images, 2.00 images/s, 06:20 left, 3 instances, 1 failed",
    ]
    assert capsys.readouterr().err == ""


def test_a_stream_has_no_end_to_wait_for_and_quiet_is_quiet(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    bar, silent = Progress("labeling", None, True, Processes()), Progress("labeling", 9, False, Processes())
    now[0] = 70.0
    with caplog.at_level("INFO"):
        silent.update(7)
        bar.update(7)
    assert re.fullmatch(r"labeling: 7 images, 0\.10 images/s", caplog.messages[0]) and len(caplog.messages) == 1
