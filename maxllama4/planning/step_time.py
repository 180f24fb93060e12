"""How long a step takes, from how much work it is: a few fractions of data-sheet rates, and what hides behind what.

The model, its constants and how far it is from published steps: docs/step_time.md.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from maxllama4.config import MESH_AXES, MeshConfig
from maxllama4.planning.chips import Chip, Topology
from maxllama4.planning.hlo import Collective

# Achieved rates over those of the data sheet, and how much of the time that a chip computes or moves its memory can hide
# transfers that were started early.
MATMUL_FRACTION = 0.80  # large dense products
GROUPED_FRACTION = 0.65  # products of routed experts: groups end inside tiles, and rows are read out of order
ATTENTION_FRACTION = 0.50  # attention's kernels: softmax runs beside products of only `head_dim` terms
HBM_FRACTION = 0.80
ICI_FRACTION = 0.80
DCN_FRACTION = 0.80
OVERLAP_FRACTION = 0.90


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What one device does in one step, recomputation included.

  With `estimated_cycles`, those of the compiler for everything but kernels, `hbm_traffic_bytes` is of the whole program;
  without, of what is no product of matrices.
  """

  executed_flops: float  # of products, in kernels or not
  grouped_flops: float = 0.0  # of these: in routed experts
  attention_flops: float = 0.0  # of these: in attention
  estimated_cycles: float | None = None
  hbm_traffic_bytes: float = 0.0
  collectives: Sequence[Collective] = ()
  links: Mapping[str, float] = dataclasses.field(
    default_factory=dict
  )  # by mesh axis, see `links_of`


@dataclasses.dataclass(frozen=True)
class StepTime:
  """Seconds of a step; `parts` (compute, hbm, ici, dcn) if each were alone, `exposed` what nothing hides: its sum is `seconds`."""

  seconds: float
  bound_by: str  # the longest part
  parts: dict[str, float]
  exposed: dict[str, float]


def predict(chip: Chip, work: Work) -> StepTime:
  """The step time of a device of `chip` that does `work`.

  A TPU runs one operation at a time; only transfers between chips run beside them. So the time is that of all products,
  plus that of all memory traffic outside them, plus whatever transfers do not fit behind both.
  """
  devices = chip.devices  # which share a chip's rates evenly
  compute = _compute_seconds(chip, work)
  hbm = work.hbm_traffic_bytes / (HBM_FRACTION * chip.hbm_bytes_per_second / devices)
  hbm_exposed = hbm if work.estimated_cycles is None else max(0.0, hbm - compute)
  parts = {"compute": compute, "hbm": hbm, "ici": 0.0, "dcn": 0.0}
  waited = {"ici": 0.0, "dcn": 0.0}  # for transfers that nothing runs beside
  for collective in work.collectives:
    part = "dcn" if collective.dcn else "ici"
    seconds = devices * collective.bytes / _bytes_per_second(chip, work, collective)
    parts[part] += seconds
    waited[part] += 0 if collective.asynchronous else seconds
  hidden = OVERLAP_FRACTION * (compute + hbm_exposed)
  exposed = {"compute": compute, "hbm": hbm_exposed}
  for part in ("dcn", "ici"):  # two networks, each beside the computation
    exposed[part] = waited[part] + max(0.0, parts[part] - waited[part] - hidden)
  bound_by = max(parts, key=parts.__getitem__)
  return StepTime(sum(exposed.values()), bound_by, parts, exposed)


def _compute_seconds(chip: Chip, work: Work) -> float:
  peak = chip.peak_flops / chip.devices
  kernels = work.grouped_flops / GROUPED_FRACTION + work.attention_flops / ATTENTION_FRACTION
  if work.estimated_cycles is not None:
    return work.estimated_cycles / chip.clock_hertz + kernels / peak
  dense = work.executed_flops - work.grouped_flops - work.attention_flops
  return (dense / MATMUL_FRACTION + kernels) / peak


def _bytes_per_second(chip: Chip, work: Work, collective: Collective) -> float:
  if collective.dcn:
    return DCN_FRACTION * chip.dcn_bytes_per_second
  links = sum(work.links.get(axis, 1.0) for axis in collective.axes) or 1.0
  # Axes that split one dimension of the torus share its links.
  return (
    ICI_FRACTION * min(links, 2.0 * chip.torus_dims if work.links else links) * chip.link_bytes_per_second
  )


def links_of(topology: Topology, mesh: MeshConfig, sizes: Mapping[str, int]) -> dict[str, float]:
  """Links over which a chip sends at once along each mesh axis of `sizes` (whole axes, of all slices).

  An axis that fills whole dimensions of the torus has two links for each that is closed to a ring, and one for each that
  is a line; one that shares a dimension with another axis has one. Axes are laid as by `mesh_utils.create_device_mesh`:
  the last first, over as many dimensions as possible.
  """
  in_slice = {axis: sizes[axis] // mesh.slices_along(axis) for axis in MESH_AXES}
  free = dict(enumerate((*topology.shape[:-1], topology.shape[-1] * topology.chip.devices)))
  closed = [_is_ring(topology, size) for size in topology.shape]
  links = {}
  for axis in reversed(MESH_AXES):
    if in_slice[axis] == 1:
      continue
    dims = _dims_of(in_slice[axis], free)
    links[axis] = float(sum(2 if closed[dim] else 1 for dim in dims)) or 1.0
    free = {dim: size for dim, size in free.items() if dim not in dims}
  return links


def _dims_of(size: int, free: Mapping[int, int]) -> tuple[int, ...]:
  for count in range(len(free), 0, -1):
    for dims in itertools.combinations(free, count):
      if math.prod(free[dim] for dim in dims) == size:
        return dims
  return ()


def _is_ring(topology: Topology, size: int) -> bool:
  """Whether a dimension of so many chips is closed to a ring.

  Three-dimensional slices are made of cubes of 4 x 4 x 4 joined by switches, smaller ones have no rings;
  two-dimensional ones have them along whole sides of a pod, 16 chips.
  """
  if topology.chip.torus_dims == 2:
    return size == 16
  return all(side % 4 == 0 for side in topology.shape)
