"""What the files of a run directory say, in one pass over them, however long they are.

Each file may be missing, unfinished or partly unreadable: what can be read is returned, and `Run.problems` says what not.
"""

import collections
import datetime
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from maxllama4.report.secrets import HIDDEN, hide_secrets, is_secret_name
from maxllama4.report.thinning import Series, Spread

METRICS, EVENTS, SAMPLES, CONFIG = "metrics.jsonl", "events.jsonl", "samples.jsonl", "config.yml"
LOAD_BY_LAYER = "moe/load_by_layer"
DEBUG = "debug/"  # lists by layer
MAX_LOAD_CELLS = 30_000  # of all load maps that are kept together
MAX_SAMPLE_STEPS, MAX_SAMPLES_A_STEP, MAX_EVENTS, MAX_MARKS = 7, 8, 40, 200
MAX_STEP = 2**53  # beyond, a step is a mistake
_KIND_OF_TIME = "seconds/"


class Run:
  """A run as its files tell it, ready to be drawn."""

  def __init__(self, run_dir: pathlib.Path):
    self.run_dir = run_dir
    self.name = run_dir.resolve().name
    self.problems: list[str] = []
    self.settings: dict[str, Any] = {}  # by dotted path, secrets hidden
    self.series: dict[str, Series] = {}  # numbers of metrics.jsonl by key
    self.seconds: dict[str, float] = collections.Counter()  # by kind of time: step, data, ...
    self.lines = 0  # of metrics.jsonl
    self.step = 0  # last logged one
    self.load_maps: list[tuple[int, list[list[float]]]] = []  # (step, load by layer and expert)
    self.by_layer: dict[
      str, tuple[int, list[float]]
    ] = {}  # newest debug statistics, with their step
    self.started: list[dict[str, Any]] = []
    self.stopped: dict[str, Any] | None = None  # None while the newest start has not come to an end
    self.marks: list[dict[str, Any]] = []  # skipped steps and resumptions, evenly thinned
    self.events: list[dict[str, Any]] = []  # the newest
    self.num_events: dict[str, int] = collections.Counter()
    self.samples: list[tuple[int, list[dict[str, Any]]]] = []  # by step
    self.updated: datetime.datetime | None = None  # when the newest of the files was written to

  @property
  def steps(self) -> int | None:
    """How many steps the configuration asks for."""
    value = self.settings.get("training.steps")
    return value if type(value) is int and value > 0 else None

  def last(self, name: str) -> float | None:
    """The newest finite value of a quantity."""
    series = self.series.get(name)
    return None if series is None or series.last is None else series.last[1]


def read_run(run_dir: pathlib.Path) -> Run:
  """Everything that a report shows of the run in `run_dir`."""
  run = Run(run_dir)
  run.settings = _read_settings(run)
  _read_metrics(run)
  _read_events(run)
  _read_samples(run)
  written = [
    path.stat().st_mtime for name in (METRICS, EVENTS) if (path := run_dir / name).exists()
  ]
  if written:
    run.updated = datetime.datetime.fromtimestamp(max(written), datetime.UTC)
  return run


def number(value: Any) -> float | None:
  """`value` as a float if it is a number, NaN and infinity included."""
  if type(value) not in (int, float):
    return None
  try:
    return float(value)
  except OverflowError:
    return None


def numbers(value: Any) -> list[float] | None:
  """`value` as floats if it is a list of numbers; None (unknown) among them becomes NaN."""
  if not isinstance(value, list) or not value:
    return None
  items = [float("nan") if item is None else number(item) for item in value]
  return None if None in items else items


def _read_settings(run: Run) -> dict[str, Any]:
  path = run.run_dir / CONFIG
  try:
    tree = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
  except FileNotFoundError:
    return {}
  except (yaml.YAMLError, ValueError, RecursionError):
    tree = None
  if not isinstance(tree, dict):
    run.problems.append(f"{CONFIG} holds no settings that can be read.")
    return {}
  return {
    path: HIDDEN if is_secret_name(path) and value is not None else _without_secrets(value)
    for path, value in _flat(tree, "")
  }


