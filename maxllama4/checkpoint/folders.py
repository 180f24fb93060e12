"""Whatever folder holds a model, to a model; and back."""

import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import yaml

from maxllama4.checkpoint import hf, llama, meta
from maxllama4.checkpoint.store import CHECKPOINTS, CheckpointStore
from maxllama4.config import (
  ConfigError,
  MeshConfig,
  ModelConfig,
  config_from_section,
  model_to_section,
  read_yaml,
)
from maxllama4.model.llama4 import Llama4ForCausalLM
from maxllama4.model.weights import Arrays, ModelTemplate, arrays_of
from maxllama4.sharding import MeshContext

FORMATS = ("hf", "maxllama4")


def load_model(
  path: str | pathlib.Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> Llama4ForCausalLM:
  """The model in `path`: a run directory, one of its checkpoints, or a folder of Hugging Face's or Meta's.

  It computes in `dtype`; weights keep the dtype they are stored in. With a `mesh` they are laid over it by the default
  rules. Raises: ConfigError when there is no model, or not the one that its configuration describes.
  """
  path = pathlib.Path(path)
  context = None if mesh is None else MeshContext(mesh, MeshConfig())
  reader = foreign_reader(path)
  if reader is not None:
    template = ModelTemplate(reader.read_config(path, dtype))
    return template.model(_place(reader.read_arrays(path, template), template, context))
  run_dir, step = find_run(path)
  template = ModelTemplate(read_run_config(run_dir, dtype))
  shapes = template.shapes
  if context is not None:
    shapes = {
      name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=template.shardings(context)[name])
      for name, s in shapes.items()
    }
  store = CheckpointStore(run_dir)
  try:
    return template.model(store.restore_model(step, shapes))
  finally:
    store.close()


def save_model(model: Llama4ForCausalLM, path: str | pathlib.Path, format: str) -> None:
  """Writes `model` to the folder `path`, as transformers reads it ("hf") or as a run directory ("maxllama4").

  Raises: ConfigError for another format, or when the folder already holds something.
  """
  path = pathlib.Path(path)
  if format not in FORMATS:
    raise ConfigError(f"format={format} is not one of {', '.join(FORMATS)}.")
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ConfigError(f"{path} already holds something; give a new or empty folder.")
  if format == "hf":
    hf.write_folder(path, model.config, arrays_of(model))
    return
  path.mkdir(parents=True, exist_ok=True)
  (path / "config.yml").write_text(
    yaml.safe_dump(model_to_section(model.config), sort_keys=False), encoding="utf-8"
  )
  store = CheckpointStore(path)
  store.save(0, arrays_of(model), {"step": jnp.zeros((), jnp.int32)}, {})
  store.wait()
  store.close()


def foreign_reader(path: pathlib.Path) -> types.ModuleType | None:
  """The module with `read_config` and `read_arrays` for the folder `path`; None where it is none that others wrote."""
  if (path / "config.json").exists():
    is_llama = hf.read_json(path / "config.json").get("model_type") == "llama"
    return llama if is_llama else hf
  return meta if (path / meta.PARAMS).exists() else None


def find_run(path: pathlib.Path) -> tuple[pathlib.Path, int]:
  """The run directory that `path` is or lies in, and the step: the one that `path` names, else the newest."""
  if path.name.isdigit() and path.parent.name == CHECKPOINTS:
    run_dir, wanted = path.parent.parent, int(path.name)
  else:
    run_dir, wanted = path, None
  if not (run_dir / "config.yml").exists() or not (run_dir / CHECKPOINTS).is_dir():
    raise ConfigError(
      f"checkpoint={path} holds no model: neither config.json (Hugging Face), {meta.PARAMS} (Meta), nor config.yml and"
      f" {CHECKPOINTS}/ (a run directory); check the path."
    )
  store = CheckpointStore(run_dir)
  steps = store.steps
  store.close()
  if not steps or (wanted is not None and wanted not in steps):
    raise ConfigError(f"checkpoint={path} is not among the checkpoints of {run_dir}: {steps}.")
  return run_dir, steps[-1] if wanted is None else wanted


def read_run_config(run_dir: pathlib.Path, dtype: str | None) -> ModelConfig:
  """The architecture of a run directory, to compute in `dtype` (None: as the run did)."""
  tree = read_yaml(run_dir / "config.yml")
  section = {**tree["model"], "dtype": dtype or tree["dtype"], "param_dtype": tree["param_dtype"]}
  return config_from_section(ModelConfig, section, f"{run_dir / 'config.yml'}: model.")


def _place(arrays: Any, template: ModelTemplate, context: MeshContext | None) -> Arrays:
  """Arrays on the device or the mesh; router biases, which no released file has, are zero."""
  shardings = None if context is None else template.shardings(context)
  placed = {
    path: jax.device_put(array, None if shardings is None else shardings[path])
    for path, array in arrays
  }
  for path, shape in template.shapes.items():
    if path not in placed:
      zeros = jnp.zeros(shape.shape, shape.dtype)
      placed[path] = jax.device_put(zeros, None if shardings is None else shardings[path])
  return placed
