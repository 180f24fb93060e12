"""The dense feed-forward network; also the shared expert of a mixture-of-experts layer."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from maxllama4.config import ModelConfig
from maxllama4.model.linear import column_parallel, row_parallel
from maxllama4.sharding import current_platform, weight, zeros


class GatedMLP(nnx.Module):
  """SwiGLU, down(silu(gate(x)) * up(x)), in the dtype of `x`. Source: arXiv:2002.05202, section 2."""

  def __init__(self, config: ModelConfig, intermediate_size: int, *, rngs: nnx.Rngs):
    self.gate = weight(rngs, (config.hidden_size, intermediate_size), ("embed", "ffn"), config)
    self.up = weight(rngs, (config.hidden_size, intermediate_size), ("embed", "ffn"), config)
    self.down = zeros((intermediate_size, config.hidden_size), ("ffn", "embed"), config)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    weights = (self.gate.get_value(), self.up.get_value())
    gate, up = _apart(column_parallel(x, weights, [("embed", "ffn")] * 2))
    hidden = _apart(jax.nn.silu(gate) * up)
    return row_parallel(hidden, self.down.get_value(), ("ffn", "embed"))


def _apart(x):
  """`x` and its gradient, each an array of its own: XLA for TPU computes them again for every tile of the next product."""
  return jax.lax.optimization_barrier(x) if current_platform() == "tpu" else x
