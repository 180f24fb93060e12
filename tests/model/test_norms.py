"""Root-mean-square norms against NumPy, and the order of casts."""

import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax import nnx
from tiny import tiny_config

from maxllama4.model.norms import RMSNorm, rms_normalize


def norm_with_weight(dtype=jnp.float32):
  norm = RMSNorm(tiny_config(rms_norm_eps=0.1))
  weight = jnp.asarray(np.linspace(-1, 2, 16), dtype)
  nnx.update(norm, {"weight": weight})
  return norm, weight


def test_a_norm_divides_by_the_root_of_the_mean_square_plus_eps_and_multiplies_by_its_weight():
  norm, weight = norm_with_weight()
  x = jax.random.normal(jax.random.key(0), (2, 3, 16))
  expected = reference.rms_norm(np.asarray(x, np.float64), np.asarray(weight), 0.1)
  np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
  plain = reference.rms_norm(np.asarray(x, np.float64), 1.0, 0.1)
  np.testing.assert_allclose(rms_normalize(x, 0.1), plain, rtol=1e-5)


def test_bfloat16_is_normalised_in_float32_cast_back_and_only_then_weighted():
  norm, weight = norm_with_weight()
  x = (100 * jax.random.normal(jax.random.key(0), (2, 3, 16))).astype(jnp.bfloat16)
  x32 = np.asarray(x, np.float32)
  normalised = x32 / np.sqrt(np.mean(x32 * x32, -1, keepdims=True) + np.float32(0.1))
  expected = jnp.asarray(normalised).astype(jnp.bfloat16) * weight.astype(jnp.bfloat16)
  assert norm(x).dtype == jnp.bfloat16
  np.testing.assert_array_equal(norm(x), expected)
