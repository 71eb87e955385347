"""A CLIP, scenes, a recipe: what the command line needs to run on two cores in seconds."""

import contextlib
import resource
from importlib import resources

import pytest
import yaml

from uplvp_hf.cli import main
from uplvp_hf.data.synthetic import CLASSES


@pytest.fixture
def label():
    """label(images, output, *more): the words of a cheap `uplvp label` with the small CLIP."""
    clip = resources.files("uplvp_hf") / "assets" / "synthetic_clip"

    def words(images, output, *more, vocabulary=None):
        vocabulary = ",".join(CLASSES) if vocabulary is None else vocabulary
        fixed = ["--template", "a photo of a {}", "--image-size", "64", "--window", "64", "--stride", "32"]
        named = ["--clip", clip, "--vocabulary", vocabulary, "--device", "cpu"]
        return ["label", *map(str, [images, "--output", output, *named, *fixed, "--quiet", *more])]

    return words


@pytest.fixture
def recipe(tmp_path, tiny_segmenter):
    """Path of a recipe: four updates at 64 px."""
    content = {
        "data": {"size": 64},
        "model": {"segmenter": tiny_segmenter("resnet")},
        "optim": {"steps": 4, "batch_size": 2, "lr": 1e-3, "warmup": 1},
        "checkpoint": {"every": 2},
        "log_every": 1,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


@pytest.fixture
def full_disk():
    """full_disk(bytes): within it, no file can grow beyond so many bytes, as if the disk were full."""

    @contextlib.contextmanager
    def limit(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def fails(capsys):
    """fails(words, *parts): the command returns 2 and says in one line, without traceback, all `parts`.

    Before it, training says what it uses.
    """

    def check(words, *parts):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        *before, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"uplvp {words[0]}: error: "), line
        assert all(words[0] == "finetune" and said.startswith("Training uses") for said in before), before
        for part in parts:
            assert str(part) in line
        return line

    return check
