"""What a training step needs and does, by arithmetic on the configuration: memory, FLOPs, traffic and collectives.

Nothing is compiled: a mesh costs microseconds, so that a search can try thousands. The rules say what the code does, which
compile.py then confirms; benchmarks/plan_estimates.py compares both. Everything is per device and step.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maxllama4.config import EMBED_AXES, Config, LayerKind, ModelConfig, OptimizerConfig
from maxllama4.model.dispatch import SLACK, WIDE
from maxllama4.model.llama4 import train_flops_per_token
from maxllama4.model.weights import ModelTemplate, is_stacked
from maxllama4.planning.hlo import Collective
from maxllama4.planning.step_time import Work
from maxllama4.training.optimizer import make_optimizer
from maxllama4.training.state import array_of

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Memory, work and collectives of one device in one step."""

  hbm_bytes: dict[str, int]  # parameters, optimizer, gradients, activations, scratch: at the peak
  host_bytes: int
  host_traffic_bytes: float  # to the host and back
  useful_flops: float
  executed_flops: float
  grouped_flops: float  # of the executed: products of routed experts
  attention_flops: float  # of the executed: in attention
  hbm_traffic_bytes: float  # read and written by what is no product of matrices
  collectives: list[Collective]

  @property
  def peak_hbm_bytes(self) -> int:
    return sum(self.hbm_bytes.values())

  def work(self, links: Mapping[str, float]) -> Work:
    """What `predict` takes; `links` by mesh axis, from `links_of`."""
    return Work(
      executed_flops=self.executed_flops,
      grouped_flops=self.grouped_flops,
      attention_flops=self.attention_flops,
      hbm_traffic_bytes=self.hbm_traffic_bytes,
      host_traffic_bytes=self.host_traffic_bytes,
      collectives=self.collectives,
      links=links,
    )


@dataclasses.dataclass(frozen=True)
class Array:
  """One of the model's arrays; of a stack, one layer's."""

  path: str
  shape: tuple[int, ...]
  axes: Axes
  itemsize: int
  copies: int  # layers in the stack
  is_trained: bool

  @property
  def size(self) -> int:
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Layers:
  """Layers that are alike: their kind, how many there are, whether they are scanned, and the arrays of one."""

  kind: LayerKind
  count: int
  is_scanned: bool
  arrays: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Structure:
  """All arrays of a model: those of its layers, and the others."""

  layers: tuple[Layers, ...]
  others: tuple[Array, ...]

  @property
  def arrays(self) -> tuple[Array, ...]:
    return (*(array for group in self.layers for array in group.arrays), *self.others)


@functools.lru_cache(maxsize=16)
def structure_of(model: ModelConfig, frozen: tuple[str, ...]) -> Structure:
  """The arrays of `model`, read off its template: whatever the code adds is counted."""
  template = ModelTemplate(model, frozen)
  groups: dict[str, list[Array]] = {}
  for path, shape in template.shapes.items():
    stacked = path.startswith("decoder/") and is_stacked(path)
    array = Array(
      path,
      shape.shape[1:] if stacked else shape.shape,
      template.axes[path][1:] if stacked else template.axes[path],
      shape.dtype.itemsize,
      shape.shape[0] if stacked else 1,
      path in template.trainable,
    )
    key = "/".join(path.split("/")[:4]) if path.startswith("decoder/") else ""
    groups.setdefault(key, []).append(array)
  others = tuple(groups.pop("", ()))
  period = model.inhomogeneous_layer_cycle_interval
  layers = {}
  for key, arrays in groups.items():
    _, part, _, place = key.split("/")
    first = 0 if part == "cycles" else model.num_cycles * period
    kind, is_scanned = model.layer_kinds[first + int(place)], part == "cycles"
    layers.setdefault((kind, is_scanned), []).append(arrays)
  return Structure(tuple(_alike(*key, stacks) for key, stacks in layers.items()), others)


def _alike(kind: LayerKind, is_scanned: bool, stacks: list[list[Array]]) -> Layers:
  count = sum(arrays[0].copies for arrays in stacks)
  arrays = (dataclasses.replace(array, copies=count) for array in stacks[0])
  return Layers(kind, count, is_scanned, tuple(arrays))


