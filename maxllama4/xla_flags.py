"""Options of XLA: presets for TPUs, by chip, and what a run sets over them. Training and plans compile with the same."""

from maxllama4.chips import chip_of

Options = dict[str, bool | int | float | str]

# Gathers of weights and scatters of gradients run on the sparse cores, beside products. Fusing gathers with products on
# the tensor core instead (below) is refused by libtpu 0.0.51 on every chip but v5e.
_ON_SPARSE_CORES: Options = {
  "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
}
_FUSED: Options = {
  "xla_enable_async_all_gather": True,
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
  "xla_tpu_overlap_compute_collective_tc": True,
}
PRESETS: dict[str, Options] = {
  "v4": {"xla_enable_async_all_gather": True},
  "v5e": _FUSED,  # has no sparse cores
  "v5p": _ON_SPARSE_CORES,
  "v6e": _ON_SPARSE_CORES,
  "tpu7x": _ON_SPARSE_CORES,
}


def compiler_options(device_kind: str, own: Options) -> Options:
  """What to compile a step with for devices of a kind, as JAX names it: the preset, if it is a TPU, and a run's `own`."""
  if not device_kind.startswith("TPU"):
    return {name: value for name, value in own.items() if not name.startswith("xla_tpu_")}
  chip = chip_of(device_kind)
  return own if chip is None else PRESETS[chip.name] | own
