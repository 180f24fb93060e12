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


def rope_frequencies(config: ModelConfig, is_long: bool = False) -> np.ndarray:
  """Radians a position turns each pair of elements by: float32 [head_dim / 2].

  `is_long` takes those that type `longrope` has for long rows; for what type `dynamic` does there see `rope_tables`.
  Rounded to float32 step by step, as by the implementations that released weights were trained with: at position
  100,000 a frequency's last bit already shows in the tables.
  Source: arXiv:2104.09864, section 3.2.2; scaling as in transformers 5.23, modeling_rope_utils.py.
  """
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
  periods = np.power(config.rope_theta, exponents, dtype=np.float64).astype(np.float32)
  scaling = config.rope_scaling
  match scaling and scaling.rope_type:
    case None | "default" | "dynamic":
      return 1 / periods
    case "linear":
      return 1 / periods / np.float32(scaling.factor)
    case "llama3":
      return _scale_by_band(1 / periods, scaling)
    case "yarn":
      return _scale_by_ramp(periods, config)
    case "longrope":
      factors = scaling.long_factor if is_long else scaling.short_factor
      return 1 / (np.asarray(factors, np.float32) * periods)


def _scale_by_band(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
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


def _scale_by_ramp(periods: np.ndarray, config: ModelConfig) -> np.ndarray:
  """Type `yarn`: stretched by `factor` where few turns fit in the original length, kept where many do; a ramp between.

  The ramp runs along the index of the frequencies, from `beta_fast` turns to `beta_slow`. Source: arXiv:2309.00071.
  """
  scaling, size = config.rope_scaling, config.head_dim

  def index(turns):  # of the frequency that makes so many turns within the original length
    period = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return size * math.log(period) / (2 * math.log(config.rope_theta))

  low, high = index(scaling.beta_fast or 32), index(scaling.beta_slow or 1)
  if scaling.truncate is not False:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, size - 1)
  high += 0.001 * (low == high)
  kept = 1 - np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low), 0, 1)
  return 1 / (np.float32(_length_factor(config)) * periods) * (1 - kept) + 1 / periods * kept


def _length_factor(config: ModelConfig) -> float:
  """How much longer sequences may be than those of the first training (`yarn`, `longrope`)."""
  scaling = config.rope_scaling
  return scaling.factor or (
    config.max_position_embeddings / scaling.original_max_position_embeddings
  )


def attention_factor(config: ModelConfig) -> float:
  """What rotated queries and keys are multiplied by; other than 1 only for types `yarn` and `longrope`."""
  scaling = config.rope_scaling
  if scaling is None or scaling.rope_type not in ("yarn", "longrope"):
    return 1.0
  if scaling.attention_factor is not None:
    return scaling.attention_factor
  growth = math.log(max(1.0, _length_factor(config)))
  if scaling.rope_type == "longrope":
    return math.sqrt(1 + growth / math.log(scaling.original_max_position_embeddings))
  if scaling.mscale and scaling.mscale_all_dim:
    return (1 + 0.1 * scaling.mscale * growth) / (1 + 0.1 * scaling.mscale_all_dim * growth)
  return 1 + 0.1 * growth


def frequencies_of_rows(
  positions: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "#B half"]:
  """`rope_frequencies`, where types `dynamic` and `longrope` change them for rows beyond their limit."""
  frequencies, scaling = jnp.asarray(rope_frequencies(config)), config.rope_scaling
  match scaling and scaling.rope_type:
    case "dynamic":  # the base grows until the slowest frequency is `factor` x excess slower
      limit, size = config.max_position_embeddings, config.head_dim
      lengths = jnp.maximum(positions.max(axis=1, keepdims=True) + 1, limit)
      excess = (lengths - limit).astype(jnp.float32) / limit
      exponents = np.arange(0, size, 2, dtype=np.float32) / (size - 2)
      return frequencies * (1 + scaling.factor * excess) ** -exponents
    case "longrope":
      is_long = positions.max(axis=1, keepdims=True) >= scaling.original_max_position_embeddings
      return jnp.where(is_long, rope_frequencies(config, is_long=True), frequencies)
  return frequencies[None]


def rope_tables(
  positions: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
  """Cosine and sine of position x frequency, times `attention_factor`; float32.

  For types `dynamic` and `longrope` the length of a row, its last position + 1, decides; in transformers that of the
  batch's longest row does.
  """
  frequencies = frequencies_of_rows(positions, config)
  angles = positions.astype(jnp.float32)[..., None] * frequencies[:, None]
  factor = attention_factor(config)
  return jnp.cos(angles) * factor, jnp.sin(angles) * factor


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
