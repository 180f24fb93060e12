"""Root-mean-square norms: with a weight before each sub-block, without one on queries and keys."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxllama4.config import ModelConfig
from maxllama4.sharding import ones


def rms_normalize(x: Float[Array, "*S D"], eps: float) -> Float[Array, "*S D"]:
  """x / rms(x) over the last dimension: statistics and quotient in float32, then cast back to the dtype of `x`."""
  x32 = x.astype(jnp.float32)
  return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
  """rms_normalize(x) * weight, the product in the dtype of `x`. Source: arXiv:1910.07467, equation 4."""

  def __init__(self, config: ModelConfig):
    self.weight = ones(config.hidden_size, config)
    self.eps = config.rms_norm_eps

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return rms_normalize(x, self.eps) * self.weight.astype(x.dtype)
