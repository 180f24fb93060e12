"""Caches against a dictionary from position to key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from maxllama4.model.kv_cache import EMPTY, init_cache, store_prompt, store_step

CONFIG = tiny_config()  # chunks of 4 positions, 2 kv heads of 6


def keys_of(length, rows=3):
  return jax.random.normal(jax.random.key(length), (rows, length, 2, 6))


@pytest.mark.parametrize("uses_rope", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_holds_the_last_positions_of_each_row_wherever_its_padding_is(uses_rope, side):
  lengths, width = np.array([1, 6, 9]), 9
  index = np.arange(width)
  first = width - lengths if side == "left" else np.zeros(3, int)
  valid = jnp.asarray((index >= first[:, None]) & (index < (first + lengths)[:, None]))
  prompt, steps = keys_of(width), keys_of(3)
  cache = init_cache(CONFIG, 3, 12, uses_rope=uses_rope)
  slots = cache.positions.shape[1]
  assert slots == (4 if uses_rope else 12) and np.all(np.asarray(cache.positions) == EMPTY)
  cache = store_prompt(cache, prompt, 2 * prompt, valid)
  for step in range(3):
    key = steps[:, step : step + 1]
    positions = jnp.asarray(lengths + step, jnp.int32)[:, None]
    cache = store_step(cache, key, 2 * key, positions)
  for row, length in enumerate(lengths):
    history = np.concatenate([prompt[row, first[row] : first[row] + length], steps[row]])
    held = {int(p): s for s, p in enumerate(cache.positions[row]) if p != EMPTY}
    assert sorted(held) == list(range(max(0, length + 3 - slots), length + 3))
    for position, slot in held.items():
      assert slot == position % slots
      np.testing.assert_array_equal(cache.key[row, slot], history[position])
      np.testing.assert_array_equal(cache.value[row, slot], 2 * history[position])


def test_a_cache_is_as_long_as_the_sequence_where_that_is_shorter_than_a_chunk():
  assert init_cache(CONFIG, 1, 3, uses_rope=True).positions.shape == (1, 3)
  unchunked = tiny_config(attention_chunk_size=None)
  assert init_cache(unchunked, 1, 9, uses_rope=True).positions.shape == (1, 9)


def test_keys_are_kept_in_the_dtype_of_the_activations():
  cache = init_cache(tiny_config(dtype="bfloat16"), 1, 3, uses_rope=True, stack=(5,))
  assert cache.key.dtype == jnp.bfloat16 and cache.key.shape == (5, 1, 3, 2, 6)
  assert cache.positions.shape == (5, 1, 3) and cache.positions.dtype == jnp.int32
