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
    self._context, self._documents = context, documents
    self._step = jax.jit(make_eval_step(config, template), out_shardings=context.sharding(()))

  def __call__(self, model: Arrays) -> Score:
    sharding = self._context.sharding(("batch", "length"))
    sums = [
      to_plain(self._step(model, place_batch(batch, sharding))) for batch in self._documents.batches
    ]
    nats, weight = (math.fsum(s[name] for s in sums) for name in ("nats", "weight"))
    num_bytes = self._documents.num_bytes
    return Score(nats / weight, nats / math.log(2) / num_bytes, round(weight), num_bytes)


def place_batch(
  batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
  """A batch of which every host has its rows, on the devices of all."""
  return {
    name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
  }


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
