"""The map of expert load, layer by expert, with a slider over the steps at which it was logged."""

import math
from collections.abc import Sequence

from maxllama4.report.text import escape

# Upper bounds of the classes of colour, in multiples of the even share; class 0 is for experts that got nothing.
BOUNDS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0, math.inf)
LABELS = ("none", "< ¼", "¼ – ½", "½ – 0.8", "even", "1¼ – 2", "2 – 4", "> 4")
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
_LEVELS_AN_OCTAVE, _EVEN, _UNKNOWN = (
  256,
  2048,
  4095,
)  # a load is two digits of base 64: its logarithm


def encode(load: float) -> str:
  """Two characters that the script of the page decodes, to 0.3 % within 1/256 .. 256 times the even share."""
  if math.isnan(load) or load < 0:
    level = _UNKNOWN
  elif load == 0:
    level = 0
  else:
    octaves = math.log2(load) if math.isfinite(load) else math.inf
    level = round(max(1, min(_UNKNOWN - 1, _EVEN + _LEVELS_AN_OCTAVE * octaves)))
  return DIGITS[level // 64] + DIGITS[level % 64]


def colour_class(load: float) -> int | None:
  """Index into `LABELS`; None where the load is not known."""
  if math.isnan(load) or load < 0:
    return None
  return (
    0
    if load == 0
    else 1 + next(i for i, bound in enumerate(BOUNDS) if load < bound or bound == math.inf)
  )


def draw_map(rows: Sequence[Sequence[float]]) -> list[str]:
  """The path of each class: rectangles, one for each stretch of neighbours of that class."""
  paths = ["" for _ in LABELS]
  for y, row in enumerate(rows):
    classes = [colour_class(load) for load in row]
    start = 0
    for x in range(1, len(row) + 1):
      if x == len(row) or classes[x] != classes[start]:
        if classes[start] is not None:
          paths[classes[start]] += f"M{start} {y}h{x - start}v1h{start - x}z"
        start = x
  return paths


def load_map_figure(maps: Sequence[tuple[int, list[list[float]]]], layers: Sequence[int]) -> str:
  """A figure of the newest map; the script redraws it as the slider moves. `layers` numbers its rows."""
  maps = [(step, rows) for step, rows in maps if len(rows) == len(maps[-1][1])]
  maps = [(step, rows) for step, rows in maps if len(rows[0]) == len(maps[-1][1][0])]
  if not maps:
    return ""
  step, rows = maps[-1]
  height, width = len(rows), len(rows[0])
  paths = "".join(f'<path class="h{i}" d="{path}"/>' for i, path in enumerate(draw_map(rows)))
  lines = "".join(f"M0 {y}H{width}" for y in range(1, height)) if height <= 64 else ""
  lines += "".join(f"M{x} 0V{height}" for x in range(1, width)) if width <= 64 else ""
  stride = math.ceil(height / 12)
  labels = "".join(
    f'<i class="y" style="top:{100 * (y + 0.5) / height:.2f}%">{layers[y]}</i>'
    for y in range(0, height, stride)
  )
  stride = math.ceil(width / 8)
  labels += "".join(
    f'<i class="x" style="left:{100 * (x + 0.5) / width:.2f}%">{x}</i>'
    for x in range(0, width, stride)
  )
  data = " ".join("".join(encode(load) for row in rows for load in row) for _, rows in maps)
  steps = " ".join(str(step) for step, _ in maps)
  key = "".join(
    f'<li><b class="key h{i}"></b>{escape(label)}</li>' for i, label in enumerate(LABELS)
  )
  last = len(maps) - 1
  slider = (
    f'<label class="slider">step <output>{step:,}</output><input type="range" min="0" max="{last}"'
    f' value="{last}" step="1" aria-label="which of the logged maps is shown"/></label>'
  )
  return (
    '<figure class="chart wide heat"><figcaption><h3>Load by layer and expert</h3>'
    '<span class="unit">multiples of the even share</span>'
    f'<ul class="legend">{key}</ul></figcaption>{slider if last else ""}'
    f'<div class="plot map" role="img" tabindex="0" style="height:{max(96, min(420, 15 * height))}px"'
    f' aria-label="Load of {width} experts in {height} layers at step {step:,}" data-maps="{escape(data)}"'
    f' data-steps="{steps}" data-width="{width}" data-layers="{" ".join(map(str, layers[:height]))}">'
    f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{paths}'
    f'<path class="seam" d="{lines}"/></svg>{labels}</div>'
    '<p class="note">Rows are layers with experts, from the top; columns are experts.</p></figure>'
  )
