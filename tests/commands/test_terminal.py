"""Which errors are one line for the user, and which are bugs that show their traceback."""

import json
import subprocess
import sys

import pytest

from uplvp_hf.cli import main
from uplvp_hf.commands._terminal import FIRST_ERROR, run
from uplvp_hf.models.errors import UserError, reading


def failing(error):
    def work():
        raise error

    return work


def test_errors_for_users_are_one_line(capsys):
    assert run("label", failing(UserError("a.json: two\nlines")), again="") == 2
    assert capsys.readouterr().err == "uplvp label: error: a.json: two lines\n"
    assert run("label", failing(FileNotFoundError(2, "No such file", "b.json"))) == 2
    assert "b.json" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("shapes differ"), TypeError("no"), KeyError("name")])
def test_other_errors_are_bugs(error):
    with pytest.raises(type(error)):
        run("label", failing(error))


def test_what_a_library_says_of_a_named_file_is_for_the_user():
    with pytest.raises(UserError, match=r"^notes\.txt: .*codec can't decode") as caught, reading("notes.txt"):
        b"\xff\xfe".decode("utf-8")
    assert isinstance(caught.value.__cause__, UnicodeDecodeError)
    with pytest.raises(UserError, match=r"^a: Expecting value.*\) Remove it\.$"), reading("a", "Remove it."):
        json.loads("")
    with pytest.raises(UserError, match=r"^ours$"), reading("a"):
        raise UserError("ours")
    with pytest.raises(OSError, match="gone"), reading("a"):
        raise OSError("gone")
    with pytest.raises(UserError) as caught, reading("a"):
        raise ValueError("word " * 1000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "data.train={}", "model.init={model}"],
        ["label", "{}", "--labeler", "saliency", "--backbone", "{model}"],
        ["label", "{}", "--vocabulary", "a,b", "--clip", "{model}"],
    ],
)
def test_a_model_of_an_unknown_type(words, scenes_dir, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "nothing_known"}')
    words = [word.format(scenes_dir, model=model) for word in words]
    assert main([*words, "--output", str(tmp_path / "output")]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert str(model) in line and "nothing_known" in line


def test_masks_of_another_encoding(scenes_dir, tmp_path, capsys):
    (tmp_path / "masks.json").write_bytes(b"\xff\xfe\x00bad")
    words = ["label", str(scenes_dir / "images"), "--labeler", "file", "--masks", str(tmp_path / "masks.json")]
    assert main([*words, "--output", str(tmp_path / "output")]) == 2
    assert "masks.json" in capsys.readouterr().err


def test_of_several_processes_only_the_first_tells_its_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(FIRST_ERROR, str(tmp_path / "told"))
    assert run("label", failing(UserError("a.json: no such file"))) == 2
    assert run("label", failing(UserError("a.json: no such file"))) == 2  # another process, the same fault
    assert run("label", failing(RuntimeError("connection closed by peer"))) == 2  # for want of the first
    assert capsys.readouterr().err == "uplvp label: error: a.json: no such file\n"


@pytest.mark.slow
def test_a_wrong_argument_of_several_processes_is_one_line(tmp_path):
    words = ["finetune", "--recipe", "no_such_recipe", "--processes", "2", "--output", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "uplvp_hf.cli", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "no_such_recipe" in line] == done.stderr.splitlines()
