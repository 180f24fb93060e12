"""Mean, deviation, share of zeros and largest size of activations and gradients, layer by layer: for debugging."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from maxllama4.config import ModelConfig
from maxllama4.model.attention import Sequences
from maxllama4.model.decoder import Llama4Decoder
from maxllama4.model.llama4 import Llama4ForCausalLM
from maxllama4.model.weights import Arrays, is_stacked, layer_place

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Sums over many numbers, in float32; of any common shape, one entry a group of numbers."""

  count: jax.Array
  total: jax.Array
  squares: jax.Array
  zeros: jax.Array
  largest: jax.Array  # of the absolute values

  @classmethod
  def of(cls, x: jax.Array, axis: tuple[int, ...] | None = None) -> "Moments":
    """Of the numbers along `axis` (None: all)."""
    x = x.astype(jnp.float32)
    total, zeros = x.sum(axis), (x == 0).sum(axis, dtype=jnp.float32)
    count = jnp.full(total.shape, x.size / total.size, jnp.float32)
    return cls(count, total, (x * x).sum(axis), zeros, jnp.abs(x).max(axis))

  def merge(self, axis: int = 0) -> "Moments":
    """Of the groups along `axis` together."""
    sums = (self.count, self.total, self.squares, self.zeros)
    return Moments(*(leaf.sum(axis) for leaf in sums), self.largest.max(axis))

  def describe(self) -> dict[str, jax.Array]:
    """`mean`, `deviation`, `zeros` (a share) and `max` (of absolute values)."""
    count = jnp.maximum(self.count, 1)
    mean = self.total / count
    variance = jnp.maximum(self.squares / count - mean**2, 0)
    deviation = jnp.where(jnp.isfinite(mean), jnp.sqrt(variance), jnp.nan)
    zeros = self.zeros / count
    return {"mean": mean, "deviation": deviation, "zeros": zeros, "max": self.largest}


def debug_metrics(
  model: Llama4ForCausalLM, microbatches: Batch, gradients: Arrays
) -> dict[str, jax.Array]:
  """`debug/activations/...` and `debug/gradients/...`, each [L]: of what layers pass on, and of their weights' gradients.

  `microbatches` has a leading axis. Activations cost another forward pass.
  """

  def of_one(batch):
    sequences = Sequences.of(batch["positions"], batch["segment_ids"], model.config)
    return activation_moments(model, batch["tokens"], sequences)

  activations = jax.lax.map(of_one, microbatches).merge()
  groups = {
    "activations": activations.describe(),
    "gradients": gradient_moments(model.config, gradients).describe(),
  }
  return {
    f"debug/{group}/{name}": value
    for group, values in groups.items()
    for name, value in values.items()
  }


def activation_moments(
  model: Llama4ForCausalLM, tokens: jax.Array, sequences: Sequences
) -> Moments:
  """Of the residual stream after each layer, [L]; padding is counted, too."""
  return _streams(model.decoder, model.embed(tokens), sequences)


def _streams(decoder: Llama4Decoder, x: jax.Array, sequences: Sequences) -> Moments:
  def through(layers, x):
    seen = []
    for layer in layers:
      x = layer(x, sequences)[0]
      seen.append(Moments.of(x))
    return x, seen

  seen = []
  if decoder.num_cycles:
    graph, states = nnx.split(decoder.cycles)
    x, stacked = jax.lax.scan(
      lambda x, state: through(nnx.merge(graph, state).layers, x), x, states
    )
    for cycle in range(decoder.num_cycles):
      seen += [jax.tree.map(lambda leaf, i=cycle: leaf[i], moments) for moments in stacked]
  seen += through(decoder.rest.layers, x)[1]
  return _stack(seen)


def gradient_moments(config: ModelConfig, gradients: Arrays) -> Moments:
  """Of all gradients of each layer's weights, [L]."""
  by_path = {
    path: Moments.of(gradient, tuple(range(int(is_stacked(path)), gradient.ndim)))
    for path, gradient in gradients.items()
  }
  nothing = Moments(*(jnp.zeros(()),) * 5)
  layers = []
  for layer in range(config.num_hidden_layers):
    prefix, index = layer_place(config, layer)
    mine = [by_path[path] for path in sorted(by_path) if path.startswith(f"{prefix}/")]
    if index is not None:
      mine = [jax.tree.map(lambda leaf, i=index: leaf[i], moments) for moments in mine]
    layers.append(_stack([nothing, *mine]).merge())
  return _stack(layers)


def _stack(moments: list[Moments]) -> Moments:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *moments)
