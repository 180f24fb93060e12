"""Rotary embedding: frequencies, tables and the rotation, against complex numbers and stored tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden import golden_units
from tiny import tiny_config

from maxllama4.config import ConfigError, RopeScaling
from maxllama4.model.attention import Sequences
from maxllama4.model.rope import (
  attention_factor,
  frequencies_of_rows,
  half_split,
  rope_frequencies,
  rope_tables,
  rotate,
)


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


# The other types, each against its formula in float64

HALF = np.arange(8) / 8  # 2j / head_dim


def typed(rope_type, **settings):
  """A model of 16 elements a head, base 1000 and at most 64 positions."""
  scaling = RopeScaling(rope_type=rope_type, **settings)
  return tiny_config(head_dim=16, rope_theta=1000.0, rope_scaling=scaling)


def frequencies_at(config, *lengths):
  """Frequencies of rows of these lengths."""
  positions = np.zeros((len(lengths), 3), np.int32)
  positions[:, 1] = np.array(lengths) - 1
  return np.asarray(frequencies_of_rows(jnp.asarray(positions), config))


def test_linear_divides_every_frequency():
  np.testing.assert_allclose(
    rope_frequencies(typed("linear", factor=4.0)), 1000.0**-HALF / 4, rtol=1e-6
  )
  np.testing.assert_array_equal(
    rope_frequencies(typed("default")),
    rope_frequencies(tiny_config(head_dim=16, rope_theta=1000.0)),
  )


def test_dynamic_leaves_rows_within_the_limit_and_grows_the_base_of_longer_ones():
  config = typed("dynamic", factor=3.0)
  short, limit, long = frequencies_at(config, 2, 64, 160)
  for row in (short, limit):
    np.testing.assert_array_equal(row, rope_frequencies(config))
  base = 1000 * (3 * 160 / 64 - 2) ** (16 / 14)
  np.testing.assert_allclose(long, base**-HALF, rtol=1e-6)
  assert long[0] == 1
  np.testing.assert_allclose(short[-1] / long[-1], 1 + 3 * (160 - 64) / 64, rtol=1e-6)


def test_longrope_has_factors_for_short_rows_and_for_long_ones():
  factors = {"short_factor": tuple(1 + HALF), "long_factor": tuple(2 + 5 * HALF)}
  config = typed("longrope", original_max_position_embeddings=16, **factors)
  short, long = frequencies_at(config, 16, 17)
  np.testing.assert_allclose(short, 1000.0**-HALF / (1 + HALF), rtol=1e-6)
  np.testing.assert_allclose(long, 1000.0**-HALF / (2 + 5 * HALF), rtol=1e-6)
  # 64 positions where 16 were trained: sqrt(1 + ln 4 / ln 16)
  assert attention_factor(config) == pytest.approx(1.5**0.5)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_frequencies_stretches_slow_ones_and_ramps_between(truncate):
  settings = {"beta_fast": 8.0, "beta_slow": 1.0, "truncate": truncate}
  config = typed("yarn", factor=4.0, original_max_position_embeddings=256, **settings)

  def index(turns):
    return 16 * np.log(256 / (2 * np.pi * turns)) / (2 * np.log(1000.0))

  low, high = index(8), index(1)
  if truncate:
    low, high = np.floor(low), np.ceil(high)
  stretched = np.clip((np.arange(8) - low) / (high - low), 0, 1)
  expected = 1000.0**-HALF * (stretched / 4 + 1 - stretched)
  assert stretched[0] == 0 and stretched[-1] == 1 and np.any((stretched > 0) & (stretched < 1))
  np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)


YARN = {"original_max_position_embeddings": 32}


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ({"factor": 4.0}, 1 + 0.1 * np.log(4)),
    ({}, 1 + 0.1 * np.log(2)),  # 64 positions over 32
    ({"factor": 0.5}, 1.0),
    (
      {"factor": 4.0, "mscale": 2.0, "mscale_all_dim": 0.5},
      (1 + 0.2 * np.log(4)) / (1 + 0.05 * np.log(4)),
    ),
    ({"factor": 4.0, "attention_factor": 1.25, "mscale": 2.0, "mscale_all_dim": 1.0}, 1.25),
  ],
)
def test_yarn_magnifies_cosine_and_sine_by_its_attention_factor(settings, expected):
  config = typed("yarn", **YARN, **settings)
  assert attention_factor(config) == pytest.approx(expected, rel=1e-12)
  cos, sin = rope_tables(jnp.arange(9)[None], config)
  np.testing.assert_allclose(cos**2 + sin**2, expected**2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_row_depends_neither_on_other_rows_nor_on_its_padding(kind):
  settings = {"factor": 2.0}
  if kind == "longrope":
    settings = {"short_factor": (1.0,) * 8, "long_factor": (3.0,) * 8}
    settings["original_max_position_embeddings"] = 64
  config = typed(kind, **settings)
  positions = jnp.stack([jnp.arange(100), jnp.arange(100)])
  segments = jnp.stack([jnp.ones(100, jnp.int32), (jnp.arange(100) < 10).astype(jnp.int32)])
  both = Sequences.of(positions, segments, config)
  alone = Sequences.of(positions[1:, :10], segments[1:, :10], config)
  np.testing.assert_array_equal(both.cos[1, :10], alone.cos[0])
  assert np.abs(both.cos[0, :10] - alone.cos[0]).max() > 0.1


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"rope_type": "su"}, "rope_type=su is not one of default, linear"),
    ({"rope_type": "linear"}, "factor is missing; model.rope_scaling.rope_type=linear needs it"),
    ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings is missing"),
    ({"rope_type": "linear", "factor": 0.0}, "factor=0.0 must be greater than 0"),
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast=3.0 is no setting of"),
    ({"rope_type": "default", "factor": 2.0}, "factor=2.0 is no setting of"),
    ({"rope_type": "yarn", **YARN, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_slow=2.0 exceeds"),
    ({"rope_type": "longrope", **YARN, "short_factor": (1.0,)}, "long_factor is missing"),
    ({"rope_type": "longrope", **YARN, "short_factor": (0.0,), "long_factor": (1.0,)}, "short_factor must hold"),
  ],
)  # fmt: skip
def test_settings_that_a_type_does_not_have_or_lacks_are_named(settings, words):
  with pytest.raises(ConfigError, match=words):
    RopeScaling(**settings)


def test_longrope_needs_a_factor_for_every_frequency():
  with pytest.raises(ConfigError, match=r"long_factor holds 2 numbers where model\.head_dim=16"):
    typed("longrope", **YARN, short_factor=(1.0,) * 8, long_factor=(1.0,) * 2)