@functools.lru_cache(maxsize=16)
def optimizer_arrays(
  model: ModelConfig, frozen: tuple[str, ...], optimizer: OptimizerConfig
) -> tuple[tuple[int, Axes], ...]:
  """Bytes and logical axes of every array of the optimizer's state."""
  template = ModelTemplate(model, frozen)
  shapes, axes = template.shapes, template.axes
  params = {path: leaf for path, leaf in shapes.items() if path in template.trainable}
  state = jax.eval_shape(make_optimizer(optimizer, 1, template).init, params)

  def entry(path: Any, leaf: Any) -> tuple[int, Axes]:
    companion = array_of(path, leaf, shapes)
    return leaf.size * leaf.dtype.itemsize, axes[companion] if companion else ()

  return tuple(entry(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(state))


class Share:
  """What part of things falls to one device, under the mesh axes' `sizes` and the rules of `config`."""

  def __init__(self, config: Config, sizes: Mapping[str, int]):
    self.config, self.model, self.training = config, config.model, config.training
    self.sizes = sizes
    self._axes: dict[tuple, tuple[str, ...]] = {}
    self._parts: dict[tuple, int] = {}
    self.itemsize = jnp.dtype(config.model.dtype).itemsize
    self.microbatches = config.training.gradient_accumulation
    rows = config.training.batch_size // self.microbatches / self.parts("batch")
    self.rows = rows
    self.length = config.training.sequence_length // self.parts("length")
    self.tokens = rows * self.length  # of a microbatch
    self.token_axes = self.axes("batch", "length")
    expert = self.axes("experts")
    # Ring expert parallelism: tokens of the whole group meet every device's experts.
    spread = set(expert) <= set(self.token_axes)
    self.expert_group = math.prod(sizes[axis] for axis in expert) if spread else 1
    # As model/moe.py chooses on a TPU.
    self.dispatch = "alike"
    if spread:
      wide = "ragged_all_to_all" if self.expert_group >= WIDE else "ring"
      kind = config.kernels.experts_dispatch
      self.dispatch = wide if kind == "auto" else kind

  def axes(self, *logical: str | None) -> tuple[str, ...]:
    """Mesh axes longer than 1 that split these logical axes."""
    if logical not in self._axes:
      axes = (axis for name in logical if name for axis in self.config.mesh.axes_of(name))
      self._axes[logical] = tuple(axis for axis in axes if self.sizes[axis] > 1)
    return self._axes[logical]

  def parts(self, *logical: str | None) -> int:
    if logical not in self._parts:
      self._parts[logical] = math.prod(self.sizes[axis] for axis in self.axes(*logical))
    return self._parts[logical]

  def stored(self, array: Array) -> int:
    """Elements of `array`, all its copies, that a device keeps."""
    return array.copies * array.size // self.parts(*array.axes)

  def gathered(self, array: Array) -> int:
    """Elements of one copy of `array` as products take it: whole along `embed`."""
    return array.size // self.parts(*(name for name in array.axes if name not in EMBED_AXES))


def peak_hbm_bytes(config: Config, sizes: Mapping[str, int]) -> int:
  """`Estimate.peak_hbm_bytes` alone."""
  share = Share(config, sizes)
  return sum(_memory(share, structure_of(config.model, config.training.frozen))[0].values())


def estimate(config: Config, sizes: Mapping[str, int]) -> Estimate:
  """The step of `config` on a mesh of whole axes `sizes`; what is done does not depend on the chip, only its time does."""
  share = Share(config, sizes)
  structure = structure_of(config.model, config.training.frozen)
  flops = _flops(share)
  tokens = config.training.batch_size * config.training.sequence_length
  useful = train_flops_per_token(config.model, config.training.sequence_length) * tokens
  hbm, host = _memory(share, structure)
  moments, inputs = host["moments"], host["inputs"]
  return Estimate(
    hbm_bytes=hbm,
    host_bytes=round(moments + inputs),
    host_traffic_bytes=2 * (moments + share.microbatches * inputs),
    useful_flops=useful / math.prod(sizes.values()),
    executed_flops=sum(flops.values()),
    grouped_flops=flops["grouped"],
    attention_flops=flops["attention"],
    hbm_traffic_bytes=_traffic(share, structure),
    collectives=_collectives(share, structure),
  )


# Work


@functools.lru_cache(maxsize=16)
def kinds_of(model: ModelConfig) -> Mapping[LayerKind, int]:
  """How many layers there are of each kind."""
  return collections.Counter(model.layer_kinds)


def keys_per_query(model: ModelConfig, kind: LayerKind, length: int) -> float:
  """Keys that a query meets on average in attention's kernels, whole blocks counted."""
  chunk = model.attention_chunk_size if kind.uses_rope else None
  run = min(length, chunk or length)
  block = min(ATTENTION_BLOCK, run)
  return (math.ceil(run / block) + 1) / 2 * block


# Of attention's kernels: keys (and queries) a block, and products of queries' by keys' size: q k and weights v forward;
# backward 3 in the kernel of the queries' gradient and 4 in that of keys and values.
ATTENTION_BLOCK = 1024
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 7


def _flops(share: Share) -> dict[str, float]:
  """Executed FLOPs of one device: dense products, grouped products, attention."""
  model, remat = share.model, share.training.remat
  dim = model.hidden_size
  tokens = share.tokens * share.microbatches
  heads = share.parts("heads")
  # The forward pass, its recomputation, and two products of the backward pass for each of the forward's. What a layer's
  # last product gives is not needed again, so of three matrices two are recomputed.
  passes = 3 if remat in ("none", "matmuls") else 4
  mlp_passes = 3 if remat in ("none", "matmuls") else 3 + 2 / 3
  exchanged = share.parts("experts") > 1  # recomputes by itself
  grouped_passes = 3 if remat == "none" and not exchanged else 3 + 2 / 3
  attention_products = FORWARD_PRODUCTS + BACKWARD_PRODUCTS
  attention_products += 0 if remat in ("none", "attention") else FORWARD_PRODUCTS
  queries = model.num_attention_heads * model.head_dim / heads
  keys = model.num_key_value_heads * model.head_dim / share.parts("kv_heads")
  out_passes = 3 if remat == "none" else 4  # what comes out of attention is not kept
  projections = passes * (queries + 2 * keys) + out_passes * queries
  dense = grouped = attention = 0.0
  for kind, layers in kinds_of(model).items():
    dense += layers * 2 * tokens * dim * projections
    met = keys_per_query(model, kind, share.training.sequence_length)
    products = layers * attention_products * 2 * tokens * met
    attention += products * queries
    if kind.is_moe:
      features = 3 * model.intermediate_size / share.parts("ffn")
      dense += layers * 2 * tokens * dim * mlp_passes * features
      dense += layers * 2 * tokens * dim * passes * model.num_local_experts
      # A group's tokens are shared out among its devices' experts.
      rows = tokens * model.num_experts_per_tok * share.expert_group / share.parts("experts")
      rows *= SLACK if exchanged else 1  # of a block, whether they are there or not
      grouped += layers * grouped_passes * 2 * rows * dim * features
    else:
      features = 3 * model.intermediate_size_mlp / share.parts("ffn")
      dense += layers * 2 * tokens * dim * mlp_passes * features
  dense += 3 * 2 * tokens * dim * model.vocab_size / share.parts("vocab")  # computed once
  return {"dense": dense, "grouped": grouped, "attention": attention}


def _traffic(share: Share, structure: Structure) -> float:
  """Bytes that everything but products reads and writes, roughly: operations between products are fused in runs.

  Counted in passes over an array of the residual stream's width (a norm reads and writes one), forward; recomputation
  and the backward pass repeat them.
  """
  model, size = share.model, share.itemsize
  tokens = share.tokens * share.microbatches
  repeats = 3 if share.training.remat == "none" else 4
  heads = model.head_dim * (
    model.num_attention_heads / share.parts("heads")
    + 2 * model.num_key_value_heads / share.parts("kv_heads")
  )
  bytes_ = 0.0
  for kind, layers in kinds_of(model).items():
    widths = 6 * model.hidden_size + 4 * heads  # two norms, two sums; rotation, layout of heads
    if kind.is_moe:
      rows = model.num_experts_per_tok * share.expert_group
      # Scores times rows, sorting, and sorting back; SwiGLU between kernels, which no product takes in.
      widths += rows * (6 * model.hidden_size)
      widths += rows * 3 * model.intermediate_size / share.parts("ffn", "experts")
    bytes_ += layers * repeats * tokens * widths * size
  # Gathered weights are written once each time, gradients written and read; the optimizer reads and writes its state.
  for array in structure.arrays:
    gathers = 3 if set(array.axes or ()) & set(EMBED_AXES) else 0
    bytes_ += gathers * share.microbatches * array.copies * share.gathered(array) * size
    bytes_ += 2 * share.stored(array) * array.itemsize
  state = optimizer_arrays(share.model, share.training.frozen, share.config.optimizer)
  return bytes_ + sum(2 * size // share.parts(*axes) for size, axes in state)


# Memory


def _memory(share: Share, structure: Structure) -> tuple[dict[str, int], dict[str, float]]:
  """Bytes at the peak, of the loss, the backward pass through the layers or the update; and bytes on the host: the
  optimizer's moments, and the inputs of the layers for a microbatch."""
  arrays = structure.arrays
  parameters = sum(share.stored(array) * array.itemsize for array in arrays)
  state = optimizer_arrays(share.model, share.training.frozen, share.config.optimizer)
  optimizer = sum(bytes_ // share.parts(*axes) for bytes_, axes in state)
  # Weights are cast once a step, and gradients of a microbatch are as narrow; sums over microbatches are float32.
  trained = [(share.stored(a), min(share.itemsize, a.itemsize)) for a in arrays if a.is_trained]
  gradients = sum(elements * narrow for elements, narrow in trained)
  sums = 4 * sum(elements for elements, _ in trained) if share.microbatches > 1 else 0
  layers = (array for group in structure.layers for array in group.arrays if array.is_trained)
  cast = sum(share.stored(a) * share.itemsize for a in layers if share.itemsize < a.itemsize)
  kept = sum(group.count * _kept_by_layer(share, group) for group in structure.layers)
  host, waiting = {"moments": 0.0, "inputs": 0.0}, optimizer
  if share.config.optimizer.state_memory == "host":
    host["moments"], waiting = optimizer, 0
  if share.training.remat == "offload":
    # Two layers' inputs are on the device: the one in use, and the one on its way.
    host["inputs"], kept = kept, 2 * kept / share.model.num_hidden_layers
  layer = max(_layer_bytes(share, group) for group in structure.layers)
  names = ("parameters", "optimizer", "gradients", "activations", "scratch")
  phases = [
    (parameters, waiting, sums, kept, cast + _loss_bytes(share)),
    (parameters, waiting, sums + gradients, kept, cast + layer),
    (parameters, optimizer, sums or gradients, 0, 0),  # the update
  ]
  peak = (round(bytes_) for bytes_ in max(phases, key=sum))
  return dict(zip(names, peak, strict=True)), host


def _kept_by_layer(share: Share, group: Layers) -> float:
  """Bytes that a layer keeps for its backward pass."""
  model, remat = share.model, share.training.remat
  queries = model.num_attention_heads * model.head_dim / share.parts("heads")
  keys = model.num_key_value_heads * model.head_dim / share.parts("kv_heads")
  features = model.intermediate_size if group.kind.is_moe else model.intermediate_size_mlp
  features /= share.parts("ffn")
  width, whole = model.hidden_size, 0  # the layer's input
  if remat == "matmuls":  # what goes into attention, and into the (shared) network
    width += queries + 2 * keys + 2 * features
  if remat == "attention":
    width += queries
  if remat == "none":
    # Norms keep their input in float32; products keep what they take in, gathered weights included.
    width += 8 * model.hidden_size + 3 * (queries + 2 * keys) + 4 * features
    if group.kind.is_moe:
      width += model.num_experts_per_tok * (3 * model.hidden_size + 4 * features)
    if share.axes("embed") or share.axes("expert_embed"):
      whole = sum(share.gathered(array) for array in group.arrays)
  return (share.tokens * width + whole) * share.itemsize


def _loss_bytes(share: Share) -> float:
  """The head, gathered, and its gradient in float32; a chunk's logits and their gradient; the last layer's output, as it
  is and cut into chunks, and its gradient."""
  model, size = share.model, share.itemsize
  vocab = model.vocab_size / share.parts("vocab")
  chunk = min(share.tokens, share.training.loss_chunk)
  rows = 3 * share.tokens * model.hidden_size * size
  return (model.hidden_size + chunk) * vocab * (4 + size) + rows


def _layer_bytes(share: Share, group: Layers) -> float:
  """What the backward pass through one layer has in use at once.

  The largest weight, gathered, or its gradient before it is scattered: never both, for a gradient is scattered before
  the next one is made. But experts that are spread work on blocks of rows in a loop, which keeps their weights and their
  gradients from one block to the next. The small weights, gathered ahead. And rows: where a cycle has several layers, one
  layer is recomputed beside the backward pass through the one behind it.
  """
  weights = [share.gathered(array) for array in group.arrays]
  routed = sum(w for w, a in zip(weights, group.arrays, strict=True) if "experts" in a.axes)
  largest = 2 * routed if routed and share.parts("experts") > 1 else max(weights)
  beside = 1 if share.model.inhomogeneous_layer_cycle_interval == 1 else 2
  elements = largest + sum(weights) - routed + beside * _row_elements(share, group.kind)
  return elements * share.itemsize


def _row_elements(share: Share, kind: LayerKind) -> float:
  """Elements of rows in use at once: as wide as the stream, from attention and norms, and as the features of networks.

  With experts spread, what is exchanged comes on top, and the experts here work on a block.
  """
  model, tokens = share.model, share.tokens
  stream = 8 * tokens * model.hidden_size
  if not kind.is_moe:
    return stream + 3 * tokens * model.intermediate_size_mlp / share.parts("ffn")
  features = model.intermediate_size / share.parts("ffn")
  rows = tokens * model.num_experts_per_tok
  stream += tokens * features  # of the shared expert
  if share.parts("experts") == 1:
    return stream + 3 * rows * features
  # Rows, their gradients, and the gradients of rows; with `ring` of the whole group.
  group = share.expert_group if share.dispatch == "ring" else 1
  even = rows / share.parts("experts") if share.dispatch == "alike" else rows
  block = SLACK * even * (6 * features + 2 * model.hidden_size)
  return stream + 3 * group * rows * model.hidden_size + block


# Collectives


class _Wire:
  """Adds up collectives by kind, axis and dtype; an axis that spans slices is gone along slice by slice."""

  def __init__(self, share: Share):
    self.share = share
    self.sums: dict[tuple, list[float]] = {}

  def add(
    self, kind: str, axes: tuple[str, ...], elements: float, dtype: str, count: float, early: bool
  ) -> None:
    """`count` collectives, each of `elements` where they are most: gathered, or not yet reduced."""
    size = jnp.dtype(dtype).itemsize
    slices = math.prod(self.share.config.mesh.slices_along(axis) for axis in axes)
    inside = math.prod(self.share.sizes[axis] for axis in axes) // slices
    for number, is_dcn, whole in ((inside, False, elements), (slices, True, elements / inside)):
      if number > 1:
        entry = self.sums.setdefault((kind, axes, dtype, early, is_dcn), [0, 0])
        entry[0] += count
        parts = {"all-reduce": 2 * (number - 1), "collective-permute": number}.get(kind, number - 1)
        entry[1] += count * whole * size * parts / number

  @property
  def collectives(self) -> list[Collective]:
    return [
      Collective(kind, axes, round(count), round(bytes_), _HLO_NAMES[dtype], early, dcn)
      for (kind, axes, dtype, early, dcn), (count, bytes_) in self.sums.items()
    ]


_HLO_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _collectives(share: Share, structure: Structure) -> list[Collective]:
  wire = _Wire(share)
  for group in structure.layers:
    for array in group.arrays:
      _weight_collectives(wire, array, 1 if share.training.remat == "none" else 2)
    _activation_collectives(wire, group)
  for array in structure.others:
    # Of the embedding, vectors of tokens travel, and their gradients, not the table.
    _weight_collectives(wire, array, 0 if array.path == "embed/weight" else 1)
  stream, dtype = share.tokens * share.model.hidden_size, share.model.dtype
  if share.axes("embed"):
    wire.add("all-to-all", share.axes("embed"), stream, dtype, 2 * share.microbatches, False)
  # Sums of the embedding's vectors, and of the gradient of what the head reads.
  if share.axes("vocab"):
    wire.add("all-reduce", share.axes("vocab"), stream, dtype, 2 * share.microbatches, False)
  return wire.collectives


def _weight_collectives(wire: _Wire, array: Array, gathers: int) -> None:
  """Gathers in the dtype of the activations; gradients scattered in it as they are summed, then summed over the rest.

  What is not gathered at all is not scattered, either.
  """
  share, dtype = wire.share, wire.share.model.dtype
  count = array.copies * share.microbatches
  over = share.axes(*(name for name in array.axes if name in EMBED_AXES))
  whole = share.gathered(array)
  if over and gathers:
    wire.add("all-gather", over, whole, dtype, gathers * count, True)
  if not array.is_trained:
    return
  scatters = tuple(axis for axis in over if axis in share.token_axes)
  if scatters and gathers:
    wire.add("reduce-scatter", scatters, whole, dtype, count, True)
  rest = set(share.token_axes) - set(share.axes(*array.axes))
  if rest:
    rest = tuple(axis for axis in share.token_axes if axis in rest)
    wire.add(
      "all-reduce", rest, whole / math.prod(share.sizes[axis] for axis in over), dtype, count, True
    )


def _activation_collectives(wire: _Wire, group: Layers) -> None:
  share, model = wire.share, wire.share.model
  dtype, remat = model.dtype, share.training.remat
  count = group.count * share.microbatches
  forwards = 1 if remat == "none" else 2
  stream = share.tokens * model.hidden_size
  # Partial sums: forward of what heads and features add to the stream, backward of the gradient of what they read. A
  # layer's last sums are not needed again.
  if share.axes("heads"):
    wire.add("all-reduce", share.axes("heads"), stream, dtype, (forwards + 1) * count, False)
  if share.axes("ffn"):
    # Routed and shared experts' in one.
    wire.add("all-reduce", share.axes("ffn"), stream, dtype, 2 * count, False)
  experts = share.axes("experts")
  if group.kind.is_moe and experts:
    rows = stream * model.num_experts_per_tok
    dispatch = share.dispatch
    if (
      dispatch == "ring"
    ):  # rows, and backward rows and gradients; their experts' results, and gradients of rows
      whole = rows * share.expert_group
      wire.add("all-gather", experts, whole, dtype, 3 * count, False)
      wire.add("reduce-scatter", experts, whole, dtype, 2 * count, False)
    elif dispatch == "ragged_all_to_all":
      wire.add("ragged-all-to-all", experts, rows, dtype, 5 * count, False)
    else:
      wire.add("all-reduce", experts, rows, dtype, 2 * count, False)
  length = share.axes("length")
  seen = _keys_of_others(share, group.kind)
  if length and seen:
    heads = 2 * model.num_key_value_heads * model.head_dim / share.parts("kv_heads")
    if seen == share.training.sequence_length:
      wire.add("all-gather", length, share.rows * seen * heads, dtype, forwards * count, False)
      wire.add("reduce-scatter", length, share.rows * seen * heads, dtype, count, False)
    else:
      part = share.rows * seen * heads
      wire.add("collective-permute", length, part, dtype, (forwards + 1) * count, False)


def _keys_of_others(share: Share, kind: LayerKind) -> int:
  """Keys of a row that a device needs besides those of its own part; with all, its own are counted."""
  chunk = share.model.attention_chunk_size if kind.uses_rope else None
  if chunk is None or chunk > share.length:
    return share.training.sequence_length
  # Where documents are packed, a chunk may begin in the part before.
  is_whole = share.config.data.whole_rows and share.length % chunk == 0
  return 0 if is_whole else chunk
