"""How long a step takes, from how much work it is: a few fractions of data-sheet rates, and what hides behind what.

The model, its constants and how far it is from published steps: docs/step_time.md.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from maxllama4.config import MESH_AXES, MeshConfig
from maxllama4.planning.chips import Chip, Topology, is_ring
from maxllama4.planning.hlo import Collective

# Achieved rates over those of the data sheet, and how much of the time that a chip computes or moves its memory can hide
# transfers that were started early.
MATMUL_FRACTION = 0.80  # large dense products
GROUPED_FRACTION = (
  0.65  # products of routed experts: groups end inside tiles, and rows are read out of order
)
ATTENTION_FRACTION = (
  0.50  # attention's kernels: softmax runs beside products of only `head_dim` terms
)
HBM_FRACTION = 0.80
ICI_FRACTION = 0.80
DCN_FRACTION = 0.80
OVERLAP_FRACTION = 0.90
# A chip's memory to its host's, or back: a share of a bus that chips have in common. Read at no source; rather low.
HOST_BYTES_PER_SECOND = 10e9


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
  host_traffic_bytes: float = 0.0  # to the host's memory and back
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
  host = work.host_traffic_bytes * devices / HOST_BYTES_PER_SECOND
  parts = {"compute": compute, "hbm": hbm, "ici": 0.0, "dcn": 0.0, "host": host}
  waited = {"ici": 0.0, "dcn": 0.0, "host": 0.0}  # for transfers that nothing runs beside
  for collective in work.collectives:
    part = "dcn" if collective.dcn else "ici"
    seconds = devices * collective.bytes / _bytes_per_second(chip, work, collective)
    parts[part] += seconds
    waited[part] += 0 if collective.asynchronous else seconds
  hidden = OVERLAP_FRACTION * (compute + hbm_exposed)
  exposed = {"compute": compute, "hbm": hbm_exposed}
  for part in ("dcn", "ici", "host"):  # each beside the computation
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
  return ICI_FRACTION * min(links, 2.0 * chip.torus_dims) * chip.link_bytes_per_second


def links_of(topology: Topology, mesh: MeshConfig, sizes: Mapping[str, int]) -> dict[str, float]:
  """Links over which a chip sends at once along each mesh axis of `sizes` (whole axes, of all slices).

  An axis has two links for each dimension of the torus that it fills and that is closed to a ring, and one for each that
  is a line or that it shares with another axis. Axes are laid as `mesh_utils.create_device_mesh` lays them: the last
  first, over as many dimensions as possible.
  """
  *outer, last = topology.shape
  dims = [(size, is_ring(topology, size)) for size in outer]
  # Two devices of a chip are neighbours along one more line, which is as good as a longer dimension.
  dims.append((last * topology.chip.devices, is_ring(topology, last)))
  links = {}
  for axis in reversed(MESH_AXES):
    size = sizes[axis] // mesh.slices_along(axis)
    if size > 1:
      links[axis], dims = _lay(size, [dim for dim in dims if dim[0] > 1])
  return links


def _lay(size: int, dims: list[tuple[int, bool]]) -> tuple[float, list[tuple[int, bool]]]:
  """Links of an axis of `size` over some of `dims` (chips, whether closed), and the dimensions that it leaves."""
  for count in range(len(dims), 0, -1):
    for taken in itertools.combinations(range(len(dims)), count):
      if math.prod(dims[i][0] for i in taken) == size:
        links = sum(2 if dims[i][1] and dims[i][0] > 2 else 1 for i in taken)
        return float(links), [dim for i, dim in enumerate(dims) if i not in taken]
  links, left = 0, []
  for chips, closed in reversed(dims):
    part = math.gcd(size, chips)
    links += part > 1
    size //= part
    left.insert(0, (chips // part, closed and part == 1))
  return float(links), left
