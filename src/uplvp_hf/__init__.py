"""uplvp_hf: instance segmentation from many pictures and few labels."""

__version__ = "0.1.0"
