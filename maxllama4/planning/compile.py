"""The programs of a run, compiled for a described TPU machine by the TPU's own compiler; no TPU is needed.

The training step is lowered by the function that the loop uses, and compiled with the same options.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from maxllama4.config import Config, ConfigError
from maxllama4.decoding.generate import decoding_functions
from maxllama4.decoding.sampling import Sampling
from maxllama4.mesh import build_mesh
from maxllama4.model.weights import ModelTemplate
from maxllama4.planning.chips import Topology, is_ring
from maxllama4.planning.hlo import Summary, summarize
from maxllama4.sharding import MeshContext, use_mesh
from maxllama4.training.optimizer import learning_rate_schedule, make_optimizer
from maxllama4.training.state import HOST_MEMORY, abstract_state
from maxllama4.training.step import lower_train_step
from maxllama4.xla_flags import compiler_options

# What libtpu would ask a metadata server for, and what it would lock or print, on a machine with no TPU.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_OVERFLOWS = (
  r"Used (?P<needed>[\d.]+[KMGT]?) of (?P<limit>[\d.]+[KMGT]?) hbm",
  r"memory required for HLO temporaries \((?P<temporaries>[\d.]+[KMGT]?)\) exceeds available HBM"
  r" \((?P<limit>[\d.]+[KMGT]?)\)",
)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of one program, on each device; bytes.

  Of a program that needs more than there is, only what it needs is known: `fits` is false and `summary` is null.
  """

  fits: bool
  peak_hbm_bytes: int  # at any moment: what must fit
  arguments_bytes: int
  host_bytes: int
  state_bytes: dict[
    str, int
  ]  # of the arguments, as they are sharded: parameters, optimizer; or parameters, caches
  summary: Summary | None
  seconds: float


class CompilerError(RuntimeError):
  """The TPU compiler gave up, for another reason than too little memory."""


def libtpu_version() -> str:
  """Raises: ConfigError where libtpu is not installed."""
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "libtpu, the compiler of TPUs, is not installed; it needs no TPU: pip install 'maxllama4[tpu]'."
    )
  import libtpu  # an extra

  return libtpu.__version__


def described_devices(topology: Topology) -> list:
  """Devices of a machine that is not there, to compile for. Raises: ConfigError when libtpu does not know it."""
  libtpu_version()
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")  # nothing runs here, and JAX must not look for TPUs
  shape = (*topology.shape, 1)[:3]
  rings = [is_ring(topology, size) for size in shape]
  options = {"wrap": rings} if any(rings) else {}
  options |= {"num_slices": topology.slices} if topology.slices > 1 else {}
  options |= {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
  try:
    described = topologies.get_topology_desc(topology.name, platform="tpu", **options)
  except jax.errors.JaxRuntimeError as error:
    reason = " ".join(str(error).split())
    raise ConfigError(f"topology={topology.name} is none that libtpu knows: {reason}.") from None
  return described.devices


def compile_train_step(config: Config, topology: Topology) -> tuple[Compiled, str]:
  """The step that `train.py` runs with `config`, compiled for `topology`, and its optimised HLO ("" where it does not fit)."""
  mesh = build_mesh(config, described_devices(topology))
  template = ModelTemplate(config.model, config.training.frozen)
  optimizer = make_optimizer(config.optimizer, config.training.steps, template)
  schedule = learning_rate_schedule(config.optimizer, config.training.steps)
  with use_mesh(mesh, config.mesh) as context:
    state = abstract_state(template, optimizer, context, config.optimizer.state_memory)

    def lower() -> jax.stages.Lowered:
      return lower_train_step(config, template, optimizer, schedule, state, context)

    parts = {"parameters": state.model, "optimizer": (state.optimizer, state.health)}
    return _compile(lower, context, config.compiler_options, parts)


def compile_decoding(
  config: Config, topology: Topology, rows: int, prompt: int, length: int
) -> tuple[dict[str, Compiled], str]:
  """Prefill of `rows` prompts of `prompt` tokens, and one decoding step with caches of `length`; the step's HLO.

  Weights are stored in `param_dtype`, as a checkpoint of this configuration holds them.
  """
  mesh = build_mesh(config, described_devices(topology))
  template, sampling = ModelTemplate(config.model), Sampling(temperature=0.0, top_k=0, top_p=1.0)
  start, advance = decoding_functions(config.model, sampling, ())
  with use_mesh(mesh, config.mesh) as context:
    shardings = template.shardings(context)
    weights = {
      path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
      for path, leaf in template.shapes.items()
    }
    by_row = context.sharding(("batch", None))
    ids = jax.ShapeDtypeStruct((rows, prompt), np.int32, sharding=by_row)
    keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), rows)))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=by_row)
    prefill = start.lower(weights, ids, ids, keys, None, max_length=length)
    compiled, _ = _compile(lambda: prefill, context, {}, {"parameters": weights})
    found = {"prefill": compiled}
    if not compiled.fits:
      return found, ""
    state = cache_shapes(prefill, context)
    found["step"], text = _compile(
      lambda: advance.lower(weights, state, count=1),
      context,
      {},
      {"parameters": weights, "caches": state.caches},
    )
    return found, text


