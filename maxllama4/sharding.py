"""Logical axis names on weights and activations, and the one place that turns them into mesh axes.

A layer says what its dimensions are (`("embed", "ffn")`); `mesh.rules` of the configuration says which mesh axes split
them. Outside `use_mesh` nothing is constrained and a layer computes on one device.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maxllama4.config import EMBED_AXES, LOGICAL_AXES, MeshConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class MeshContext:
  """A mesh and the rules that lay logical axes over it."""

  mesh: jax.sharding.Mesh
  rules: MeshConfig

  def axes_of(self, logical: str | None) -> tuple[str, ...]:
    """Mesh axes of one logical axis. Raises: KeyError for a name that is not in `LOGICAL_AXES`."""
    if logical is None:
      return ()
    if logical not in LOGICAL_AXES:
      raise KeyError(f"{logical!r} is not a logical axis; the axes are {', '.join(LOGICAL_AXES)}")
    return self.rules.axes_of(logical)

  def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(*(self.axes_of(axis) or None for axis in axes))

  def sharding(self, axes: tuple[str | None, ...]) -> NamedSharding:
    return NamedSharding(self.mesh, self.spec(axes))

  def size(self, logical: str) -> int:
    """In how many parts the mesh splits `logical`."""
    return math.prod(self.mesh.shape[axis] for axis in self.axes_of(logical))

  def scatter_phases(self, axis: str) -> list[list[list[int]] | None]:
    """Groups of places along the mesh axis `axis` over which sums are scattered, phase by phase; None: all at once.

    Within each slice first, then between the slices what is left. And XLA does not scatter over all dimensions of a TPU's
    torus at once, but adds up everything on every chip, twice the bytes; nor does it gather so, unless it knows that the
    torus is closed. So such an axis goes in two phases: first between places that are a run apart, then within a run of
    neighbours along one dimension. Gathers go the other way.
    """
    number, slices = self.mesh.axis_names.index(axis), self.rules.slices_along(axis)
    devices = np.moveaxis(self.mesh.devices, number, -1)
    phases = _phases_of_torus(devices.reshape(-1, devices.shape[-1])[0, ::slices], devices.flat)
    if slices == 1:
      return phases
    places = np.arange(devices.shape[-1]).reshape(-1, slices)
    if len(places) == 1:
      return [None]
    inside = [[range(len(places))] if groups is None else groups for groups in phases]
    each = [
      [places[group, i].tolist() for group in groups for i in range(slices)] for groups in inside
    ]
    return [*each, places.tolist()]


def _phases_of_torus(line: np.ndarray, everywhere: Iterable[Any]) -> list[list[list[int]] | None]:
  """`scatter_phases` of the devices of one slice along `line`, one among those `everywhere`."""
  places, others = (
    np.array([getattr(device, "coords", ()) for device in devices])
    for devices in (line, everywhere)
  )
  dimensions = (others != others[:1]).any(0).sum()
  if (places != places[:1]).any(0).sum() < max(2, dimensions) or line.size <= 4:
    return [None]
  runs = [n for n in range(2, line.size) if line.size % n == 0]
  run = max(n for n in runs if n == 2 or (places[:n] != places[:1]).any(0).sum() < 2)
  grid = np.arange(line.size).reshape(-1, run)
  return [grid.T.tolist(), grid.tolist()]


_CONTEXT: contextvars.ContextVar[MeshContext | None] = contextvars.ContextVar(
  "mesh_context", default=None
)


@contextlib.contextmanager
def use_mesh(mesh: jax.sharding.Mesh, rules: MeshConfig) -> Iterator[MeshContext]:
  """Layers traced inside place their arrays on `mesh` by `rules`."""
  context = MeshContext(mesh, rules)
  token = _CONTEXT.set(context)
  try:
    yield context
  finally:
    _CONTEXT.reset(token)


@contextlib.contextmanager
def no_mesh() -> Iterator[None]:
  """Layers traced inside leave it to the compiler where their arrays lie."""
  token = _CONTEXT.set(None)
  try:
    yield
  finally:
    _CONTEXT.reset(token)


def current_mesh() -> MeshContext | None:
  """The context of the innermost `use_mesh`; None on a single device."""
  context = _CONTEXT.get()
  return context if context is not None and context.mesh.size > 1 else None


def current_platform() -> str | None:
  """What the devices of the innermost `use_mesh` are: cpu, tpu, ...; None outside, where devices are not known.

  Not what this process runs on: a step may be compiled for devices that are elsewhere.
  """
  context = _CONTEXT.get()
  return None if context is None else context.mesh.devices.flat[0].platform


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """`x`, laid over the mesh as `axes` say (one name, or None for whole, a dimension)."""
  context = current_mesh()
  if context is None:
    return x
  return jax.lax.with_sharding_constraint(x, context.sharding(axes))


def gather_embed(
  context: MeshContext, weight: jax.Array, axes: tuple[str | None, ...], dtype: Any
) -> jax.Array:
  """A device's part of `weight` in `dtype`, whole along the dimension that `axes` call one of `EMBED_AXES`.

  For use in `shard_map`. The cast comes before the gather, so that half as much is sent; and the gradient is scattered as it is summed, in
  `dtype`, too.
  """
  weight = weight.astype(dtype)
  ((dim, name),) = [(i, name) for i, name in enumerate(axes) if name in EMBED_AXES]
  for axis in reversed([a for a in context.axes_of(name) if context.mesh.shape[a] > 1]):
    weight = gather(context, weight, axis, dim)
  return weight


def gather(context: MeshContext, x: jax.Array, axis: str, dim: int) -> jax.Array:
  """The parts `x` of all devices along the mesh axis `axis`, put together along `dim`; for use in `shard_map`.

  The gradient is scattered as it is summed.
  """

  @jax.custom_vjp
  def whole(x):
    return gather_parts(context, x, axis, dim)

  def scatter(_, gradient):
    return (scatter_sum(context, gradient, axis, dim),)

  whole.defvjp(lambda x: (whole(x), None), scatter)
  return whole(x)


def gather_parts(context: MeshContext, x: jax.Array, axis: str, dim: int) -> jax.Array:
  """`gather`, where no gradient is taken."""
  for groups in reversed(context.scatter_phases(axis)):
    x = jax.lax.all_gather(x, axis, axis=dim, tiled=True, axis_index_groups=groups)
  return x


def scatter_sum(context: MeshContext, x: jax.Array, axis: str, dim: int) -> jax.Array:
  """This device's part along `dim` of the sum of the `x` of all devices along `axis`: `gather_parts` backwards."""
  slices, phases = context.rules.slices_along(axis), context.scatter_phases(axis)
  for groups in phases[: -1 if slices > 1 else None]:
    x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
  if slices == 1:
    return x
  # Slices are a dimension by themselves: else XLA fills up each part to the width of a tile before it leaves the slice.
  x = x.reshape(*x.shape[:dim], slices, -1, *x.shape[dim + 1 :])
  return jax.lax.psum_scatter(x, axis, scatter_dimension=dim, axis_index_groups=phases[-1])


