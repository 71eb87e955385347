"""Files of text embeddings: what one room writes, the others read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from uplvp_hf.data.text_embeddings import read_text_matrix, write_text_matrix

ROOT = Path(__file__).resolve().parents[2]


def test_round_trip_and_either_orientation(tmp_path):
    vectors = torch.randn(3, 5)
    write_text_matrix(tmp_path / "a.safetensors", vectors, ["bear", "deer", "otter"], encoder="clip")
    found, names = read_text_matrix(tmp_path / "a.safetensors")
    assert torch.equal(found, vectors) and names == ["bear", "deer", "otter"]
    save_file({"other": vectors.T.contiguous()}, tmp_path / "b.safetensors")
    found, _ = read_text_matrix(tmp_path / "b.safetensors", names)
    assert torch.equal(found, vectors)


@pytest.mark.parametrize(
    ("names", "wrong"),
    [(["a", "b"], "2 names for a matrix"), (["a", "b", "a"], "'a' occurs twice"), (None, "no names")],
)
def test_what_does_not_fit_is_named(tmp_path, names, wrong):
    save_file({"text": torch.zeros(3, 5)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=wrong):
        read_text_matrix(tmp_path / "c.safetensors", names)
    with pytest.raises(ValueError, match="but 1 names"):
        write_text_matrix(tmp_path / "d.safetensors", torch.zeros(2, 3), ["a"])
    assert not (tmp_path / "d.safetensors").exists()


def test_the_script_embeds_a_vocabulary_with_the_shipped_clip(load_script, tmp_path, capsys):
    script = load_script("embed_classes")
    clip = str(ROOT / "src" / "uplvp_hf" / "assets" / "synthetic_clip")
    out = tmp_path / "text.safetensors"
    assert script.main(["bear,deer", "--clip", clip, "--template", "bare", "--output", str(out)]) == 0
    vectors, names = read_text_matrix(out)
    assert names == ["bear", "deer"]
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert script.main(["bear,deer", "--clip", str(tmp_path), "--output", str(out)]) == 2
    assert "embed_classes:" in capsys.readouterr().err
