"""Small charts as inline SVG: lines over steps or iterations, bars, intervals. Colours are classes of the style sheet, for both themes.

No chart holds text from a model or a file but labels that are given, and these are escaped.
"""
from __future__ import annotations

import math
from typing import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 46
SMOOTH = 60             # steps above which a curve is thinned to means

Points = Sequence[tuple[float, float]]


def lines(title: str, series: Sequence[tuple[str, Points]], x_label: str, *, whole_x: bool = False, digits: int = 2,
          zero: bool = False) -> Markup:
    """Curves over a common axis.

    Args:
        title: what is shown, read out instead of the picture.
        series: (name, points) each; those without points are left out.
        whole_x: the x axis has whole numbers (iterations), each marked.
        digits: decimals of the y axis.
        zero: the y axis begins at 0.
    """
    series = [(name, _thin(points)) for name, points in series if points]
    xs, ys = ([p[i] for _, points in series for p in points] for i in (0, 1))
    if not xs:
        return Markup("")
    ticks = _ticks(0.0 if zero else min(ys), max(ys))
    x_at = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_at = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    marks = sorted(set(xs)) if whole_x else [t for t in _ticks(min(xs), max(xs)) if min(xs) <= t <= max(xs)]
    parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(t):.1f}" y2="{y_at(t):.1f}"/>'
             f'<text class="tick" x="{LEFT - 8}" y="{y_at(t) + 4:.1f}" text-anchor="end">{t:.{digits}f}</text>' for t in ticks]
    parts += [f'<text class="tick" x="{x_at(t):.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">{t:g}</text>' for t in marks]
    parts.append(f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for n, (_, points) in enumerate(series):
        at = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="curve c{n % 6}" points="{at}"/>')
        if len(points) <= 12:
            parts += [f'<circle class="dot c{n % 6}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"/>' for x, y in points]
    legend = "".join(f'<li><span class="key c{n % 6}"></span>{escape(name)}</li>' for n, (name, _) in enumerate(series))
    legend = f'<ul class="legend">{legend}</ul>' if len(series) > 1 else ""
    frame = f'class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    return Markup(f'<svg {frame}>{"".join(parts)}</svg>{legend}')


def _thin(points: Points) -> list[tuple[float, float]]:
    """At most about `SMOOTH` points: means over runs of neighbours."""
    size = max(len(points) // SMOOTH, 1)
    runs = [points[i:i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs] if size > 1 else list(points)


def intervals(rows: Sequence[tuple[float, float | None, float | None] | None], zero: float | None = None) -> list[Markup]:
    """For each (value, low, high) a small picture on one common axis; "" for None. A line is drawn at `zero`."""
    ends = [x for row in rows if row for x in row if x is not None] + ([zero] if zero is not None else [])
    at = _scale(min(ends), max(ends), 6, 154) if ends else None
    return [_interval(row, at, zero) if row else Markup("") for row in rows]


def _interval(row: tuple[float, float | None, float | None], at, zero: float | None) -> Markup:
    value, low, high = row
    parts = [f'<line class="axis" x1="{at(zero):.1f}" x2="{at(zero):.1f}" y1="0" y2="22"/>'] if zero is not None else []
    if low is not None and high is not None:
        parts.append(f'<line class="span" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="11" y2="11"/>')
    parts.append(f'<circle class="point" cx="{at(value):.1f}" cy="11" r="4"/>')
    return Markup(f'<svg class="interval" viewBox="0 0 160 22" aria-hidden="true">{"".join(parts)}</svg>')


def bar(value: float, most: float, kind: str = "") -> Markup:
    """A horizontal bar of `value` out of `most`."""
    width = 200 * min(max(value / most, 0.0), 1.0) if most else 0.0
    return Markup(f'<svg class="bar {escape(kind)}" viewBox="0 0 200 10" preserveAspectRatio="none" aria-hidden="true">'
                  f'<rect class="track" width="200" height="10"/><rect class="fill" width="{width:.1f}" height="10"/></svg>')


# ------------------------------------------------------------------------------------------------------------------------ axes
def _scale(low: float, high: float, first: float, last: float):
    """A linear map of [low, high] onto [first, last]; to the middle where there is but one value."""
    if high == low:
        return lambda _: (first + last) / 2
    return lambda x: first + (x - low) / (high - low) * (last - first)


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values that enclose [low, high], at most about `most` of them."""
    if high - low < 1e-12 * max(abs(high), 1.0):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [i * step for i in range(first, last + 1)]
