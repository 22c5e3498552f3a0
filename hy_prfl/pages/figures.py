"""Plots for pages: without a background of their own and in colours that can be read on light and on dark ones."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter


INK = "#858d98"
COLORS = ("#3b82c4", "#e0762f", "#4ba37a", "#a06cc9", "#c2557a", "#b59a2c")
# Points of a curve; with fewer, each has a marker.
MANY = 20

Points = Sequence[tuple[float, float]]


def new_figure(title: str, label: str) -> tuple[Figure, Any]:
    """An empty plot with a title and a label of its x axis."""
    # Margins by hand: matplotlib's layouts cost more time than all the rest of a plot.
    figure = Figure(figsize=(5.2, 3.1))
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.16, top=0.9)
    axes = figure.add_subplot()
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.set_xlabel(label, color=INK)
    axes.tick_params(colors=INK)
    # Not a common factor above the axis, which would push the title out of the picture.
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def draw_curves(
    title: str,
    label: str,
    curves: Mapping[str, Points],
    *,
    colors: Mapping[str, str] | None = None,
    is_share: bool = False,
    whole: bool = False,
    always_marked: bool = False,
) -> Figure:
    """
    A plot of some curves with a legend.

    Args:
        curves (`Mapping[str, Sequence[tuple[float, float]]]`): Points by the name of the curve.
        colors (`Mapping[str, str]`, *optional*): Colours by name; others come from `COLORS`.
        is_share (`bool`): Whether values are in [0, 1], and the whole range is shown.
        whole (`bool`): Whether x is counted in whole numbers.
        always_marked (`bool`): Whether each point has a marker, however many there are.
    """
    figure, axes = new_figure(title, label)
    for index, (name, points) in enumerate(curves.items()):
        color = (colors or {}).get(name, COLORS[index % len(COLORS)])
        marker = "o" if always_marked or len(points) < MANY else ""
        axes.plot(*zip(*points, strict=True), label=name, color=color, marker=marker)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if is_share:
        axes.set_ylim(-0.03, 1.03)
    add_legend(axes)
    return figure


def add_legend(axes: Any) -> None:
    """A legend without a frame."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def figure_uri(figure: Figure) -> str:
    """The figure as a data URL of an SVG image, whose texts stay text."""
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
