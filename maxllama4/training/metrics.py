"""Names and units of what a run reports, and the writers: metrics.jsonl, TensorBoard, the terminal."""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

import jax
import numpy as np
from tensorboardX import SummaryWriter

# Dense bf16 FLOPs a second of one JAX device, by the start of its `device_kind`.
PEAK_FLOPS = {
  "TPU v4": 275e12 / 2,  # two devices a chip
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12 / 2,  # two devices a chip
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Peak bf16 FLOPs a second of a device; None where it is not known."""
  return next((flops for name, flops in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


class MetricsWriter:
  """Appends to metrics.jsonl and TensorBoard event files of a run directory; only process 0 writes."""

  def __init__(self, run_dir: pathlib.Path, *, first_step: int):
    """Lines of steps after `first_step`, left by a run that stopped after its last checkpoint, are taken back."""
    self._lines: TextIO | None = None
    if jax.process_index() != 0:
      return
    path = run_dir / "metrics.jsonl"
    if path.exists():
      kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
      path.write_text("".join(f"{line}\n" for line in kept))
    self._lines = path.open("a", encoding="utf-8")
    self._board = SummaryWriter(str(run_dir), purge_step=first_step + 1)

  def write(self, step: int, values: dict[str, Any]) -> None:
    if self._lines is None:
      return
    self._lines.write(json.dumps({"step": step, **values}) + "\n")
    self._lines.flush()
    for name, value in values.items():
      if isinstance(value, list):
        for i, item in enumerate(value):
          self._board.add_scalar(f"{name}/{i}", item, step)
      elif value is not None:
        self._board.add_scalar(name, value, step)
    self._board.flush()

  def close(self) -> None:
    if self._lines is not None:
      self._lines.close()
      self._board.close()


def _step_of(line: str) -> float:
  """The step of a line of metrics.jsonl; infinity for one that was cut off as its run was killed."""
  try:
    return float(json.loads(line)["step"])
  except ValueError:
    return math.inf


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
      self._out.write(start + text + end)
      self._out.flush()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Stopwatch:
  """Seconds a step, leaving out what runs inside `pause`."""

  def __init__(self, step: int):
    self._step, self._start = step, time.perf_counter()

  def read(self, step: int) -> float:
    """Mean seconds a step since the last reading."""
    now, steps = time.perf_counter(), step - self._step
    seconds = (now - self._start) / steps
    self._step, self._start = step, now
    return seconds

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    entered = time.perf_counter()
    yield
    self._start += time.perf_counter() - entered
