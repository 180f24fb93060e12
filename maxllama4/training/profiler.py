"""Traces of a few steps, and of what lies in a device's memory, for XProf and pprof."""

import pathlib
from typing import Any

import jax

from maxllama4.config import Config

PROFILE = "profile"


class Profiler:
  """Records what `profile.*` asks for into RUN/profile; otherwise does nothing."""

  def __init__(self, config: Config, first_step: int):
    self._config = config.profile
    self._folder = pathlib.Path(config.run_dir) / PROFILE
    self._memory_step = self._config.steps[-1] if self._config.steps else first_step
    self._tracing = False

  def before(self, step: int) -> None:
    """Starts the trace, if it is to hold `step`."""
    steps = self._config.steps
    if steps and steps[0] <= step <= steps[1] and not self._tracing:
      jax.profiler.start_trace(str(self._folder))
      self._tracing = True

  def after(self, step: int, state: Any) -> None:
    """Waits for `state` and writes what ends with `step`."""
    if self._tracing and step == self._config.steps[1]:
      jax.block_until_ready(state)
      self.close()
    if self._config.memory and step == self._memory_step:
      jax.block_until_ready(state)
      self._folder.mkdir(exist_ok=True)
      path = self._folder / f"memory-{jax.process_index()}.prof"
      jax.profiler.save_device_memory_profile(str(path))

  def close(self) -> None:
    """Ends a trace under way, also that of a run which stops before its last step."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
