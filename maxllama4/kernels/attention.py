"""Causal attention inside runs of neighbours, by the way that suits the devices; see `attention`.

A run is a stretch of a row whose tokens may see each other: a document, or a chunk of one. Which keys a query sees is
said by one number, the index of its run's first key; no mask is needed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from maxllama4.kernels.splash import splash_attention

BLOCK = 128  # queries, or keys, that meet at once in `blockwise`
LOWEST = float(jnp.finfo(jnp.float32).min)
# cuDNN's limits: check_layout and check_is_flash_attention in jax/_src/cudnn/fused_attention_stablehlo.py.
CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_HEAD_DIM = 128


def choose_kernel(platform: str | None, dtype: str, head_dim: int, *lengths: int) -> str:
  """The kernel for devices of a platform. None, not known: plain JAX, which the compiler can split over devices."""
  fast = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "blockwise")
  return "blockwise" if obstacle(fast, platform, dtype, head_dim, *lengths) else fast


def obstacle(
  kernel: str, platform: str | None, dtype: str, head_dim: int, *lengths: int
) -> str | None:
  """Why a kernel cannot run there, as the end of a sentence; None if it can.

  `lengths` are of all rows of queries or of keys that a device hands to the kernel.
  """
  for name, wanted in (("splash", "tpu"), ("cudnn", "gpu")):
    if kernel == name and platform != wanted:
      return f"needs devices of the platform {wanted}; they are {platform or 'not known here'}"
  if kernel == "cudnn" and dtype not in CUDNN_DTYPES:
    return f"needs dtype to be {' or '.join(CUDNN_DTYPES)}; it is {dtype}"
  if kernel == "cudnn" and (head_dim % 8 or head_dim > CUDNN_HEAD_DIM):
    return f"needs model.head_dim to be a multiple of 8 up to {CUDNN_HEAD_DIM}; it is {head_dim}"
  odd = [length for length in lengths if length % 2]
  if kernel == "cudnn" and odd:
    return f"needs even numbers of queries and of keys on a device; there are {odd[0]}"
  return None


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  starts: Int[Array, "B S"],
  offset: int | Int[Array, ""] = 0,
  *,
  kernel: str,
  longest_run: int | None = None,
  even_runs: bool = False,
) -> Float[Array, "B T N H"]:
  """softmax(q k / sqrt(H)) v, where query t sees the keys of its own run up to key `offset` + t, which is itself.

  `starts` tells for each key the index of the first one of its run. No run is longer than `longest_run` (None: than a
  row); `even_runs` says that all are as long as that, but for the last of a row. `offset` is a multiple of the greatest
  common divisor of T and S. Scores and softmax are float32. Checkpoint policies know the output, and what else the
  backward pass needs besides the inputs, as "attention"; of cuDNN by `is_cudnn_forward`.
  """
  if kernel == "splash":
    return splash_attention(q, k, v, starts, offset, longest_run=longest_run, name="attention")
  if kernel == "blockwise":
    return blockwise(q, k, v, starts, jnp.asarray(offset, jnp.int32))
  if kernel == "cudnn":
    run = min(longest_run or q.shape[1], q.shape[1]) if even_runs else None
    return library_attention(q, k, v, starts, offset, run, "cudnn")
  y = attend(q, k, v, run_mask(starts, offset, q.shape[1]))
  return checkpoint_name(y, "attention")


def is_cudnn_forward(primitive, *_, **__) -> bool:
  """A checkpoint policy: keeps what cuDNN's forward pass gives. It has no name, being made inside of JAX's gradient rule."""
  return primitive.name.startswith("dot_product_attention_fwd")


def run_mask(
  starts: Int[Array, "B S"], offset: int | Int[Array, ""], length: int
) -> Bool[Array, "B T S"]:
  """The rule of `attention` for `length` queries, pair by pair."""
  keys = jnp.arange(starts.shape[1], dtype=jnp.int32)
  first = jax.lax.dynamic_slice_in_dim(starts, offset, length, axis=1)
  index = offset + jnp.arange(length, dtype=jnp.int32)
  return (keys <= index[:, None]) & (keys >= first[..., None])


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B T S"] | None,
) -> Float[Array, "B T N H"]:
  """softmax(q k / sqrt(H)) v over the keys that `mask` lets through (None: all); scores and softmax in float32.

  A query that sees nothing (padding) gets some finite value.
  """
  batch, length, heads, size = q.shape
  q = q.reshape(batch, length, k.shape[2], -1, size) * jnp.asarray(size**-0.5, q.dtype)
  scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
  if mask is not None:
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - largest)
  # Divided by their sum only after the product: T x H quotients in place of T x S, forward and backward.
  sums = weights.sum(-1)  # B K G T
  y = jnp.einsum(
    "BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  y = y / sums.transpose(0, 3, 1, 2)[..., None]
  return y.astype(v.dtype).reshape(batch, length, heads, size)


def library_attention(q, k, v, starts, offset, run: int | None, implementation: str):
  """`attention` by `jax.nn`: cuDNN's kernels, where `implementation` is "cudnn".

  Causal attention of whole runs where all have the length `run`; else with a mask of T x S a row.
  """
  product = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
  if run is None or q.shape[1] != k.shape[1] or q.shape[1] % run:
    return product(q, k, v, mask=run_mask(starts, offset, q.shape[1])[:, None])
  parts = (z.reshape(-1, run, *z.shape[2:]) for z in (q, k, v))
  return product(*parts, is_causal=True).reshape(q.shape)


@jax.custom_vjp
def blockwise(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  starts: Int[Array, "B S"],
  offset: Int[Array, ""],
) -> Float[Array, "B T N H"]:
  """`attention` in plain JAX, block by block; memory grows with T + S, work with the blocks that somebody sees.

  Source: FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.
  """
  return _forward(q, k, v, starts, offset)[0]


def _forward(q, k, v, starts, offset):
  queries, keys, values = _by_head(q, k.shape[2]), _by_head(k, k.shape[2]), _by_head(v, k.shape[2])
  queries = queries * jnp.asarray(q.shape[3] ** -0.5, q.dtype)
  rows = _Rows.of(starts, offset, q.shape[1])

  def block_of_queries(i):
    query = _block(queries, i)

    def meet(j, carry):
      largest, sums, y = carry
      scores = rows.scores(query, _block(keys, j), i, j)
      new = jnp.maximum(largest, scores.max(-1))
      weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
      product = _einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), _block(values, j)[:, :, 0])
      return new, sums * shrink + weights.sum(-1), y * shrink[..., None] + product

    shape = query.shape[:-1]
    empty = (jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros(query.shape))
    largest, sums, y = rows.for_each_block_of_keys(i, meet, empty)
    return (y / sums[..., None]).astype(v.dtype), largest + jnp.log(sums)

  y, logsumexp = jax.lax.map(block_of_queries, jnp.arange(queries.shape[3] // BLOCK))
  # Named here, so that a policy that keeps them spares the backward pass all of the above.
  y, logsumexp = (checkpoint_name(z, "attention") for z in (_by_token(y, q.shape), logsumexp))
  return y, (q, k, v, starts, offset, y, logsumexp)


def _backward(saved, gradient):
  q, k, v, starts, offset, y, logsumexp = saved
  queries, keys, values = _by_head(q, k.shape[2]), _by_head(k, k.shape[2]), _by_head(v, k.shape[2])
  scale = jnp.asarray(q.shape[3] ** -0.5, q.dtype)
  queries, gradients, outputs = (
    queries * scale,
    _by_head(gradient, k.shape[2]),
    _by_head(y, k.shape[2]),
  )
  rows = _Rows.of(starts, offset, q.shape[1])

  def block_of_queries(carry, i):
    query, dy = _block(queries, i), _block(gradients, i)
    inner = _einsum("BKGTH,BKGTH->BKGT", dy, _block(outputs, i))

    def meet(j, carry):
      dq, dk, dv = carry
      key, value = _block(keys, j), _block(values, j)
      weights = jnp.exp(rows.scores(query, key, i, j) - logsumexp[i][..., None])
      dv = _add_to_block(dv, j, _einsum("BKGTS,BKGTH->BKSH", weights.astype(v.dtype), dy))
      dweights = _einsum("BKGTH,BKSH->BKGTS", dy, value[:, :, 0])
      dscores = (weights * (dweights - inner[..., None])).astype(q.dtype)
      dk = _add_to_block(dk, j, _einsum("BKGTS,BKGTH->BKSH", dscores, query))
      return dq + _einsum("BKGTS,BKSH->BKGTH", dscores, key[:, :, 0]), dk, dv

    zeros = jnp.zeros(query.shape, jnp.float32)
    dq, *carry = rows.for_each_block_of_keys(i, meet, (zeros, *carry))
    return tuple(carry), dq.astype(q.dtype)

  zeros = jnp.zeros(keys.shape, jnp.float32)
  blocks = jnp.arange(queries.shape[3] // BLOCK)
  (dk, dv), dq = jax.lax.scan(block_of_queries, (zeros, zeros), blocks)
  dk, dv = (z[:, :, 0, : k.shape[1]].swapaxes(1, 2).astype(k.dtype) for z in (dk, dv))
  return _by_token(dq, q.shape) * scale, dk, dv, None, None


blockwise.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Who sees whom in a batch, block by block."""

  starts: Int[Array, "B T"]  # for each query its first key
  offset: Int[Array, ""]
  blocks: Int[
    Array, "2 n"
  ]  # for each block of queries the first block of keys that any row sees, and the last

  @classmethod
  def of(cls, starts, offset, length: int) -> "_Rows":
    last_key = starts.shape[1] - 1
    starts = jax.lax.dynamic_slice_in_dim(starts, offset, length, axis=1)
    starts = jnp.pad(starts, ((0, 0), (0, -length % BLOCK)), mode="edge")
    first = starts.min(0)[::BLOCK]
    last = jnp.minimum(offset + jnp.arange(BLOCK - 1, starts.shape[1], BLOCK), last_key)
    return cls(starts, offset, jnp.stack([first, last]) // BLOCK)

  def scores(self, query, key, i, j) -> Float[Array, "B K G T S"]:
    """Of a block of queries and one of keys; `LOWEST` where a query must not see a key."""
    keys = j * BLOCK + jnp.arange(BLOCK)
    index = self.offset + i * BLOCK + jnp.arange(BLOCK)
    first = jax.lax.dynamic_slice_in_dim(self.starts, i * BLOCK, BLOCK, axis=1)
    mask = (keys <= index[:, None]) & (keys >= first[..., None])
    scores = _einsum("BKGTH,BKSH->BKGTS", query, key[:, :, 0])
    return jnp.where(mask[:, None, None], scores, LOWEST)

  def for_each_block_of_keys(self, i, body, carry):
    return jax.lax.fori_loop(self.blocks[0, i], self.blocks[1, i] + 1, body, carry)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_head(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G padded H"]:
  """Whole blocks of tokens, padded with zeros."""
  batch, length, _, size = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0)))
  return x.reshape(batch, -1, kv_heads, x.shape[2] // kv_heads, size).transpose(0, 2, 3, 1, 4)


def _by_token(blocks: Float[Array, "n B K G t H"], shape) -> Float[Array, "B T N H"]:
  batch, length, heads, size = shape
  x = blocks.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, size)
  return x[:, :length]


def _block(x: Float[Array, "B K G T H"], i) -> Float[Array, "B K G t H"]:
  return jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, axis=3)


def _add_to_block(x: Float[Array, "B K 1 S H"], j, more: Float[Array, "B K s H"]):
  block = _block(x, j) + more[:, :, None]
  return jax.lax.dynamic_update_slice_in_dim(x, block, j * BLOCK, axis=3)
