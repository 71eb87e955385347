"""Frozen networks that labelers and namers look at images and words with."""
