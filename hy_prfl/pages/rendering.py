"""Templates of all pages. What they are given is escaped; nothing they use comes from the network."""

import base64
import functools
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .figures import figure_uri


TEMPLATES = Path(__file__).with_name("templates")
MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".svg": "image/svg+xml"}


@functools.cache
def environment(folder: Path | None = None) -> jinja2.Environment:
    """
    The environment of the templates: undefined names are errors, all values are escaped.

    Args:
        folder (`Path`, *optional*): Folder of more templates, which may extend those of this package.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader([TEMPLATES] if folder is None else [folder, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (data_uri, figure_uri, number, percent, as_json)
    templates.filters |= {each.__name__: each for each in filters}
    templates.globals["style"] = style
    return templates


def render(name: str, *, folder: Path | None = None, **values: Any) -> str:
    """Text of a template, see `environment`."""
    return environment(folder).get_template(name).render(**values)


def style(*names: str) -> Markup:
    """Style sheets of this package, to be put into a page."""
    return Markup("\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names))


def data_uri(path: str | Path) -> str:
    """A file as a data URL."""
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
