"""Words that settings of few-shot models take. Light to import: recipes are checked before torch is loaded."""

CONDITIONING = ("prompt", "prototype")
SUPPORT_MAPS = ("fine", "prompt")
NORMALIZATIONS = ("layer", "none")
SCORES = ("head_similarity", "head")
