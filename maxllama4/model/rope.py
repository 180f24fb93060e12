"""Rotary position embedding: frequencies (plain and scaled), tables, and the rotation, all in float32.

A Llama 4 checkpoint pairs elements (2j, 2j+1) of a head. Vector hardware would rather rotate two contiguous halves, and
scores do not change when query and key elements are permuted alike; so the projection weights are permuted on the fly
(`half_split`, cheap: weights are small beside activations) and `rotate` pairs elements (j, j + H/2).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maxllama4.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> np.ndarray:
  """Radians a position turns each pair of elements by: float32 [head_dim / 2].

  Rounded to float32 step by step, as by the implementations that released weights were trained with: at position
  100,000 a frequency's last bit already shows in the tables.
  Source: arXiv:2104.09864, section 3.2.2; scaling as rope_type "llama3" in Hugging Face transformers.
  """
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
  frequencies = 1 / np.power(config.rope_theta, exponents, dtype=np.float64).astype(np.float32)
  return frequencies if config.rope_scaling is None else _scale(frequencies, config.rope_scaling)


def _scale(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """Long wavelengths stretched by `factor`, short ones kept, those between blended; float32 throughout."""
  original = scaling.original_max_position_embeddings
  wavelengths = np.float32(2 * math.pi) / frequencies
  band = scaling.high_freq_factor - scaling.low_freq_factor
  # With an empty band (Scout: both factors are 1) nothing lies strictly inside, so any finite blend will do.
  blend = (original / wavelengths - scaling.low_freq_factor) / (band or 1.0)
  between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
  long = wavelengths > original / scaling.low_freq_factor
  short = wavelengths < original / scaling.high_freq_factor
  return np.where(long, frequencies / scaling.factor, np.where(short, frequencies, between))


def rope_tables(
  positions: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
  """Cosine and sine of position x frequency, float32."""
  angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(config)
  return jnp.cos(angles), jnp.sin(angles)


def half_split(weight: Float[Array, "*S H"]) -> Float[Array, "*S H"]:
  """The projection `weight` (or bias) with head elements 0, 2, 4, ... before 1, 3, 5, ..."""
  *outer, size = weight.shape
  return weight.reshape(*outer, size // 2, 2).swapaxes(-1, -2).reshape(weight.shape)


def rotate(
  x: Float[Array, "B T N H"], cos: Float[Array, "#B T half"], sin: Float[Array, "#B T half"]
) -> Float[Array, "B T N H"]:
  """Queries or keys turned by their position's angles; halves hold real and imaginary parts. Result in x's dtype."""
  real, imaginary = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
