"""The device mesh of a run, over one slice of devices or several."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from maxllama4.config import MESH_AXES, Config, MeshConfig, check_mesh_divides, require


def build_mesh(config: Config, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """The mesh of `config.mesh` over `devices` (default: all), axes in the order of `MESH_AXES`.

  Along an axis that spans several slices, neighbours are in different slices: so a gather can begin between slices, where
  it has least to send, and still put its parts together in order. Raises: ConfigError when the axis sizes do not fit the
  devices, their slices are not as many as the axes span, or a dimension does not divide.
  """
  devices = jax.devices() if devices is None else list(devices)
  check_slices(config.mesh, devices)
  sizes = config.mesh.resolve(len(devices))
  check_mesh_divides(config, sizes)
  spanned = [config.mesh.slices_along(axis) for axis in MESH_AXES]
  in_slice = [size // slices for size, slices in zip(sizes.values(), spanned, strict=True)]
  # An axis may split one of the torus: without, two devices of `tensor` could not be laid over 4 x 4 x 4 chips.
  if config.mesh.num_slices == 1:
    placed = mesh_utils.create_device_mesh(in_slice, devices, allow_split_physical_axes=True)
  elif devices[0].platform == "cpu":
    # Equal runs of consecutive devices stand for slices, which no CPU has.
    placed = _interleaved(np.array(devices).reshape(*spanned, *in_slice))
  else:
    placed = mesh_utils.create_hybrid_device_mesh(
      in_slice, spanned, devices, allow_split_physical_axes=True
    )
    pairs = [size for pair in zip(spanned, in_slice, strict=True) for size in pair]
    rank = len(in_slice)
    outer_first = (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
    placed = _interleaved(placed.reshape(pairs).transpose(outer_first))
  axis_types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  return jax.sharding.Mesh(placed, MESH_AXES, axis_types=axis_types)


def check_slices(mesh: MeshConfig, devices: Sequence[Any]) -> None:
  """Checks that `devices` form as many slices as `mesh` spans.

  TPUs say which slice they are in. GPUs say what they share NVLink with, which may be left out of account: a mesh that
  spans no slices may be laid over several. CPU devices say nothing, and are as many slices as asked for. Raises:
  ConfigError with both numbers.
  """
  platform, wanted = devices[0].platform, mesh.num_slices
  if platform == "cpu" or (platform != "tpu" and wanted == 1):
    return
  found = len({getattr(device, "slice_index", 0) for device in devices})
  factors = " x ".join(f"mesh.dcn_{axis}={mesh.slices_along(axis)}" for axis in MESH_AXES)
  require(
    found == wanted,
    f"{factors} spans {wanted} slice{'s' * (wanted > 1)}, but the {len(devices)} devices are in {found}; set the"
    f" factors so that they multiply to {found}.",
  )


def _interleaved(blocks: np.ndarray) -> np.ndarray:
  """Devices [*slices along each axis, *places in a slice along each axis] as [*axes], the slice last along each."""
  rank = blocks.ndim // 2
  order = [place for axis in range(rank) for place in (rank + axis, axis)]
  sizes = [blocks.shape[axis] * blocks.shape[rank + axis] for axis in range(rank)]
  return blocks.transpose(order).reshape(sizes)
