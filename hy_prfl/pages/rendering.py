"""Templates of all pages. What they are given is escaped; nothing they use comes from the network."""

import base64
import functools
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup


TEMPLATES = Path(__file__).with_name("templates")
MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".svg": "image/svg+xml"}


@functools.cache
def environment() -> jinja2.Environment:
    """The environment of the templates: undefined names are errors, all values are escaped."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"data_uri": data_uri, "number": number, "percent": percent, "as_json": as_json}
    templates.globals["style"] = style
    return templates


def render(name: str, **values: Any) -> str:
    """Text of a template."""
    return environment().get_template(name).render(**values)


def style(*names: str) -> Markup:
    """Style sheets of this package, to be put into a page."""
    return Markup("\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names))


def data_uri(path: str | Path) -> str:
    """A file as an address that holds it."""
    path = Path(path)
    return f"data:{MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def number(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits, `-` for None. Whole numbers and texts stay as they are."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def percent(value: float | None, digits: int = 0) -> str:
    """A share as per cent, `-` for None."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def as_json(value: Any) -> str:
    """A value of an option as it would be written in JSON."""
    return json.dumps(value, default=str, ensure_ascii=False)
