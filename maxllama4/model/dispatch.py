"""Rows to the devices that hold their experts and back, a bounded number at a time, none dropped.

Each device has rows sorted by expert. What all devices of the experts' axis have for one device is, expert by expert and
for each expert device by device, a queue; it is worked off in blocks of a fixed number of rows, a quarter more than each
gets when all experts are chosen alike. So the first block nearly always is the only one, whatever the router does the
result is exact, and memory follows the number of rows and not the number of devices.

Two ways to fetch a block. `ring`: all rows of the axis are gathered, and results are scattered as they are summed; runs
everywhere, and moves each row to every device. `ragged_all_to_all`: each row goes to the device of its expert alone.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxllama4.kernels.grouped_matmul import grouped_matmul

# Rows of a block over those that a device gets when all experts are chosen alike.
SLACK = 1.25
# Name scope of the loop over all blocks but the first; a plan counts what is in it as never run.
SELDOM = "seldom"
# From so many devices on, moving a row to all of them costs more than sorting out where it has to go.
WIDE = 8


def apply_experts(
  rows: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E D F"],
) -> Float[Array, "R D"]:
  """Each row through its expert: groups are consecutive, `sizes` rows each; rows beyond them give anything."""
  hidden = jax.nn.silu(grouped_matmul(rows, gate, sizes)) * grouped_matmul(rows, up, sizes)
  return grouped_matmul(hidden, down, sizes, transposed=True)


@dataclasses.dataclass(frozen=True)
class Exchange:
  """How rows travel along the mesh axis `axis`, over `parts` devices of which the experts are spread."""

  axis: str
  parts: int
  kind: str  # ring, ragged_all_to_all, or alike: all devices of the axis have the same rows

  def block(self, num_rows: int) -> int:
    """Rows of a block, where each device has `num_rows`."""
    alike = self.kind == "alike"
    even = num_rows / self.parts if alike else num_rows
    return min(num_rows * (1 if alike else self.parts), 8 * math.ceil(SLACK * even / 8))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def exchange_and_apply(
  exchange: Exchange,
  rows: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  gate: Float[Array, "e D F"],
  up: Float[Array, "e D F"],
  down: Float[Array, "e D F"],
) -> Float[Array, "R D"]:
  """`apply_experts` of E experts, e of which each device of an axis holds, in order; in a shard_map."""
  queue = _queue(exchange, rows, sizes, gate)
  shared = queue.share(rows)

  def step(i, out):
    groups, block = queue.fetch(i, shared)
    return queue.put(i, out, apply_experts(block, groups, gate, up, down))

  return queue.collect(_fold(queue, step, queue.empty(rows)))


def _forward(exchange, rows, sizes, *weights):
  return exchange_and_apply(exchange, rows, sizes, *weights), (rows, sizes, *weights)


def _backward(exchange, saved, gradient):
  """Blocks are fetched and computed again: what a block needs for its gradient is there for one block at a time."""
  rows, sizes, *weights = saved
  queue = _queue(exchange, rows, sizes, weights[0])
  if exchange.kind == "alike":  # each device was handed its share of what all have alike
    gradient = gradient * exchange.parts
  shared, shared_gradient = queue.share(rows), queue.share(gradient)

  def step(i, totals):
    to_rows, *to_weights = totals
    groups, block = queue.fetch(i, shared)
    _, block_gradient = queue.fetch(i, shared_gradient)
    _, pull = jax.vjp(
      lambda block, *weights: apply_experts(block, groups, *weights), block, *weights
    )
    to_block, *more = pull(block_gradient)
    to_weights = [a + b for a, b in zip(to_weights, more)] if to_weights else more
    return queue.put(i, to_rows, to_block), *to_weights

  to_rows, *to_weights = _fold(queue, step, (queue.empty(rows),))
  if exchange.kind != "alike":
    to_rows = queue.collect(to_rows)
  return to_rows, None, *to_weights


exchange_and_apply.defvjp(_forward, _backward)


def _fold(queue, step, carry):
  """`step(i, carry)` over all blocks; the first stands outside the loop, where the compiler can overlap it."""
  carry = step(0, carry)
  with jax.named_scope(SELDOM):
    return jax.lax.fori_loop(1, queue.num_blocks, step, carry)


def _queue(exchange: Exchange, rows, sizes, gate):
  kind = _ByAddress if exchange.kind == "ragged_all_to_all" else _ByGathering
  return kind(exchange, rows.shape[0], sizes, len(gate))


class _ByGathering:
  """The queue of this device, all rows of the axis at hand: a block is a gather, its results are a scatter."""

  def __init__(self, exchange: Exchange, num_rows: int, sizes, local_experts: int):
    self.exchange, self.num_rows = exchange, num_rows
    self.alike, self.block = exchange.kind == "alike", exchange.block(num_rows)
    counts = sizes[None] if self.alike else jax.lax.all_gather(sizes, exchange.axis)  # S E
    starts = jnp.cumsum(counts, 1) - counts + num_rows * jnp.arange(len(counts))[:, None]
    first = jax.lax.axis_index(exchange.axis) * local_experts
    mine = (jax.lax.dynamic_slice_in_dim(a, first, local_experts, 1) for a in (counts, starts))
    self.counts, self.starts = (a.T for a in mine)  # e S
    self.num_blocks = -(-self.counts.sum() // self.block)

  def share(self, rows):
    return rows if self.alike else jax.lax.all_gather(rows, self.exchange.axis, tiled=True)

  def empty(self, rows):
    parts = 1 if self.alike else self.exchange.parts
    return jnp.zeros((parts * rows.shape[0], rows.shape[1]), rows.dtype)

  def fetch(self, i, shared):
    taken, places = self._window(i)
    return taken.sum(1), shared.at[places].get(mode="fill", fill_value=0)

  def put(self, i, out, block):
    return out.at[self._window(i)[1]].set(block, mode="drop", unique_indices=True)

  def collect(self, out):
    reduce = jax.lax.psum if self.alike else functools.partial(jax.lax.psum_scatter, tiled=True)
    return reduce(out, self.exchange.axis)

  def _window(self, i):
    """Rows of each expert and source in block `i` [e, S], and where they lie; what is left of it lies outside."""
    done, taken = _window(self.counts, i, self.block)
    places, valid = _places(taken, self.starts + done, self.block)
    outside = self.counts.shape[1] * self.num_rows + jnp.arange(self.block)
    return taken, jnp.where(valid, places, outside)


class _ByAddress:
  """The queues of all devices of the axis: each knows what every other one sends and gets."""

  def __init__(self, exchange: Exchange, num_rows: int, sizes, local_experts: int):
    self.exchange, self.block = exchange, exchange.block(num_rows)
    parts = exchange.parts
    counts = jax.lax.all_gather(sizes, exchange.axis)  # S E
    starts = (jnp.cumsum(counts, 1) - counts)[:, ::local_experts]
    self.starts = starts.T  # d S: where each source's rows for device d begin
    self.counts = counts.reshape(parts, parts, local_experts).transpose(1, 2, 0)  # d e S
    self.me = jax.lax.axis_index(exchange.axis)
    # The same for all: they go through the exchanges together.
    self.num_blocks = (-(-self.counts.sum((1, 2)) // self.block)).max()

  def share(self, rows):
    return rows

  def empty(self, rows):
    return jnp.zeros_like(rows)

  def fetch(self, i, rows):
    here, there, taken, order = self._window(i)
    empty = jnp.zeros((self.block, rows.shape[1]), rows.dtype)
    block = self._send(
      rows, empty, here[:, self.me], taken[:, :, self.me].sum(1), there[:, self.me]
    )
    return taken[self.me].sum(1), block[order]

  def put(self, i, out, block):
    here, there, taken, order = self._window(i)
    block = jnp.zeros_like(block).at[order].set(block, unique_indices=True)
    return self._send(block, out, there[self.me], taken[self.me].sum(0), here[self.me])

  def collect(self, out):
    return out

  def _window(self, i):
    """For each destination and source [d, S]: from where in the source's rows block `i` takes, where in the block it
    puts; how many rows [d, e, S]; and the order that sorts this device's block by expert."""
    done, taken = _window(self.counts, i, self.block)
    amounts = taken.sum(1)
    here = self.starts + done.sum(1)
    there = jnp.cumsum(amounts, 1) - amounts
    mine = taken[self.me]  # e S
    order, valid = _places(mine, there[self.me] + jnp.cumsum(mine, 0) - mine, self.block)
    return here, there, taken, jnp.where(valid, order, jnp.arange(self.block))

  def _send(self, source, target, from_, amounts, to):
    """`target` with the rows that devices send to this one: `amounts[d]` rows `from_[d]` on to place `to[d]` of d."""
    received = jax.lax.all_to_all(amounts, self.exchange.axis, 0, 0, tiled=True)
    send = functools.partial(jax.lax.ragged_all_to_all, axis_name=self.exchange.axis)
    emulated = functools.partial(_emulated_all_to_all, axis_name=self.exchange.axis)
    return jax.lax.platform_dependent(
      source, target, from_, amounts, to, received, cpu=emulated, default=send
    )


