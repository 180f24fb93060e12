"""Grouped-query attention: chunked with RoPE, or global with NoPE and temperature; and the one rule of who sees whom."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from maxllama4.config import ModelConfig
from maxllama4.kernels.attention import attend, attention, choose_kernel, obstacle
from maxllama4.kernels.choice import current_choice
from maxllama4.model.kv_cache import EMPTY, LayerCache, store_prompt, store_step
from maxllama4.model.linear import column_parallel, row_parallel
from maxllama4.model.norms import rms_normalize
from maxllama4.model.rope import half_split, rope_tables, rotate
from maxllama4.settings import require
from maxllama4.sharding import (
  MeshContext,
  current_mesh,
  current_platform,
  gather,
  weight,
  zeros,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
  """Where each token of a batch stands, and how they attend to each other; the same for every layer.

  `positions` count up by one from token to token of a segment; segment 0 is padding. `whole_rows`: each row is known to
  be one document from its first token on.
  """

  positions: Int[Array, "B T"]
  segment_ids: Int[Array, "B T"]
  cos: Float[Array, "B T half"]
  sin: Float[Array, "B T half"]
  whole_rows: bool = dataclasses.field(default=False, metadata={"static": True})

  @classmethod
  def of(cls, positions, segment_ids, config: ModelConfig, *, whole_rows=False) -> "Sequences":
    # Padding does not count: a row is as long as its longest document.
    counted = jnp.where(segment_ids > 0, positions, 0)
    return cls(positions, segment_ids, *rope_tables(counted, config), whole_rows)

  @property
  def valid(self) -> Bool[Array, "B T"]:
    return self.segment_ids > 0


def attention_mask(
  query_positions: Int[Array, "B T"],
  key_positions: Int[Array, "B S"],
  query_segments: Int[Array, "B T"],
  key_segments: Int[Array, "B S"],
  chunk_size: int | None,
) -> Bool[Array, "B T S"]:
  """True where a query may see a key: same segment, not later, and, with `chunk_size`, in the same chunk of positions."""
  query, key = query_positions[:, :, None], key_positions[:, None, :]
  same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0)
  mask = same & (key <= query)
  return mask if chunk_size is None else mask & (key // chunk_size == query // chunk_size)


def run_starts(
  positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"], chunk_size: int | None
) -> Int[Array, "B T"]:
  """For each token the index of the first one that it may see; a token of padding sees itself alone.

  Those who see each other stand in a row: with this and "not later", it is the rule of `attention_mask`.
  """
  chunks = jnp.zeros_like(positions) if chunk_size is None else positions // chunk_size
  changes = [ids[:, 1:] != ids[:, :-1] for ids in (segment_ids, chunks)]
  first = jnp.pad(changes[0] | changes[1], ((0, 0), (1, 0)), constant_values=True)
  index = jnp.arange(positions.shape[1], dtype=jnp.int32)
  return jax.lax.cummax(jnp.where(first | (segment_ids == 0), index, 0), axis=1)


def attention_kernel(
  choice: str, config: ModelConfig, platform: str | None, length: int, parts: int = 1
) -> str:
  """The kernel that `kernels.attention=choice` means for rows of `length` tokens on devices of a platform, each row split
  over `parts` of them.

  Raises: ConfigError when an explicit choice cannot be met.
  """
  part, chunk = length // parts, config.attention_chunk_size
  fetches_chunk = parts > 1 and chunk is not None and chunk <= part  # see `_visible_keys`
  keys = part + chunk if fetches_chunk else length
  limits = (platform, config.dtype, config.head_dim, part, keys)
  if choice == "auto":
    return choose_kernel(*limits)
  problem = obstacle(choice, *limits)
  require(
    problem is None, f"kernels.attention={choice} {problem}. Choose another one, or say auto."
  )
  return choice


def self_attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  sequences: Sequences,
  chunk_size: int | None,
  config: ModelConfig,
) -> Float[Array, "B T N H"]:
  """`attend` of a batch to itself; on a mesh of each device's rows and heads to the keys that they can see."""
  context = current_mesh()
  parts = 1 if context is None else context.size("length")
  choice = current_choice().attention
  kernel = attention_kernel(choice, config, current_platform(), q.shape[1], parts)

  def local(q, k, v, positions, segments):
    keys, offset = (k, v, positions, segments), 0
    if parts > 1:
      keys, offset = _visible_keys(context, keys, chunk_size, sequences.whole_rows)
    k, v, positions, segments = keys
    starts = run_starts(positions, segments, chunk_size)
    return attention(
      q,
      k,
      v,
      starts,
      offset,
      kernel=kernel,
      longest_run=chunk_size,
      even_runs=sequences.whole_rows,
    )

  arrays = (q, k, v, sequences.positions, sequences.segment_ids)
  if context is None:
    return local(*arrays)
  tokens, queries = (context.spec(("batch", "length", *more)) for more in ((), ("heads", None)))
  keys = context.spec(("batch", "length", "kv_heads", None))
  if context.axes_of("heads") != context.axes_of("kv_heads"):
    k, v = (_repeat_heads(z, q.shape[2], context.size("heads")) for z in (k, v))
    keys, arrays = queries, (q, k, v, *arrays[3:])
  return jax.shard_map(
    local,
    mesh=context.mesh,
    in_specs=(queries, keys, keys, tokens, tokens),
    out_specs=queries,
    check_vma=False,
  )(*arrays)


