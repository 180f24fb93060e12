"""Names and units of what a run reports, and the writers: the run directory, TensorBoard, the terminal."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import platform
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
import numpy as np

from maxllama4.config import Config, ConfigError, config_to_dict
from maxllama4.files import naming, write_whole
from maxllama4.training.board import Board

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SAMPLES_FILE = "samples.jsonl"
SPENT_ON = ("data", "checkpoint", "evaluation", "other")
MAX_REPORT_SHARE = 0.02  # of a run's time that goes into rewriting its report
PAUSES = ("evaluation", "other")  # not counted in the seconds of a step


class RunWriter:
  """Appends to the files of a run directory that say how it goes; only process 0 writes.

  metrics.jsonl and TensorBoard event files: logged steps; events.jsonl: starts, stops and skipped steps; samples.jsonl;
  and report.html, which `report` makes of them.
  """

  def __init__(
    self,
    config: Config,
    *,
    first_step: int,
    report: Callable[[pathlib.Path], None] | None = None,
  ):
    """Lines of steps after `first_step`, left by a run that stopped after its last checkpoint, are taken back."""
    self._run_dir = pathlib.Path(config.run_dir)
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    self._every, self._report = config.reporting.report_every_seconds, report
    self._reported = time.monotonic()
    for name in (METRICS_FILE, SAMPLES_FILE):
      take_back(self._run_dir / name, first_step)
    take_back(self._run_dir / EVENTS_FILE, first_step, only="skipped")
    with naming(self._run_dir):
      self._board = Board(self._run_dir, first_step + 1)
    self._wandb = open_wandb(config)

  def write(self, step: int, values: dict[str, Any]) -> None:
    """The metrics of a logged step; rewrites the report when it is old."""
    if not self._is_writer:
      return
    self._append(METRICS_FILE, {"step": step, **values})
    with naming(self._run_dir):
      self._board.write(step, values)
    if self._wandb is not None:
      self._wandb.log({k: v for k, v in values.items() if not isinstance(v, list)}, step=step)
    if self._every and time.monotonic() - self._reported >= self._every:
      self.report()

  def event(self, event: str, step: int, **values) -> None:
    """Something that happened to the run at `step`, with the time."""
    self._append(EVENTS_FILE, event_of(event, step, **values))

  def sample(self, step: int, prompt: str, completion: str) -> None:
    self._append(SAMPLES_FILE, {"step": step, "prompt": prompt, "completion": completion})

  def report(self) -> None:
    """Rewrites the report; a large one, that takes long, less often."""
    if self._report is None:
      return
    start = time.monotonic()
    try:
      self._report(self._run_dir)
    except OSError as error:  # no reason to lose the run
      print(f"{self._run_dir}: no report was written ({error.strerror})")
    self._reported = time.monotonic()
    if self._every:
      self._every = max(self._every, (self._reported - start) / MAX_REPORT_SHARE)

  def close(self) -> None:
    if self._is_writer:
      self.report()
      with naming(self._run_dir):
        self._board.close()
      if self._wandb is not None:
        self._wandb.finish()

  def _append(self, name: str, line: dict[str, Any]) -> None:
    if self._is_writer:
      append_line(self._run_dir / name, line)


def end_events(config: Config, step: int) -> None:
  """Says that a run is done where a kill came between its last checkpoint and that line."""
  path = pathlib.Path(config.run_dir) / EVENTS_FILE
  if jax.process_index() == 0 and path.exists():
    take_back(path, step, only="skipped")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or json.loads(lines[-1]).get("reason") != "done":
      append_line(path, event_of("stopped", step, reason="done"))


def event_of(event: str, step: int, **values) -> dict[str, Any]:
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  return {"time": now, "event": event, "step": step, **values}


def append_line(path: pathlib.Path, line: dict[str, Any]) -> None:
  with naming(path), path.open("a", encoding="utf-8") as file:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def take_back(path: pathlib.Path, last_step: int, *, only: str | None = None) -> None:
  """Leaves out of a file of JSON lines those after `last_step` (`only`: events of that name), and what is no whole line."""
  if not path.exists():
    return
  rest = path.with_name(f"{path.name}.tmp")
  with (
    naming(path),
    path.open(encoding="utf-8", errors="replace") as old,
    rest.open("w", encoding="utf-8") as new,
  ):
    new.writelines(line for line in old if line.endswith("\n") and _stays(line, last_step, only))
    new.flush()
    os.fsync(new.fileno())
  rest.replace(path)


def _stays(line: str, last_step: int, only: str | None) -> bool:
  """Whether `take_back` keeps a line; one that was cut off as its run was killed goes."""
  try:
    values = json.loads(line)
    return values["step"] <= last_step or (only is not None and values["event"] != only)
  except (ValueError, KeyError, TypeError):
    return False


def check_wandb(config: Config) -> None:
  """Raises: ConfigError when Weights & Biases is asked for and not installed."""
  project = config.reporting.wandb_project
  if project is not None and importlib.util.find_spec("wandb") is None:
    raise ConfigError(
      f"reporting.wandb_project={project}, but the package wandb is not installed; pip install 'maxllama4[wandb]', or"
      " set it to null."
    )


def open_wandb(config: Config) -> Any:
  """The run's Weights & Biases run, the same one after a restart; None when none is asked for."""
  if config.reporting.wandb_project is None:
    return None
  import wandb  # an extra

  run_dir = pathlib.Path(config.run_dir)
  name = run_dir / "wandb-id"
  if not name.exists():
    write_whole(name, secrets.token_hex(8).encode())
  return wandb.init(
    project=config.reporting.wandb_project,
    name=run_dir.name,
    id=name.read_text(encoding="utf-8"),
    resume="allow",
    dir=str(run_dir),
    config=config_to_dict(config),
  )


