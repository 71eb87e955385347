"""The settings language: dataclasses, dicts, `section.key=value` words, and one kind of message."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from uplvp_hf.settings import ConfigError, Settings, build_settings, describe, merge_words, setting


@dataclass
class Inner(Settings):
    count: int = setting(3, "how many", least=1)
    low: float = setting(0.0, "lower bound", least=0, below=1)
    high: float | None = setting(None, "upper bound; none: no bound")
    mode: str = setting("a", "way of going on", choices=("a", "none", "bold"))
    kind: str | None = setting(None, "kind of thing", choices=("round", "square"))
    sizes: list[int] = setting([1, 2], "in pixels", above=0)
    shape: int | tuple[int, int] = setting(5, "one side, or height and width")
    names: str | list[str] = setting("", "what to call it")
    flag: bool = setting(False, "whether")
    table: dict[str, Any] | None = setting(None, "free settings")
    knob: float = setting(1.0, "of mode bold", only=("mode", "bold"))


@dataclass
class Outer(Settings):
    title: str = setting("", "of everything")
    inner: Inner = field(default_factory=Inner)
    tables: dict[str, Inner] = field(default_factory=dict)


def inner(*words):
    values = {}
    merge_words(values, [f"inner.{word}" for word in words])
    return build_settings(Outer, values).inner


@pytest.mark.parametrize(
    "word, want",
    [
        ("count=7", 7),
        ("count=7.0", 7),
        ("count=1e3", 1000),
        ("low=1e-3", 0.001),  # text to YAML
        ("high=none", None),
        ("high=null", None),
        ("high=", None),
        ("high=.5", 0.5),
        ("high=2", 2.0),
        ("mode=none", "none"),  # one of its choices
        ("kind=none", None),
        ("sizes=4,5", [4, 5]),
        ("sizes=640, 800", [640, 800]),
        ("sizes=[4, 5]", [4, 5]),
        ("sizes=4", [4]),
        ("sizes=[]", []),
        ("shape=9", 9),
        ("shape=9,8", (9, 8)),
        ("names=a photo of a {}", "a photo of a {}"),
        ("names=@list", "@list"),
        ("names=*.json", "*.json"),
        ("names=off", "off"),
        ("names=12", "12"),
        ("names=['a {}', b]", ["a {}", "b"]),
        ("flag=true", True),
        ("table={a: 1}", {"a": 1}),
        ("table.a=off", {"a": False}),
    ],
)
def test_a_value_means_the_same_in_words_and_in_files(word, want):
    key, _, text = word.partition("=")
    got = getattr(inner(word), key.partition(".")[0])
    assert got == want and type(got) is type(want)
    if "." not in key and not text.startswith(("[", "{")) and text not in ("off", "12", ""):
        import yaml

        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        again = getattr(build_settings(Outer, {"inner": {key: value}}).inner, key)
        assert again == want and type(again) is type(want)


@pytest.mark.parametrize(
    "word, message",
    [
        ("count=many", "`inner.count` must be a whole number, got 'many'"),
        ("count=1.5", "`inner.count` must be a whole number, got 1.5"),
        ("count=true", "`inner.count` must be a whole number, got True"),
        ("count=", "`inner.count` needs a value: a whole number"),
        ("count=none", "`inner.count` must be a whole number, got 'none'"),
        ("count=0", "`inner.count` must be at least 1, got 0"),
        ("low=nan", "`inner.low` must be a number, got 'nan'"),
        ("low=1", "`inner.low` must be at least 0 and below 1, got 1.0"),
        ("high=[1]", r"`inner.high` must be a number or none, got \[1\]"),
        ("mode=bald", "`inner.mode` must be one of a, none, bold, got `bald`. Did you mean `bold`"),
        ("mode=[a]", r"`inner.mode` must be one of a, none, bold, got `\[a\]`"),
        ("sizes=a,b", r"`inner.sizes\[0\]` must be a whole number, got 'a'"),
        ("sizes=4,0", "`inner.sizes` must be above 0, got 0"),
        ("shape=1,2,3", "`inner.shape` must be a whole number or 2 whole numbers"),
        ("flag=1", "`inner.flag` must be true or false, got 1"),
        ("table=3", "`inner.table` must be a mapping or none, got 3"),
        ("cuont=3", r"Unknown setting `inner.cuont`. Did you mean `inner.count`\?"),
        ("titlee=x", r"Unknown setting `inner.titlee`. Did you mean `title`\?"),
        ("zzz=1", "Unknown setting `inner.zzz`. Known here: inner.count, inner.low"),
        ("knob=2", "`inner.knob` has no effect with `inner.mode=a`; leave it out"),
        ("count", "`inner.count` is not of the form section.key=value"),
        ("=3", "`inner.=3` is not of the form section.key=value"),
        ("count.more=3", "`inner.count` must be a whole number, got {'more': 3}"),
    ],
)
def test_mistakes_have_one_kind_of_message(word, message):
    with pytest.raises(ConfigError, match=message):
        inner(word)


def test_limits_hold_for_objects_made_in_python():
    with pytest.raises(ConfigError, match="`count` must be at least 1, got 0"):
        Inner(count=0)
    with pytest.raises(ConfigError, match="`mode` must be one of"):
        Inner.of(mode="c")
    assert Inner().sizes is not Inner().sizes
    base = Inner.of(count="7")
    changed = Inner.of(base, high="1e-3")
    assert (changed.count, changed.high, changed.given) == (7, 0.001, {"count", "high"})
    assert Inner(count=7).given == {"count"} and Inner.of(count=3).given == {"count"} and Inner().given == set()
    with pytest.raises(TypeError, match="lest"):
        setting(1, "", lest=2)


def test_tables_sections_and_later_words():
    values = {"tables": {"one": {"count": 2}, "two": None}}
    merge_words(values, ["title=x", "tables.one.low=.5", "title=y"])
    settings = build_settings(Outer, values)
    assert settings.title == "y" and settings.tables == {"one": Inner(count=2, low=0.5), "two": Inner()}
    for values, message in [
        ({"inner": 3}, "`inner` is a section and needs"),
        ({"tables": 3}, "`tables` is a table and needs"),
        ({"tables": {"one": 3}}, "`tables.one` is a section"),
        ({"tables": {"one": {"cuont": 3}}}, "Did you mean `tables.one.count`"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_settings(Outer, values)


def test_help_says_kind_limits_default_and_meaning():
    text = describe(Outer)
    assert "  title\n      text; default empty. of everything" in text
    assert "  inner.count\n      a whole number, at least 1; default 3. how many" in text
    assert "  inner.mode\n      one of a, none, bold; default a. way of going on" in text
    assert "  inner.kind\n      one of round, square or none; default none." in text
    assert "  inner.sizes\n      a list of whole numbers, above 0; default 1,2. in pixels" in text
    assert "  inner.flag\n      true or false; default false. whether" in text


def test_every_setting_of_training_has_a_meaning():
    import dataclasses

    from uplvp_hf.training.config import TrainSettings

    text = describe(TrainSettings)
    for section in dataclasses.fields(TrainSettings):
        fields = [section]
        if section.default is dataclasses.MISSING:
            fields = dataclasses.fields(section.default_factory)
        for item in fields:
            assert item.metadata["meaning"], item.name
            assert f"{item.name}\n" in text


def test_settings_are_light():
    code = "import sys, uplvp_hf.settings, uplvp_hf.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
