"""Logits to a token: greedy, temperature, top-k, top-p."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How tokens are chosen; 0 and 1 switch the filters off."""

  temperature: float = 0.0  # 0: always the likeliest token
  top_k: int = 0  # only the k likeliest; 0: all
  top_p: float = 1.0  # only the likeliest whose mass before them is at most p

  def __post_init__(self):
    if self.temperature < 0:
      raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or greater.")
    if 0 < self.temperature < 1e-30:
      raise ValueError(f"temperature={self.temperature} overflows float32; take 0 (greedy).")
    if self.top_k < 0:
      raise ValueError(f"top_k={self.top_k} must be 0 (off) or greater.")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p} must be greater than 0 and at most 1 (off).")


def sample(keys: jax.Array, logits: Float[Array, "B V"], sampling: Sampling) -> Int[Array, " B"]:
  """One token a row, by that row's key ([B])."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = filter_logits(logits / sampling.temperature, sampling)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
  """`logits` with -inf where top-k or top-p, which looks at what top-k has left, rule a token out."""
  vocab = logits.shape[-1]
  if sampling.top_k in range(1, vocab):
    smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits >= smallest, logits, -jnp.inf)
  if sampling.top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    rows = jnp.arange(logits.shape[0])[:, None]
    keep = jnp.zeros(logits.shape, bool).at[rows, order].set(before <= sampling.top_p)
    logits = jnp.where(keep, logits, -jnp.inf)
  return logits
