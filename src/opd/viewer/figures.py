"""Drawings that a page holds without JavaScript: means with intervals, and small curves. Each is an SVG element."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from opd.viewer.results import Setting
from opd.viewer.thin import m4

LEFT, WIDTH, LINE = 78, 230, 24


def dots(one: Setting) -> Markup:
    """The mean reward of each measurement of a setting with its interval, on one axis."""
    low, high = one.scale
    span = (high - low) or 1.0
    at = lambda x: LEFT + (x - low) / span * WIDTH  # noqa: E731
    share = one.share
    show = (lambda x: f"{x:.0%}") if share else (lambda x: f"{x:.3g}")
    height = 28 + LINE * len(one.points)
    said = ", ".join(f"{point.label} {show(point.mean)}" for point in one.points)
    out = [
        f'<svg viewBox="0 0 {LEFT + WIDTH + 24} {height}" role="img" aria-label="{escape(one.title)}: {escape(said)}">'
    ]
    for i in range(5):
        value = low + span * i / 4
        text = f"{value * 100:.0f}" if share else f"{value:.3g}"
        out.append(f'<line class="grid" x1="{at(value):.1f}" x2="{at(value):.1f}" y1="18" y2="{height - 8}"/>')
        out.append(f'<text class="s" text-anchor="middle" x="{at(value):.1f}" y="12">{text}</text>')
    for n, point in enumerate(one.points):
        y = 30 + LINE * n
        out.append(f'<g class="w-{escape(point.when)}"><text x="0" y="{y + 4}" class="s">{escape(point.label)}</text>')
        if point.low is not None and point.high is not None:
            ends = f'x1="{at(point.low):.1f}" x2="{at(point.high):.1f}"'
            out.append(f'<line class="ci" {ends} y1="{y}" y2="{y}"/>')
        out.append(f'<circle cx="{at(point.mean):.1f}" cy="{y}" r="5"/></g>')
    return Markup("".join([*out, "</svg>"]))


def spark(xs: Sequence[float], ys: Sequence[float], width: int = 160, height: int = 32) -> Markup:
    """A small curve; empty for fewer than two points."""
    if len(xs) < 2:
        return Markup("")
    xs, ys = m4(xs, ys, width)
    low, high = min(ys), max(ys)
    across, up = (xs[-1] - xs[0]) or 1.0, (high - low) or 1.0
    points = (
        f"{(x - xs[0]) / across * width:.0f} {height - 2 - (y - low) / up * (height - 4):.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
    return Markup(f'{head}<path d="M{"L".join(points)}"/></svg>')
