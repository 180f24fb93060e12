"""The training state: one pytree, and exactly what a checkpoint holds besides the data's position."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxllama4.model.weights import Arrays, ModelTemplate
from maxllama4.sharding import MeshContext
from maxllama4.training.health import Health

HOST_MEMORY = "pinned_host"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Steps done (int32), the model's arrays by path, the optimizer's state, which is sharded as they are, and the guard's."""

  step: jax.Array
  model: Arrays
  optimizer: Any
  health: Health

  def resumable(self) -> "TrainState":
    """The state of a run that halted, ready to go on."""
    halted = jnp.zeros_like(self.health.halted)
    return dataclasses.replace(self, health=dataclasses.replace(self.health, halted=halted))


def split_trainable(model: Arrays, template: ModelTemplate) -> tuple[Arrays, Arrays]:
  """The arrays that gradients move, and the others (router biases)."""
  trainable = template.trainable
  return (
    {path: value for path, value in model.items() if path in trainable},
    {path: value for path, value in model.items() if path not in trainable},
  )


def init_state(
  template: ModelTemplate,
  optimizer: optax.GradientTransformation,
  seed: int,
  context: MeshContext,
  memory: str = "device",
) -> TrainState:
  """A fresh state, every array made already sharded over the mesh of `context`; its moments in `memory`."""

  def make(key):
    model = template.init(key)
    params, _ = split_trainable(model, template)
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(params), Health.fresh())

  key = jax.random.key(seed)
  shardings = state_shardings(jax.eval_shape(make, key), template, context, memory)
  return jax.jit(make, out_shardings=shardings)(key)


def abstract_state(
  template: ModelTemplate,
  optimizer: optax.GradientTransformation,
  context: MeshContext,
  memory: str = "device",
) -> TrainState:
  """The shapes, dtypes and shardings of `init_state`'s result; nothing is computed."""

  def make(model):
    params, _ = split_trainable(model, template)
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(params), Health.fresh())

  state = jax.eval_shape(make, template.shapes)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    state,
    state_shardings(state, template, context, memory),
  )


def state_shardings(
  state: TrainState, template: ModelTemplate, context: MeshContext, memory: str = "device"
) -> TrainState:
  """A tree like `state` of shardings: the optimizer's copies of an array lie as the array does, scalars everywhere.

  `memory` is `optimizer.state_memory`: with "host" those copies are in page-locked memory of the host of each device.
  """
  by_path, shapes = template.shardings(context), template.shapes
  replicated = context.sharding(())
  lain = jax.tree_util.tree_map_with_path(
    lambda path, leaf: by_path.get(array_of(path, leaf, shapes), replicated), state
  )
  if memory == "device":
    return lain
  moments = jax.tree.map(
    lambda leaf, sharding: sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else sharding,
    state.optimizer,
    lain.optimizer,
  )
  return dataclasses.replace(lain, optimizer=moments)


def to_device(moments: Any) -> Any:
  """The optimizer's state in the memory of the devices, for the update; inside a compiled step."""
  return _moved(moments, jax.memory.Space.Device)


def to_host(moments: Any) -> Any:
  """The inverse of `to_device`."""
  return _moved(moments, jax.memory.Space.Host)


def _moved(moments: Any, space: jax.memory.Space) -> Any:
  return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, moments)


def array_of(path: tuple, leaf: Any, shapes: dict[str, jax.ShapeDtypeStruct]) -> str | None:
  """Which of the model's arrays (`shapes`) a leaf of the state is, or is a companion of; None for counters."""
  names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
  name = names[-1] if names else None
  return name if name in shapes and leaf.shape == shapes[name].shape else None
