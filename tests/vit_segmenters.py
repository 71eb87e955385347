"""Settings of tiny segmenters whose backbone is part of them, for images of 64 x 64 pixels."""

VIT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_blocks": 2, "image_size": 64,
    "patch_size": 16, "num_register_tokens": 1, "train_num_points": 64,
}  # fmt: skip
WHOLE: dict[str, dict] = {  # segmenters whose backbone is part of them
    "eomt": {**VIT, "mlp_ratio": 2},
    "eomt_dinov3": {**VIT, "intermediate_size": 48, "pos_embed_rescale": None},
    "vit_mask_decoder": {
        "hidden_size": 32,
        "num_blocks": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "train_num_points": 64,
        "backbone_config": {
            "model_type": "dinov2_with_registers",
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 16,
            "mlp_ratio": 2,
            "out_features": ["stage1", "stage2"],
        },
    },
}

# RF-DETR as transformers has it, with two groups of queries in training.
GROUPS, QUERIES = 2, 16
RF_DETR = {
    "d_model": 32, "decoder_layers": 2, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4,
    "decoder_n_points": 2, "decoder_ffn_dim": 48, "num_queries": QUERIES, "group_detr": GROUPS, "dropout": 0.0,
    "intermediate_size": 48, "mask_point_sample_ratio": 16, "id2label": {0: "cat", 1: "dog", 2: "horse"},
    "backbone_config": {
        "model_type": "rf_detr_dinov2", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 64, "patch_size": 8, "num_windows": 2, "mlp_ratio": 2, "out_features": ["stage1", "stage2"],
    },
}  # fmt: skip
