"""The device mesh of a run, over one slice of devices or several."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from maxllama4.config import MESH_AXES, Config, MeshConfig, check_mesh_divides, require


def build_mesh(config: Config, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """The mesh of `config.mesh` over `devices` (default: all), axes in the order of `MESH_AXES`.

  Along an axis that spans several slices, all devices of one slice come before those of the next. Raises: ConfigError
  when the axis sizes do not fit the devices, their slices are not as many as the axes span, or a dimension does not
  divide.
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
    placed = _virtual_slices(devices, in_slice, spanned)
  else:
    placed = mesh_utils.create_hybrid_device_mesh(
      in_slice, spanned, devices, allow_split_physical_axes=True
    )
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


def _virtual_slices(
  devices: Sequence[Any], in_slice: Sequence[int], spanned: Sequence[int]
) -> np.ndarray:
  """Equal runs of consecutive devices as slices, placed as `create_hybrid_device_mesh` places real ones."""
  rank = len(in_slice)
  blocks = np.array(devices).reshape(*spanned, *in_slice)
  order = [place for axis in range(rank) for place in (axis, rank + axis)]
  return blocks.transpose(order).reshape([a * b for a, b in zip(in_slice, spanned, strict=True)])
