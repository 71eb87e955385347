"""Tiny networks with random weights, and images, for the labeling tests."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from uplvp_hf.data.dataset import InstanceDataset
from uplvp_hf.data.rows import read_image_folder
from uplvp_hf.labeling.encoders.backbone import Encoder
from uplvp_hf.labeling.encoders.clip import Clip
from uplvp_hf.labeling.labelers.saliency import propose_batch

WORDS = ["a", "photo", "of", "the", "bear", "deer", "grizzly", "sky", ".", "itap", "bad", "large", "small"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[BOS]", "[UNK]", *WORDS, "[EOS]"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[BOS]", 1), ("[EOS]", vocabulary["[EOS]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=special)
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)


def tiny_clip(seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 3}
    vision |= {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(projection_dim=24, text_config=text, vision_config=vision)
    model = CLIPModel(config)
    with torch.no_grad():  # initialized biases and norms are constants: a forgotten one would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Clip(model.eval(), tokenizer, "tiny", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def tiny_siglip(naflex: bool = False, seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16, "projection_size": 48}
    text |= {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 3}
    vision |= {"patch_size": 8} | ({"num_patches": 16} if naflex else {"image_size": 32})
    config, kind = (Siglip2Config, Siglip2Model) if naflex else (SiglipConfig, SiglipModel)
    model = kind(config(text_config=text, vision_config=vision))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Clip(model.eval(), tokenizer, "tiny", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Pyramid(nn.Module):
    """Three strided convolutions with a linear classifier, with timm's methods."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.steps = nn.ModuleList(
            [nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 12, 2, stride=2), nn.Conv2d(12, 16, 2, stride=2)]
        )
        self.classifier = nn.Linear(16, classes)

    def forward_intermediates(self, x: torch.Tensor, intermediates_only: bool = False):
        maps = []
        for step in self.steps:
            x = step(x).relu()
            maps.append(x)
        return maps if intermediates_only else (x, maps)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x.mean(dim=(2, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_intermediates(x)[0])


def tiny_encoder() -> Encoder:
    return Encoder(Pyramid(), "tiny", (0.5,) * 3, (0.5,) * 3, num_classes=6)


class FixedEncoder(Encoder):
    """Returns a given last map, whatever the image."""

    def __init__(self, feature: torch.Tensor, shift: float = 0.0) -> None:
        super().__init__(nn.Identity(), "fixed", (0.5,) * 3, (0.5,) * 3, shift)
        self.feature = feature

    def __call__(self, pixels: torch.Tensor, stages=None) -> tuple[torch.Tensor, ...]:
        return (self.feature[None].expand(len(pixels), -1, -1, -1),)


def propose(feature: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Saliency's `propose_batch` for one map (C, h, w): soft masks (N, h, w) and their scores (N,), best first."""
    soft, scores, valid = propose_batch(feature[None], **options)
    return soft[0, valid[0]], scores[0, valid[0]]


def blob_image(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Noise with a bright disc."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    cx, cy = rng.integers(30, width - 30), rng.integers(20, height - 20)
    pixels[(x - cx) ** 2 + (y - cy) ** 2 < 18**2] += 180
    return Image.fromarray(pixels.astype(np.uint8))


def image_folder(folder, count: int) -> InstanceDataset:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        blob_image(k).save(folder / f"{k:03d}.png")
    return read_image_folder(folder)
