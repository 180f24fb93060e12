"""Rotary embedding: frequencies, tables and the rotation, against complex numbers and stored tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden import golden_units
from tiny import tiny_config

from maxllama4.config import RopeScaling
from maxllama4.model.rope import half_split, rope_frequencies, rope_tables, rotate


def scaling(factor, low, high, original):
  return RopeScaling(
    rope_type="llama3",
    factor=factor,
    low_freq_factor=low,
    high_freq_factor=high,
    original_max_position_embeddings=original,
  )


SCALINGS = {
  "none": None,
  "an empty band, as in Scout": scaling(16.0, 1.0, 1.0, 32),
  "a band of several frequencies": scaling(8.0, 1.0, 4.0, 64),
  "an edge that is a frequency": scaling(4.0, 1.0, 2.0, 2 * np.pi),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_are_scaled_band_by_band(kind):
  config = tiny_config(head_dim=16, rope_theta=1000.0, rope_scaling=SCALINGS[kind])
  found = rope_frequencies(config)
  assert found.dtype == np.float32 and np.all(np.isfinite(found))
  np.testing.assert_allclose(found, reference.frequencies(config), rtol=1e-6)


def test_scaling_keeps_short_wavelengths_stretches_long_ones_and_blends_between():
  config = tiny_config(head_dim=16, rope_theta=1000.0)
  plain = rope_frequencies(config)
  ratio = rope_frequencies(dataclasses.replace(config, rope_scaling=scaling(8.0, 1, 4, 64))) / plain
  assert ratio[0] == 1 and ratio[-1] == 1 / 8
  assert np.all(np.diff(ratio) <= 0) and np.any((ratio > 1 / 8) & (ratio < 1))


def test_the_rotation_multiplies_neighbouring_pairs_as_complex_numbers():
  """Weights are reordered and halves rotated; scores are those of the pairs."""
  config = tiny_config()
  positions = np.array([0, 1, 5, 63])
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (1, 4, 16))
  query, key = (jax.random.normal(k, (16, 2, 6)) for k in keys[1:])
  tables = rope_tables(jnp.asarray(positions)[None], config)
  ours = [rotate(jnp.einsum("BTD,DNH->BTNH", x, half_split(w)), *tables)[0] for w in (query, key)]
  pairs = [
    reference.rotate(np.einsum("TD,DNH->TNH", np.asarray(x[0], np.float64), w), positions, config)
    for w in (query, key)
  ]
  for half, pair in zip(ours, pairs):
    np.testing.assert_allclose(half[..., :3], pair[..., 0::2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(half[..., 3:], pair[..., 1::2], rtol=1e-5, atol=1e-5)
  scores, expected = (np.einsum("TNH,SNH->NTS", *both) for both in (ours, pairs))
  np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_rotated_in_float32():
  tables = rope_tables(jnp.array([[7]]), tiny_config())
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 6), jnp.bfloat16)
  found = rotate(x, *tables)
  assert (found.dtype, tables[0].dtype) == (jnp.bfloat16, jnp.float32)
  expected = rotate(x.astype(jnp.float32), *tables).astype(jnp.bfloat16)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ("name", "rope_scaling"),
  [
    ("scout_instruct_16_1_1", scaling(16.0, 1.0, 1.0, 8192)),
    ("scout_base_file_8_1_4", scaling(8.0, 1.0, 4.0, 8192)),
    ("maverick_unscaled", None),
  ],
)
def test_tables_of_released_sizes_agree_with_the_reference_far_out(name, rope_scaling):
  units = golden_units()
  config = tiny_config(head_dim=128, rope_theta=500000.0, rope_scaling=rope_scaling)
  frequencies = rope_frequencies(config)
  np.testing.assert_allclose(frequencies, units[f"rope.{name}.inv_freq"], rtol=1e-6)
  positions = units["rope.positions"]
  tables = rope_tables(jnp.asarray(positions, jnp.int32)[None], config)
  # A frequency that differs in its last bit moves the angle by so much.
  tolerance = np.maximum(1e-6, 2 * positions[:, None] * frequencies * 2.0**-24)
  for table, part in zip(tables, ("cos", "sin")):
    assert np.all(np.abs(table[0] - units[f"rope.{name}.{part}"]) <= tolerance)
