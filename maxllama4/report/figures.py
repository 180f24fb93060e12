"""Which figures are drawn of one run, or of several over each other."""

import dataclasses
import statistics
from collections.abc import Sequence

from maxllama4.report.charts import Curve, Pieces, line_chart, stacked_chart
from maxllama4.report.load_map import load_map_figure
from maxllama4.report.run_files import DEBUG, Run
from maxllama4.report.text import escape, plain

# In the order in which they are stacked; kinds that are not named here come before "other".
KINDS_OF_TIME = ("step", "data", "checkpoint", "evaluation", "other")
NUM_BARS = 48
MAX_OTHER_FIGURES = 24
MAX_FAINT_RUNS = 4  # with more, only smooth lines can be told apart
GIGABYTE = 1e9


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A key of metrics.jsonl and how it is drawn."""

  key: str
  name: str
  unit: str = ""
  scale: float = 1.0
  smooth: bool = False
  log: bool = False
  from_zero: bool = False
  clip_start: bool = False
  dots: bool = False
  marks: bool = False
  width: str = ""


LOSS = Quantity("loss", "training loss", smooth=True, log=True, clip_start=True, marks=True)
HELD_OUT = Quantity("eval/loss", "held-out loss", dots=True, log=True, clip_start=True)
PROGRESS = (
  Quantity("eval/bits_per_byte", "held-out bits per byte", dots=True, clip_start=True),
  Quantity("gradient_norm", "gradient norm", smooth=True, log=True, marks=True),
  Quantity("learning_rate", "learning rate", from_zero=True),
)
SPEED = (
  Quantity("tokens_per_second", "throughput", "tokens/s", smooth=True, from_zero=True),
  Quantity("mfu", "model FLOPs utilisation", "%", 100, smooth=True, from_zero=True),
  Quantity("step_seconds", "time of a step", "s", smooth=True, from_zero=True),
)
MEMORY = (
  Quantity("memory/device_peak_bytes", "device memory, peak", "GB", 1 / GIGABYTE, from_zero=True),
  Quantity("memory/host_peak_bytes", "host memory, peak", "GB", 1 / GIGABYTE, from_zero=True),
)
LOADS = (
  Quantity("moe/max_load", "busiest expert", log=True),
  Quantity("moe/min_load", "idlest expert", log=True),
)
ROUTING = (
  Quantity("moe/entropy", "entropy of the routing", smooth=True),
  Quantity("moe/load_balance_loss", "load-balance loss", smooth=True),
)
SHOWN = {
  quantity.key for quantity in (LOSS, HELD_OUT, *PROGRESS, *SPEED, *MEMORY, *LOADS, *ROUTING)
} | {"tokens", "skipped_steps"}


def learning_figures(runs: Sequence[Run], names: Sequence[str]) -> str:
  """Loss, bits per byte, gradient norm and learning rate."""
  marks = _marks(runs[0]) if len(runs) == 1 else ()
  loss = _together(runs, names, "Loss", (LOSS, HELD_OUT), "nats a token", marks, width="wide")
  return loss + _by_token(runs, names) + "".join(_figure(runs, names, q, marks) for q in PROGRESS)


def speed_figures(runs: Sequence[Run], names: Sequence[str]) -> str:
  """Throughput, utilisation (or the time of a step, where it is not known), memory, and where time went."""
  drawn = [_figure(runs, names, quantity) for quantity in SPEED]
  if drawn[1]:
    drawn.pop()
  figures = "".join(drawn) + _together(runs, names, "Memory", MEMORY, "GB")
  return figures + (time_figure(runs[0]) if len(runs) == 1 else "")


def expert_figures(runs: Sequence[Run], names: Sequence[str]) -> str:
  """How evenly experts are loaded: over the run, and by layer and expert."""
  figures = _together(runs, names, "Load of experts", LOADS, "multiples of the even share")
  figures += "".join(_figure(runs, names, quantity) for quantity in ROUTING)
  if len(runs) == 1 and runs[0].load_maps:
    rows = len(runs[0].load_maps[-1][1])
    figures = load_map_figure(runs[0].load_maps, expert_layers(runs[0], rows)) + figures
  return figures


def expert_layers(run: Run, count: int) -> list[int]:
  """Numbers of the layers with experts, by the configuration; 0, 1, ... where it does not tell."""
  layers, every = (
    run.settings.get("model.moe_layers"),
    run.settings.get("model.interleave_moe_layer_step"),
  )
  if isinstance(layers, list):
    numbers = sorted(layer for layer in layers if type(layer) is int)
  elif type(every) is int and every > 0:
    numbers = [every * (i + 1) - 1 for i in range(count)]
  else:
    numbers = []
  return numbers if len(numbers) == count else list(range(count))


def layer_figures(run: Run) -> str:
  """The newest statistics of activations and gradients, layer by layer."""
  figures = []
  for key, (step, values) in sorted(run.by_layer.items()):
    points = [(i, value) for i, value in enumerate(values) if abs(value) < float("inf")]
    title = key.removeprefix(DEBUG).replace("/", ": ").replace("_", " ").capitalize()
    title = f"{title}, step {step:,}"
    curves = [Curve(title, [points], dots=True)] if points else []
    figures.append(line_chart(title, curves, log=True, x_label="layer"))
    if len(points) < len(values):
      figures.append(
        f'<p class="note">{escape(title)} of {len(values) - len(points)} layers is not finite.</p>'
      )
  return "".join(figures)


def other_figures(runs: Sequence[Run], names: Sequence[str]) -> str:
  """What else was logged; the first `MAX_OTHER_FIGURES` by name."""
  keys = {key for run in runs for key in run.series} - SHOWN
  keys = sorted(key for key in keys if not key.startswith("seconds/"))
  return "".join(
    _figure(runs, names, Quantity(key, key, smooth=True)) for key in keys[:MAX_OTHER_FIGURES]
  )


def time_figure(run: Run) -> str:
  """Shares of time over the steps."""
  kinds = kinds_of_time(run)
  width = max(1, -(-run.step // max(1, min(NUM_BARS, run.lines))))
  bins: dict[int, list[float]] = {}
  for i, kind in enumerate(kinds):
    for start, stop, seconds in run.series[f"seconds/{kind}"].sums():
      place = max(0, (start + stop - 1) // 2 - 1) // width  # a line tells of the steps before it
      bins.setdefault(place, [0.0] * len(kinds))[i] += max(0.0, seconds)
  places = sorted(bins)
  starts = [*places[:1], *(place + 1 for place in places)]  # a bar reaches back to the one before
  bars = [(start * width, (place + 1) * width, bins[place]) for start, place in zip(starts, places)]
  return stacked_chart("Where time went", kinds, bars)


def kinds_of_time(run: Run) -> list[str]:
  """The kinds of time that were logged, in the order of `KINDS_OF_TIME`."""
  known = [kind for kind in KINDS_OF_TIME if kind in run.seconds]
  new = sorted(set(run.seconds) - set(known))
  return [*known[:-1], *new, *known[-1:]]


def _together(runs, names, title, quantities: Sequence[Quantity], unit, marks=(), width="") -> str:
  """Quantities of one run in one figure; of several runs, a figure for each quantity."""
  if len(runs) > 1:
    drawn = [dataclasses.replace(quantity, unit=unit, width=width) for quantity in quantities]
    return "".join(_figure(runs, names, quantity) for quantity in drawn)
  curves = [_curve(runs[0], quantity, quantity.name, i) for i, quantity in enumerate(quantities)]
  first = quantities[0]
  return line_chart(
    title,
    curves,
    unit=unit,
    log=first.log,
    from_zero=first.from_zero,
    clip_start=first.clip_start,
    marks=marks,
    width=width,
  ) + _not_finite(runs, names, quantities)


def _figure(runs: Sequence[Run], names: Sequence[str], quantity: Quantity, marks=()) -> str:
  """One quantity of all runs in one figure."""
  if len(runs) > MAX_FAINT_RUNS and quantity.smooth:
    curves = [
      _smooth_alone(_curve(run, quantity, name, i))
      for i, (run, name) in enumerate(zip(runs, names))
    ]
  else:
    curves = [_curve(run, quantity, name, i) for i, (run, name) in enumerate(zip(runs, names))]
  if len(runs) == 1:
    curves = [dataclasses.replace(curves[0], name=quantity.name)]
  title = quantity.name
  if title != quantity.key:
    title = title[:1].upper() + title[1:]
  return line_chart(
    title,
    curves,
    unit=quantity.unit,
    log=quantity.log,
    from_zero=quantity.from_zero,
    clip_start=quantity.clip_start,
    marks=marks if quantity.marks else (),
    width=quantity.width,
  ) + _not_finite(runs, names, [quantity])


def _smooth_alone(curve: Curve) -> Curve:
  return dataclasses.replace(curve, pieces=curve.smooth or curve.pieces, smooth=())


def _curve(run: Run, quantity: Quantity, name: str, colour: int) -> Curve:
  series = run.series.get(quantity.key)
  if series is None:
    return Curve(name, ())
  pieces, smooth = list(series.extremes()), []
  if quantity.smooth and sum(map(len, pieces)) > 12:
    smooth = smoothed(list(series.means()))
  return Curve(
    name, _scaled(pieces, quantity.scale), colour, _scaled(smooth, quantity.scale), quantity.dots
  )


def _scaled(pieces: Pieces, factor: float) -> Pieces:
  return [[(step, value * factor) for step, value in piece] for piece in pieces]


def smoothed(pieces: Pieces) -> list[list[tuple[int, float]]]:
  """Medians over a window of a twentieth of the curve, centred, and narrower towards the ends of a piece."""
  reach = sum(map(len, pieces)) // 40
  result = []
  for piece in pieces:
    values, line = [value for _, value in piece], []
    for i, (step, _) in enumerate(piece):
      near = min(reach, i, len(piece) - 1 - i)
      window = values[i - near : i + near + 1]
      line.append((step, statistics.median(window)))
    result.append(line)
  return result


def _by_token(runs: Sequence[Run], names: Sequence[str]) -> str:
  """Training loss over tokens, where a step has not as many tokens in each of the runs."""
  rates = {
    round(tokens / run.series["tokens"].last[0])
    for run in runs
    if (tokens := run.last("tokens")) and run.series["tokens"].last[0]
  }
  if len(runs) == 1 or len(rates) < 2 or max(rates) < 1.02 * min(rates):
    return ""
  curves = []
  for i, (run, name) in enumerate(zip(runs, names)):
    tokens = run.last("tokens")
    if tokens:
      a_step = tokens / run.series["tokens"].last[0]
      curve = _smooth_alone(_curve(run, LOSS, name, i))
      pieces = [[(step * a_step, value) for step, value in piece] for piece in curve.pieces]
      curves.append(dataclasses.replace(curve, pieces=pieces))
  return line_chart(
    "Training loss by tokens",
    curves,
    unit="nats a token",
    log=True,
    clip_start=True,
    x_label="token",
  )


def _marks(run: Run) -> list[tuple[int, str, str]]:
  marks = []
  for event in run.marks:
    step = event["step"]
    if event["event"] == "started":
      marks.append((step, "restart", f"resumed from step {step:,}"))
    else:
      reason = str(event.get("reason", "")).strip()
      marks.append(
        (step, "bad", f"{event['event']} at step {step:,}" + (f": {reason}" if reason else ""))
      )
  return marks


def _not_finite(runs, names, quantities: Sequence[Quantity]) -> str:
  """A note on values that no figure can hold."""
  notes = []
  for run, name in zip(runs, names):
    for quantity in quantities:
      series = run.series.get(quantity.key)
      if series is not None and series.unusable:
        whose = f" of {name}" if len(runs) > 1 else ""
        count = plain(series.unusable, 1) if series.unusable > 1 else "one"
        notes.append(
          f"{quantity.name}{whose}: {count} logged value{'s' * (series.unusable > 1)} not finite"
        )
  return f'<p class="note bad-note">{escape("; ".join(notes))}.</p>' if notes else ""