def memory_peaks() -> dict[str, int | None]:
  """Most bytes so far: on the fullest device of this host (None where the device does not say), and of this process."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  unit = 1 if sys.platform == "darwin" else 1024
  return {
    "memory/device_peak_bytes": max(peaks, default=None),
    "memory/host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
  }


def versions() -> dict[str, str]:
  """Of what a run's numbers depend on."""
  packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "maxllama4")}
  return {**packages, "python": platform.python_version()}


def to_plain(metrics: dict[str, jax.Array]) -> dict[str, Any]:
  """Device arrays as floats and lists of floats; waits for them."""
  return {name: np.asarray(value, np.float64).tolist() for name, value in metrics.items()}


class Progress:
  """One live line in a terminal, a line an event into a pipe."""

  def __init__(self, steps: int, out: TextIO | None = None):
    """Writes to `out`, or to standard output."""
    self._steps, self._out = steps, out or sys.stdout
    self._live = self._out.isatty()

  def show(self, step: int, values: dict[str, Any]) -> None:
    """A logged step: `values` as written to metrics.jsonl."""
    left = (self._steps - step) * values["step_seconds"]
    mfu = values["mfu"]
    text = (
      f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {values['loss']:.4f}"
      f"  {values['tokens_per_second']:,.0f} tokens/s  mfu {'-' if mfu is None else f'{mfu:.1%}'}"
      f"  left {_clock(left)}"
    )
    self._print(text, end="" if self._live else "\n")

  def say(self, text: str) -> None:
    """A line that stays."""
    self._print(text, end="\n")

  def _print(self, text: str, end: str) -> None:
    if jax.process_index() == 0:
      start = "\r\x1b[2K" if self._live else ""
      try:
        self._out.write(start + text + end)
        self._out.flush()
      except OSError:  # whoever read it is gone, which is no reason to lose the run
        self._out = io.StringIO()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Clock:
  """Where a run's wall-clock time goes: steps, unless it is said to be spent on something else."""

  def __init__(self):
    self._created = self._read = self._logged = time.perf_counter()
    self._step = 0
    self._spent = dict.fromkeys(SPENT_ON, 0.0)  # since the last `read`
    self._paused = 0.0  # of the seconds since the last logged step

  def since_start(self) -> float:
    return time.perf_counter() - self._created

  def start(self, step: int) -> None:
    """The steps after `step` begin; what came before, such as compilation, counts no more."""
    self._read = self._logged = time.perf_counter()
    self._step = step
    self._paused = 0.0
    self._spent = dict.fromkeys(SPENT_ON, 0.0)

  def add(self, what: str, seconds: float) -> None:
    self._spent[what] += seconds
    if what in PAUSES:
      self._paused += seconds

  @contextlib.contextmanager
  def spent_on(self, what: str) -> Iterator[None]:
    entered = time.perf_counter()
    yield
    self.add(what, time.perf_counter() - entered)

  def seconds_a_step(self, step: int) -> float:
    """Mean since the last logged step, evaluations and reports left out."""
    now = time.perf_counter()
    seconds = (now - self._logged - self._paused) / max(1, step - self._step)
    self._step, self._logged, self._paused = step, now, 0.0
    return seconds

  def read(self) -> dict[str, float]:
    """`seconds/...` since the last reading; they add up to the wall-clock time."""
    now = time.perf_counter()
    spent, elapsed = self._spent, now - self._read
    self._read, self._spent = now, dict.fromkeys(SPENT_ON, 0.0)
    seconds = {"step": elapsed - sum(spent.values()), **spent}
    return {f"seconds/{name}": value for name, value in seconds.items()}
