"""The control runs: both models start with equal losses, and each gets its line of numbers."""

import pytest


@pytest.mark.slow
def test_control_of_two_steps(load_script, tmp_path, capsys):
    words = ["optim.steps=2", "optim.batch_size=2", "model.class_agnostic=true", "data.size=96"]
    control = load_script("control_mask2former")
    assert control.main([*words, "--scenes", "4", "2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    lines = [line.split("|")[1:-1] for line in printed.out.splitlines()]
    assert [line[0].strip() for line in lines[2:]] == ["ours", "transformers"]
    assert all(len(line) == len(control.HEAD) and line[2].strip() == "2" for line in lines[2:])
    assert "First loss" in printed.err
