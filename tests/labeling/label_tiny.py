"""A labeling run with a tiny random CLIP in a process of its own: `python label_tiny.py images labels`."""

import sys

import torch
from labeling_helpers import tiny_clip

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.labeling import DenseClipLabeler, label_images


def tiny_labeler():
    return DenseClipLabeler(tiny_clip(), ["bear", "deer"], image_size=48, window=32, stride=16, threshold=0.3)


def run(images, output):
    torch.set_num_threads(1)
    options = {"progress": False, "shard_size": 6, "batch_size": 4, "calibration_images": 9}
    return label_images(load_dataset_rows(images), tiny_labeler(), None, output, **options)


if __name__ == "__main__":
    print(run(*sys.argv[1:]).as_dict())
