"""Which devices take part in a collective, and over which mesh axes they lie."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices that a program runs on: a mesh's.

  XLA makes a program for a slice, and numbers its devices as they come in the mesh; so all slices', one behind the other.
  """

  axes: tuple[str, ...]
  sizes: tuple[int, ...]
  slices: tuple[int, ...]  # of each device of the mesh, in its order

  @classmethod
  def of(cls, mesh: jax.sharding.Mesh) -> Devices:
    slices = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    return cls(tuple(mesh.axis_names), mesh.devices.shape, tuple(slices))

  @property
  def count(self) -> int:
    return len(self.slices)

  @functools.cached_property
  def _places(self) -> np.ndarray:
    """Where in the mesh the devices of the program are."""
    return np.argsort(self.slices, stable=True)

  def axes_of(self, group: list[int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    places = np.array(np.unravel_index(self._places[group], self.sizes))  # axes members
    return tuple(axis for axis, place in zip(self.axes, places) if np.ptp(place) > 0)

  def spanning_axes(self) -> tuple[str, ...]:
    """The mesh axes along which the slice changes."""
    slices = np.array(self.slices).reshape(self.sizes)
    changes = (np.any(np.diff(slices, axis=i)) for i in range(len(self.axes)))
    return tuple(axis for axis, change in zip(self.axes, changes) if change)

  def leaves_slice(self, group: list[int]) -> bool:
    return len({self.slices[place] for place in self._places[group]}) > 1


def replica_group(attributes: str, devices: Devices) -> list[int]:
  """The first of a collective's groups; the others lie alike. Groups are written out, as an iota, or over a mesh."""
  start = attributes.find("replica_groups=")
  text = attributes[start + len("replica_groups=") :] if start >= 0 else "{}"
  if text.startswith("{{"):
    return _numbers(text[2 : text.index("}")])
  if text.startswith("mesh"):
    mesh, _, axes = text.partition("{")
    return _mesh_group(mesh, axes.partition("}")[0])
  iota = _IOTA.match(text)
  if iota:
    return [int(device) for device in _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))[0]]
  return list(range(devices.count))


def _mesh_group(mesh: str, axes: str) -> list[int]:
  """The group of `mesh['a'=2,'b'=4] {'b'}`; an axis may be a part of one, `'b':(2)2`: sizes before it, and its own."""
  names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", mesh))
  ids = re.search(r"device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh)
  sizes = [int(size) for size in sizes]
  order = _iota(ids[1], ids[2]) if ids else np.arange(np.prod(sizes))
  order, shape, taken = order.reshape(-1), [], []
  chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
  for name, size in zip(names, sizes):
    parts = [(int(before or 1), int(own or size)) for axis, before, own in chosen if axis == name]
    before, own = parts[0] if parts else (1, 1)
    shape += [before, own, size // (before * own)]
    taken += [False, bool(parts), False]
  order = order.reshape(shape)
  return [int(i) for i in order[tuple(slice(None) if take else 0 for take in taken)].reshape(-1)]


def _iota(sizes: str, permutation: str | None) -> np.ndarray:
  sizes = _numbers(sizes)
  order = np.arange(np.prod(sizes)).reshape(sizes)
  return order.transpose(_numbers(permutation)) if permutation else order


def permutation(attributes: str, devices: Devices) -> tuple[list[int], float]:
  """A pair of a collective permutation (the farthest apart in axes), and the share of the devices that send."""
  found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
  pairs = [_numbers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", found[1])] if found else []
  pairs = [pair for pair in pairs if pair[0] != pair[1]]
  if not pairs:
    return [], 0.0

  def distance(pair: list[int]) -> tuple[bool, int]:
    return devices.leaves_slice(pair), len(devices.axes_of(pair))

  return max(pairs, key=distance), len(pairs) / devices.count


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]
