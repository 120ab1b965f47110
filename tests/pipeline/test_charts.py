"""Figures: their geometry, what is written in them, and a machine without matplotlib."""

from __future__ import annotations

import math
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from hywia_kernels import HywiaError
from hywia_kernels.cli import charts, figures

SVG = "{http://www.w3.org/2000/svg}"


def part(svg, name):
    """Points of the path that the figure calls `name`, y downwards."""
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        if re.fullmatch(rf"f[0-9a-f]+-{name}", group.get("id", "")):
            path = next(group.iter(f"{SVG}path"))
            return [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d"))]
    return None


def height(svg, name):
    ys = [y for _, y in part(svg, name)]
    return max(ys) - min(ys)


def texts(svg):
    return ["".join(t.itertext()) for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_bars_are_as_high_as_their_values():
    svg = charts.bars("t", ["x", "y"], {"one": [1.0, 2.0], "two": [4.0, None]})
    one = height(svg, "bar-0-0")
    assert height(svg, "bar-0-1") == pytest.approx(2 * one, rel=1e-3)
    assert height(svg, "bar-1-0") == pytest.approx(4 * one, rel=1e-3)
    assert part(svg, "bar-1-1") is None  # a gap
    assert {"x", "y", "one", "two", "t"} <= set(texts(svg))


def test_lines_go_through_their_points():
    (ax, ay), (bx, by), (cx, cy) = part(
        charts.lines("t", {"one": [(2.0, 5.0), (0.0, 0.0), (1.0, 10.0)]}, x_label="x"), "line-0"
    )
    assert bx - ax == pytest.approx(cx - bx, rel=1e-3)
    assert ay - by == pytest.approx(2 * (ay - cy), rel=1e-3)


def test_the_spread_marks_its_median():
    quantiles = [[0.0, 1.0, 2.0, 3.0, 10.0], [0.0, 1.0, 4.0, 5.0, 10.0]]
    svg = charts.spread("t", [0, 1], quantiles, {"least kept": [2.0, None]})
    (_, low), (_, high) = part(svg, "median")
    (_, zero), (_, one) = part(
        charts.spread("t", [0, 1], [[0.0] * 4 + [10.0], [0.0, 0.0, 2.0, 2.0, 10.0]], {}), "median"
    )
    assert low - high == pytest.approx(zero - one, rel=0.02)  # both are two of ten
    assert texts(svg).count("least kept") == 1


NASTY = '_a <b> & "q" $x^{2$ --> ]]> \x1b\x00 \ud800 href="#p" url(#p) é 漢'


@pytest.mark.parametrize("draw", ["bars", "lines", "spread"])
def test_labels_are_text_whatever_they_hold(draw):
    calls = {
        "bars": lambda: charts.bars(NASTY, [NASTY], {NASTY: [1.0]}, x_label=NASTY, y_label=NASTY),
        "lines": lambda: charts.lines(NASTY, {NASTY: [(0.0, 1.0)]}, x_label=NASTY, y_label=NASTY),
        "spread": lambda: charts.spread(NASTY, [0], [[1, 2, 3, 4, 5]], {NASTY: [1.0]}, x_label=NASTY, y_label=NASTY),
    }
    svg = calls[draw]()
    svg.encode("utf-8")
    shown = [t for t in texts(svg) if t.startswith('_a <b> & "q" $x^{2$ --> ]]>')]
    assert len(shown) >= 4  # the title, both axes, and the legend
    assert "<b>" not in svg
    assert "\x1b" not in svg


@pytest.mark.parametrize(
    "svg",
    [
        lambda: charts.bars("t", [], {}),
        lambda: charts.bars("t", ["a"], {"one": [math.nan]}),
        lambda: charts.lines("t", {"one": []}),
        lambda: charts.lines("t", {"one": [(0.0, math.inf), (1.0, 1.0)]}),
        lambda: charts.spread("t", [], [], {"a": []}),
        lambda: charts.spread("t", [0], [[math.nan] * 5], {}),
    ],
)
def test_nothing_to_draw_is_an_empty_figure(svg):
    assert ElementTree.fromstring(svg()).get("aria-label") == "t"


def test_a_figure_takes_its_ink_from_the_page_and_is_the_same_each_time():
    svg = charts.lines("t", {"one": [(0.0, 0.0), (1.0, 10.0)]})
    assert svg == charts.lines("t", {"one": [(0.0, 0.0), (1.0, 10.0)]})
    assert "currentColor" in svg
    colours = set(re.findall(r"#[0-9a-f]{6}\b", svg)) - set(charts.COLOURS)
    assert colours == set()
    assert not re.search(r"<(metadata|style|script|image)\b|https?://(?!www\.w3\.org/)", svg)


def test_names_inside_figures_of_one_page_differ():
    one, two = charts.bars("t", ["a"], {"s": [1.0]}), charts.bars("t", ["a"], {"s": [2.0]})
    names = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in (one, two)]
    assert names[0]
    assert not names[0] & names[1]
    for svg, own in zip((one, two), names, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= own


def test_standalone_stacks_figures():
    small, large = charts.bars("a", ["x"], {"s": [1.0]}, height=240), charts.bars("b", ["x"], {"s": [1.0]}, width=800)
    root = ElementTree.fromstring(charts.standalone([small, large]))
    assert root.get("viewBox") == "0 0 800 540"
    assert [e.get("y") for e in root if e.tag == f"{SVG}svg"] == ["0", "240"]
    assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text


def test_standalone_places_figures_side_by_side():
    small, large = charts.bars("a", ["x"], {"s": [1.0]}, height=240), charts.bars("b", ["x"], {"s": [1.0]}, width=800)
    root = ElementTree.fromstring(charts.standalone([small, large], across=True))
    assert root.get("viewBox") == "0 0 1520 300"
    assert [e.get("x") for e in root if e.tag == f"{SVG}svg"] == ["0", "720"]


def test_a_logarithmic_axis_has_plain_ticks():
    svg = charts.lines("t", {"one": [(0.0, 30.0), (1.0, 450.0)]}, log=True)
    texts = {"".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    assert {"50", "100", "200", "500"} <= texts
    assert not {"20", "1,000", "10"} & texts


def test_the_ticks_of_a_wide_spread_are_plain_numbers():
    svg = charts.spread("t", [0, 1], [[0.01, 1, 2, 3, 4], [1, 10, 100, 1000, 9000]], {})
    texts = {"".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    assert {"0.1", "10", "1,000"} <= texts
    assert "mathdefault" not in svg


def test_kin_look_alike():
    series = {"a": [(0.0, 1.0), (1.0, 2.0)], "b": [(0.0, 1.0), (1.0, 3.0)]}
    svg = charts.lines("t", series, looks={"a": (2, 0), "b": (2, 1)})
    strokes = re.findall(r"stroke: (#[0-9a-f]{6})", svg)
    assert charts.COLOURS[2] in strokes
    assert not set(charts.COLOURS[:2]) & set(strokes)
    assert "stroke-dasharray: 5.92,2.56" in svg.replace(", ", ",")


def test_without_matplotlib_figures_say_what_to_install(monkeypatch):
    assert charts.available()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not charts.available()
    for draw in (
        charts.require,
        lambda: charts.bars("t", [], {}),
        lambda: charts.lines("t", {}),
        lambda: charts.spread("t", [], [], {}),
    ):
        with pytest.raises(HywiaError, match=r"pip install 'hywia_kernels\[report\]'"):
            draw()


def test_models_of_one_name_keep_their_bars():
    reading = {"mode": "eager", "phase": "decode", "batch": 1, "context": 8, "tokens_per_second": 2.0}
    models = [
        {"model": "a/out", "figures": [reading]},
        {"model": "b/out", "figures": [reading]},
        {"model": "b/out", "figures": []},
    ]
    (svg,) = figures.speed_figures(models)
    assert [t for t in texts(svg) if "out" in t] == ["a/out", "b/out", "b/out (3)"]
    assert height(svg, "bar-0-0") == pytest.approx(height(svg, "bar-1-0"))
    assert part(svg, "bar-2-0") is None
