"""The dense feed-forward network; also the shared expert of a mixture-of-experts layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxllama4.config import ModelConfig
from maxllama4.model.linear import project
from maxllama4.sharding import constrain, weight, zeros


class GatedMLP(nnx.Module):
  """SwiGLU, down(silu(gate(x)) * up(x)), in the dtype of `x`. Source: arXiv:2002.05202, section 2."""

  def __init__(self, config: ModelConfig, intermediate_size: int, *, rngs: nnx.Rngs):
    self.gate = weight(rngs, (config.hidden_size, intermediate_size), ("embed", "ffn"), config)
    self.up = weight(rngs, (config.hidden_size, intermediate_size), ("embed", "ffn"), config)
    self.down = zeros((intermediate_size, config.hidden_size), ("ffn", "embed"), config)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    gate, up = project(x, self.gate.get_value()), project(x, self.up.get_value())
    hidden = constrain(jax.nn.silu(gate) * up, ("batch", "length", "ffn"))
    return jnp.einsum("BTF,FD->BTD", hidden, self.down.astype(x.dtype))
