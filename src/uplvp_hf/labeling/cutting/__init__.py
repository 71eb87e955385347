"""From soft maps to instances: thresholds, components, splitting, refinement, filters, non-maximum suppression."""
