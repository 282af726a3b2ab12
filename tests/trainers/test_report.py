"""Is the report one self-contained, well-formed page that shows the numbers it was given?"""

import re
from html.parser import HTMLParser

import pytest

from trainers import report


class Checker(HTMLParser):
    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def whole_page():
    return report.page(
        "A <run> & its report",
        [
            report.heading("Modes"),
            report.paragraph("x < y"),
            report.table([{"mode": "thinking", "accuracy": "98%"}, {"mode": "non-thinking", "accuracy": "17%"}]),
            report.line_chart({"a": [(0, 2.0), (10, 0.5)]}, caption="Loss", x_label="step", y_label="nats", log_y=True),
            report.heat_map([[0.1, 0.9], [0.5, 0.5]], caption="Load", row_names=["a", "b"], column_names=["0", "1"]),
            report.preformatted("<think>work</think>answer"),
        ],
    )


def test_page_is_well_formed_escaped_and_fetches_nothing():
    html = whole_page()
    checker = parse(html)
    text = " ".join(checker.text)
    for shown in ("A <run> & its report", "x < y", "98%", "non-thinking", "Loss", "Load", "<think>work</think>", "0.9"):
        assert shown in text
    assert "script" not in checker.tags and "think" not in checker.tags
    assert not re.search(r"(src|href|url\()\s*=?|https?:|@import", html)


def test_curve_points_stand_where_their_numbers_say():
    svg = report.line_chart({"a": [(0, 0), (5, 5), (10, 10)]}, caption="c", x_label="x", y_label="y")
    points = [tuple(map(float, point.split(","))) for point in re.search(r'points="([^"]+)"', svg).group(1).split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 == report.LEFT and x2 == report.WIDTH - report.RIGHT and x1 == pytest.approx((x0 + x2) / 2, abs=0.06)
    assert y0 == report.HEIGHT - report.BOTTOM and y2 == report.TOP and y1 == pytest.approx((y0 + y2) / 2, abs=0.06)


def test_log_axis_puts_equal_ratios_at_equal_distances():
    svg = report.line_chart({"a": [(0, 0.01), (1, 0.1), (2, 1)]}, caption="c", x_label="x", y_label="y", log_y=True)
    heights = [float(point.split(",")[1]) for point in re.search(r'points="([^"]+)"', svg).group(1).split()]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.06)


def test_points_that_cannot_be_drawn_are_counted():
    curve = {"a": [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 0.0), (4, 2.0)]}
    svg = report.line_chart(curve, caption="c", x_label="x", y_label="y", log_y=True)
    assert svg.count("<circle") == 2 and "3 points that cannot be drawn" in svg
    with pytest.raises(ValueError, match="no point to draw"):
        report.line_chart({"a": [(0, float("nan"))]}, caption="c", x_label="x", y_label="y")


def test_a_single_point_and_a_flat_curve_can_be_drawn():
    for curve in ([(3, 1.0)], [(0, 1.0), (1, 1.0)]):
        assert "nan" not in report.line_chart({"a": curve}, caption="c", x_label="x", y_label="y")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3, 1204, [500, 1000]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert report.ticks(low, high) == pytest.approx(expected)


def test_log_ticks_cover_decades_and_short_spans():
    assert report.log_ticks(0.03, 3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert report.log_ticks(3.1, 3.6) == pytest.approx([3.1, 3.2, 3.3, 3.4, 3.5, 3.6])


def test_ragged_input_raises():
    with pytest.raises(ValueError, match="columns"):
        report.table([{"a": 1}, {"b": 2}])
    with pytest.raises(ValueError, match="make them agree"):
        report.heat_map([[1, 2], [3]], caption="c", row_names=["a", "b"], column_names=["x", "y"])
