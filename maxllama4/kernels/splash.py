"""Attention on TPU: JAX's splash kernels, told at run time which blocks of keys a block of queries can see.

Splash visits lists of blocks that it makes from a mask known beforehand. Here they come from the data: those who see
each other stand in one run of neighbours (a document, or a chunk of one), so a block of queries meets consecutive blocks
of keys, from the start of its first query's run to itself. Nothing outside a chunk or a document is computed, however
rows are packed.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
  DEFAULT_MASK_VALUE,
  BlockSizes,
  SegmentIds,
  SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Int

LANES = 128  # of a vector register: heads and blocks are multiples of it
BLOCKS = (1024, 512, 256, 128)  # queries, or keys, that meet at once: the largest that pads little
MOST_PADDING = 1 / 16  # of a row, for the sake of larger blocks
COMPUTE_BLOCK = 512  # keys of a block whose scores exist at once


def splash_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  starts: Int[Array, "B S"],
  offset: int | Int[Array, ""] = 0,
  *,
  longest_run: int | None = None,
  name: str | None = None,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """`attention`, in kernels/attention.py, on a TPU, or with `interpret` in plain JAX.

  `name` is what checkpoint policies call the output and the logsumexp.
  """
  batch, length, heads, size = q.shape
  length_of_keys = k.shape[1]
  common = math.gcd(length, length_of_keys)
  block = choose_block(common)
  q = q * jnp.asarray(size**-0.5, q.dtype)
  q, k, v = (_pad(_pad(z, 1, block), 3, LANES) for z in (q, k, v))
  # A key of padding is a run of its own, which no query of a token is in.
  own = jnp.arange(length_of_keys, k.shape[1], dtype=jnp.int32)
  own = jnp.broadcast_to(own, (batch, own.size))
  starts = jnp.concatenate([starts, own], axis=1)
  longest = min(longest_run or k.shape[1], k.shape[1])
  # Blocks that a run can touch, given that a block of queries starts at a multiple of `common`.
  width = (longest + 2 * block - 2 - math.gcd(common, block)) // block + 1
  by_queries = _mask_info(
    *key_blocks(starts, offset, q.shape[1], block), width, k.shape[1] // block
  )
  by_keys = _mask_info(*query_blocks(starts, offset, q.shape[1], block), width, q.shape[1] // block)
  by_keys = MaskInfo(*(None if z is None else z.swapaxes(1, 2) for z in by_keys))

  rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * k.shape[1]
  # The index of each query among the keys of all rows, which lie in one line.
  index = (rows + offset + jnp.arange(q.shape[1], dtype=jnp.int32)).reshape(-1)
  runs = (starts + rows).reshape(-1)
  compute = min(block, COMPUTE_BLOCK)
  kernel = SplashAttentionKernel(
    by_queries._replace(q_sequence=index),
    by_queries._replace(q_sequence=index),
    by_keys._replace(q_sequence=index),
    block_sizes=BlockSizes(block, block, compute, block, block, compute, block, block),
    is_mqa=False,
    save_residuals=False,
    mask_value=DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=name,
    mask_function=_not_later,
    interpret=interpret,
  )
  segments = SegmentIds(runs[jnp.minimum(index, runs.size - 1)], runs)
  y = kernel(_in_line(q), _in_line(k), _in_line(v), segments)
  y = y.reshape(heads, batch, -1, q.shape[3]).transpose(1, 2, 0, 3)
  return y[:, :length, :, :size]


def choose_block(length: int) -> int:
  """The largest of `BLOCKS` to which a row of `length` is padded at little cost."""
  for block in BLOCKS[:-1]:
    if -length % block <= MOST_PADDING * length:
      return block
  return BLOCKS[-1]


def key_blocks(
  starts: Int[Array, "B S"], offset: int | Int[Array, ""], length: int, block: int
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
  """First and last block of keys that each block of the `length` queries can see."""
  first = jnp.minimum(offset + jnp.arange(0, length, block), starts.shape[1] - 1)
  last = jnp.minimum(first + block, starts.shape[1]) - 1
  start = starts[:, first]
  return start // block, jnp.broadcast_to(last // block, start.shape)


def query_blocks(
  starts: Int[Array, "B S"], offset: int | Int[Array, ""], length: int, block: int
) -> tuple[Int[Array, "B m"], Int[Array, "B m"]]:
  """First and last block of the `length` queries that see each block of keys; the last lies before the first if none."""
  num_keys = starts.shape[1]
  keys = jnp.arange(num_keys, dtype=jnp.int32)
  # For each key the first of the next run.
  behind = jax.lax.cummin(jnp.where(starts == keys, keys, num_keys), axis=1, reverse=True)
  behind = jnp.pad(behind[:, 1:], ((0, 0), (0, 1)), constant_values=num_keys)
  first = keys[::block] - offset
  last = jnp.minimum(behind[:, block - 1 :: block] - 1 - offset, length - 1)
  return jnp.broadcast_to(jnp.maximum(first, 0) // block, last.shape), last // block


def _mask_info(first, last, width: int, row_blocks: int) -> MaskInfo:
  """Splash's lists of blocks to visit, [1, B * n, width]: from `first` to `last`, [B, n], of `row_blocks` in a row."""
  width = min(width, row_blocks)
  steps = first[..., None] + jnp.arange(width, dtype=jnp.int32)
  # A step without work names the block before it again, so that nothing is fetched.
  visited = jnp.clip(jnp.minimum(steps, last[..., None]), 0, row_blocks - 1)
  visited += row_blocks * jnp.arange(first.shape[0], dtype=jnp.int32)[:, None, None]
  few = first.shape[0] * row_blocks <= jnp.iinfo(jnp.int16).max
  return MaskInfo(
    data_next=visited.astype(jnp.int16 if few else jnp.int32).reshape(1, -1, width),
    mask_next=None,
    block_mask=(steps <= last[..., None]).astype(jnp.int8).reshape(1, -1, width),
    partial_mask_blocks=None,
    q_sequence=None,
  )


def _not_later(query, key):
  return key <= query


def _pad(x, axis: int, multiple: int, value=0):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def _in_line(x: Float[Array, "B T N H"]) -> Float[Array, "N BT H"]:
  """All rows one behind the other: to the kernel the batch is one long row of which it visits parts."""
  return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])
