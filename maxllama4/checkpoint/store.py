"""Run directories: the whole training state saved with Orbax, in the background, and restored onto any mesh.

A checkpoint is written under another name and renamed when it is whole, so its step is there or it is not. What was left
unfinished goes with the next save; what turns out to be damaged is kept aside as `<step>.broken`.
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from maxllama4.checkpoint.checksums import find_damage, write_record
from maxllama4.config import CheckpointConfig
from maxllama4.model.weights import Arrays, is_stacked

CHECKPOINTS = "checkpoints"
SAVE_TIMEOUT_SECONDS = 6 * 3600  # Orbax's own 20 minutes end a run on a slow shared disk
UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's ending of what is not whole yet, or no more


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written, or not be restored; one sentence."""


class CheckpointStore:
  """Checkpoints of one run, by step. Each holds `model` (arrays by path), `rest` (any other state) and `position`.

  All processes of a run call all methods, in the same order. Only `save` changes files; and `restore_newest`, which
  sets aside what it had to pass over.
  """

  def __init__(self, run_dir: str | pathlib.Path, config: CheckpointConfig | None = None):
    self._folder = pathlib.Path(run_dir).absolute() / CHECKPOINTS
    self._config = config or CheckpointConfig()
    _silence_repetitions()
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(), timeout_secs=SAVE_TIMEOUT_SECONDS
    )
    self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._saving: concurrent.futures.Future | None = None

  @property
  def steps(self) -> list[int]:
    """Steps that have a committed checkpoint, oldest first, as process 0 sees them."""
    return gather_json(list_steps(self._folder))[0]

  def save(self, step: int, model: Arrays, rest: Any, position: dict[str, Any]) -> None:
    """Copies the state off the device, then writes it in the background; each layer of a stack by itself.

    A step that has a checkpoint keeps it. Raises: CheckpointError when this save cannot begin, or the one before has failed.
    """
    self.wait()
    if step in self.steps:
      return
    layer_by_layer = {
      path: ocp.SaveArgs(shard_axes=(0,) if is_stacked(path) else ()) for path in model
    }
    items = ocp.args.Composite(
      model=ocp.args.StandardSave(model, layer_by_layer),
      rest=ocp.args.StandardSave(rest),
      position=ocp.args.JsonSave(position),
    )
    with self._explained(step, "cannot be written"):
      if jax.process_index() == 0:
        self._clear_unfinished()
      self._orbax.save(self._folder / str(step), args=items)
    self._saving = self._background.submit(self._finish, step)

  def check(self) -> None:
    """Raises CheckpointError when the save under way has failed already; waits for nothing."""
    if self._saving is not None and self._saving.done():
      self.wait()

  def wait(self) -> None:
    """Returns when everything saved so far is on disk. Raises: CheckpointError when it could not be."""
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def close(self) -> None:
    """Waits, and ends the threads."""
    try:
      self.wait()
    finally:
      self._background.shutdown()
      self._orbax.close()

  def restore_newest(
    self, model: Any, rest: Any, say: Callable[[str], None]
  ) -> tuple[int, Any, Any, dict[str, Any]] | None:
    """Step, state and data position of the newest whole checkpoint; None when there is no checkpoint at all.

    `model` and `rest` say shapes, dtypes and shardings. Damaged checkpoints that are newer are kept as `<step>.broken`,
    and `say` tells of each. Raises: CheckpointError when there are checkpoints but none is whole, or the newest whole
    one does not fit.
    """
    self.wait()
    passed_over: list[tuple[int, str]] = []
    for step in reversed(self.steps):
      damage = self._find_damage(step)
      if damage is None:
        try:
          state = self._read(step, model=model, rest=rest)
        except CheckpointError as error:
          # Every byte is as it was written; or the others may not have met what this process has.
          if jax.process_count() > 1 or self._is_recorded(step):
            raise
          damage = str(error)
        if damage is None:
          self._set_aside(passed_over, say)
          return step, *state
      passed_over.append((step, damage))
    if passed_over:
      reasons = "; ".join(damage for _, damage in passed_over)
      raise CheckpointError(
        f"no checkpoint of {self._folder} can be restored ({reasons}); put back a copy of one, or set run_dir to a new"
        " folder."
      )
    return None

  def restore(self, step: int, model: Any, rest: Any) -> tuple[Any, Any, dict[str, Any]]:
    """State and data position of `step`; `model` and `rest` say shapes, dtypes and shardings to restore to."""
    self._check_whole(step)
    return self._read(step, model=model, rest=rest)

  def restore_model(self, step: int, model: Any) -> Any:
    """The arrays alone."""
    self._check_whole(step, item="model")
    return self._read(step, model=model)[0]

  def _read(self, step: int, **shapes: Any) -> tuple[Any, ...]:
    """The items that `shapes` describe, and after both of them the position."""
    items = {name: ocp.args.StandardRestore(shape) for name, shape in shapes.items()}
    if "rest" in shapes:
      items["position"] = ocp.args.JsonRestore()
    with self._explained(step, "cannot be restored"):
      restored = self._orbax.restore(self._folder / str(step), args=ocp.args.Composite(**items))
    return tuple(restored[name] for name in items)

  def _check_whole(self, step: int, item: str | None = None) -> None:
    self.wait()
    damage = self._find_damage(step, item)
    if damage is not None:
      raise CheckpointError(f"{damage}.")

  def _find_damage(self, step: int, item: str | None = None) -> str | None:
    """What all processes find, each looking at its share of the files."""
    folder, mine = self._folder / str(step), {"share": jax.process_index()}
    found = gather_json(find_damage(folder, item=item, shares=jax.process_count(), **mine))
    damage = next((damage for damage in found if damage is not None), None)
    return None if damage is None else f"checkpoint {folder} is damaged: {damage}"

  def _is_recorded(self, step: int) -> bool:
    return gather_json(any((self._folder / str(step)).glob("checksums.*")))[0]

  def _set_aside(self, passed_over: list[tuple[int, str]], say: Callable[[str], None]) -> None:
    for step, damage in passed_over:
      if jax.process_index() == 0:
        path = self._folder / str(step)
        names = (f"{step}.broken{number}" for number in ("", *map("-{}".format, range(2, 1000))))
        broken = next(b for b in map(path.with_name, names) if not b.exists())
        with self._explained(step, "cannot be renamed"):
          os.replace(path, broken)
        say(f"{damage}; passed over, and kept as {broken.name}")
    gather_json(None)  # no process goes on before the names are settled

  def _finish(self, step: int) -> None:
    """In the background: waits for the commit, records its checksums, and lets go of what is no longer kept."""
    with self._explained(step, "cannot be written"):
      self._orbax.wait_until_finished()
      write_record(self._folder / str(step), jax.process_index())
      if jax.process_index() == 0:
        keep, keep_every = self._config.keep, self._config.keep_every
        for old in list_steps(self._folder)[:-keep]:
          if not keep_every or old % keep_every:
            self._delete(old)

  def _delete(self, step: int) -> None:
    """Renamed first: a kill leaves a whole checkpoint or none."""
    leaving = self._folder / f"{step}{UNFINISHED}"
    os.replace(self._folder / str(step), leaving)
    shutil.rmtree(leaving)

  def _clear_unfinished(self) -> None:
    for path in self._folder.glob(f"*{UNFINISHED}*"):
      shutil.rmtree(path)

  @contextlib.contextmanager
  def _explained(self, step: int, what: str) -> Iterator[None]:
    """Any failure of Orbax or the disk as a CheckpointError that names the checkpoint and the reason."""
    try:
      yield
    except Exception as error:
      raise CheckpointError(
        f"checkpoint {self._folder / str(step)} {what}: {_reason(error)}."
      ) from error


