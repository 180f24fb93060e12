"""The mesh, remat policy and microbatches that train a model fastest: thousands by arithmetic, the best few compiled."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import yaml

from maxllama4.config import (
  MESH_AXES,
  REMAT_POLICIES,
  Config,
  ConfigError,
  config_to_dict,
  require,
)
from maxllama4.planning.chips import Topology
from maxllama4.planning.compile import CompilerError
from maxllama4.planning.estimate import Estimate, estimate, peak_hbm_bytes
from maxllama4.planning.step_time import StepTime, links_of, predict

# Share of the memory that an estimate must leave free: as much as it may be off.
MEMORY_MARGIN = 0.10
# Mesh axes over which slices can be laid: both exchange gradients and weights, not activations.
SLICE_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run a configuration: the configuration itself, complete, and what arithmetic says of it."""

  config: Config
  sizes: dict[str, int]  # of whole mesh axes
  estimate: Estimate
  step_time: StepTime

  @property
  def seconds_per_token(self) -> float:
    training = self.config.training
    return self.step_time.seconds / (training.batch_size * training.sequence_length)

  @property
  def description(self) -> str:
    """The mesh, the policy and the microbatches on a line."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1)
    training = self.config.training
    parts = [mesh or "one device", f"remat {training.remat}"]
    if training.gradient_accumulation > 1:
      parts.append(f"{training.gradient_accumulation} microbatches")
    return ", ".join(parts)


class Compiled(Protocol):
  """What a compiled candidate must tell."""

  @property
  def seconds(self) -> float: ...  # predicted, of a step

  @property
  def fits(self) -> bool: ...

  @property
  def peak_hbm_bytes(self) -> int: ...  # of a chip


@dataclasses.dataclass(frozen=True)
class Found:
  """One of the best candidates, compiled."""

  candidate: Candidate
  compiled: Any  # what `compile_best` gave; see `Compiled`


def candidates(config: Config, topology: Topology) -> list[Candidate]:
  """Every mesh, remat policy and number of microbatches that divides `config` and fits with a margin, fastest first.

  Batch, sequence length and rules stay. With several slices, one of `SLICE_AXES` spans them.
  """
  chip = topology.chip
  limit = (1 - MEMORY_MARGIN) * chip.hbm_bytes / chip.devices
  found = []
  for variant, sizes in variants(config, topology):
    if peak_hbm_bytes(variant, sizes) <= limit:
      cost = estimate(variant, sizes)
      step_time = predict(chip, cost.work(links_of(topology, variant.mesh, sizes)))
      found.append(Candidate(variant, sizes, cost, step_time))
  return sorted(found, key=lambda c: (c.seconds_per_token, c.estimate.peak_hbm_bytes))


def variants(config: Config, topology: Topology) -> Iterator[tuple[Config, dict[str, int]]]:
  """Configurations that differ from `config` in mesh, remat and microbatches, with their whole axes; all divide."""
  has_experts = any(kind.is_moe for kind in config.model.layer_kinds)
  per_slice = topology.devices // topology.slices
  spanning = SLICE_AXES if topology.slices > 1 else SLICE_AXES[:1]
  for axis in spanning:
    slices = {f"dcn_{name}": 1 for name in MESH_AXES} | {f"dcn_{axis}": topology.slices}
    for in_slice in factorizations(per_slice, len(MESH_AXES)):
      placed = dict(zip(MESH_AXES, in_slice, strict=True))
      if placed["expert"] > 1 and not has_experts:
        continue
      for count in divisors(config.training.batch_size):
        for remat in REMAT_POLICIES:
          variant = _variant(config, placed | slices, remat, count)
          if variant is None:
            break  # policies have no say in what divides
          yield variant, variant.mesh.resolve(topology.devices)


def _variant(config: Config, mesh: dict[str, int], remat: str, count: int) -> Config | None:
  """`config` so changed; None where a dimension does not divide."""
  training = dataclasses.replace(config.training, remat=remat, gradient_accumulation=count)
  try:
    return dataclasses.replace(
      config, mesh=dataclasses.replace(config.mesh, **mesh), training=training
    )
  except ConfigError:
    return None


def factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
  """All ways to write `number` as an ordered product of `parts` factors."""
  if parts == 1:
    yield (number,)
    return
  for first in divisors(number):
    for rest in factorizations(number // first, parts - 1):
      yield (first, *rest)


def divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def search(
  config: Config,
  topology: Topology,
  compile_best: Callable[[Config], Compiled],
  best: int = 3,
) -> list[Found]:
  """The candidates that are fastest by arithmetic, compiled by `compile_best` until `best` of them fit, at most twice as
  many; ranked by what that predicts, misfits last. What the compiler gives up on is said and left out.

  Raises: ConfigError when no candidate fits, by arithmetic or by the compiler.
  """
  ranked = candidates(config, topology)
  chip = topology.chip
  require(
    bool(ranked),
    f"training.batch_size={config.training.batch_size} rows of training.sequence_length="
    f"{config.training.sequence_length} fit {topology.devices} devices of {topology.name} with"
    f" {chip.hbm_bytes / chip.devices / 1e9:.0f} GB each in no mesh, remat policy or number of microbatches; take more"
    " chips, or fewer or shorter rows.",
  )
  found, fitting = [], 0
  for candidate in ranked[: 2 * best]:
    try:
      found.append(Found(candidate, compile_best(candidate.config)))
    except CompilerError as error:
      print(f"left out: {candidate.description}: {error}", file=sys.stderr)
      continue
    fitting += found[-1].compiled.fits
    if fitting == best:
      break
  require(
    fitting > 0,
    f"of the {len(ranked[: 2 * best])} candidates that are fastest by arithmetic, the compiler fits none into"
    f" {chip.hbm_bytes / chip.devices / 1e9:.0f} GB; take more chips, fewer or shorter rows, or a larger best=.",
  )
  return sorted(found, key=lambda f: (not f.compiled.fits, f.compiled.seconds))


def write_config(path: str | pathlib.Path, found: Found, topology: Topology) -> None:
  """Writes a complete run for `train.py`, with a folder of its own under `runs/`; its head says what was searched, what it
  is for and what is predicted."""
  candidate, chip, path = found.candidate, topology.chip, pathlib.Path(path)
  config = dataclasses.replace(candidate.config, run_dir=f"runs/{path.stem}")
  tokens = config.training.batch_size * config.training.sequence_length
  seconds = found.compiled.seconds
  chips = topology.chips
  utilization = candidate.estimate.useful_flops * chip.devices / (seconds * chip.peak_flops)
  slices = f", {topology.slices} slices" if topology.slices > 1 else ""
  head = [
    f"The fastest of all meshes, remat policies and microbatches for {chips} {chip.name} chips ({topology.name}{slices}).",
    f"  command:    python train.py {path}",
    f"  plan:       maxllama4 plan {path} topology={topology.name}"
    + (f" slices={topology.slices}" if topology.slices > 1 else ""),
    f"  mesh:       {candidate.description}",
    f"  memory:     {found.compiled.peak_hbm_bytes / 1e9:.1f} of {chip.hbm_bytes / 1e9:.1f} GB a chip, by the compiler",
    f"  prediction: {seconds:.2f} s a step of {tokens:,} tokens, {tokens / seconds / chips:,.0f} tokens/s/chip, MFU"
    f" {100 * utilization:.1f} %; not yet measured",
  ]
  body = yaml.safe_dump(config_to_dict(config), sort_keys=False, width=120)
  path.write_text("".join(f"# {line}\n" for line in head) + body, encoding="utf-8")
