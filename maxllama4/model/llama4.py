"""The whole text model: tokens to logits; and what it costs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from maxllama4.config import ModelConfig
from maxllama4.model.attention import Sequences
from maxllama4.model.decoder import Llama4Decoder
from maxllama4.model.embeddings import Embedding, Head, logits_of
from maxllama4.model.moe import RouterStatistics
from maxllama4.model.norms import RMSNorm


class Llama4ForCausalLM(nnx.Module):
  """A Llama 4 text model. Source: transformers 5.23, models/llama4/modeling_llama4.py, Llama4ForCausalLM."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embed = Embedding(config, rngs=rngs)
    self.decoder = Llama4Decoder(config, rngs=rngs)
    self.norm = RMSNorm(config)
    if not config.tie_word_embeddings:
      self.head = Head(config, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    pixel_values: Float[Array, "tiles 3 S S"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Float32 logits of the next token at every place.

    `positions` count up by one in the token's own document (default: from 0 at each segment's first token);
    `segment_ids` tell documents in a row apart, 0 is padding (default: a new one wherever `positions` do not go on).
    Raises: ValueError for `pixel_values`, which a text model cannot see.
    """
    if pixel_values is not None:
      raise ValueError(
        "pixel_values were given, but this model has no vision tower; leave them out."
      )
    sequences = sequences_of(tokens, positions, segment_ids, self.config)
    return logits_of(self.hidden_states(tokens, sequences)[0], self.head_weight())

  def hidden_states(
    self, tokens: Int[Array, "B T"], sequences: Sequences, caches: Any = None, remat: str = "none"
  ) -> tuple[Float[Array, "B T D"], RouterStatistics | None, Any]:
    """The final norm's output, routing statistics by layer (None for a dense model), and the caches with this call's keys."""
    x, statistics, caches = self.decoder(self.embed(tokens), sequences, caches, remat)
    return self.norm(x), statistics, caches

  def head_weight(self) -> Float[Array, "D V"]:
    """The output head, in `param_dtype`; with tied embeddings their transpose."""
    if self.config.tie_word_embeddings:
      return self.embed.weight.get_value().T
    return self.head.weight.get_value()


def sequences_of(
  tokens: Int[Array, "B T"],
  positions: Int[Array, "B T"] | None,
  segment_ids: Int[Array, "B T"] | None,
  config: ModelConfig,
) -> Sequences:
  """`Sequences` of a batch, whichever of positions and segments are given."""
  index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  if segment_ids is None:
    if positions is None:
      segment_ids = jnp.ones_like(index)
    else:
      starts = jnp.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1
      segment_ids = 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
  if positions is None:
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    positions = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  return Sequences.of(positions, segment_ids, config)


def count_parameters(config: ModelConfig) -> tuple[int, int]:
  """Text parameters in all, and the weights of the products that one token takes part in.

  The latter are attention, dense MLPs, shared and chosen experts and the head; embedding, norms and routers are left out.
  """
  dim, kinds = config.hidden_size, config.layer_kinds
  heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
  attention = dim * heads * config.head_dim
  expert = 3 * dim * config.intermediate_size
  dense = 3 * dim * config.intermediate_size_mlp
  embedding = config.vocab_size * dim
  total = embedding * (1 if config.tie_word_embeddings else 2) + dim
  active = embedding
  for kind in kinds:
    total += attention + 2 * dim
    active += attention
    if kind.is_moe:
      total += dim * config.num_local_experts + (config.num_local_experts + 1) * expert
      active += (config.num_experts_per_tok + 1) * expert
    else:
      total += dense
      active += dense
  return total, active


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
  """Useful FLOPs to train on one token: 6 a weight of a matmul, and causal attention.

  A layer's queries see half of min(sequence_length, chunk) keys on average.
  """
  matmuls = 6 * count_parameters(config)[1]
  attention = 0.0
  for kind in config.layer_kinds:
    chunk = config.attention_chunk_size if kind.uses_rope else None
    keys = min(sequence_length, chunk or sequence_length) / 2
    attention += 12 * config.num_attention_heads * config.head_dim * keys
  return matmuls + attention
