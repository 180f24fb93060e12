"""Figures as SVG in HTML: lines, stacked bars, maps of load. Plain values in, markup out.

A path holds the data itself, divided by a power of ten, and a matrix maps it to the figure, so that the script of the page can read values back
from what is drawn. Figures stretch with the page; their labels are HTML, and do not.
"""

import dataclasses
import math
from collections.abc import Sequence

from maxllama4.report.text import escape, plain, short

Point = tuple[float, float]
Pieces = Sequence[Sequence[Point]]  # a curve, broken where values were not finite
LARGEST = 1e30  # values beyond are drawn here, so that differences stay finite
NUM_COLOURS = 8


@dataclasses.dataclass(frozen=True)
class Curve:
  """A named line; where `smooth` is given, it is drawn strongly over a faint `pieces`."""

  name: str
  pieces: Pieces
  colour: int = 0
  smooth: Pieces = ()
  dots: bool = False

  @property
  def points(self) -> list[Point]:
    return [point for piece in self.pieces for point in piece]


@dataclasses.dataclass(frozen=True)
class Axis:
  """Where values lie, as shares of the figure."""

  low: float
  high: float
  log: bool = False

  def place(self, value: float) -> float:
    """0 at the low end, 1 at the high one."""
    return (self.scaled(value) - self.scaled(self.low)) / (
      self.scaled(self.high) - self.scaled(self.low)
    )

  def scaled(self, value: float) -> float:
    return math.log10(value) if self.log else value

  @property
  def factor(self) -> float:
    """The power of ten that values are divided by in a path, for renderers that compute with 32 bits."""
    size = max(abs(self.low), abs(self.high))
    return 1.0 if self.log or size == 0 else 10.0 ** math.floor(math.log10(size))

  def ticks(self, count: int) -> list[float]:
    """About `count` round values on the axis."""
    if self.log and self.high / self.low > 12:
      powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
      factors = (1, 2, 5) if len(powers) <= 3 else (1,)
      ticks = [factor * 10.0**power for power in powers for factor in factors]
      ticks = [tick for tick in ticks if self.low <= tick <= self.high]
      return ticks[:: max(1, math.ceil(len(ticks) / (count + 1)))]
    raw = (self.high - self.low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(self.low / step - 1e-9)
    last = math.floor(self.high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(
  title: str,
  curves: Sequence[Curve],
  *,
  unit: str = "",
  log: bool = False,
  from_zero: bool = False,
  clip_start: bool = False,
  marks: Sequence[tuple[int, str, str]] = (),
  x_label: str = "step",
  width: str = "",
) -> str:
  """A figure of the curves that have points; nothing if none has.

  `log` is followed where values span more than a factor of 8. `clip_start` lets the first 5 % of the steps, where a loss
  falls, leave the figure. `marks` are (step, kind, words), kind one of "bad" and "restart". `width` is "", "double" or
  "wide".
  """
  curves = [curve for curve in curves if curve.points]
  if not curves:
    return ""
  x = _span([point[0] for curve in curves for point in curve.points])
  y, above = _value_axis(curves, x, log, from_zero, clip_start)
  paths = "".join(_curve_paths(curve, y) for curve in curves)
  kinds = {kind for _, kind, _ in marks}
  keys = [(f"k{curve.colour % NUM_COLOURS}", curve.name) for curve in curves]
  if len(curves) == 1 and curves[0].name.lower() == title.lower():
    keys = []
  keys += [("bad", "skipped")] * ("bad" in kinds)
  keys += [("restart", "resumed")] * ("restart" in kinds)
  legend = _legend(keys) if keys else ""
  body = _mark_paths(marks, x) + f'<g transform="{_matrix(x, y)}">{paths}</g>'
  words = "; ".join(_in_words(curve, unit, x_label) for curve in curves[:8])
  return _figure(title, unit, legend, body, x, y, words, x_label, marks, width, above)


def _value_axis(
  curves: Sequence[Curve], x: Axis, log: bool, from_zero: bool, clip_start: bool
) -> tuple[Axis, str]:
  """The vertical axis, and a label where a curve starts above it."""
  values = [_clamped(point[1]) for curve in curves for point in curve.points]
  above = ""
  if clip_start:
    start = x.low + 0.05 * (x.high - x.low)
    later = [
      _clamped(v)
      for c in curves
      for piece in (c.smooth or c.pieces)
      for s, v in piece
      if s >= start
    ]
    later += [_clamped(v) for curve in curves for s, v in curve.points if s >= start]
    if len(later) > 10 and max(values) - min(values) > 1.3 * (max(later) - min(values)):
      above = f'<i class="above">↑ from {plain(max(values))}</i>'
      values = [*later, min(values)]
  log = log and min(values) > 0 and max(values) / min(values) > 8
  return _padded(values, from_zero=from_zero and not log, log=log), above


def _clamped(value: float) -> float:
  """`value` where arithmetic on it can neither overflow nor vanish."""
  return 0.0 if abs(value) < 1 / LARGEST else max(-LARGEST, min(LARGEST, value))


def _span(steps: Sequence[float]) -> Axis:
  """The horizontal axis: from 0, with room for a dot at the end."""
  return Axis(0, 1.01 * max(steps) or 1)


def _padded(values: Sequence[float], *, from_zero: bool, log: bool = False) -> Axis:
  """An axis on which all values lie; with some room above and below, unless it starts at 0."""
  low, high = min(values), max(values)
  if from_zero and low >= 0:
    return Axis(0.0, high * 1.08 or 1.0)
  if log:
    room = (high / low) ** 0.06
    return Axis(low / room, high * room, log=True)
  if low == high == 0:
    return Axis(0.0, 1.0)
  room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
  return Axis(low - room, high + room)


def _matrix(x: Axis, y: Axis) -> str:
  """Data to a square of 100 x 100 whose vertical axis points down."""
  across = 100 / (x.high - x.low)
  low, high = y.scaled(y.low), y.scaled(y.high)
  up = 100 / (high - low)
  return f"matrix({across:.9g} 0 0 {-up * y.factor:.9g} {-x.low * across:.9g} {100 + low * up:.9g})"


def _curve_paths(curve: Curve, y: Axis) -> str:
  """The line itself, faint where a smooth one is drawn over it; its data is what the script reads."""
  colour, data = f"k{curve.colour % NUM_COLOURS}", _path(curve.pieces, y)
  dash = " dashed" if curve.colour >= NUM_COLOURS else ""
  name = escape(curve.name)
  strength = "faint" if curve.smooth else "line"
  paths = f'<path class="{strength} {colour}{dash}" data-name="{name}" d="{data}"/>'
  if curve.smooth:
    paths += f'<path class="line {colour}{dash}" d="{_path(curve.smooth, y)}"/>'
  lonely = [piece[0] for piece in curve.pieces if len(piece) == 1]
  dots = curve.points if curve.dots and len(curve.points) <= 60 else lonely
  if dots:
    places = "".join(f"M{_pair(*point, y)}h0" for point in dots)
    paths += f'<path class="dots {colour}" d="{places}"/>'
  return paths


def _path(pieces: Pieces, y: Axis) -> str:
  return "".join("M" + " ".join(_pair(*point, y) for point in piece) for piece in pieces if piece)


def _pair(step: float, value: float, y: Axis) -> str:
  value = _clamped(value)
  if y.log:
    return f"{step:.10g} {math.log10(value):.5f}" if value > 0 else f"{step:.10g} -30"
  return f"{step:.10g} {value / y.factor:.5g}".replace("e+", "e")


def _mark_paths(marks: Sequence[tuple[int, str, str]], x: Axis) -> str:
  """Short lines at the top for what went wrong, whole ones where a run went on."""
  paths = []
  for kind, line in (("restart", "V100"), ("bad", "V8")):
    places = [100 * x.place(step) for step, its_kind, _ in marks if its_kind == kind]
    data = "".join(f"M{place:.3f} 0{line}" for place in places if 0 <= place <= 100)
    if data:
      paths.append(f'<path class="mark {kind}" d="{data}"/>')
  return "".join(paths)


def _figure(title, unit, legend, body, x, y, words, x_label, marks, width, above="") -> str:
  """A figure: heading, legend, axes with their labels, and what is drawn."""
  lines = "".join(f"M0 {100 - 100 * y.place(tick):.2f}H100" for tick in y.ticks(5))
  labels = "".join(
    f'<i class="y" style="top:{100 - 100 * y.place(tick):.2f}%">{short(tick)}</i>'
    for tick in y.ticks(5)
  )
  labels += "".join(
    f'<i class="x" style="left:{100 * x.place(tick):.2f}%">{short(tick)}</i>'
    for tick in x.ticks(5)
    if tick == round(tick)
  )
  notes = escape("\n".join(f"{step}\t{text}" for step, _, text in marks))
  data = {
    "x0": f"{x.low:.10g}",
    "x1": f"{x.high:.10g}",
    "log": int(y.log),
    "factor": f"{y.factor:g}",
    "unit": escape(unit),
  }
  attributes = " ".join(f'data-{name}="{value}"' for name, value in data.items())
  return (
    f'<figure class="chart {width}"><figcaption><h3>{escape(title)}</h3>'
    f'<span class="unit">{escape(unit)}</span>{legend}</figcaption>'
    f'<div class="plot" role="img" tabindex="0" aria-label="{escape(title)}: {escape(words)}"'
    f' {attributes} data-label="{escape(x_label)}" data-marks="{notes}">'
    f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
    f'<path class="grid" d="{lines}"/>{body}</svg>{labels}{above}</div></figure>'
  )


def _legend(keys: Sequence[tuple[str, str]]) -> str:
  items = "".join(f'<li><b class="key {kind}"></b>{escape(name)}</li>' for kind, name in keys)
  return f'<ul class="legend">{items}</ul>'


def _in_words(curve: Curve, unit: str, x_label: str) -> str:
  """What a reader who does not see the figure should know."""
  (first_x, first), (last_x, last) = curve.points[0], curve.points[-1]
  unit = f" {unit}" if unit else ""
  return (
    f"{curve.name} from {plain(first)}{unit} at {x_label} {first_x:,.0f}"
    f" to {plain(last)}{unit} at {x_label} {last_x:,.0f}"
  )


def stacked_chart(
  title: str, names: Sequence[str], bins: Sequence[tuple[int, int, Sequence[float]]]
) -> str:
  """Shares by kind over the steps, as bars: `bins` are (first step, step after the last, amount of each kind)."""
  bins = [(start, stop, amounts) for start, stop, amounts in bins if sum(amounts) > 0]
  if not bins:
    return ""
  x, y = Axis(bins[0][0], max(stop for _, stop, _ in bins)), Axis(0.0, 100.0)
  bars = ["" for _ in names]
  shares: list[list[Point]] = [[] for _ in names]
  for start, stop, amounts in bins:
    base, total = 0.0, sum(amounts)
    for i, amount in enumerate(amounts):
      share = 100 * amount / total
      if share > 0:
        bars[i] += f"M{start} {base / y.factor:.5g}H{stop}V{(base + share) / y.factor:.5g}H{start}z"
      shares[i].append(((start + stop) / 2, share))
      base += share
  paths = "".join(
    f'<path class="bar t{i}" d="{bar}"/><path class="data" data-name="{escape(name)}" d="{_path([share], y)}"/>'
    for i, (name, bar, share) in enumerate(zip(names, bars, shares))
  )
  body = f'<g transform="{_matrix(x, y)}">{paths}</g>'
  legend = _legend([(f"t{i}", name) for i, name in enumerate(names)])
  words = "; ".join(f"{name} {share[-1][1]:.1f} % at the end" for name, share in zip(names, shares))
  return _figure(title, "%", legend, body, x, y, words, "step", (), "double")
