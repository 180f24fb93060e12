"""A step that went wrong: what is kept of it for a closer look, and how to run it again."""

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxllama4.checkpoint.safetensors_files import read_json
from maxllama4.checkpoint.store import CheckpointStore
from maxllama4.config import Config, ConfigError, load_config, require
from maxllama4.data.packing import ROW_DTYPES
from maxllama4.files import naming, write_whole
from maxllama4.kernels.choice import use_kernels
from maxllama4.mesh import build_mesh
from maxllama4.model.weights import Arrays, ModelTemplate
from maxllama4.sharding import MeshContext, use_mesh
from maxllama4.training.evaluate import place_batch
from maxllama4.training.metrics import to_plain
from maxllama4.training.optimizer import make_optimizer
from maxllama4.training.run_dir import compilation_cache_of
from maxllama4.training.state import abstract_state, split_trainable
from maxllama4.training.statistics import debug_metrics
from maxllama4.training.step import (
  Batch,
  batch_gradients,
  batch_totals,
  kernel_choice,
  microbatches_of,
)

FAILURES = "failures"
FAILURE_FILE = "failure.json"
STATISTICS = ("mean", "deviation", "zeros", "max")


class TrainingFailure(RuntimeError):
  """A run that cannot go on; says the step, the reason and what to do."""


def make_diagnosis(config: Config, template: ModelTemplate, context: MeshContext):
  """A function of weights and batch: loss, gradient norm, and the statistics of every layer, for this very step."""

  @use_kernels(kernel_choice(config))
  def diagnose(arrays: Arrays, batch: Batch) -> dict[str, jax.Array]:
    params, fixed = split_trainable(arrays, template)
    totals = batch_totals(batch)
    gradients, sums = batch_gradients(config, template, params, fixed, batch, totals)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients.values()))
    statistics = debug_metrics(template.model(arrays), microbatches_of(config, batch), gradients)
    return {"loss": sums["nats"] / totals["weight"], "gradient_norm": norm} | statistics

  return jax.jit(diagnose, out_shardings=context.sharding(()))


def write_failure(
  config: Config,
  step: int,
  reason: str,
  batch: dict[str, np.ndarray],
  rows: Sequence[int],
  documents: Sequence[dict[str, Any]],
) -> pathlib.Path:
  """The folder that holds the batch (each process its `rows`), and where its rows come from."""
  folder = pathlib.Path(config.run_dir) / FAILURES / f"step-{step}"
  index = jax.process_index()
  with naming(folder):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"batch-{index}.npz", rows=np.asarray(rows), **batch)
  lines = "".join(f"{json.dumps(document)}\n" for document in documents)
  write_whole(folder / f"documents-{index}.jsonl", lines.encode())
  if index == 0:
    write_whole(folder / FAILURE_FILE, json.dumps({"step": step, "reason": reason}).encode())
  return folder


def write_diagnosis(folder: pathlib.Path, diagnosis: dict[str, Any]) -> None:
  """Adds to what `write_failure` wrote what the step's numbers look like."""
  if jax.process_index() == 0:
    path = folder / FAILURE_FILE
    write_whole(path, json.dumps(read_json(path) | diagnosis, indent=1).encode())


def read_batch(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The whole batch in `folder`. Raises: ConfigError when it is none that `write_failure` left."""
  parts = []
  for path in folder.glob("batch-*.npz"):
    try:
      with np.load(path, allow_pickle=False) as arrays:
        parts.append({name: arrays[name] for name in ("rows", *ROW_DTYPES)})
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
      raise ConfigError(f"{path} is not a batch of a failed step ({error}).") from None
  require(bool(parts), f"{folder} holds no batch; name a folder of RUN/{FAILURES}.")
  whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  _, order = np.unique(
    whole.pop("rows"), return_index=True
  )  # processes may have read the same rows
  return {name: values[order] for name, values in whole.items()}


def replay(folder: str | pathlib.Path, overrides: Sequence[str]) -> dict[str, Any]:
  """Runs the failed step in `folder` again, on the checkpoint before it; see `make_diagnosis`.

  `overrides` change the run's configuration, such as `dtype=float32`. Raises: ConfigError when the folder, or that
  checkpoint, is not there.
  """
  folder = pathlib.Path(folder)
  batch = read_batch(folder)
  step = read_json(folder / FAILURE_FILE).get("step")
  require(isinstance(step, int), f"{folder / FAILURE_FILE} names no step.")
  run_dir = folder.absolute().parent.parent
  config = load_config(run_dir / "config.yml", overrides)
  config = dataclasses.replace(config, run_dir=str(run_dir))
  template = ModelTemplate(config.model, config.training.frozen)
  optimizer = make_optimizer(config.optimizer, config.training.steps, template)
  store = CheckpointStore(config.run_dir, config.checkpoint)
  if step - 1 not in store.steps:
    raise ConfigError(
      f"{folder}: the run no longer has its checkpoint of step {step - 1}, which the step started from."
    )
  require(
    len(batch["tokens"]) == config.training.batch_size,
    f"training.batch_size={config.training.batch_size}, but {folder} holds {len(batch['tokens'])} rows; leave it as it"
    " was.",
  )
  with compilation_cache_of(config), use_mesh(build_mesh(config), config.mesh) as context:
    shapes = abstract_state(template, optimizer, context)
    arrays = store.restore_model(step - 1, shapes.model)
    placed = place_batch(batch, config, context)
    return {"step": step} | to_plain(make_diagnosis(config, template, context)(arrays, placed))


def print_replay(found: dict[str, Any]) -> None:
  """A table of the layers, and the first with numbers that are not finite."""
  print(
    f"step {found['step']}: loss {found['loss']:.6g}, gradient norm {found['gradient_norm']:.6g}\n"
  )
  names = [f"{group}/{name}" for group in ("activations", "gradients") for name in STATISTICS]
  print(f"{'':>5}  {'activations':<41}  gradients")
  print(f"{'layer':>5}  " + "  ".join(f"{name:<9}" for name in STATISTICS * 2))
  columns = [found[f"debug/{name}"] for name in names]
  for layer, row in enumerate(zip(*columns)):
    print(f"{layer:>5}  " + "  ".join(f"{value:<9.3g}" for value in row))
  verdict = first_bad_layer(found)
  if verdict is not None:
    print(f"\n{verdict}")


def first_bad_layer(found: dict[str, Any]) -> str | None:
  """Where numbers first went wrong, in the order of computation: forwards, then backwards; None where they did not."""
  activations, gradients = (
    np.flatnonzero(~np.isfinite(found[f"debug/{group}/max"]))
    for group in ("activations", "gradients")
  )
  if activations.size:
    return f"layer {activations[0]} is the first whose output is not finite"
  if gradients.size:
    return f"layer {gradients[-1]} is the first, from the loss backwards, with gradients that are not finite"
  return None
