"""How does a run's result reach a reader offline? One HTML page with tables, curves and heat maps drawn as inline SVG.

Nothing is fetched: no script, no font, no picture from elsewhere. Every function returns a piece of HTML; `page` joins
the pieces.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

# Okabe-Ito: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH, HEIGHT = 720, 316
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 44
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 760px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; } svg text { font: 12px system-ui, sans-serif; fill: #444; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; }
td, th { text-align: right; }
th:first-child, td:first-child { text-align: left; } pre { background: #f5f5f5; padding: .7rem; white-space: pre-wrap; }
"""


def page(title: str, pieces: Sequence[str]) -> str:
    body = "\n".join(pieces)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """One column a key of the first row; every row has the same keys."""
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"A table row has the columns {list(row)}, the first {columns}; give all the same.")
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = ["<tr>" + "".join(f"<td>{escape(str(row[name]))}</td>" for name in columns) + "</tr>" for row in rows]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The same table for a terminal."""
    grid = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in grid) for column in range(len(grid[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in grid)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    caption: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> str:
    """Curves over a common x axis. Points that are not finite (`log_y`: not positive) are left out and counted."""
    shown = {name: [point for point in points if _drawable(point, log_y)] for name, points in series.items()}
    left_out = sum(len(points) for points in series.values()) - sum(len(points) for points in shown.values())
    points = [point for curve in shown.values() for point in curve]
    if not points:
        raise ValueError(f"The chart {caption!r} has no point to draw; give at least one finite one.")
    x_low, x_high = _span([x for x, _ in points])
    y_low, y_high = _span([math.log10(y) if log_y else y for _, y in points])

    def place(point):
        x, y = point
        height = math.log10(y) if log_y else y
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (height - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_y_axis(y_low, y_high, y_label, log_y), _x_axis(x_low, x_high, x_label)]
    for number, (name, curve) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(point)) for point in curve)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        parts += [
            '<circle cx="{:.1f}" cy="{:.1f}" r="2.4" fill="{}"><title>{}: {:g}, {:.4g}</title></circle>'.format(
                *place(point), colour, escape(name), *point
            )
            for point in curve
        ]
    parts.append(_legend(list(shown)))
    note = f" ({left_out} points that cannot be drawn are left out.)" if left_out else ""
    return _figure("".join(parts), WIDTH, HEIGHT, caption + note)


def heat_map(
    values: Sequence[Sequence[float]], *, caption: str, row_names: Sequence[str], column_names: Sequence[str]
) -> str:
    """A grid of numbers, darker for larger; each cell shows its value."""
    if len(values) != len(row_names) or any(len(row) != len(column_names) for row in values):
        raise ValueError(
            f"The heat map {caption!r} has {len(values)} rows of {[len(row) for row in values]} values for "
            f"{len(row_names)} row and {len(column_names)} column names; make them agree."
        )
    low, high = _span([value for row in values for value in row])
    cell_w, cell_h, left, top = (WIDTH - 96) / len(column_names), 30, 92, 22
    parts = []
    for place, name in enumerate(column_names):
        parts.append(_text(left + (place + 0.5) * cell_w, top - 6, name, "middle"))
    for row, (name, line) in enumerate(zip(row_names, values)):
        parts.append(_text(left - 8, top + row * cell_h + 20, name, "end"))
        for column, value in enumerate(line):
            share = (value - low) / (high - low)
            x, y = left + column * cell_w, top + row * cell_h
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell_w - 1:.1f}" height="{cell_h - 1}" '
                f'fill="#0072B2" fill-opacity="{0.08 + 0.92 * share:.2f}"/>'
            )
            ink = "#fff" if share > 0.5 else "#222"
            # Narrow cells (many experts) keep their colour and drop the number.
            if cell_w >= 34:
                parts.append(_text(x + cell_w / 2, y + 20, f"{value:.3g}", "middle", ink))
    return _figure("".join(parts), WIDTH, top + len(values) * cell_h + 4, caption)


def _drawable(point: tuple[float, float], log_y: bool) -> bool:
    return all(math.isfinite(number) for number in point) and (point[1] > 0 or not log_y)


def _span(numbers: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, kept apart so that one can divide by their distance."""
    low, high = min(numbers), max(numbers)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) between `low` and `high`, about `wanted` of them."""
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between `low` and `high`; a short span gets the ticks of a linear axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [value for value in values if low <= value <= high]
    return inside if len(inside) >= 3 else ticks(low, high)


def _y_axis(low: float, high: float, label: str, log_y: bool) -> str:
    parts = []
    values = log_ticks(10**low, 10**high) if log_y else ticks(low, high)
    for value in values:
        height = math.log10(value) if log_y else value
        y = HEIGHT - BOTTOM - (height - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:.3g}", "end"))
    middle = (HEIGHT - BOTTOM + TOP) / 2
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{escape(label)}</text>')
    return "".join(parts)


def _x_axis(low: float, high: float, label: str) -> str:
    base = HEIGHT - BOTTOM
    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" stroke="#888"/>']
    for tick in ticks(low, high, 8):
        x = LEFT + (tick - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        parts.append(_text(x, base + 16, f"{tick:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, label, "middle"))
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    """In one line above the plot, where no curve can run through it."""
    parts, x = [], LEFT
    for number, name in enumerate(names):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<line x1="{x}" x2="{x + 20}" y1="12" y2="12" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(x + 26, 16, name, "start"))
        x += 26 + 7 * len(name) + 20
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, ink: str = "#444") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{ink}">{escape(text)}</text>'


def _figure(inner: str, width: float, height: float, caption: str) -> str:
    label = escape(caption, quote=True)
    return (
        f'<figure><svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{label}">{inner}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
