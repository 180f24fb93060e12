"""Whatever folder holds a model, to a model; and back."""

import dataclasses
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import yaml

from maxllama4.checkpoint.checksums import find_damage
from maxllama4.checkpoint.convert import FORMATS, Conversion, save
from maxllama4.checkpoint.hf import HuggingFaceFolder, ModelTensors
from maxllama4.checkpoint.llama import LlamaFolder
from maxllama4.checkpoint.meta import PARAMS, MetaFolder
from maxllama4.checkpoint.run_tensors import RunTensors
from maxllama4.checkpoint.safetensors_files import read_json
from maxllama4.checkpoint.store import CHECKPOINTS, CheckpointError, CheckpointStore, list_steps
from maxllama4.checkpoint.tensors import TensorSource
from maxllama4.config import (
  ConfigError,
  MeshConfig,
  ModelConfig,
  model_to_section,
  read_yaml,
  require,
)
from maxllama4.model.llama4 import Llama4ForCausalLM
from maxllama4.model.weights import ModelTemplate, arrays_of
from maxllama4.settings import config_from_file
from maxllama4.sharding import MeshContext


def open_source(path: str | pathlib.Path) -> TensorSource:
  """The tensors in `path`: a run directory, one of its checkpoints, or a folder of Hugging Face's or Meta's.

  Raises: ConfigError when there is no model, or none that we support.
  """
  path = pathlib.Path(path)
  if os.path.exists(
    path / "config.json"
  ):  # unlike the path's own answer, false for a name too long
    is_llama = read_json(path / "config.json").get("model_type") == "llama"
    return LlamaFolder(path) if is_llama else HuggingFaceFolder(path)
  if os.path.exists(path / PARAMS):
    return MetaFolder(path)
  run_dir, step = find_run(path)
  return RunTensors(run_dir, step, read_run_config(run_dir, None))


def load_model(
  path: str | pathlib.Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> Llama4ForCausalLM:
  """The model in `path`, whatever `open_source` knows.

  It computes in `dtype`; weights keep the dtype they are stored in. With a `mesh` they are laid over it by the default
  rules, each device's part read by itself. Raises: ConfigError when there is no model, or not the one that its
  configuration describes.
  """
  source = open_source(path)
  template = ModelTemplate(dataclasses.replace(source.config, dtype=dtype))
  shardings = None if mesh is None else template.shardings(MeshContext(mesh, MeshConfig()))
  return template.model(source.arrays(template, shardings))


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
    save(ModelTensors(model.config, arrays_of(model)), path, Conversion(to="hf"))
    return
  path.mkdir(parents=True, exist_ok=True)
  (path / "config.yml").write_text(
    yaml.safe_dump(model_to_section(model.config), sort_keys=False), encoding="utf-8"
  )
  store = CheckpointStore(path)
  store.save(0, arrays_of(model), {"step": jnp.zeros((), jnp.int32)}, {})
  store.close()


def find_run(path: pathlib.Path) -> tuple[pathlib.Path, int]:
  """The run directory that `path` is or lies in, and the step: the one that `path` names, else the newest whole one."""
  if path.name.isdigit() and path.parent.name == CHECKPOINTS:
    run_dir, wanted = path.parent.parent, int(path.name)
  else:
    run_dir, wanted = path, None
  if not os.path.exists(run_dir / "config.yml") or not os.path.isdir(run_dir / CHECKPOINTS):
    raise ConfigError(
      f"checkpoint={path} holds no model: neither config.json (Hugging Face), {PARAMS} (Meta), nor config.yml and"
      f" {CHECKPOINTS}/ (a run directory); check the path."
    )
  steps = list_steps(run_dir / CHECKPOINTS)
  if not steps or (wanted is not None and wanted not in steps):
    raise ConfigError(f"checkpoint={path} is not among the checkpoints of {run_dir}: {steps}.")
  return run_dir, _newest_whole(run_dir, [wanted] if wanted is not None else steps)


def _newest_whole(run_dir: pathlib.Path, steps: list[int]) -> int:
  """The last of `steps` whose model is as it was written; warns of each that is passed over."""
  problems = []
  for step in reversed(steps):
    folder = run_dir / CHECKPOINTS / str(step)
    damage = find_damage(folder, item="model")
    if damage is None:
      for problem in problems:
        warnings.warn(f"{problem}; step {step} is read instead.", stacklevel=2)
      return step
    problems.append(f"checkpoint {folder} is damaged: {damage}")
  raise CheckpointError(f"no checkpoint of {run_dir} can be read ({'; '.join(problems)}).")


def read_run_config(run_dir: pathlib.Path, dtype: str | None) -> ModelConfig:
  """The architecture of a run directory, to compute in `dtype` (None: as the run did)."""
  path = run_dir / "config.yml"
  tree = read_yaml(path)
  require(isinstance(tree.get("model"), dict), f"{path}: model must be a section of settings.")
  section = {
    **tree["model"],
    "dtype": dtype or tree.get("dtype"),
    "param_dtype": tree.get("param_dtype"),
  }
  return config_from_file(ModelConfig, section, path, "model.")
