"""Token embedding and output head."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from maxllama4.config import ModelConfig
from maxllama4.sharding import constrain, weight


class Embedding(nnx.Module):
  """Token ids to vectors in `dtype`, unscaled."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.weight = weight(rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"), config)
    self.dtype = config.dtype

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    # Without a mesh this is a plain row lookup; on one, the compiler gathers the sharded table.
    x = self.weight.astype(self.dtype).at[tokens].get(mode="clip")
    return constrain(x, ("batch", "length", None))


class Head(nnx.Module):
  """Vectors to logits, with a weight of its own ([D, V])."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.weight = weight(rngs, (config.hidden_size, config.vocab_size), ("embed", "vocab"), config)


def logits_of(x: Float[Array, "B T D"], head: Float[Array, "D V"]) -> Float[Array, "B T V"]:
  """Scores of every token: the product in the dtype of `x`, sums and result in float32."""
  return jnp.einsum("BTD,DV->BTV", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
