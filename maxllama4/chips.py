"""What is published of each kind of TPU: speeds, memory, links and price, by name; and of GPUs the peak alone.

Source: the pages v4, v5p, v6e and tpu7x of docs.cloud.google.com/tpu, read in 2026-11. Not read at a source: links and network
of v4 and tpu7x; clocks, which make the published peaks of v4, v5e, v5p and v6e out of their arrays of multipliers; and
prices, which are round figures to compare by.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One chip; rates are per chip and second, one direction of a link."""

  name: str  # as in a topology, v5p:4x4x4
  device_kinds: tuple[str, ...]  # how JAX's `device_kind` may begin
  devices: int = 1  # JAX devices a chip, which share its memory, links and arithmetic evenly
  torus_dims: int  # of the interconnect; a chip has two links along each
  peak_flops: float  # dense bf16
  clock_hertz: float  # of the compiler's cycles
  hbm_bytes: int  # that the compiler gives to programs; it says so when one needs more
  hbm_bytes_per_second: float
  link_bytes_per_second: float  # of one link, in one direction
  dcn_bytes_per_second: float  # out of a slice, a chip's share of its host's cards
  dollars_per_hour: float  # about, on demand in the United States


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      device_kinds=("TPU v4",),
      torus_dims=3,
      peak_flops=275e12,
      clock_hertz=1.05e9,
      hbm_bytes=int(30.75 * 2**30),
      hbm_bytes_per_second=1228e9,
      link_bytes_per_second=50e9,
      dcn_bytes_per_second=3.125e9,
      dollars_per_hour=3.22,
    ),
    Chip(
      name="v5e",
      device_kinds=("TPU v5 lite", "TPU v5e"),
      torus_dims=2,
      peak_flops=197e12,
      clock_hertz=1.5e9,
      hbm_bytes=int(15.75 * 2**30),
      hbm_bytes_per_second=819e9,
      link_bytes_per_second=50e9,
      dcn_bytes_per_second=3.125e9,
      dollars_per_hour=1.20,
    ),
    Chip(
      name="v5p",
      device_kinds=("TPU v5p", "TPU v5"),
      torus_dims=3,
      peak_flops=459e12,
      clock_hertz=1.75e9,
      hbm_bytes=int(95.74 * 2**30),
      hbm_bytes_per_second=2765e9,
      link_bytes_per_second=100e9,
      dcn_bytes_per_second=6.25e9,
      dollars_per_hour=4.20,
    ),
    Chip(
      name="v6e",
      device_kinds=("TPU v6 lite", "TPU v6e"),
      torus_dims=2,
      peak_flops=918e12,
      clock_hertz=1.75e9,
      hbm_bytes=int(31.25 * 2**30),
      hbm_bytes_per_second=1640e9,
      link_bytes_per_second=100e9,
      dcn_bytes_per_second=12.5e9,
      dollars_per_hour=2.70,
    ),
    Chip(
      name="tpu7x",
      device_kinds=("TPU7x",),
      devices=2,
      torus_dims=3,
      peak_flops=2307e12,
      clock_hertz=2.2e9,
      hbm_bytes=2 * int(94.75 * 2**30),
      hbm_bytes_per_second=7380e9,
      link_bytes_per_second=100e9,
      dcn_bytes_per_second=12.5e9,
      dollars_per_hour=12.00,
    ),
  )
}
GPU_PEAK_FLOPS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12}  # dense bf16


def chip_of(device_kind: str) -> Chip | None:
  """The TPU of a JAX device; None for another device, and for a TPU that is not in the table."""
  # The longest beginning first: "TPU v5 lite" is no "TPU v5".
  kinds = sorted(
    ((kind, chip) for chip in CHIPS.values() for kind in chip.device_kinds), key=_length
  )
  return next((chip for kind, chip in kinds if device_kind.startswith(kind)), None)


def _length(entry: tuple[str, Chip]) -> int:
  return -len(entry[0])


def peak_flops(device_kind: str) -> float | None:
  """Peak bf16 FLOPs a second of a JAX device; None where it is not known."""
  chip = chip_of(device_kind)
  if chip is not None:
    return chip.peak_flops / chip.devices
  return next((f for name, f in GPU_PEAK_FLOPS.items() if device_kind.startswith(name)), None)
