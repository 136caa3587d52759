"""Charts as plotly figures; the page sets the colours of lines and text, which follow its theme."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale, unlabel_rgb

from lata_lightning.display.charts import Chart, HeatMap, Lines, ink_on

# Name of a colour scale and the range of it that is used: the ends of the diverging scale are nearly black, and greys stay pale.
_COLOURS = {"rising": ("Viridis", (0.0, 1.0)), "diverging": ("PuOr", (0.1, 0.9)), "muted": ("Greys", (0.1, 0.5))}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
_MOST_ROWS, _MOST_NUMBERS = 24, 8
"""Largest numbers of rows or columns with gaps between the cells, and of columns with numbers in the cells."""


def plotly_figure(chart: Chart) -> go.Figure:
    """Return the chart as a plotly figure with unrounded values; ``meta`` says which colours of the page each trace uses."""
    figure = _heat_map(chart) if isinstance(chart, HeatMap) else _lines(chart)
    figure.update_layout(template="none", margin={"l": 8, "r": 8, "t": 8, "b": 8}, dragmode=False, autosize=True)
    figure.update_layout(hovermode="closest" if isinstance(chart, HeatMap) else "x unified")
    figure.update_xaxes(automargin=True, fixedrange=True)
    figure.update_yaxes(automargin=True, fixedrange=True)
    return figure


def plotly_json(chart: Chart) -> str:
    """Return data and layout as JSON for a script element, escaped so that nothing in it can end the element."""
    figure: dict[str, Any] = json.loads(plotly_figure(chart).to_json())
    text = json.dumps({"data": figure["data"], "layout": figure["layout"]}, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _heat_map(chart: HeatMap) -> go.Figure:
    low, high = chart.limits
    name, ends = _COLOURS["muted" if chart.muted else "diverging" if chart.diverging else "rising"]
    scale = sample_colorscale(name, 9, *ends)
    columns, rows = _shown(chart.columns), _shown(chart.rows)
    gap = 1 if len(columns) <= _MOST_ROWS and len(rows) <= _MOST_ROWS else 0
    trace = go.Heatmap(
        z=chart.values,
        x=columns,
        y=rows,
        zmin=low,
        zmax=high,
        colorscale=scale,
        hoverongaps=False,
        xgap=gap,
        ygap=gap,
        hovertemplate=f"%{{y}}<br>%{{x}}<br>{_literal(chart.value_title)} %{{z:{chart.form}}}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0, "xpad": 6, "ticklen": 3, "nticks": 5},
        meta={"colours": name},
    )
    # Few rows are as high as a finger is wide; many rows are thinner, so that the figure fits a screen.
    height = max(26 * len(rows), 96) if len(rows) <= 16 else min(320 + 6 * len(rows), 720)
    figure = go.Figure(trace, {"height": height + 64})
    if len(columns) <= _MOST_NUMBERS and len(rows) <= _MOST_ROWS:
        cells = [
            (column, row, value)
            for row, values in zip(rows, chart.values, strict=True)
            for column, value in zip(columns, values, strict=True)
            if value is not None
        ]
        shades = sample_colorscale(scale, [min(max((value - low) / (high - low), 0.0), 1.0) for *_, value in cells]) if cells else []
        figure.add_scatter(
            x=[column for column, _, _ in cells],
            y=[row for _, row, _ in cells],
            text=[format(value, chart.form) for *_, value in cells],
            mode="text",
            textfont={"size": 11, "color": [ink_on(*(part / 255 for part in unlabel_rgb(shade))) for shade in shades]},
            hoverinfo="skip",
            showlegend=False,
            meta={"cells": len(columns)},
        )
    figure.update_xaxes(_names(chart.columns, chart.column_ticks, chart.column_title), showgrid=False, ticks="")
    figure.update_yaxes(_names(chart.rows, chart.row_ticks, chart.row_title), showgrid=False, ticks="", autorange="reversed")
    return figure


def _lines(chart: Lines) -> go.Figure:
    figure = go.Figure(layout={"height": 320})
    for line in chart.series:
        points = list(line.points)
        figure.add_scatter(
            x=_shown([str(point) for point in points]) if chart.ticks else points,
            y=list(line.points.values()),
            name=_literal(line.name),
            mode="lines+markers",
            line={"width": 2},
            marker={"size": 7, "symbol": SYMBOLS[line.colour % len(SYMBOLS)]},
            meta={"series": line.colour, "muted": line.muted},
            hovertemplate=f"{_literal(line.name)} %{{y:{chart.form}}}<extra></extra>",
        )
    figure.update_layout(showlegend=len(chart.series) > 1, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    if chart.ticks:
        figure.update_xaxes(_names(tuple(chart.ticks), tuple(chart.ticks.values()), chart.x_title))
    else:
        figure.update_xaxes(title=_literal(chart.x_title), hoverformat="~g")
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="")
    figure.update_yaxes(title=_literal(chart.y_title), zeroline=False, ticks="", nticks=8)
    return figure


def _names(names: tuple[str, ...], ticks: tuple[str, ...], title: str) -> dict[str, Any]:
    """Return an axis of names. The page leaves out labels that do not fit."""
    return {
        "type": "category",
        "tickmode": "array",
        "tickvals": _shown(names),
        "ticktext": _shown(ticks),
        "title": _literal(title),
    }


def _shown(names: Iterable[str]) -> list[str]:
    return [_literal(name) for name in names]


def _literal(text: str) -> str:
    """Escape a text for plotly, which interprets tags, formulas between dollars, and template variables after ``%{``."""
    return html.escape(text, quote=False).replace("$", "&#36;").replace("%{", "%&#123;")
