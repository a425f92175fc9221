"""Pages, cards and summaries for people: the jinja2 templates of `ttmray/templates`, and their filters.

A page (`*.html.j2`) builds on `base.html.j2` and escapes every value that is not `Markup`. Markdown (`*.md.j2`) has no
such guard: texts from outside go through the filter `text`, or `cell` where Markdown is meant. A name that a template
asks for and does not get is an error.
"""

import math
import re
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#])")


def render(template: str, /, **values: Any) -> str:
    """The text that a template makes of values."""
    return _environment().get_template(template).render(values)


def source(name: str) -> str:
    """A file beside the templates as it stands, such as a script."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"number": number, "p_value": p_value, "text": text, "cell": cell}
    environment.filters |= {"yaml": as_yaml, "fenced": fenced}
    return environment


def number(value: float | None, digits: int, sign: str = "") -> str:
    """A number with real minus signs; a dash where it is not known."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−").replace("inf", "∞")


def p_value(value: float | None) -> str:
    """A p value; a dash where it is not known."""
    if value is None or math.isnan(value):
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def text(value: Any) -> str:
    """Any value as one line of Markdown that shows it as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def cell(value: Any) -> str:
    """One cell of a Markdown table, in which Markdown stays Markdown."""
    return " ".join(str(value).split()).replace("|", r"\|")


def as_yaml(value: Any) -> str:
    """YAML in the order of the value, ending in a newline."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def fenced(value: Any) -> str:
    """A block of YAML in Markdown that no text inside can end."""
    content = as_yaml(value)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", content)), default=0))
    return f"{fence}yaml\n{content}{fence}"
