"""What an optimised TPU program does, read from the compiler's text: collectives, FLOPs, cycles and memory traffic.

The text is read once, line by line. Every loop counts as often as it runs: `known_trip_count`, or else what its counter
starts from, moves by and is compared with. Of a conditional the branch with the most FLOPs (then cycles) counts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator

import jax

from maxllama4.planning.flops import convolution_flops, dot_flops, kernel_flops
from maxllama4.planning.groups import Devices, permutation, replica_group
from maxllama4.planning.hlo_text import Computation, Instruction, bytes_of, parse_module
from maxllama4.planning.loops import Loops

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
UNKNOWN_CYCLES = 2**62  # the compiler writes the largest integer for what it cannot estimate
_FUSED = re.compile(r'"async_collective_fusion_config":\{[^}]*"flag_start":"(-?\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Opcodes that move nothing through memory by themselves.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
  *("recv", "after-all", "add-dependency", "partition-id", "replica-id", "opt-barrier", "domain"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind over the same mesh axes: what a device sends over the wire in one step.

  Bytes are those that leave a device: of n in a group, an all-gather sends output less input, a reduce-scatter input
  less output, an all-reduce 2 (n - 1) / n of its input, an all-to-all (n - 1) / n of it, a permutation all of it. A
  ragged all-to-all is taken to send all its rows, evenly, as an all-to-all.
  """

  kind: str  # one of KINDS
  axes: tuple[str, ...]  # mesh axes that the groups run over
  count: int  # executions, loops multiplied out
  bytes: int  # on the wire, a step and a device
  dtype: str  # of the elements, as HLO writes it
  asynchronous: bool  # whether started early and waited for later
  dcn: bool = False  # whether it leaves a slice


@dataclasses.dataclass(frozen=True)
class Summary:
  """One execution of a program, on one device."""

  collectives: tuple[Collective, ...]  # most bytes first
  matmul_flops: float  # dots and convolutions
  grouped_flops: float  # products of routed experts, in kernels
  attention_flops: float  # in attention's kernels
  estimated_cycles: int  # the compiler's, of its tensor core, custom calls and collectives left out
  cycles_by_kind: dict[str, int]  # matmul, copy, other; sparsecore runs beside them
  hbm_traffic_bytes: int  # operands read and results written, of what lies in HBM
  emulated_gather_bytes: int  # of the all-reduces: whole arrays made from shards by adding zeros
  loops: tuple[
    tuple[str, int], ...
  ]  # bodies and how often each runs, once through the one around it
  unknown_loops: tuple[str, ...]  # bodies that are counted once, for want of a number

  @property
  def executed_flops(self) -> float:
    return self.matmul_flops + self.grouped_flops + self.attention_flops

  @property
  def wire_bytes(self) -> int:
    return sum(collective.bytes for collective in self.collectives)


def summarize(text: str, mesh: jax.sharding.Mesh) -> Summary:
  """What the program in `text` does on one device of `mesh`, whose devices' order its partitions follow."""
  module = parse_module(text)
  reader = _Reader(module.computations, Devices.of(mesh))
  tally = reader.tally(module.entry)
  collectives = [
    Collective(kind, axes, count, round(size), dtype, asynchronous, dcn)
    for (kind, axes, dtype, asynchronous, dcn), (count, size) in tally.collectives.items()
  ]
  on_core = {kind: n for kind, n in sorted(tally.cycles.items()) if kind != "sparsecore"}
  return Summary(
    collectives=tuple(sorted(collectives, key=lambda c: -c.bytes)),
    matmul_flops=tally.matmul_flops,
    grouped_flops=tally.grouped_flops,
    attention_flops=tally.attention_flops,
    estimated_cycles=sum(on_core.values()),
    cycles_by_kind=dict(sorted(tally.cycles.items())),
    hbm_traffic_bytes=round(tally.hbm_bytes),
    emulated_gather_bytes=round(tally.emulated_gather_bytes),
    loops=tuple(reader.loops.trips.items()),
    unknown_loops=tuple(reader.loops.unknown),
  )


@dataclasses.dataclass
class _Tally:
  """Sums over one execution of a computation."""

  matmul_flops: float = 0.0
  grouped_flops: float = 0.0
  attention_flops: float = 0.0
  hbm_bytes: float = 0.0
  emulated_gather_bytes: float = 0.0
  cycles: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  collectives: dict[tuple, list[float]] = dataclasses.field(default_factory=dict)

  @property
  def flops(self) -> float:
    return self.matmul_flops + self.grouped_flops + self.attention_flops

  def add(self, other: _Tally, times: int = 1, *, asynchronous: bool = False) -> None:
    """Adds `times` executions of `other`, whose collectives are `asynchronous` if it was started to run beside others."""
    if times == 0:
      return
    self.matmul_flops += times * other.matmul_flops
    self.grouped_flops += times * other.grouped_flops
    self.attention_flops += times * other.attention_flops
    self.hbm_bytes += times * other.hbm_bytes
    self.emulated_gather_bytes += times * other.emulated_gather_bytes
    for kind, count in other.cycles.items():
      self.cycles[kind] += times * count
    for (kind, axes, dtype, started, dcn), (count, size) in other.collectives.items():
      key = (kind, axes, dtype, started or asynchronous, dcn)
      self.count_collective(key, times * count, times * size)

  def count_collective(self, key: tuple, count: int, size: float) -> None:
    total = self.collectives.setdefault(key, [0, 0.0])
    total[0] += count
    total[1] += size


