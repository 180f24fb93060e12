"""A run that is asked to stop, by SIGTERM or from the keyboard."""

import contextlib
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Whether somebody asked the run to stop; a context that takes SIGTERM and Ctrl-C while it lasts.

  Before `defer`, when there is nothing to save, a signal ends the process at once with exit code 0. After it, the first
  one is kept for the loop to see, and a second Ctrl-C is a KeyboardInterrupt.

  Among several processes a signal to one stops all after the same step, on which JAX's preemption service agrees. It takes
  SIGTERM itself, also before the first step: then they stop after that.
  """

  def __init__(self):
    self._deferred, self._asked = False, False
    self._steps_seen = 0
    self._earlier: dict[int, object] = {}

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      taken = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGTERM, signal.SIGINT]
      for number in taken:
        self._earlier[number] = signal.signal(number, self._take)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._earlier.items():
      signal.signal(number, handler)

  def defer(self) -> None:
    self._deferred = True

  def after_this_step(self) -> bool:
    """Whether the run is to stop now; every process asks once a step."""
    if jax.process_count() > 1:
      # The service counts calls: to a signal from before the first one it answers "at number 1", wherever a run goes on.
      self._steps_seen += 1
      return multihost_utils.reached_preemption_sync_point(self._steps_seen)
    return self._asked

  def _take(self, number: int, frame: FrameType | None) -> None:
    if not self._deferred:
      _say("stopped before the first step")
      raise SystemExit(0)
    if self._asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    if not self._asked:
      _say(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint")
    self._asked = True
    if jax.process_count() > 1:
      signal.raise_signal(signal.SIGTERM)


def _say(text: str) -> None:
  """To standard output, past its buffer: a signal may come in the middle of a `print`."""
  with contextlib.suppress(OSError):
    os.write(1, f"\n{text}\n".encode())