def sum_over(context: MeshContext, x: jax.Array, logical: str) -> jax.Array:
  """The sum of the `x` of all devices along the mesh axes of `logical`, in `shard_map` with `logical` whole in its result.

  Of the gradient of what n devices have alike, `shard_map` hands each an n-th. Automatic differentiation would add these
  up, which sends as much as the sum itself; here each device multiplies its own.
  """
  axes = context.axes_of(logical)
  if not axes:
    return x

  @jax.custom_vjp
  def total(x):
    return jax.lax.psum(x, axes)

  total.defvjp(lambda x: (total(x), None), lambda _, gradient: (gradient * context.size(logical),))
  return total(x)


def weight(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  config: ModelConfig,
) -> nnx.Param:
  """A fresh weight in `param_dtype`: normal, standard deviation `initializer_range`, axes named `axes`."""
  value = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
  return nnx.Param(value.astype(config.param_dtype), logical_axes=axes)


def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...], config: ModelConfig) -> nnx.Param:
  """A bias or weight in `param_dtype` that starts at zero, axes named `axes`.

  So do the weights that write to the residual stream: a fresh layer passes its input on, and learns faster from there
  (docs/decisions/0004).
  """
  return nnx.Param(jnp.zeros(shape, config.param_dtype), logical_axes=axes)


def ones(size: int, config: ModelConfig) -> nnx.Param:
  """A norm's weight, [size], in `param_dtype`."""
  return nnx.Param(jnp.ones((size,), config.param_dtype), logical_axes=(None,))


def variable_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
  """Logical axes of a variable's value; a stack of layers has one more dimension in front, which is never split."""
  axes = tuple(variable.get_metadata("logical_axes"))
  return (None,) * (variable.get_value().ndim - len(axes)) + axes