def _emulated_all_to_all(source, target, from_, amounts, to, received, axis_name):
  """`jax.lax.ragged_all_to_all` for a CPU, which has none: every row goes everywhere."""
  del received
  me = jax.lax.axis_index(axis_name)
  sources = jax.lax.all_gather(source, axis_name)  # S R D
  from_, amounts, to = (jax.lax.all_gather(a, axis_name)[:, me, None] for a in (from_, amounts, to))
  place = jnp.arange(target.shape[0])
  hits = (place >= to) & (place < to + amounts)  # S R
  sender = hits.argmax(0)
  index = jnp.take_along_axis(from_ + place - to, sender[None], 0)[0]
  return jnp.where(hits.any(0)[:, None], sources.at[sender, index].get(mode="clip"), target)


def _window(counts: Int[Array, "*d e S"], i, block: int):
  """Of a queue of `counts` rows, flat over its last two dimensions: rows before its block `i`, and rows in it."""
  flat = counts.reshape(*counts.shape[:-2], -1)
  first = i * block - (jnp.cumsum(flat, -1) - flat).reshape(counts.shape)
  done = jnp.clip(first, 0, counts)
  return done, jnp.clip(first + block, 0, counts) - done


def _places(taken: Int[Array, "e S"], starts: Int[Array, "e S"], block: int):
  """Where each of `block` rows lies, pieces of `taken` rows from `starts` on one behind the other; and which exist."""
  taken, starts, row = taken.reshape(-1), starts.reshape(-1), jnp.arange(block)
  ends = jnp.cumsum(taken)
  piece = jnp.searchsorted(ends, row, side="right", method="compare_all")
  valid = piece < taken.size
  piece = jnp.minimum(piece, taken.size - 1)
  return starts[piece] + row - (ends - taken)[piece], valid
