"""HTML pages from the templates of the library."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2


def render(room: str, name: str, /, **values: Any) -> str:
    """The page `templates/NAME.html.j2` of a room of the library, such as `labeling`, with these values.

    Its filters `number` and `percent` write what cannot be computed, None, as a dash.
    """
    template = resources.files(f"uplvp_hf.{room}") / "templates" / f"{name}.html.j2"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": _number, "percent": _percent}
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}"