def _visible_keys(context: MeshContext, keys, chunk_size: int | None, whole_rows: bool):
  """Of rows split over a mesh axis, what the queries of this part may see; and the index of the first query in it.

  `keys` are keys, values, positions and segments, [B, T, ...]. Layers without chunks gather whole rows. Those with chunks
  need at most one chunk of the part before, and nothing where every part is made of whole chunks.
  """
  (axis,) = context.axes_of("length")
  length, parts = keys[0].shape[1], context.size("length")
  if chunk_size is not None and whole_rows and length % chunk_size == 0:
    return keys, 0
  if chunk_size is not None and chunk_size <= length:
    # The first part gets zeros, which are padding: segment 0.
    before = jax.lax.ppermute(
      [z[:, -chunk_size:] for z in keys], axis, [(i, i + 1) for i in range(parts - 1)]
    )
    return [jnp.concatenate(pair, axis=1) for pair in zip(before, keys)], chunk_size
  k, v, *ids = keys
  k, v = (gather(context, z, axis, 1) for z in (k, v))
  ids = jax.lax.all_gather(ids, axis, axis=1, tiled=True)
  return [k, v, *ids], jax.lax.axis_index(axis) * length


def _repeat_heads(x: Float[Array, "B T K H"], heads: int, parts: int) -> Float[Array, "B T R H"]:
  """`x` with each head as often as it takes for `parts` devices to hold the key heads of their share of `heads`."""
  groups = heads // x.shape[2]
  times = next(n for n in range(1, groups + 1) if groups % n == 0 and x.shape[2] * n % parts == 0)
  return jnp.repeat(x, times, axis=2)


class Attention(nnx.Module):
  """One attention sub-block, chunked with RoPE (`uses_rope`) or global with NoPE, in the dtype of its input."""

  def __init__(self, config: ModelConfig, *, uses_rope: bool, rngs: nnx.Rngs):
    dim, size = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    self.query = weight(rngs, (dim, heads, size), ("embed", "heads", None), config)
    self.key = weight(rngs, (dim, kv_heads, size), ("embed", "kv_heads", None), config)
    self.value = weight(rngs, (dim, kv_heads, size), ("embed", "kv_heads", None), config)
    self.out = zeros((heads, size, dim), ("heads", None, "embed"), config)
    self.config, self.uses_rope = config, uses_rope

  @property
  def chunk_size(self) -> int | None:
    return self.config.attention_chunk_size if self.uses_rope else None

  def __call__(
    self, x: Float[Array, "B T D"], sequences: Sequences, cache: LayerCache | None = None
  ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """The sub-block's output and, given a cache, the cache with this call's keys and values.

    With a cache, T > 1 is a whole prompt and the cache is empty; T = 1 is the next token of every row.
    """
    q, k, v = self.project(x, sequences)
    if cache is not None and x.shape[1] == 1:
      cache = store_step(cache, k, v, sequences.positions)
      filled = (cache.positions != EMPTY).astype(jnp.int32)
      mask = attention_mask(
        sequences.positions,
        cache.positions,
        jnp.ones_like(sequences.positions),
        filled,
        self.chunk_size,
      )
      y = attend(q, cache.key, cache.value, mask)
    else:
      y = self_attend(q, k, v, sequences, self.chunk_size, self.config)
      cache = None if cache is None else store_prompt(cache, k, v, sequences.valid)
    return row_parallel(y, self.out.get_value(), ("heads", None, "embed")), cache

  def project(
    self, x: Float[Array, "B T D"], sequences: Sequences
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries, keys and values, as scores use them."""
    config = self.config
    weights = [self.query.get_value(), self.key.get_value(), self.value.get_value()]
    if self.uses_rope:
      weights[:2] = [half_split(weight) for weight in weights[:2]]
    heads = ("heads", "kv_heads", "kv_heads")
    q, k, v = column_parallel(x, weights, [("embed", name, None) for name in heads])
    if self.uses_rope:
      q, k = (rotate(z, sequences.cos, sequences.sin) for z in (q, k))
      if config.use_qk_norm:
        q, k = (rms_normalize(z, config.rms_norm_eps) for z in (q, k))
    elif config.attn_temperature_tuning:
      q = (q * temperature(sequences.positions, config)[:, :, None, None]).astype(q.dtype)
    return q, k, v


def temperature(positions: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T"]:
  """Factor on the queries of NoPE layers, growing with the logarithm of the position; float32."""
  steps = jnp.floor((positions.astype(jnp.float32) + 1) / config.floor_scale)
  return 1 + config.attn_scale * jnp.log1p(steps)