def _flat(tree: dict, prefix: str) -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, dict) and value:
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def _without_secrets(value: Any) -> Any:
  if isinstance(value, str):
    return hide_secrets(value)
  if isinstance(value, list):
    return [_without_secrets(item) for item in value]
  if isinstance(value, dict):
    return {
      name: HIDDEN if is_secret_name(str(name)) else _without_secrets(item)
      for name, item in value.items()
    }
  return value


def _objects(run: Run, name: str) -> Iterator[dict[str, Any]]:
  """The JSON objects of a file with one a line; others are counted among the problems, but for an unfinished last line."""
  path = run.run_dir / name
  broken, unfinished = 0, False
  if not path.exists():
    return
  with path.open(encoding="utf-8", errors="replace") as file:
    for line in file:
      unfinished = not line.endswith("\n")
      try:
        value = json.loads(line)
      except (ValueError, RecursionError):
        value = None
      if isinstance(value, dict):
        unfinished = False
        yield value
      elif line.strip():
        broken += 1
  broken -= unfinished
  if broken:
    run.problems.append(f"{broken} line{'s' * (broken > 1)} of {name} could not be read.")


def _step_of(line: dict[str, Any]) -> int | None:
  step = line.get("step")
  return step if type(step) is int and 0 <= step < MAX_STEP else None


def _read_metrics(run: Run) -> None:
  series = run.series
  load_maps: Spread | None = None
  for line in _objects(run, METRICS):
    step = _step_of(line)
    if step is None:
      continue
    run.lines, run.step = run.lines + 1, step
    for name, value in line.items():
      kind = type(value)
      if kind is list:
        load_maps = _keep_list(run, load_maps, step, name, value)
      elif (kind is float or kind is int) and (value := number(value)) is not None:
        curve = series.get(name)
        if curve is None:
          curve = series[name] = Series()
        curve.add(step, value)
        if name.startswith(_KIND_OF_TIME) and 0 <= value < float("inf"):
          run.seconds[name.removeprefix(_KIND_OF_TIME)] += value
  series.pop("step", None)
  run.load_maps = load_maps.items if load_maps else []


def _keep_list(
  run: Run, load_maps: Spread | None, step: int, name: str, value: list
) -> Spread | None:
  """Keeps a list of the line at `step`, if it is one that is shown. Returns the load maps so far."""
  if name == LOAD_BY_LAYER:
    rows = [numbers(row) for row in value]
    if rows and None not in rows and len({len(row) for row in rows}) == 1:
      if load_maps is None:
        load_maps = Spread(max(4, min(24, MAX_LOAD_CELLS // (len(rows) * len(rows[0])))))
      load_maps.add((step, rows))
  elif name.startswith(DEBUG):
    items = numbers(value)
    if items is not None:
      run.by_layer[name] = (step, items)
  return load_maps


def _read_events(run: Run) -> None:
  newest: collections.deque = collections.deque(maxlen=MAX_EVENTS)
  marks = Spread(MAX_MARKS)
  for line in _objects(run, EVENTS):
    name = line.get("event")
    if not isinstance(name, str):
      continue
    event = _without_secrets(line)
    run.num_events[name] += 1
    newest.append(event)
    if name == "started":
      run.started.append(event)
      run.stopped = None
    elif name == "stopped":
      run.stopped = event
    is_mark = name == "skipped" or (name == "started" and event.get("resumed"))
    if is_mark and _step_of(event) is not None:
      marks.add(event)
  run.events, run.marks = list(newest), marks.items


def _read_samples(run: Run) -> None:
  groups = Spread(MAX_SAMPLE_STEPS)
  last = None
  for line in _objects(run, SAMPLES):
    step = _step_of(line)
    if step is None or not isinstance(line.get("completion"), str):
      continue
    if last is None or last[0] != step:
      last = (step, [])
      groups.add(last)
    if len(last[1]) < MAX_SAMPLES_A_STEP:
      last[1].append(_without_secrets(line))
  run.samples = groups.items


def display_names(runs: Sequence[Run]) -> list[str]:
  """A name for each run that no other has: the last parts of its path, as many as it takes."""
  paths = [run.run_dir.resolve().parts for run in runs]
  for length in range(1, max(map(len, paths)) + 1):
    names = ["/".join(parts[-length:]) for parts in paths]
    if len(set(names)) == len(names):
      return names
  return [f"{'/'.join(parts[-1:])} ({i + 1})" for i, parts in enumerate(paths)]
