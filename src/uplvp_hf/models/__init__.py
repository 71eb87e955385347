"""Tensors only: configurations, segmenters, the method, the image processor. Flat, so that it travels to the Hub."""
