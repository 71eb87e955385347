"""Loading, and patches in the text space, against the models' own code."""

import json

import pytest
import torch
import torch.nn.functional as F
from labeling_helpers import blob_image, tiny_clip, tiny_siglip, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from uplvp_hf.labeling.encoders.clip import OPENAI_MEAN, load_clip
from uplvp_hf.labeling.encoders.text import embed_classes
from uplvp_hf.labeling.encoders.windows import dense_features
from uplvp_hf.labeling.settings import ATTENTIONS, Recipe

SIZE = 48, 24  # pixels, higher than wide


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))


def saved(clip, folder):
    clip.model.save_pretrained(folder)
    clip.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("naflex", [False, True])
def test_a_siglip_patch_is_what_the_head_returns_for_it_alone(pixels, naflex):
    clip = tiny_siglip(naflex)
    vision = clip.vision
    with torch.inference_mode():
        if naflex:
            patches = torch.stack([convert_image_to_patches(image, 8) for image in pixels])
            shapes, mask = torch.tensor([[6, 3]] * 2), torch.ones(2, 18, dtype=torch.int64)
            last = vision(patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
        else:
            last = vision(pixels, interpolate_pos_encoding=True).last_hidden_state
        want = torch.stack([F.normalize(vision.head(last[:, k : k + 1]), dim=-1) for k in range(18)], dim=2)
    got = dense_features(clip, pixels, Recipe("vanilla"))
    assert got.shape == (2, 48, 6, 3)
    torch.testing.assert_close(got.flatten(2), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip, lambda: tiny_siglip(True)])
def test_whole_images_and_texts_equal_the_models_own(make):
    clip = make()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    patched = clip.model.config.model_type == "siglip2"
    inputs = {"pixel_values": pixels}
    if patched:
        inputs = {
            "pixel_values": torch.stack([convert_image_to_patches(image, 8) for image in pixels]),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
    prompts = ["a photo of a bear", "deer"]
    padding = True if clip.prefix else "max_length"
    with torch.inference_mode():
        images = clip.model.get_image_features(**inputs).pooler_output
        tokens = tiny_tokenizer()(prompts, padding=padding, truncation=True, max_length=16, return_tensors="pt")
        mask = {"attention_mask": tokens.attention_mask} if clip.prefix else {}
        texts = clip.model.get_text_features(input_ids=tokens.input_ids, **mask).pooler_output
    torch.testing.assert_close(clip.encode_images(pixels), images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clip.encode_texts(prompts), texts, atol=1e-5, rtol=1e-4)
    assert clip.dimension == images.shape[1] == texts.shape[1]
    assert (clip.image_size, clip.patch_size) == (32, 8)


def test_load_clip_round_trip(tmp_path):
    folder = saved(tiny_clip(), tmp_path)
    loaded = load_clip(folder)
    assert loaded.image_mean == OPENAI_MEAN  # no preprocessor configuration
    assert (loaded.image_size, loaded.patch_size, loaded.license) == (32, 8, None)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}'
    )
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert load_clip(folder).image_mean == (0.1, 0.2, 0.3) and load_clip(folder).license == "mit"
    assert load_clip(folder, image_mean=(0.5,) * 3, image_std=(0.5,) * 3).image_mean == (0.5,) * 3


@pytest.mark.parametrize("naflex", [False, True])
def test_siglip_round_trip(tmp_path, naflex, pixels):
    clip = tiny_siglip(naflex)
    loaded = load_clip(saved(clip, tmp_path))
    assert loaded.image_mean == (0.5,) * 3 and loaded.prefix == 0
    for attention in ATTENTIONS:
        if attention != "proxy":
            got, want = (dense_features(one, pixels, Recipe(attention)) for one in (loaded, clip))
            torch.testing.assert_close(got, want)


def test_recommended_settings_beside_the_weights(tmp_path):
    folder = saved(tiny_clip(), tmp_path)
    assert load_clip(folder).recommended == {}
    (tmp_path / "labeling.json").write_text('{"sigma": 2.5}')
    assert load_clip(folder).recommended == {"sigma": 2.5}
    for content, message in (("[1]", "labeling.json: must map settings .* got a list"), ("{", "not JSON")):
        (tmp_path / "labeling.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_clip(folder)


def test_bfloat16_weights_give_float32_features_near_the_exact_ones(tmp_path, pixels):
    folder = saved(tiny_clip(), tmp_path)
    exact, rounded = load_clip(folder), load_clip(folder, dtype="bfloat16")
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    for attention in ("vanilla", "naclip", "gem"):
        a, b = (dense_features(clip, pixels, Recipe(attention)) for clip in (exact, rounded))
        assert b.dtype == torch.float32
        torch.testing.assert_close(b.norm(dim=1), torch.ones(2, 6, 3))
        assert (a * b).sum(dim=1).min() > 0.98
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        load_clip(folder, dtype="int8")


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
def test_the_image_tower_alone(tmp_path, make, pixels):
    clip = make()
    alone = load_clip(saved(clip, tmp_path), text_tower=False)
    torch.testing.assert_close(dense_features(alone, pixels), dense_features(clip, pixels))
    square = clip.pixels([blob_image(0)], (32, 32))
    torch.testing.assert_close(alone.encode_images(square), clip.encode_images(square))
    alone.model.save_pretrained(tmp_path / "vision")  # a folder that never had a text tower
    again = load_clip(str(tmp_path / "vision"), text_tower=False)
    torch.testing.assert_close(dense_features(again, pixels), dense_features(clip, pixels))
    with pytest.raises(ValueError, match="has no text tower; load it with text_tower=False"):
        load_clip(str(tmp_path / "vision"))
    with pytest.raises(ValueError, match="without its text tower"):
        alone.encode_texts(["a bear"])
    with pytest.raises(ValueError, match="without its text tower"):
        embed_classes(alone.model, alone.tokenizer, ["bear"])


def test_incomplete_and_foreign_checkpoints_are_refused(tmp_path):
    folder = saved(tiny_clip(), tmp_path / "clip")
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are not in the checkpoint, such as"):
        load_clip(folder)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a bert model; the clip labeler reads clip, siglip, siglip2"):
        load_clip(str(tmp_path / "bert"))
