"""A model taken apart into a flat dictionary of arrays by path, and put together again.

The dictionary (`"decoder/cycles/layers/0/attention/query" -> array`) is what optimizers, checkpoints and conversions
work on; a `ModelTemplate` is everything else about the model.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from maxllama4.config import ModelConfig, require
from maxllama4.model.llama4 import Llama4ForCausalLM
from maxllama4.sharding import MeshContext, variable_axes

Arrays = dict[str, jax.Array]


def layer_place(config: ModelConfig, layer: int) -> tuple[str, int | None]:
  """Path of layer `layer` in the model, and its index along the stack when it is scanned (else None)."""
  cycle, place = divmod(layer, config.inhomogeneous_layer_cycle_interval)
  if cycle < config.num_cycles:
    return f"decoder/cycles/layers/{place}", cycle
  scanned = config.num_cycles * config.inhomogeneous_layer_cycle_interval
  return f"decoder/rest/layers/{layer - scanned}", None


def is_stacked(path: str) -> bool:
  """Whether the array at `path` holds the weights of several layers, along its first axis."""
  return path.startswith(("decoder/cycles/", "vision/encoder/layers/"))


def is_inside(path: str, parts: Sequence[str]) -> bool:
  """Whether the array at `path` is in one of `parts`, each the start of a path."""
  return path.startswith(tuple(f"{part}/" for part in parts))


class ModelTemplate:
  """The structure of a `Llama4ForCausalLM` of `config`; holds no weights and touches no device.

  `frozen` names parts, by the start of their paths, that training does not move. Raises: ConfigError when the model has
  no such part, or no other.
  """

  def __init__(self, config: ModelConfig, frozen: Sequence[str] = ()):
    self.config = config
    self._frozen = tuple(frozen)
    model = nnx.eval_shape(lambda: Llama4ForCausalLM(config, rngs=nnx.Rngs(0)))
    self._graph, state = nnx.split(model)
    self._variables = {path: variable for path, variable in nnx.to_flat_state(state)}
    parts = sorted({_name(path[:1]) for path in self._variables})
    for part in frozen:
      require(
        any(is_inside(_name(path), [part]) for path in self._variables),
        f"training.frozen={part} is no part of the model; its parts are {', '.join(parts)}.",
      )
    require(
      not frozen or len(self.trainable) > 0,
      f"training.frozen={list(frozen)} leaves nothing to train; leave out one of its parts.",
    )

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and fresh dtype of every array, by path."""
    return {
      _name(path): jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype)
      for path, v in self._variables.items()
    }

  @property
  def axes(self) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of every array, by path."""
    return {_name(path): variable_axes(variable) for path, variable in self._variables.items()}

  @property
  def trainable(self) -> frozenset[str]:
    """Paths of the arrays that gradients move."""
    params = (_name(path) for path, v in self._variables.items() if isinstance(v, nnx.Param))
    return frozenset(path for path in params if not is_inside(path, self._frozen))

  def model(self, arrays: Arrays) -> Llama4ForCausalLM:
    """The model with these weights."""
    flat = [(path, v.replace(arrays[_name(path)])) for path, v in self._variables.items()]
    return nnx.merge(self._graph, nnx.from_flat_state(flat))

  def init(self, key: jax.Array) -> Arrays:
    """Fresh weights; those of a run on a mesh are made by training/state.py, already sharded."""

    @jax.jit
    def make(key):
      return arrays_of(Llama4ForCausalLM(self.config, rngs=nnx.Rngs(params=key)))

    return make(key)

  def shardings(self, context: MeshContext) -> dict[str, jax.sharding.NamedSharding]:
    return {name: context.sharding(axes) for name, axes in self.axes.items()}


def arrays_of(model: Llama4ForCausalLM) -> Arrays:
  """The weights of `model`, by path."""
  state = nnx.split(model)[1]
  return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
  return "/".join(map(str, path))
