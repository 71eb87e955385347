"""What would help most next: more labels, more images or more time, from what the runs have measured."""

from __future__ import annotations

import math
from typing import Any


def advise(data: dict[str, Any], rows: dict[str, dict[str, Any]], best: str) -> list[dict[str, Any]]:
    """[{what, gain, how}], most helpful first. gain: AP (0 to 1) that twice as much brings, as far as it can be told.

    rows: of the benchmark, by arm. best: the arm that is taken.

    labels: AP with all of them less AP with half. time: AP at the end less AP at half of the steps. images: what
    pre-training brought, as if every doubling of its images had brought the same. All assume that the next doubling
    brings what the last one did, which is more than it usually does.
    """
    end = rows[best]["metrics"]["AP"] or 0.0
    found = []
    if "half the labels" in rows:
        gain = end - (rows["half the labels"]["metrics"]["AP"] or 0.0)
        found.append({"what": "labels", "gain": gain, "how": "all labels against half of them"})
    curve = {int(step): value or 0.0 for step, value in rows[best]["curve"].items()}
    if len(curve) > 1:
        *_, half, _ = sorted(curve)
        found.append(
            {"what": "time", "gain": end - curve[half], "how": "all steps of fine-tuning against half of them"}
        )
    if "pre-trained" in rows:
        gain = (rows["pre-trained"]["metrics"]["AP"] or 0.0) - (rows["no pre-training"]["metrics"]["AP"] or 0.0)
        doublings = math.log2(max(2, data["images"]))
        how = f"pre-training on {data['images']} images against none, by doubling"
        found.append({"what": "images", "gain": gain / doublings, "how": how})
    return sorted(found, key=lambda one: -one["gain"])


def noise(instances: int) -> float:
    """About how far two AP may lie apart by chance: two standard errors of a share, of so many objects."""
    return 1.0 / math.sqrt(max(1, instances))
