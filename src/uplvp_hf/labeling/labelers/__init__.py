"""Labelers: what proposes masks for an image."""
