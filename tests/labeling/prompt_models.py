"""Tiny random models of transformers' own classes, saved as folders: SAMs, zero-shot detectors, SAM 3."""

import torch
from labeling_helpers import tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, CLIPTextConfig, PreTrainedTokenizerFast, SwinConfig

CLIP_TEXT = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CLIP_TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": 16, "bos_token_id": 1}
CLIP_TEXT |= {"pad_token_id": 0}


def save(folder, model, *processors, seed=0, spread=0.1):
    """Random weights, of biases and norms too: those that initialization leaves constant would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    return str(folder)


def bert_tokenizer():
    """With the ids of BERT that Grounding DINO knows: 101, 102, and 1012 for the full stop, 1029 for "?"."""
    words = {f"[unused{k}]": k for k in range(1030)}
    for word, number in {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}.items():
        words.pop(f"[unused{number}]")
        words[word] = number
    words |= {word: 1030 + k for k, word in enumerate(["bear", "deer", "otter", "red", "brown", "big"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 101), ("[SEP]", 102)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def swin(stages):
    sizes = {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 4}
    return SwinConfig(**sizes, out_features=stages)


def grounding_dino(folder, kind="grounding-dino"):
    from transformers import (
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        MMGroundingDinoConfig,
        MMGroundingDinoForObjectDetection,
    )

    text = BertConfig(vocab_size=1040, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    sizes = {"d_model": 32, "num_queries": 12, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48}
    sizes |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_text_len": 64}
    config, model = (
        (GroundingDinoConfig, GroundingDinoForObjectDetection)
        if kind == "grounding-dino"
        else (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection)
    )
    torch.manual_seed(0)
    built = model(config(backbone_config=swin(["stage2", "stage3"]), text_config=text, num_feature_levels=3, **sizes))
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return save(folder, built, GroundingDinoProcessor(images, bert_tokenizer()))


def owl(folder, kind="owlv2"):
    from transformers import (
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
        OwlViTConfig,
        OwlViTForObjectDetection,
        OwlViTImageProcessor,
        OwlViTProcessor,
    )

    config, model, images, processor = {
        "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor),
        "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor),
    }[kind]
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 48, "patch_size": 8}
    torch.manual_seed(0)
    built = model(config(text_config=CLIP_TEXT, vision_config=vision, projection_dim=32))
    return save(folder, built, processor(images(size={"height": 48, "width": 48}), tiny_tokenizer()))


def omdet(folder):
    from transformers import DetrImageProcessor, OmDetTurboConfig, OmDetTurboForObjectDetection, OmDetTurboProcessor

    sizes = {"encoder_hidden_dim": 64, "decoder_hidden_dim": 64, "class_embed_dim": 32, "text_projection_in_dim": 32}
    sizes |= {"text_projection_out_dim": 32, "task_encoder_hidden_dim": 48, "num_queries": 10, "decoder_num_layers": 2}
    sizes |= {"encoder_attention_heads": 4, "decoder_num_heads": 4, "encoder_dim_feedforward": 48}
    sizes |= {"decoder_dim_feedforward": 48, "vision_features_channels": [64, 64, 64], "image_size": 64}
    sizes |= {"encoder_in_channels": [16, 32, 64], "apply_layernorm_after_vision_backbone": False}
    text = CLIPTextConfig(**{**CLIP_TEXT, "max_position_embeddings": 80, "projection_dim": 32})
    torch.manual_seed(0)
    built = OmDetTurboForObjectDetection(
        OmDetTurboConfig(
            backbone_config=swin(["stage1", "stage2", "stage3"]), text_config=text, use_timm_backbone=False, **sizes
        )
    )
    size = {"height": 64, "width": 64}
    return save(folder, built, OmDetTurboProcessor(DetrImageProcessor(size=size, do_pad=False), tiny_tokenizer()))


def sam3(folder):
    from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    vit = {**small, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14, "window_size": 2}
    vit |= {"global_attn_indexes": [1], "pretrain_image_size": 28, "model_type": "sam3_vit_model"}
    vision = {"backbone_config": vit, "fpn_hidden_size": 32, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    text = {**CLIP_TEXT, "projection_dim": 24, "model_type": "clip_text_model"}
    torch.manual_seed(0)
    built = Sam3Model(
        Sam3Config(
            vision_config=vision,
            text_config=text,
            geometry_encoder_config={**small, "num_layers": 1},
            detr_encoder_config={**small, "num_layers": 1},
            detr_decoder_config={**small, "num_layers": 2, "num_queries": 6},
            mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
        )
    )
    images = Sam3ImageProcessor(size={"height": 56, "width": 56})
    return save(folder, built, Sam3Processor(images, tiny_tokenizer()))


def sam(folder, kind="sam"):
    """The mask decoder is spread further, by seeds whose masks differ from box to box."""
    from transformers import (
        Sam2Config,
        Sam2ImageProcessor,
        Sam2Model,
        Sam2Processor,
        SamConfig,
        SamHQConfig,
        SamHQModel,
        SamHQProcessor,
        SamImageProcessor,
        SamModel,
        SamProcessor,
    )

    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder |= {"iou_head_hidden_dim": 16, "iou_head_depth": 2}
    torch.manual_seed(0)
    if kind == "sam2":
        hiera = {"hidden_size": 8, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1]}
        hiera |= {"embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2]}
        hiera |= {"window_size_per_stage": [8, 8, 8, 8], "global_attention_blocks": [3]}
        hiera |= {"model_type": "sam2_hiera_det_model", "window_positional_embedding_background_size": [2, 2]}
        vision = {"backbone_config": hiera, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16}
        vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
        prompt |= {"patch_size": 16}
        built = Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
        size = {"height": 64, "width": 64}
        processor = Sam2Processor(Sam2ImageProcessor(size=size, mask_size={"height": 16, "width": 16}))
    else:
        vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8}
        if kind == "sam_hq":
            decoder |= {"vit_dim": 16}
        config, model = (SamConfig, SamModel) if kind == "sam" else (SamHQConfig, SamHQModel)
        built = model(config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
        sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
        sizes |= {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
        processor = (SamProcessor if kind == "sam" else SamHQProcessor)(SamImageProcessor(**sizes))
    torch.manual_seed({"sam": 5, "sam_hq": 2, "sam2": 0}[kind])
    for parameter in built.mask_decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return save(folder, built, processor, spread=0.02)
