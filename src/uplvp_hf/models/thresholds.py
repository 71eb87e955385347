"""The default thresholds of whatever shows instances: pipeline, endpoint, page, `uplvp predict`, reports and cards."""

# Least score, measured by scripts/measure_threshold.py: the table and the reason are in docs/inference.md.
SCORE_THRESHOLD = 0.5
# Least probability of a mask's pixels.
MASK_THRESHOLD = 0.5
