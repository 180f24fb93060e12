import math
import re
import xml.etree.ElementTree as ET

import pytest

from maxllama4.report.charts import Axis, Curve, line_chart, stacked_chart
from maxllama4.report.load_map import (
  DIGITS,
  LABELS,
  colour_class,
  draw_map,
  encode,
  load_map_figure,
)
from maxllama4.report.text import count, duration, plain, short


def paths_of(figure, marker):
  return [
    node.get("d") for node in ET.fromstring(figure).iter("path") if marker in node.get("class")
  ]


def axis_of(figure):
  plot = next(node for node in ET.fromstring(figure).iter("div") if node.get("class") == "plot")
  matrix = next(node.get("transform") for node in plot.iter("g"))
  return plot, [float(number) for number in re.findall(r"-?[\d.]+(?:e[-+]?\d+)?", matrix)]


@pytest.mark.parametrize(
  "values",
  [
    [1.0, 2.0, 3.0],
    [0.0],
    [5.0, 5.0],
    [-1e300, 1e300],
    [1e-320, 2e-320],
    [1e-12, 1e12],
    [-3.0, -2.0],
    [1e9, 1e9 + 1e-7],
    [1e15, 1e15 + 1],
  ],
)
@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("from_zero", [True, False])
def test_whatever_is_drawn_lies_in_the_figure_and_is_well_formed(values, log, from_zero):
  curve = Curve("c", [list(enumerate(values))], dots=True)
  figure = line_chart("title", [curve], log=log, from_zero=from_zero)
  plot, (a, _, _, d, e, f) = axis_of(figure)
  for path in paths_of(figure, "line"):
    numbers = [float(number) for number in re.split("[M ]", path) if number]
    for x, y in zip(numbers[::2], numbers[1::2]):
      assert -0.01 <= a * x + e <= 100.01 and -1 <= d * y + f <= 101
  assert all(
    -0.01 <= float(re.search(r"[\d.-]+", node.get("style"))[0]) <= 100.01 for node in plot.iter("i")
  )


def test_a_figure_holds_its_data():
  figure = line_chart("t", [Curve("c", [[(0, 0.5), (10, 0.25)], [(30, 1e-5)]])])
  assert paths_of(figure, "line") == ["M0 5 10 2.5M30 0.0001"]
  assert paths_of(figure, "dots") == ["M30 0.0001h0"]
  log = line_chart("t", [Curve("c", [[(0, 1.0), (10, 1000.0)]])], log=True)
  assert paths_of(log, "line") == ["M0 0.00000 10 3.00000"]


def test_a_legend_names_every_curve_that_the_title_does_not():
  loss, host = Curve("Loss", [[(0, 1.0)]]), Curve("host memory", [[(0, 1.0)]])
  assert "legend" not in line_chart("Loss", [loss])
  assert "</b>host memory<" in line_chart("Memory", [host])
  assert all(f"</b>{name}<" in line_chart("Loss", [loss, host]) for name in ("Loss", "host memory"))


def test_nothing_is_drawn_of_nothing():
  assert line_chart("t", [Curve("c", ())]) == "" and line_chart("t", []) == ""
  assert stacked_chart("t", ["a"], []) == "" and stacked_chart("t", ["a"], [(0, 1, [0.0])]) == ""


def test_text_in_a_figure_cannot_become_markup():
  bad = "<script>alert('1')</script>\"&\x00\ud800"
  figure = line_chart(
    bad, [Curve(bad, [[(0, 1.0)]]), Curve("b", [[(0, 1.0)]])], unit=bad, marks=[(0, "bad", bad)]
  )
  assert "<script" not in figure and "\x00" not in figure
  figure.encode("utf-8")
  assert {node.tag for node in ET.fromstring(figure).iter()} <= {
    *("figure", "figcaption", "h3", "span", "ul", "li", "b", "div", "svg", "path", "g", "i")
  }


