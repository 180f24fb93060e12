"""Options of XLA: presets for TPUs, by chip, and what a run sets over them. Training and plans compile with the same."""

from maxllama4.chips import chip_of

Options = dict[str, bool | int | float | str]

# Weight gathers are started early and fused with products that run meanwhile.
_ASYNC_GATHERS: Options = {
  "xla_enable_async_all_gather": True,
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
  "xla_tpu_overlap_compute_collective_tc": True,
}
PRESETS: dict[str, Options] = {
  "v4": _ASYNC_GATHERS,
  "v5e": _ASYNC_GATHERS,
  "v5p": _ASYNC_GATHERS,
  "v6e": {"xla_enable_async_all_gather": True},  # its compiler refuses collective fusions
  "tpu7x": _ASYNC_GATHERS,
}


def compiler_options(device_kind: str, own: Options) -> Options:
  """What to compile a step with for devices of a kind, as JAX names it: the preset, if it is a TPU, and a run's `own`."""
  chip = chip_of(device_kind)
  if chip is None:
    return {name: value for name, value in own.items() if not name.startswith("xla_tpu_")}
  return PRESETS[chip.name] | own
