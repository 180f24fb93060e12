"""TensorBoard event files, written at once.

tensorboardX's own SummaryWriter hands events to a thread. What that holds is lost when the run is killed, though the run
goes on from a later step, and an error in it, such as a full disk, reaches nobody.
"""

import pathlib
import time
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import histogram, scalar

HISTOGRAM_BINS = 64


class Board:
  """One event file of a run directory, which begins by taking back what others hold of steps from `first_step` on."""

  def __init__(self, run_dir: pathlib.Path, first_step: int):
    self._file = EventsWriter(str(run_dir / "events"), f".{first_step}")
    start = SessionLog(status=SessionLog.START)
    self._file.write_event(Event(step=first_step, wall_time=time.time(), session_log=start))

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Numbers and lists of them as scalars, lists of lists as a histogram each; returns when all is in the file."""
    for name, value in values.items():
      self._write(step, name, value)
    self._file.flush()

  def _write(self, step: int, name: str, value: Any) -> None:
    if isinstance(value, list) and value and isinstance(value[0], list):
      for i, row in enumerate(value):
        self._add(step, histogram(f"{name}/{i}", np.array(row), HISTOGRAM_BINS))
    elif isinstance(value, list):
      for i, item in enumerate(value):
        self._write(step, f"{name}/{i}", item)
    elif value is not None:
      self._add(step, scalar(name, value))

  def _add(self, step: int, summary: Any) -> None:
    self._file.write_event(Event(step=step, wall_time=time.time(), summary=summary))

  def close(self) -> None:
    self._file.close()
