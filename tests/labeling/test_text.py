"""Templates, background names, and text embeddings in files."""

import json

import pytest
import torch
import torch.nn.functional as F
from labeling_helpers import tiny_clip
from safetensors.torch import save_file

from uplvp_hf.labeling.encoders.prompt_templates import OPENAI80, TEMPLATES, read_background, read_templates
from uplvp_hf.labeling.encoders.text import (
    TextEmbeddings,
    embed_classes,
    load_text_embeddings,
    read_vocabulary,
    save_text_embeddings,
)

ENTRIES = ["bear, grizzly", "deer"]


@pytest.fixture(scope="module")
def text():
    clip = tiny_clip()
    return embed_classes(clip.model, clip.tokenizer, ENTRIES, ["the {}"])


def test_presets_files_and_single_templates(tmp_path):
    assert read_templates("bare") == ("{}",)
    assert read_templates("openai80") is OPENAI80 and len(set(OPENAI80)) == 80
    assert set(read_templates("openai7")) == set(TEMPLATES) < set(OPENAI80)
    assert all(template.count("{}") == 1 for template in OPENAI80)
    assert read_templates("a photo of a {}") == ("a photo of a {}",)
    file = tmp_path / "templates.txt"
    file.write_text("# mine\nthe {}\n\na # of {}\n")
    assert read_templates(file) == ("the {}", "a # of {}")
    for bad, message in [("openai", "neither a preset"), (["the"], r"got \['the'\]"), ([], "no template")]:
        with pytest.raises(ValueError, match=message):
            read_templates(bad)


def test_a_preset_of_templates_is_the_mean_of_its_members():
    clip = tiny_clip()
    got = embed_classes(clip.model, clip.tokenizer, ["bear"], "openai7").vectors[0]
    members = [embed_classes(clip.model, clip.tokenizer, ["bear"], [template]).vectors[0] for template in TEMPLATES]
    torch.testing.assert_close(got, F.normalize(torch.stack(members).mean(0), dim=0), atol=1e-5, rtol=1e-4)


def test_background_names(tmp_path):
    stuff = read_background("stuff")
    assert "sky" in stuff and len(set(stuff)) == len(stuff) > 20
    assert read_background("stuff", ["Sky, heaven", "tree"]) == [name for name in stuff if name not in ("sky", "tree")]
    file = tmp_path / "background.txt"
    file.write_text("sky  # above\n\nbrick wall\n")
    assert read_background(file) == ["sky", "brick wall"]
    assert read_background("sky, wall") == ["sky", "wall"] and read_background(None) == []
    assert read_background(["sky", "wall"]) == ["sky", "wall"]


def test_embeddings_survive_their_file(text, tmp_path):
    file = tmp_path / "text.safetensors"
    save_text_embeddings(file, text, encoder="tiny")
    assert text.names == ("bear", "grizzly", "deer")
    back = load_text_embeddings(file, ENTRIES)
    torch.testing.assert_close(back.vectors, text.vectors)
    assert back.owners.tolist() == [0, 0, 1] and back.count == 2 and back.names == text.names
    turned = load_text_embeddings(file, ["deer", "grizzly"])
    torch.testing.assert_close(turned.vectors, text.vectors[[2, 1]])
    assert load_text_embeddings(file).count == 3
    with pytest.raises(ValueError, match=r"no vector for 1 names, such as 'otter'; its 3 names begin with 'bear'"):
        load_text_embeddings(file, ["bear", "otter"])
    with pytest.raises(ValueError, match="3 text embeddings but 0 names"):
        save_text_embeddings(file, TextEmbeddings(text.vectors, text.owners, 2))


def test_files_of_others(tmp_path):
    """Not normalized, the classes in the columns, names in a file beside; other tensors around."""
    matrix = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)) * 9
    file = tmp_path / "text.safetensors"
    save_file({"weights": matrix, "logit_scale": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"no names in its metadata and no file .*text\.json"):
        load_text_embeddings(file)
    (tmp_path / "text.json").write_text(json.dumps(["bear", "deer"]))
    got = load_text_embeddings(file, ["deer", "bear"])
    torch.testing.assert_close(got.vectors, F.normalize(matrix.T[[1, 0]], dim=1))
    torch.testing.assert_close(load_text_embeddings(file, names=["deer", "bear"]).vectors, F.normalize(matrix.T, dim=1))
    bad = [
        (["bear"], "1 names for a matrix of \\(16, 2\\)"),
        (["bear", "bear"], "'bear' occurs twice"),
    ]
    for names, message in bad:
        with pytest.raises(ValueError, match=message):
            load_text_embeddings(file, names=names)
    (tmp_path / "text.json").write_text('{"bear": 0}')
    with pytest.raises(ValueError, match="must be a JSON list of words"):
        load_text_embeddings(file)
    save_file({"a": matrix, "b": matrix.clone()}, file)
    with pytest.raises(ValueError, match="needs one matrix"):
        load_text_embeddings(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_text_embeddings(file)
    with pytest.raises(ValueError, match="no such file"):
        load_text_embeddings(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_useless_vectors_are_named(tmp_path, value):
    matrix = torch.ones(2, 4)
    matrix[1] = value
    save_text_embeddings(tmp_path / "text.safetensors", TextEmbeddings(matrix, torch.arange(2), 2, ("bear", "deer")))
    assert load_text_embeddings(tmp_path / "text.safetensors", ["bear"]).count == 1
    with pytest.raises(ValueError, match=r"text\.safetensors: the vector of 'deer' is zero or not finite"):
        load_text_embeddings(tmp_path / "text.safetensors", ["bear", "deer"])


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "names.txt").write_text("bear\ndeer\n", encoding="utf-8-sig")
    assert read_vocabulary(tmp_path / "names.txt") == ["bear", "deer"]
