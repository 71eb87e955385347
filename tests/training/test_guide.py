"""docs/training.md lists every setting of the loop with its default."""

import dataclasses
import json
import re
from pathlib import Path

from uplvp_hf.training.config import TrainSettings

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"


def written(value) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def test_every_setting_stands_in_the_guide_with_its_default():
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", GUIDE.read_text(), re.MULTILINE))
    expected = {}
    for key, value in dataclasses.asdict(TrainSettings()).items():
        if key == "data":  # has guides of its own
            continue
        inner = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        expected |= {name: written(item) for name, item in inner.items()}
    assert {name: text for name, text in rows.items() if name in expected} == expected
    assert not [name for name in rows if "." in name and name not in expected and ".json" not in name]
