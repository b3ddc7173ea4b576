"""The curves as SVG files, the same bytes for the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

    from .figures import Growth


def draw(growth: Growth, directory: Path) -> None:
    """Write ``SLUG.svg``: medians as lines, the middle half of the values as bars."""
    # Text stays text, and no part of the file is random.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": growth.slug, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for series, marker in zip(growth.series, "osv^Dx", strict=False):
            spreads = [spread for _, spread in series.points]
            medians = [spread.median for spread in spreads]
            below = [spread.median - spread.low for spread in spreads]
            above = [spread.high - spread.median for spread in spreads]
            xs = [x for x, _ in series.points]
            axes.errorbar(xs, medians, yerr=[below, above], marker=marker, markersize=4, capsize=3, label=series.name)
        if growth.logarithmic:
            axes.set_xscale("log")
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=growth.title, xlabel=growth.x, ylabel=growth.y)
        axes.grid(visible=True, alpha=0.3)
        if len(growth.series) > 1:
            axes.legend()
        figure.savefig(directory / f"{growth.slug}.svg", metadata={"Date": None})
