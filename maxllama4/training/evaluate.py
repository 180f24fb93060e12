"""Loss and bits per byte of a model on documents: during a run, and of any checkpoint by itself."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from maxllama4.checkpoint.folders import open_source
from maxllama4.checkpoint.tensors import TensorSource
from maxllama4.config import (
  Config,
  ConfigError,
  config_from_dict,
  model_to_section,
  parse_override,
  read_yaml,
)
from maxllama4.data.loader import EvalSet, make_eval_batches
from maxllama4.data.tokenizer import load_tokenizer
from maxllama4.mesh import build_mesh
from maxllama4.model.weights import Arrays, ModelTemplate
from maxllama4.settings import set_dotted
from maxllama4.sharding import MeshContext, use_mesh
from maxllama4.training.metrics import to_plain
from maxllama4.training.step import make_eval_step

SEQUENCE_LENGTH = 2048  # tokens a row, unless the run or the command says otherwise


@dataclasses.dataclass(frozen=True)
class Score:
  """How well a model predicts a text."""

  loss: float  # nats a counted token
  bits_per_byte: float
  tokens: int  # counted targets
  bytes: int  # UTF-8 bytes that they stand for


class Evaluation:
  """A function from a model's arrays to its `Score` on documents that were packed once."""

  def __init__(
    self, config: Config, template: ModelTemplate, context: MeshContext, documents: EvalSet
  ):
    self._config, self._context, self._documents = config, context, documents
    self._step = jax.jit(make_eval_step(config, template), out_shardings=context.sharding(()))

  def __call__(self, model: Arrays) -> Score:
    sums = [
      to_plain(self._step(model, place_batch(batch, self._config, self._context)))
      for batch in self._documents.batches
    ]
    nats, weight = (math.fsum(s[name] for s in sums) for name in ("nats", "weight"))
    num_bytes = self._documents.num_bytes
    return Score(nats / weight, nats / math.log(2) / num_bytes, round(weight), num_bytes)


def local_rows(config: Config, context: MeshContext) -> list[int]:
  """Which rows of the global batch this host's devices hold; hosts share rows where the mesh splits rows among them."""
  size = config.training.batch_size
  places = context.sharding(("batch",)).addressable_devices_indices_map((size,)).values()
  return sorted({row for (rows,) in places for row in range(size)[rows]})


def place_batch(
  batch: dict[str, np.ndarray], config: Config, context: MeshContext
) -> dict[str, jax.Array]:
  """A batch of which every host has its `local_rows`, on the devices of all."""
  rows, sharding = local_rows(config, context), context.sharding(("batch", "length"))

  def place(local: np.ndarray) -> jax.Array:
    def piece(index: tuple[slice, slice]) -> np.ndarray:
      wanted = range(config.training.batch_size)[index[0]]
      first = rows.index(wanted[0])
      return local[first : first + len(wanted), index[1]]

    shape = (config.training.batch_size, local.shape[1])
    return jax.make_array_from_callback(shape, sharding, piece)

  return {name: place(local) for name, local in batch.items()}


def evaluate_checkpoint(checkpoint: str | pathlib.Path, overrides: Sequence[str]) -> Score:
  """The score of any checkpoint, with settings as `key=value`.

  On all documents of the data that `overrides` name; without, on what the checkpoint's run held out. Raises: ConfigError
  when there are none, or the tokenizer is missing or of another vocabulary.
  """
  source = open_source(checkpoint)
  config = evaluation_config(source, overrides)
  tokenizer = load_tokenizer(config.data.tokenizer or source.folder)
  named = any(word.startswith(("data.paths=", "data.tfds_name=")) for word in overrides)
  documents = make_eval_batches(config, tokenizer, split="all" if named else "held_out")
  template = ModelTemplate(config.model)
  with use_mesh(build_mesh(config), config.mesh) as context:
    arrays = source.arrays(template, template.shardings(context))
    return Evaluation(config, template, context, documents)(arrays)


def evaluation_config(source: TensorSource, overrides: Sequence[str]) -> Config:
  """The configuration of a checkpoint's run, or of none, changed by `overrides`."""
  changes = [parse_override(word) for word in overrides]
  for key, _ in changes:
    if key.split(".")[0] == "model":
      raise ConfigError(f"{key} cannot be set here; the checkpoint says what the model is.")
  tree: dict[str, Any] = {
    **model_to_section(dataclasses.replace(source.config, dtype="float32")),
    "data": {},
    "training": {
      "steps": 1,
      "batch_size": 8,
      "sequence_length": min(SEQUENCE_LENGTH, source.config.max_position_embeddings),
    },
    "run_dir": str(source.folder),
  }
  if (source.folder / "config.yml").exists():
    tree |= read_yaml(source.folder / "config.yml")
  settings = ml_collections.ConfigDict(tree, type_safe=False, convert_dict=True)
  for key, value in changes:
    set_dotted(settings, key, value)
  return config_from_dict(settings.to_dict())
