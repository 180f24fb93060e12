"""Keys and values of earlier positions, one cache a layer.

A chunked layer never looks back beyond its chunk, so its cache is a ring of at most `attention_chunk_size` slots; a
global layer's holds every position. A key knows its position, so one mask rule serves rings, padding and packing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from maxllama4.config import ModelConfig
from maxllama4.sharding import constrain

EMPTY = -1  # position of a slot that holds nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """S slots a row; the key of position p lies in slot p % S."""

  key: Float[Array, "... B S K H"]
  value: Float[Array, "... B S K H"]
  positions: Int[Array, "... B S"]  # EMPTY where nothing is stored


def init_cache(
  config: ModelConfig, batch: int, max_length: int, *, uses_rope: bool, stack: tuple[int, ...] = ()
) -> LayerCache:
  """An empty cache for sequences of up to `max_length` positions, in the activations' dtype; `stack` dims in front."""
  chunk = config.attention_chunk_size if uses_rope else None
  slots = max_length if chunk is None else min(chunk, max_length)
  shape = (*stack, batch, slots, config.num_key_value_heads, config.head_dim)
  zeros = jnp.zeros(shape, config.dtype)
  return LayerCache(zeros, zeros, jnp.full(shape[:-2], EMPTY, jnp.int32))


def store_prompt(
  cache: LayerCache,
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  valid: Bool[Array, "B T"],
) -> LayerCache:
  """An empty `cache` filled with a prompt, padded on either side; a ring keeps each slot's last position."""
  slots = cache.positions.shape[1]
  lengths = valid.sum(1, keepdims=True)  # B 1
  slot = jnp.arange(slots)[None]
  laps = (lengths - 1 - slot) // slots  # negative where the prompt does not reach the slot
  positions = jnp.where(slot < lengths, slot + slots * laps, EMPTY).astype(jnp.int32)
  rows = jnp.maximum(positions, 0) + jnp.argmax(valid, axis=1, keepdims=True)

  def take(x):
    return constrain(
      jnp.take_along_axis(x, rows[..., None, None], axis=1), ("batch", None, "kv_heads", None)
    )

  return LayerCache(take(key), take(value), positions)


def store_step(
  cache: LayerCache,
  key: Float[Array, "B 1 K H"],
  value: Float[Array, "B 1 K H"],
  positions: Int[Array, "B 1"],
) -> LayerCache:
  """`cache` with one more position a row; in a ring it takes the place of one that no later query may see."""
  rows = jnp.arange(positions.shape[0])
  slots = positions[:, 0] % cache.positions.shape[1]
  return LayerCache(
    cache.key.at[rows, slots].set(key[:, 0]),
    cache.value.at[rows, slots].set(value[:, 0]),
    cache.positions.at[rows, slots].set(positions[:, 0]),
  )
