"""A described machine: so many slices of a kind of chip, `v5p:4x4x4`."""

import dataclasses
import math
import re

from maxllama4.chips import CHIPS, Chip
from maxllama4.settings import ConfigError, require

__all__ = ["Chip", "Topology", "is_ring", "parse_topology"]


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` slices of `shape` chips each, joined by the data centre's network."""

  chip: Chip
  shape: tuple[int, ...]  # chips of a slice along each dimension
  slices: int = 1

  @property
  def name(self) -> str:
    """Of one slice, as users and libtpu write it."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def chips_per_slice(self) -> int:
    return math.prod(self.shape)

  @property
  def chips(self) -> int:
    return self.slices * self.chips_per_slice

  @property
  def devices(self) -> int:
    """JAX devices, over which the mesh is laid."""
    return self.chips * self.chip.devices


def parse_topology(text: str, slices: int = 1) -> Topology:
  """The machine that `text` describes. Raises: ConfigError when it is no `chip:AxBxC` of a chip that we know."""
  names = ", ".join(CHIPS)
  name, _, shape = text.partition(":")
  require(
    name in CHIPS, f"topology={text} names no known chip; write one of {names}, :, and a shape."
  )
  dims = re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", shape)
  chip = CHIPS[name]
  example = "x".join("4" * chip.torus_dims)
  if not dims or len(shape.split("x")) != chip.torus_dims:
    raise ConfigError(
      f"topology={text} must give the chips along each of {chip.torus_dims} dimensions, such as {name}:{example}."
    )
  require(slices >= 1, f"slices={slices} must be at least 1.")
  return Topology(chip, tuple(map(int, shape.split("x"))), slices)


def is_ring(topology: Topology, size: int) -> bool:
  """Whether the chips along a dimension of `size` are closed to a ring.

  Three-dimensional slices are made of cubes of 4 x 4 x 4 joined by switches, smaller ones have no rings;
  two-dimensional ones have them along whole sides of a pod, 16 chips.
  Source: docs.cloud.google.com/tpu/docs/v5p and v6e.
  """
  if topology.chip.torus_dims == 2:
    return size == 16
  return all(side % 4 == 0 for side in topology.shape)