def test_the_start_of_a_loss_may_leave_the_figure_and_that_is_said():
  values = [(i, 2.0 + 9 * math.exp(-i / 3)) for i in range(200)]
  figure = line_chart("t", [Curve("c", [values])], clip_start=True)
  assert "↑ from 11.00" in figure
  assert "↑ from" not in line_chart("t", [Curve("c", [values])])


def test_a_tick_is_round_and_in_range():
  assert Axis(0, 10).ticks(5) == [0, 2, 4, 6, 8, 10]
  assert Axis(0.01, 1000, log=True).ticks(5) == [0.01, 0.1, 1, 10, 100, 1000]
  assert Axis(1, 50, log=True).ticks(5) == [1, 2, 5, 10, 20, 50]


def test_stacked_shares_add_up():
  figure = stacked_chart("t", ["a", "b"], [(0, 10, [3.0, 1.0]), (10, 20, [1.0, 0.0])])
  assert paths_of(figure, "bar") == ["M0 0H10V0.75H0zM10 0H20V1H10z", "M0 0.75H10V1H0z"]
  assert paths_of(figure, "data") == ["M5 0.75 15 1", "M5 0.25 15 0"]


def decode(text):
  level = 64 * DIGITS.index(text[0]) + DIGITS.index(text[1])
  return math.nan if level == 4095 else 0.0 if level == 0 else 2 ** ((level - 2048) / 256)


@pytest.mark.parametrize("load", [0.0, 1 / 200, 0.3, 1.0, 1.9, 16.0, 128.0, math.nan])
def test_a_load_survives_its_two_characters(load):
  assert decode(encode(load)) == pytest.approx(load, rel=3e-3, nan_ok=True)


def test_loads_beyond_all_bounds_have_a_colour_or_none():
  assert len(encode(math.inf)) == len(encode(1e-300)) == len(encode(-1.0)) == 2
  loads = [0.0, 0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 9.0, math.inf, math.nan, -1.0]
  assert [colour_class(load) for load in loads] == [0, 1, 2, 3, 4, 5, 6, 7, 7, None, None]


def test_a_map_covers_each_known_cell_once():
  rows = [[1.0, 1.0, 0.0], [9.0, math.nan, 1.0]]
  covered = {}
  for kind, path in enumerate(draw_map(rows)):
    for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
      for cell in range(int(x), int(x) + int(width)):
        assert (cell, int(y)) not in covered
        covered[cell, int(y)] = LABELS[kind]
  assert covered == {(0, 0): "even", (1, 0): "even", (2, 0): "none", (0, 1): "> 4", (2, 1): "even"}


def test_the_figure_of_loads_is_well_formed_and_holds_all_maps_of_the_newest_shape():
  maps = [(0, [[1.0]]), (10, [[1.0, 2.0], [0.0, 1.0]]), (20, [[1.0, 1.0], [1.0, 1.0]])]
  figure = ET.fromstring(load_map_figure(maps, [1, 3]))
  plot = next(node for node in figure.iter("div"))
  assert plot.get("data-steps") == "10 20" and plot.get("data-layers") == "1 3"
  assert [len(text) for text in plot.get("data-maps").split()] == [8, 8]


def test_numbers_are_written_for_readers():
  assert [short(v) for v in (0, 0.25, 1500, 34e6, 17.2e9, 6e-4, -2500)] == [
    "0", "0.25", "1.5k", "34M", "17.2B", "6e-4", "-2.5k",
  ]  # fmt: skip
  assert [count(v) for v in (6358.7, 658_123, None)] == ["6,359", "658.1k", "–"]
  assert [plain(v) for v in (2.0384, 1234.5, 3e-7, math.nan, math.inf, None, 0)] == [
    "2.038", "1,234", "3.000e-7", "NaN", "∞", "–", "0.000",
  ]  # fmt: skip
  assert [duration(v) for v in (0.25, 61, 3600, 93_784, None, math.nan)] == [
    "0.2 s", "1 min 1 s", "1 h", "1 d 2 h", "–", "–",
  ]  # fmt: skip