class _Reader:
  """Adds up computations, those that one calls first."""

  def __init__(self, computations: dict[str, Computation], devices: Devices):
    self._computations, self._devices = computations, devices
    self._done: dict[str, _Tally] = {}
    self.loops = Loops(computations)

  def tally(self, name: str) -> _Tally:
    if name not in self._done:
      tally = self._done[name] = _Tally()
      computation = self._computations[name]
      for instruction in computation.instructions.values():
        self._add(tally, computation, instruction)
    return self._done[name]

  def _add(self, tally: _Tally, computation: Computation, instruction: Instruction) -> None:
    op = instruction.op
    kind = op.removesuffix("-start")
    if kind in KINDS:
      self._add_collective(tally, computation, instruction, kind)
    elif op == "send":
      self._add_between_slices(tally, computation, instruction)
    elif op == "while":
      body = instruction.called("body")
      tally.add(self.tally(body), self.loops.count(computation, instruction))
    elif op == "conditional":
      branches = [self.tally(name) for name in instruction.branches()]
      tally.add(max(branches, key=lambda tally: (tally.flops, tally.cycles.total())))
    elif op in ("call", "call-start", "async-start", "custom-call-start"):
      self._add_call(tally, instruction)
    elif op == "fusion":
      self._add_fusion(tally, computation, instruction)
    else:
      self._add_single(tally, computation, instruction)

  def _add_call(self, tally: _Tally, instruction: Instruction) -> None:
    attributes = ("to_apply", "calls", "called_computations")
    called = self.tally(next(filter(None, map(instruction.called, attributes))))
    if 'async_execution_thread="sparsecore"' in instruction.rest:
      beside = dataclasses.replace(
        called, cycles=collections.Counter(sparsecore=called.cycles.total())
      )
      tally.add(beside, asynchronous=True)
    else:
      tally.add(called, asynchronous=instruction.op != "call")

  def _add_fusion(self, tally: _Tally, computation: Computation, instruction: Instruction) -> None:
    """What a fusion computes counts; its parts' cycles and memory traffic are its own."""
    name = instruction.called("calls")
    fused = self.tally(name)
    collective = fused.collectives
    if self._scatters(self._computations[name]):
      collective = {_as_reduce_scatter(key): [n, s / 2] for key, (n, s) in collective.items()}
    inner = dataclasses.replace(
      fused, cycles=collections.Counter(), hbm_bytes=0.0, collectives=collective
    )
    tally.add(inner)
    is_matmul = fused.matmul_flops > 0
    self._add_cycles(tally, instruction, "matmul" if is_matmul else "other")
    tally.hbm_bytes += self._fusion_traffic(computation, instruction, self._computations[name])

  def _add_single(self, tally: _Tally, computation: Computation, instruction: Instruction) -> None:
    op = instruction.op
    shapes = functools.partial(computation.operand_shapes, instruction)
    if op in _FREE or op.endswith("-done") or op == "async-update":
      return
    if op == "convolution":
      tally.matmul_flops += convolution_flops(instruction, *shapes()[:2])
    elif op in ("dot", "ragged-dot"):
      tally.matmul_flops += dot_flops(instruction, *shapes()[:2])
    elif op == "custom-call":
      if "AllocateBuffer" in instruction.rest:
        return
      if "splash" in instruction.name or "attention" in instruction.name:
        tally.attention_flops += kernel_flops(instruction, shapes())
      else:
        tally.grouped_flops += kernel_flops(instruction, shapes())
    kinds = {"convolution": "matmul", "dot": "matmul", "copy": "copy", "transpose": "copy"}
    self._add_cycles(tally, instruction, kinds.get(op, "other"))
    tally.hbm_bytes += _traffic(computation, instruction)

  def _add_cycles(self, tally: _Tally, instruction: Instruction, kind: str) -> None:
    found = _CYCLES.search(instruction.rest)
    if found and int(found[1]) < UNKNOWN_CYCLES:
      tally.cycles[kind] += int(found[1])

  def _add_collective(
    self, tally: _Tally, computation: Computation, instruction: Instruction, kind: str
  ) -> None:
    fused = _FUSED.search(
      instruction.rest
    )  # start, parts and end of one exchange stand in several fusions
    if fused and fused[1] != "-1":
      return
    operands = computation.operand_shapes(instruction)
    operands = operands[:1] if kind == "ragged-all-to-all" else operands
    size = sum(bytes_of(shape) for shape in operands)
    if kind == "collective-permute":
      group, share = permutation(instruction.rest, self._devices)
    else:
      group = replica_group(instruction.rest, self._devices)
      share = _share(kind, len(group))
    if share == 0:
      return
    axes, dcn = self._devices.axes_of(group), self._devices.leaves_slice(group)
    dtype = operands[0].partition("[")[0].lstrip("(")
    asynchronous = bool(fused) or instruction.op.endswith("-start")
    tally.count_collective((kind, axes, dtype, asynchronous, dcn), 1, size * share)
    tally.hbm_bytes += _traffic(computation, instruction)
    if kind == "all-reduce" and any("dynamic-update-slice" in o for o in instruction.operands):
      tally.emulated_gather_bytes += size * share

  def _add_between_slices(
    self, tally: _Tally, computation: Computation, instruction: Instruction
  ) -> None:
    """The part of a collective that leaves the slice is handed to the host, and comes back from it."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    if found is None:
      return
    kind = found[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    n = len(set(self._devices.slices))
    share = _share(kind, n) if kind != "collective-permute" else 1
    shape = computation.operand_shapes(instruction)[0]
    key = (kind, self._devices.spanning_axes(), shape.partition("[")[0], True, True)
    tally.count_collective(key, 1, bytes_of(shape) * share)

  def _scatters(self, computation: Computation) -> bool:
    """Whether a fused computation is an all-reduce of which each device keeps its slice."""
    ops = {instruction.op for instruction in computation.instructions.values()}
    return "all-reduce" in ops and "dynamic-slice" in ops

  def _fusion_traffic(
    self, computation: Computation, instruction: Instruction, fused: Computation
  ) -> int:
    """Bytes of HBM that a fusion reads and writes: of an array that is sliced or updated in place, those alone."""
    total = 0
    parameters = fused.parameters()
    for position, shape in enumerate(computation.operand_shapes(instruction)):
      if _in_hbm(shape):
        touched = _touched(fused, parameters[position]) if position in parameters else None
        total += bytes_of(shape) if touched is None else min(touched, bytes_of(shape))
    updates = _root_updates(fused)
    if updates is not None:
      return total + updates
    return total + sum(bytes_of(shape) for shape in instruction.shapes() if _in_hbm(shape))


def _share(kind: str, n: int) -> float:
  """Bytes that a device sends over those that it is given, of `n` devices in a group."""
  shares = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-broadcast": 1}
  return shares.get(kind, (n - 1) / n)


def _as_reduce_scatter(key: tuple) -> tuple:
  kind, *rest = key
  return ("reduce-scatter" if kind == "all-reduce" else kind, *rest)


def _in_hbm(shape: str) -> bool:
  """Whether an array lies in HBM: other memories are marked S(1), S(2), ... in its layout."""
  return "S(" not in shape


def _traffic(computation: Computation, instruction: Instruction) -> int:
  """Bytes of HBM that an instruction that is no fusion reads and writes."""
  operands, op = computation.operand_shapes(instruction), instruction.op
  results = instruction.shapes()
  if op.endswith(
    "-start"
  ):  # (what it was given, or will give, first; then the other; then its own books)
    results = results[:1] if op in ("copy-start", "slice-start") else results[1:2]
  if op in ("dynamic-slice", "gather", "slice", "slice-start"):
    operands = results
  elif op in ("dynamic-update-slice", "scatter"):
    update = operands[-1] if op == "scatter" else operands[1]
    operands, results = [update], [update]
  return sum(bytes_of(shape) for shape in (*operands, *results) if _in_hbm(shape))


def _touched(fused: Computation, parameter: str) -> int | None:
  """Bytes of `parameter` that are read where it is only sliced, gathered from or updated; None where all of it is."""
  total = 0
  for user in _users(fused, parameter):
    if user.op in ("dynamic-slice", "gather", "slice") and user.operands[0] == parameter:
      total += bytes_of(user.shape)
    elif user.op == "dynamic-update-slice" and user.operands[0] == parameter:
      continue
    elif user.op == "bitcast":
      inner = _touched(fused, user.name)
      if inner is None:
        return None
      total += inner
    else:
      return None
  return total


def _users(fused: Computation, name: str) -> Iterator[Instruction]:
  return (user for user in fused.instructions.values() if name in user.operands)


def _root_updates(fused: Computation) -> int | None:
  """Bytes written by a fusion that ends in an update of a slice; None where it writes whole arrays."""
  root = fused.instructions[fused.root]
  while root.op == "bitcast":
    root = fused.instructions[root.operands[0]]
  if root.op != "dynamic-update-slice":
    return None
  return bytes_of(fused.instructions[root.operands[1]].shape)
