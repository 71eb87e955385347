"""The whole path on generated scenes: no data, weights or network needed."""
