"""The demo replaces what a demo wrote, and nothing else."""

import pytest

from uplvp_hf.demo.pipeline import claim_folder


def test_an_earlier_demo_is_replaced_and_the_rest_stays(tmp_path):
    folder = tmp_path / "demo"
    claim_folder(folder)
    (folder / "model").mkdir()
    (folder / "model" / "weights").touch()
    (folder / "results.json").touch()
    (folder / "notes.txt").touch()
    claim_folder(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".uplvp_demo", "notes.txt"]


def test_a_folder_of_the_user_is_refused(tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match="choose another"):
        claim_folder(tmp_path)
    assert (tmp_path / "precious").is_dir() and (tmp_path / "scenes").is_dir()


def test_an_empty_folder_is_fine(tmp_path):
    claim_folder(tmp_path)
    assert (tmp_path / ".uplvp_demo").is_file()
