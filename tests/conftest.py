"""What tests of several rooms need."""

import pytest


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory):
    """Six labelled synthetic scenes as a COCO folder."""
    from uplvp_hf.data.synthetic import write_scenes

    return write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", count=6, seed=0, size=96)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, scenes_dir):
    """A saved segmenter with random weights for the classes of the scenes, and its image processor."""
    import torch

    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.models.configuration_uplvp import UplvpConfig
    from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
    from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation

    dataset = load_dataset_rows(scenes_dir)
    backbone = {
        "model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
        "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }  # fmt: skip
    segmenter = {
        "model_type": "mask2former", "backbone_config": backbone, "feature_size": 32, "mask_feature_size": 32,
        "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 1,
        "decoder_layers": 3, "num_attention_heads": 2, "num_queries": 12,
    }  # fmt: skip
    torch.manual_seed(0)
    config = UplvpConfig(
        id2label=dataset.id2label, category_ids=[10 * i for i in dataset.category_ids], segmenter_config=segmenter
    )
    folder = tmp_path_factory.mktemp("model")
    UplvpForInstanceSegmentation(config).save_pretrained(folder)
    UplvpImageProcessor(size={"longest_edge": 64}).save_pretrained(folder)
    return folder
