"""The device mesh of a run."""

from collections.abc import Sequence

import jax

from maxllama4.config import MESH_AXES, Config, check_mesh_divides


def build_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """The mesh of `config.mesh` over `devices` (default: all), axes in the order of `MESH_AXES`.

  Raises: ConfigError when the axis sizes do not fit the devices, or a dimension does not divide.
  """
  devices = jax.devices() if devices is None else devices
  sizes = config.mesh.resolve(len(devices))
  check_mesh_divides(config, sizes)
  return jax.make_mesh(
    tuple(sizes.values()),
    MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )
