"""NAME=VALUE words against constructors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from uplvp_hf.commands._settings import (
    check_name,
    coerce,
    describe,
    read_assignments,
    read_meanings,
    read_options,
    settings_of,
    takes_anything,
)


class Maker:
    """Makes things.

    Args:
        model: loaded before. count: how many; see `other`: not a setting.
        low, high: bounds, from 0
            to 1. mode: "a" or "b".
        sizes: see `helper`.

    Raises ValueError for count: never.
    """

    def __init__(
        self,
        model: "Unknown",  # noqa: F821
        count: int = 3,
        low: float = 0.0,
        high: float | None = None,
        mode: str = "a",
        sizes: "Sequence[int]" = (1, 2),
        shape: int | tuple[int, int] = 5,
        names: str | Sequence[str] = (),
        flag: bool = False,
        table: Mapping[str, Any] | None = None,
        free=None,
        other: "Unknown | None" = None,  # noqa: F821
        **more: Any,
    ) -> None:
        """Nothing."""


@dataclass
class Knobs:
    """Knobs of a maker. turns: of the knob."""

    turns: int = 2
    mode: str = "z"


def helper(sizes: Sequence[int]) -> None:
    """Helps. sizes: in pixels."""


SETTINGS = settings_of([Maker, Knobs], ("model",), [helper])


def test_constructors_become_settings():
    assert list(SETTINGS) == ["count", "low", "high", "mode", "sizes", "shape", "names", "flag", "table", "free",
                              "other", "turns"]  # fmt: skip
    assert SETTINGS["mode"].default == "a" and SETTINGS["turns"].default == 2
    meanings = {name: setting.meaning for name, setting in SETTINGS.items()}
    assert meanings["count"] == "how many; see `other`: not a setting."
    assert meanings["low"] == meanings["high"] == "bounds, from 0 to 1."
    assert meanings["mode"] == '"a" or "b".' and meanings["turns"] == "of the knob."
    assert meanings["sizes"] == "in pixels." and meanings["free"] == ""
    assert SETTINGS["high"].kind_text == "float | None" and SETTINGS["sizes"].kind_text == "Sequence[int]"
    assert takes_anything(Maker) and not takes_anything(Knobs)
    text = describe("Title", SETTINGS)
    assert "count = 3    (int)\n      how many" in text and text.startswith("Title\n")
    assert read_meanings("", ["a"]) == {"a": ""}


@pytest.mark.parametrize(
    "word, want",
    [
        ("count=7", 7),
        ("count=7.0", 7),
        ("low=1", 1.0),
        ("low=1e-3", 0.001),  # a word to YAML
        ("high=none", None),
        ("high=null", None),
        ("high=.5", 0.5),
        ("mode=none", "none"),
        ("mode=5", "5"),
        ("sizes=4,5", [4, 5]),
        ("sizes=[4, 5]", [4, 5]),
        ("sizes=4", [4]),
        ("shape=9", 9),
        ("shape=9,8", (9, 8)),
        ("names=a photo of a {}", "a photo of a {}"),
        ("names=['a {}', b]", ["a {}", "b"]),
        ("flag=true", True),
        ("table={a: 1}", {"a": 1}),
        ("free=[1, x]", [1, "x"]),
    ],
)
def test_values(word, want):
    ((name, value),) = read_assignments([word]).items()
    got = coerce(SETTINGS[name], value)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    "word, kind",
    [
        ("count=many", "int"),
        ("count=1.5", "int"),
        ("count=true", "int"),
        ("count=", "int"),
        ("low=wide", "float"),
        ("low=none", "float"),
        ("high=[1]", r"float \| None"),
        ("mode=[a]", "str"),
        ("sizes=a,b", r"Sequence\[int\]"),
        ("shape=1,2,3", r"int \| tuple\[int, int\]"),
        ("flag=1", "bool"),
        ("table=3", r"Mapping"),
    ],
)
def test_wrong_values(word, kind):
    ((name, value),) = read_assignments([word]).items()
    with pytest.raises(ValueError, match=rf"--set {name}=.*: must be .*{kind}"):
        coerce(SETTINGS[name], value)


def test_words_and_names(tmp_path):
    assert read_assignments(["min-area=3", "x=a=b"]) == {"min_area": 3, "x": "a=b"}
    for words, message in [(["count"], "write NAME=VALUE"), (["=3"], "write NAME=VALUE"), (["a=1", "a=2"], "twice")]:
        with pytest.raises(ValueError, match=message):
            read_assignments(words)
    check_name("count", SETTINGS, "the maker")
    with pytest.raises(ValueError, match=r"cuont: the maker has no such setting. Did you mean count\? \(it has co"):
        check_name("cuont", SETTINGS, "the maker")
    with pytest.raises(ValueError, match="it has none"):
        check_name("count", {}, "the maker")
    assert read_options('{"a": 1, b: [2]}') == {"a": 1, "b": [2]}
    (tmp_path / "o.yaml").write_text("a: 1\n")
    assert read_options(str(tmp_path / "o.yaml")) == {"a": 1}
    (tmp_path / "list.json").write_text("[1]")
    for text, message in [("nowhere.json", "no such file"), ("{", "not JSON"), (str(tmp_path / "list.json"), "map")]:
        with pytest.raises(ValueError, match=message):
            read_options(text)
