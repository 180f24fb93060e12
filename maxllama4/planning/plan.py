"""What a run would need, do and cost on a machine that is not there; the command `maxllama4 plan`."""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from maxllama4.config import (
  MESH_AXES,
  Config,
  ConfigError,
  check_mesh_divides,
  config_from_section,
  load_config,
  parse_override,
  require,
)
from maxllama4.model.llama4 import train_flops_per_token
from maxllama4.planning.cache import Cache, default_folder, key_of
from maxllama4.planning.chips import Topology, parse_topology
from maxllama4.planning.compile import Compiled, compile_decoding, compile_train_step
from maxllama4.planning.estimate import Estimate, estimate
from maxllama4.planning.hlo import Collective
from maxllama4.planning.progress import waiting
from maxllama4.planning.search import search, write_config
from maxllama4.planning.step_time import HBM_FRACTION, StepTime, Work, links_of, predict
from maxllama4.settings import not_empty, one_of

PARTS = ("parameters", "optimizer", "gradients", "activations", "scratch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRequest:
  """What is asked for, besides the settings of the run."""

  topology: str
  slices: int = 1
  target: str = "train"  # or decode
  search: bool = False  # the fastest mesh, remat policy and number of microbatches
  save: str | None = None  # search: the file that the winner is written to
  best: int = 3  # search: how many candidates are compiled
  output: str = "text"  # or json
  hlo: str | None = None  # a file for the optimised HLO of the step
  tokens: float | None = None  # cost and days of a training on so many
  price_per_chip_hour: float | None = None  # dollars; null: the round figure of the chip
  batch: int = 8  # decode: rows
  prompt_length: int = 1024  # decode: tokens of each prompt
  max_length: int = 2048  # decode: tokens of prompt and answer
  cache: str | None = None  # a folder of compilations; null: the user's own

  def __post_init__(self):
    one_of("target", self.target, ("train", "decode"))
    one_of("output", self.output, ("text", "json"))
    for name in ("slices", "best", "batch", "prompt_length", "max_length"):
      positive_value(name, getattr(self, name))
    for name in ("tokens", "price_per_chip_hour"):
      if getattr(self, name) is not None:
        positive_value(name, getattr(self, name))
    for name in ("hlo", "save", "cache"):
      not_empty(name, getattr(self, name))
    require(
      self.prompt_length < self.max_length,
      f"prompt_length={self.prompt_length} must be below max_length={self.max_length}, which counts the answer, too.",
    )
    require(
      not (self.search and self.target == "decode"),
      "search=true finds meshes to train with; leave out target=decode, or the search.",
    )


def positive_value(name: str, value: float) -> None:
  require(value > 0, f"{name}={value} must be greater than 0.")


def split_request(words: Sequence[str]) -> tuple[PlanRequest, list[str]]:
  """The request, and the settings of the run, of `key=value` words. Raises: ConfigError without a topology."""
  names = {field.name for field in dataclasses.fields(PlanRequest)}
  asked, rest = {}, []
  for word in words:
    key = word.partition("=")[0]
    if key in ("topology", "hlo", "save", "cache"):
      asked[key] = word.partition("=")[2]  # as it stands: v5p:4x4x4 is no YAML
    elif key in names:
      asked |= dict([parse_override(word)])
    else:
      rest.append(word)
  if "topology" not in asked:
    raise ConfigError("name the machine: topology=CHIP:SHAPE, such as topology=v5p:4x4x4.")
  request = config_from_section(PlanRequest, asked, "")
  for names, needed, is_met in (
    (("save", "best"), "search=true", request.search),
    (("batch", "prompt_length", "max_length"), "target=decode", request.target == "decode"),
    (("tokens",), "target=train", request.target == "train"),
  ):
    for name in names:
      require(
        name not in asked or is_met,
        f"{name}={asked.get(name)} means something with {needed} alone; say that, or leave out {name}=.",
      )
  return request, rest


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of one way to run; numbers are per chip and step unless they say otherwise."""

  topology: Topology
  slices: int
  target: str
  mesh: dict[str, int]
  fits: bool
  hbm_bytes: dict[str, int]
  host_bytes: int
  useful_flops: float
  executed_flops: float
  collectives: tuple[Collective, ...]
  estimated_cycles: (
    int | None
  )  # null where the program does not fit, and all below is by arithmetic
  time: StepTime
  tokens: int  # of the whole machine in a step
  dollars_per_hour: float  # of a chip
  compile_seconds: float
  extra: dict[str, Any]

  @property
  def seconds(self) -> float:
    return self.time.seconds

  @property
  def peak_hbm_bytes(self) -> int:
    return sum(self.hbm_bytes.values())

  @property
  def mfu(self) -> float:
    return self.useful_flops / self.seconds / self.topology.chip.peak_flops

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds

  def dollars(self, tokens: float) -> float:
    """To train on, or decode, so many tokens."""
    hours = tokens / self.tokens_per_second / 3600
    return hours * self.topology.chips * self.dollars_per_hour

  def to_json(self) -> dict[str, Any]:
    """As docs/planning.md lists it."""
    return {
      "topology": self.topology.name,
      "slices": self.slices,
      "chips": self.topology.chips,
      "target": self.target,
      "mesh": self.mesh,
      "fits": self.fits,
      "peak_hbm_bytes": self.peak_hbm_bytes,
      "hbm_bytes": self.hbm_bytes,
      "hbm_limit_bytes": self.topology.chip.hbm_bytes,
      "host_bytes": self.host_bytes,
      "useful_flops": self.useful_flops,
      "executed_flops": self.executed_flops,
      "collectives": [dataclasses.asdict(collective) for collective in self.collectives],
      "estimated_cycles": self.estimated_cycles,
      "step_seconds": self.seconds,
      "step_seconds_parts": self.time.parts,
      "step_seconds_exposed": self.time.exposed,
      "bound_by": self.time.bound_by,
      "mfu": self.mfu,
      "tokens_per_second": self.tokens_per_second,
      "tokens_per_second_per_chip": self.tokens_per_second / self.topology.chips,
      "price_per_chip_hour": self.dollars_per_hour,
      "cost_per_billion_tokens": self.dollars(1e9),
      "compile_seconds": self.compile_seconds,
      **self.extra,
    }


class Planner:
  """Plans of a machine for one request."""

  def __init__(self, request: PlanRequest):
    self.request = request
    self.topology = parse_topology(request.topology, request.slices)
    chip = self.topology.chip
    self.price = request.price_per_chip_hour or chip.dollars_per_hour
    self._cache = Cache(pathlib.Path(request.cache) if request.cache else default_folder())
    self.text = ""  # the last program's

  def plan_training(self, config: Config) -> Plan:
    """The plan of `config`'s training step."""
    topology, chip = self.topology, self.topology.chip
    sizes = self._sizes(config)
    check_mesh_divides(config, sizes)
    guess = estimate(config, sizes)

    def compile_step() -> tuple[dict[str, Compiled], str]:
      step, text = compile_train_step(config, topology)
      return {"step": step}, text

    programs = self._compiled(config, ("train",), compile_step)
    step, devices = programs["step"], chip.devices
    links = links_of(topology, config.mesh, sizes)
    work = work_of(step, links, guess.host_traffic_bytes) if step.fits else guess.work(links)
    time = predict(chip, work)
    tokens = config.training.batch_size * config.training.sequence_length
    per_token = train_flops_per_token(config.model, config.training.sequence_length)
    summary = step.summary
    return Plan(
      topology=topology,
      slices=topology.slices,
      target="train",
      mesh=sizes,
      fits=step.fits and step.peak_hbm_bytes * devices <= chip.hbm_bytes,
      hbm_bytes={k: v * devices for k, v in split_memory(step, guess).items()},
      host_bytes=step.host_bytes * devices,
      useful_flops=per_token * tokens / topology.chips,
      executed_flops=(summary or guess).executed_flops * devices,
      collectives=per_chip((summary or guess).collectives, devices),
      estimated_cycles=summary and summary.estimated_cycles,
      time=time,
      tokens=tokens,
      dollars_per_hour=self.price,
      compile_seconds=step.seconds,
      extra=training_extra(self.request, step, tokens / time.seconds, topology, self.price),
    )

  def plan_decoding(self, config: Config) -> Plan:
    """The plan of one decoding step: a token of every row."""
    request, topology, chip = self.request, self.topology, self.topology.chip
    sizes = self._sizes(config)
    check_decoding(config, request, sizes)
    rows, prompt, length = request.batch, request.prompt_length, request.max_length
    # The mesh is checked for these rows, not for those of a training.
    training = dataclasses.replace(config.training, batch_size=rows, gradient_accumulation=1)
    config = dataclasses.replace(config, training=training)

    def compile_both() -> tuple[dict[str, Compiled], str]:
      return compile_decoding(config, topology, rows, prompt, length)

    programs = self._compiled(config, ("decode", rows, prompt, length), compile_both)
    prefill, devices = programs["prefill"], chip.devices
    step = programs.get("step", prefill)
    largest = max(programs.values(), key=lambda program: program.peak_hbm_bytes)
    fits = all(p.fits and p.peak_hbm_bytes * devices <= chip.hbm_bytes for p in programs.values())
    links = links_of(topology, config.mesh, sizes)
    time = decode_time(topology, step, links)
    summary = step.summary
    state = largest.state_bytes
    caches = step.state_bytes.get("caches", 0)
    scratch = largest.peak_hbm_bytes - state["parameters"] - caches
    memory = dict.fromkeys(PARTS, 0) | {"parameters": state["parameters"], "activations": caches}
    memory["scratch"] = max(0, scratch)
    useful = train_flops_per_token(config.model, 1) / 3 * rows
    first = prefill.summary and predict(chip, work_of(prefill, links)).seconds
    return Plan(
      topology=topology,
      slices=topology.slices,
      target="decode",
      mesh=sizes,
      fits=fits,
      hbm_bytes={name: size * devices for name, size in memory.items()},
      host_bytes=0,
      useful_flops=useful / topology.chips,
      executed_flops=summary.executed_flops * devices if summary else 0.0,
      collectives=per_chip(summary.collectives, devices) if summary else (),
      estimated_cycles=summary and summary.estimated_cycles,
      time=time,
      tokens=rows,
      dollars_per_hour=self.price,
      compile_seconds=sum(program.seconds for program in programs.values()),
      extra={"batch": rows, "cache_bytes": caches * devices, "prefill_seconds": first},
    )

  def _sizes(self, config: Config) -> dict[str, int]:
    """Sizes of the mesh's axes. Raises: ConfigError when they are not those of the machine."""
    spanned, slices = config.mesh.num_slices, self.topology.slices
    require(
      spanned == slices,
      f"slices={slices}, but the mesh spans {spanned} (the product of mesh.dcn_AXIS over all axes); set"
      f" mesh.dcn_data={slices}, or another axis.",
    )
    return config.mesh.resolve(self.topology.devices)

  def _compiled(
    self, config: Config, what: tuple, make: Callable[[], tuple[dict[str, Compiled], str]]
  ) -> dict[str, Compiled]:
    """From the cache, or from the compiler."""
    topology = self.topology
    key = key_of(config, topology.name, topology.slices, *what)
    found = self._cache.load(key)
    if found is None:
      mesh = mesh_words(self._sizes(config))
      with waiting(f"compiling for {topology.name}, {mesh}", self._cache.last_seconds()):
        found = make()
      self._cache.save(key, *found)
    programs, self.text = found
    return programs


def per_chip(collectives: Sequence[Collective], devices: int) -> tuple[Collective, ...]:
  """Collectives of a chip with so many devices."""
  return tuple(dataclasses.replace(c, bytes=c.bytes * devices) for c in collectives)


def work_of(program: Compiled, links: dict[str, float], host_traffic_bytes: float = 0.0) -> Work:
  """What the step-time model is told of a compiled program; what goes to the host and back is known by arithmetic."""
  summary = program.summary
  return Work(
    executed_flops=summary.executed_flops,
    grouped_flops=summary.grouped_flops,
    attention_flops=summary.attention_flops,
    estimated_cycles=summary.estimated_cycles,
    hbm_traffic_bytes=summary.hbm_traffic_bytes,
    host_traffic_bytes=host_traffic_bytes,
    collectives=summary.collectives,
    links=links,
  )


def split_memory(step: Compiled, guess: Estimate) -> dict[str, int]:
  """The compiler's peak by what it is for, on a device.

  Parameters and optimizer are exact. What else there is, is given to gradients and activations as far as arithmetic says
  that they need it; the rest is scratch.
  """
  memory = {name: step.state_bytes[name] for name in ("parameters", "optimizer")}
  rest = max(0, step.peak_hbm_bytes - sum(memory.values()))
  for name in ("gradients", "activations"):
    memory[name] = min(rest, guess.hbm_bytes[name])
    rest -= memory[name]
  return memory | {"scratch": rest}


def training_extra(
  request: PlanRequest, step: Compiled, rate: float, topology: Topology, price: float
) -> dict[str, Any]:
  """What a plan says besides: how much is missing, cycles by kind, and a whole training where it was asked for."""
  extra: dict[str, Any] = {"missing_bytes": 0}
  chip = topology.chip
  missing = step.peak_hbm_bytes * chip.devices - chip.hbm_bytes
  if missing > 0:
    extra["missing_bytes"] = missing
  if step.summary is not None:
    extra["cycles_by_kind"] = step.summary.cycles_by_kind
    extra["emulated_gather_bytes"] = step.summary.emulated_gather_bytes * chip.devices
    extra["loops_counted_once"] = list(step.summary.unknown_loops)
  if request.tokens is not None:
    seconds = request.tokens / rate
    extra["tokens"] = request.tokens
    extra["training_days"] = seconds / 86400
    extra["training_dollars"] = seconds / 3600 * topology.chips * price
  return extra


def check_decoding(config: Config, request: PlanRequest, sizes: dict[str, int]) -> None:
  """Raises: ConfigError where rows do not divide or are split themselves, or the model has fewer positions."""
  parts = math.prod(sizes[axis] for axis in config.mesh.axes_of("batch"))
  require(
    request.batch % parts == 0,
    f"batch={request.batch} rows cannot be dealt out over {parts} devices ("
    f"{' x '.join(f'mesh.{axis}' for axis in config.mesh.axes_of('batch'))}); set a multiple of {parts}, or other axes.",
  )
  splitting = [axis for axis in config.mesh.axes_of("length") if sizes[axis] > 1]
  require(
    not splitting,
    f"mesh.{'/'.join(splitting)} splits rows, to which decoding adds one token at a time; set it to 1.",
  )
  require(
    request.max_length <= config.model.max_position_embeddings,
    f"max_length={request.max_length} exceeds model.max_position_embeddings={config.model.max_position_embeddings};"
    " lower it.",
  )


def decode_time(topology: Topology, step: Compiled, links: dict[str, float]) -> StepTime:
  """Of one token a row: weights and caches are read once, at the memory's rate; exchanges are waited for."""
  chip = topology.chip
  if step.summary is None:
    size = sum(step.state_bytes.values())
    seconds = size / (HBM_FRACTION * chip.hbm_bytes_per_second / chip.devices)
    return StepTime(seconds, "hbm", {"hbm": seconds}, {"hbm": seconds})
  work = dataclasses.replace(work_of(step, links), estimated_cycles=None)
  summary = step.summary
  waited = tuple(dataclasses.replace(c, asynchronous=False) for c in summary.collectives)
  whole = predict(chip, dataclasses.replace(work, collectives=waited))
  local = max(whole.parts["compute"], whole.parts["hbm"])
  exposed = {name: whole.exposed[name] for name in ("ici", "dcn")}
  name = "hbm" if whole.parts["hbm"] >= whole.parts["compute"] else "compute"
  parts = {**whole.parts}
  bound_by = max(parts, key=parts.__getitem__)
  return StepTime(local + sum(exposed.values()), bound_by, parts, {name: local, **exposed})


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the command line asked for: the plan, or the best of a search; and all compiled plans with what they are."""

  request: PlanRequest
  plans: tuple[Plan, ...]
  descriptions: tuple[str, ...]

  def to_json(self) -> dict[str, Any]:
    best = self.plans[0].to_json()
    if self.request.search:
      best["candidates"] = [
        {"description": description, **plan.to_json()}
        for plan, description in zip(self.plans, self.descriptions)
      ]
    return best


def make_plan(path: str, words: Sequence[str]) -> Answer:
  """The plan that the words of the command line ask for."""
  request, overrides = split_request(words)
  for name in ("hlo", "save"):
    check_place(name, getattr(request, name))
  require(
    request.cache is None or pathlib.Path(request.cache).is_dir(),
    f"cache={request.cache} is no folder; make it, or leave out cache=.",
  )
  planner = Planner(request)
  config = load_config(path, overrides)
  if request.search:
    return run_search(planner, config)
  decodes = request.target == "decode"
  plan = planner.plan_decoding(config) if decodes else planner.plan_training(config)
  if request.hlo:
    write_hlo(planner, request.hlo)
  return Answer(request, (plan,), (mesh_words(plan.mesh),))


def check_place(name: str, path: str | None) -> None:
  if path is not None:
    place = pathlib.Path(path)
    require(
      place.parent.is_dir() and not place.is_dir(),
      f"{name}={path} is no place for a file; name a file in a folder that exists.",
    )


def write_hlo(planner: Planner, path: str) -> None:
  if planner.text:
    pathlib.Path(path).write_text(planner.text, encoding="utf-8")
  else:
    print(f"{path} was not written: a program that does not fit has no HLO", file=sys.stderr)


def run_search(planner: Planner, config: Config) -> Answer:
  """The candidates that were compiled, fastest first; the winner is written to `save`, and its program to `hlo`."""
  request = planner.request
  found = search(config, planner.topology, planner.plan_training, best=request.best)
  if request.save:
    write_config(request.save, found[0], planner.topology)
  if request.hlo:
    planner.plan_training(found[0].candidate.config)  # from the cache, for its text
    write_hlo(planner, request.hlo)
  plans = tuple(one.compiled for one in found)
  return Answer(request, plans, tuple(one.candidate.description for one in found))


def mesh_words(mesh: dict[str, int]) -> str:
  return " x ".join(f"{axis} {mesh[axis]}" for axis in MESH_AXES if mesh[axis] > 1) or "one device"
