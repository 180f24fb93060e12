"""Run directories: the whole training state saved with Orbax, in the background, and restored onto any mesh."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from maxllama4.config import CheckpointConfig
from maxllama4.model.weights import Arrays, is_stacked

CHECKPOINTS = "checkpoints"


class CheckpointStore:
  """Checkpoints of one run, by step. Each holds `model` (arrays by path), `rest` (any other state) and `position`."""

  def __init__(self, run_dir: str | pathlib.Path, config: CheckpointConfig | None = None):
    config = config or CheckpointConfig()
    self._manager = ocp.CheckpointManager(
      pathlib.Path(run_dir).absolute() / CHECKPOINTS,
      item_names=("model", "rest", "position"),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.keep,
        keep_period=config.keep_every or None,
        enable_async_checkpointing=True,
      ),
    )

  @property
  def steps(self) -> list[int]:
    """Steps that have a whole checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, model: Arrays, rest: Any, position: dict[str, Any]) -> None:
    """Copies the state off the device, then writes it in the background; each layer of a stack by itself."""
    layer_by_layer = {
      path: ocp.SaveArgs(shard_axes=(0,) if is_stacked(path) else ()) for path in model
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(model, layer_by_layer),
        rest=ocp.args.StandardSave(rest),
        position=ocp.args.JsonSave(position),
      ),
    )

  def restore(self, step: int, model: Any, rest: Any) -> tuple[Any, Any, dict[str, Any]]:
    """State and data position of `step`; `model` and `rest` say shapes, dtypes and shardings to restore to."""
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardRestore(model),
        rest=ocp.args.StandardRestore(rest),
        position=ocp.args.JsonRestore(),
      ),
    )
    return items["model"], items["rest"], items["position"]

  def restore_model(self, step: int, model: Any) -> Any:
    """The arrays alone."""
    arguments = ocp.args.Composite(model=ocp.args.StandardRestore(model))
    return self._manager.restore(step, args=arguments)["model"]

  def wait(self) -> None:
    """Returns when everything saved so far is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def gather_json(value: Any) -> list[Any]:
  """The values of all processes, in order; each is plain and small."""
  if jax.process_count() == 1:
    return [value]
  mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.process_allgather(np.int64(mine.size)).max())
  rows = multihost_utils.process_allgather(np.pad(mine, (0, size - mine.size)))
  return [json.loads(bytes(row).rstrip(b"\0")) for row in rows]
