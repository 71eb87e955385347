"""HTML pages from the templates of the library."""

from __future__ import annotations

import re
from typing import Any

import jinja2
from markupsafe import Markup, escape


def render(room: str, name: str, /, **values: Any) -> str:
    """The page `templates/NAME.html.j2` of a room of the library, such as `labeling`, with these values.

    Its filters `number` and `percent` write what cannot be computed, None, as a dash; `code` marks what stands between
    backticks.
    """
    loader = jinja2.PackageLoader(f"uplvp_hf.{room}")  # also of the templates that this one extends
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": _number, "percent": _percent, "code": _code}
    return environment.get_template(f"{name}.html.j2").render(**values)


def _code(text: str) -> Markup:
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}"
