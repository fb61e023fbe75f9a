"""Small inline SVG charts for the report: no script, no dependency, colours from the page's CSS."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

Point = tuple[float, float]

_WIDTH, _HEIGHT = 330.0, 168.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 10.0, 22.0
_MOST_POINTS = 400
_SMOOTH_FROM = 40


@dataclasses.dataclass(frozen=True)
class Curve:
    """One chart.

    Attributes:
      title: heading.
      points: (step, value), ascending by step; None breaks the line (a value that was not finite).
      chance: level drawn as a dashed line.
      percent: the values are fractions 0..1.
      noisy: many points are shown faint under their moving average.
    """

    title: str
    points: Sequence[tuple[float, float | None]]
    chance: float | None = None
    percent: bool = False
    noisy: bool = True


def number(value: float, percent: bool = False) -> str:
    """A value as a person reads it."""
    if not math.isfinite(value):
        return str(value)
    if percent:
        shown = f"{100 * value:.1f}" if abs(value) >= 0.001 or value == 0 else f"{100 * value:.2g}"
        return f"{shown} %"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.3g}"


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float | None]], most: int = _MOST_POINTS) -> list:
    """At most about `most` points: means over equal runs of neighbours; breaks stay breaks."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    out: list[tuple[float, float | None]] = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        known = [v for _, v in part if v is not None]
        out.append((part[-1][0], sum(known) / len(known) if len(known) == len(part) else None))
    return out


def smooth(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Mean over neighbours on both sides, about a fifteenth of the points in all: a curve that
    neither lags nor leads."""
    reach = max(1, len(points) // 30)
    out: list[tuple[float, float | None]] = []
    for n, (x, y) in enumerate(points):
        near = min(reach, n, len(points) - 1 - n)
        known = [v for _, v in points[n - near : n + near + 1] if v is not None]
        out.append((x, None if y is None else sum(known) / len(known)))
    return out


def _path(points: Sequence[tuple[float, float | None]], place: _Place) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        parts.append(f"{pen}{place.x(x):.1f} {place.y(y):.1f}")
        pen = "L"
    return "".join(parts)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Data to SVG coordinates."""

    x_range: Point
    y_range: Point

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / ((high - low) or 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return (
            _HEIGHT - _BOTTOM - (value - low) / ((high - low) or 1.0) * (_HEIGHT - _TOP - _BOTTOM)
        )


def line_chart(curve: Curve) -> str:
    """A line chart as an SVG element; many points are shown faint with their moving average."""
    known = [(x, y) for x, y in curve.points if y is not None]
    if not known:
        return ""
    xs, ys = [x for x, _ in known], [y for _, y in known]
    levels = ys if curve.chance is None else [*ys, curve.chance]
    low, high = min(levels), max(levels)
    if curve.percent or 0 <= low <= 0.3 * high:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    place = _Place((min(xs), max(xs)), (low if low == 0 else low - margin, high + margin))
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{html.escape(curve.title, quote=True)}">'
    ]
    for level in ticks(*place.y_range):
        y = place.y(level)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{number(level, curve.percent).replace(' ', '')}</text>"
        )
    for step in ticks(*place.x_range, most=3):
        anchor = "end" if place.x(step) > _WIDTH - _RIGHT - 14 else "middle"
        x = min(place.x(step), _WIDTH - 2)
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{number(step)}</text>'
        )
    if curve.chance is not None:
        y = place.y(curve.chance)
        parts.append(
            f'<line class="chance" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="chance" x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">'
            "chance</text>"
        )
    shown = thin(curve.points)
    many = curve.noisy and len(shown) >= _SMOOTH_FROM
    parts.append(f'<path class="{"faint" if many else "curve"}" d="{_path(shown, place)}"/>')
    if many:
        parts.append(f'<path class="curve" d="{_path(smooth(shown), place)}"/>')
    if len(known) <= 30:
        parts.extend(
            f'<circle class="dot" cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="2.6">'
            f"<title>step {number(x)}: {number(y, curve.percent)}</title></circle>"
            for x, y in known
        )
    return "".join(parts) + "</svg>"


def progress_bar(
    start: float | None, end: float, chance: float | None, published: float | None
) -> str:
    """From the first value to the last on a scale of 0 to 1, with ticks for chance and the
    published value."""
    width, height, y = 190.0, 16.0, 8.0

    def at(value: float) -> str:
        return f"{4 + min(max(value, 0.0), 1.0) * (width - 8):.1f}"

    parts = [
        f'<svg class="bar" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="'
        f'{number(end, True)}"><line class="track" x1="4" x2="{width - 4}" y1="{y}" y2="{y}"/>'
    ]
    if chance is not None:
        parts.append(
            f'<line class="chance" x1="{at(chance)}" x2="{at(chance)}" y1="2" y2="14">'
            f"<title>chance {number(chance, True)}</title></line>"
        )
    if published is not None:
        parts.append(
            f'<line class="published" x1="{at(published)}" x2="{at(published)}" y1="1" y2="15">'
            f"<title>published {number(published, True)}</title></line>"
        )
    if start is not None:
        parts.append(
            f'<line class="span" x1="{at(start)}" x2="{at(end)}" y1="{y}" y2="{y}"/>'
            f'<circle class="from" cx="{at(start)}" cy="{y}" r="3.4"/>'
        )
    parts.append(f'<circle class="to" cx="{at(end)}" cy="{y}" r="4.2"/></svg>')
    return "".join(parts)