def cache_shapes(prefill: jax.stages.Lowered, context: MeshContext):
  """What prefill returns, as shapes: rows over the batch's axes, heads of keys and values over theirs."""

  def place(path, leaf):
    axes = ("batch",) + (None,) * (leaf.ndim - 1)
    if path[0].name == "caches":  # some have a dimension of layers in front
      tail = ("batch", None) if leaf.dtype == np.int32 else ("batch", None, "kv_heads", None)
      axes = (None,) * (leaf.ndim - len(tail)) + tail
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=context.sharding(axes))

  return jax.tree_util.tree_map_with_path(place, prefill.out_info)


def _compile(
  lower: Callable[[], jax.stages.Lowered], context: MeshContext, own: dict, state: dict
) -> tuple[Compiled, str]:
  """Compiles for the devices of `context`, with a run's `own` options; `state` are the arguments to be told apart."""
  start = time.perf_counter()
  state_bytes = {name: sharded_bytes(tree) for name, tree in state.items()}
  options = compiler_options(context.mesh.devices.flat[0].device_kind, own)
  lowered = lower()
  try:
    compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    seconds = time.perf_counter() - start
    return _overflow(str(error), state_bytes, seconds), ""
  stats = compiled.memory_analysis()
  text = _text_of(compiled, lowered, options)
  found = Compiled(
    fits=True,
    peak_hbm_bytes=stats.peak_memory_in_bytes,
    arguments_bytes=stats.argument_size_in_bytes,
    host_bytes=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
    state_bytes=state_bytes,
    summary=summarize(text, context.mesh),
    seconds=time.perf_counter() - start,
  )
  return found, text


def sharded_bytes(tree) -> int:
  """Bytes of the arrays of `tree` in the memory of one device, without those that its host keeps."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding.memory_kind != HOST_MEMORY
  )


def _overflow(message: str, state_bytes: dict[str, int], seconds: float) -> Compiled:
  """What is known of a program that does not fit. Raises: CompilerError when that is not why it failed to compile."""
  found = next((m for m in (re.search(p, message) for p in _OVERFLOWS) if m), None)
  if found is None or "RESOURCE_EXHAUSTED" not in message:
    raise CompilerError(f"the TPU compiler failed: {message}")
  arguments, sizes = sum(state_bytes.values()), found.groupdict()
  if "temporaries" in sizes:
    temporaries = _bytes(sizes["temporaries"])
  else:
    temporaries = max(0, _bytes(sizes["needed"]) - arguments)
  return Compiled(
    fits=False,
    peak_hbm_bytes=arguments + temporaries,
    arguments_bytes=arguments,
    host_bytes=0,
    state_bytes=state_bytes,
    summary=None,
    seconds=seconds,
  )


def _bytes(text: str) -> int:
  """`95.74G`, as libtpu writes sizes, in powers of 1,024."""
  power = " KMGT".find(text[-1]) if text[-1].isalpha() else 0
  return int(float(text.rstrip("KMGT")) * 1024**power)


def _text_of(compiled: jax.stages.Compiled, lowered: jax.stages.Lowered, options: dict) -> str:
  """The optimised HLO; where this JAX cannot read what a newer libtpu hands over, libtpu writes it down itself."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    return compiled.as_text()
  with dump_folder() as folder:
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    lowered.compile(compiler_options=options | dump)
    written = sorted(folder.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
    if not written:
      raise RuntimeError("libtpu wrote no HLO; install the libtpu that this JAX asks for.")
    return written[-1].read_text(encoding="utf-8")


@contextlib.contextmanager
def dump_folder() -> Iterator[Path]:
  with tempfile.TemporaryDirectory(prefix="maxllama4-plan-") as folder:
    yield Path(folder)