def list_steps(folder: pathlib.Path) -> list[int]:
  """Steps of the committed checkpoints in a run's folder of them, oldest first."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def _reason(error: Exception) -> str:
  """The operating system's words where it was the disk, else the error's own."""
  number = re.search(r"os_error_code='(\d+)'", str(error))
  if number:
    return os.strerror(int(number[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  words = " ".join(str(error).split()) or type(error).__name__
  return words if len(words) <= 400 else f"{words[:400]} ..."


def _silence_repetitions() -> None:
  """Of a failed save, Orbax and TensorStore print what they also raise, with tracebacks, and what they drop."""
  logging.getLogger("absl").addFilter(_is_not_from_orbax)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  hook = sys.unraisablehook
  if getattr(hook, "func", None) is not _print_unraisable:
    sys.unraisablehook = functools.partial(_print_unraisable, hook)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
  return record.levelno < logging.ERROR or "orbax" not in pathlib.Path(record.pathname).parts


def _print_unraisable(hook: Callable, unraisable: Any) -> None:
  """As `hook` does, unless it is a write that ended after the failed save it was part of."""
  if str(unraisable.exc_value) != "Event loop is closed":
    hook(unraisable)


def gather_json(value: Any) -> list[Any]:
  """The values of all processes, in order; each is plain and small."""
  if jax.process_count() == 1:
    return [value]
  mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.process_allgather(np.int64(mine.size)).max())
  rows = multihost_utils.process_allgather(np.pad(mine, (0, size - mine.size)))
  return [json.loads(bytes(row).rstrip(b"\0")) for row in rows]
