"""A run's directory before the first step: whose it is, what is written there, and its cache of compiled programs."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import yaml
from jax.experimental.compilation_cache import compilation_cache

from maxllama4.config import Config, DistributedConfig, config_to_dict, read_yaml, require
from maxllama4.data.tokenizer import keep_tokenizer
from maxllama4.files import write_whole

CONFIG_FILE = "config.yml"


def check_run_dir(config: Config) -> None:
  """Raises: ConfigError when the run's directory holds a run whose state has another shape."""
  path = pathlib.Path(config.run_dir) / CONFIG_FILE
  if not path.exists():
    return
  earlier, tree = read_yaml(path), config_to_dict(config)
  fixed = [f"model.{name}" for name in tree["model"]] + ["optimizer.name", "training.frozen"]
  for name in fixed:
    section, key = name.split(".")
    before = earlier.get(section)
    require(isinstance(before, dict), f"{path}: {section} must be a section of settings.")
    require(
      before.get(key) == tree[section][key],
      f"{name}={tree[section][key]}, but {path} was trained with {before.get(key)}; set run_dir to a new folder, or"
      f" {name} as it was.",
    )


def keep_config(config: Config) -> None:
  """Writes the resolved configuration into the run, and a copy of a tokenizer from elsewhere.

  Where the processes run is left out: the run may go on on other machines.
  """
  if jax.process_index() == 0:
    run_dir = pathlib.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    tree = config_to_dict(dataclasses.replace(config, distributed=DistributedConfig()))
    write_whole(run_dir / CONFIG_FILE, yaml.safe_dump(tree, sort_keys=False).encode())
    if config.data.tokenizer is not None:
      keep_tokenizer(config.data.tokenizer, run_dir)  # so that the run can be decoded and exported


@contextlib.contextmanager
def compilation_cache_of(config: Config) -> Iterator[None]:
  """Keeps compiled programs for the next start of this run, or of any that shares the folder."""
  folder = config.compilation_cache
  settings = {"jax_enable_compilation_cache": folder is not None}
  if folder is not None:
    settings["jax_compilation_cache_dir"] = str(pathlib.Path(config.run_dir, folder).absolute())
    settings["jax_persistent_cache_min_compile_time_secs"] = 0.1
  before = {name: getattr(jax.config, name) for name in settings}
  _set_compilation_cache(settings)
  try:
    yield
  finally:
    _set_compilation_cache(before)


def _set_compilation_cache(settings: dict[str, Any]) -> None:
  compilation_cache.reset_cache()  # JAX opens a folder once
  for name, value in settings.items():
    jax.config.update(name, value)
