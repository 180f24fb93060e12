"""The whole text model: tokens to logits; and what it costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from maxllama4.config import ConfigError, ModelConfig
from maxllama4.model.attention import Sequences
from maxllama4.model.decoder import Llama4Decoder
from maxllama4.model.embeddings import Embedding, Head, logits_of
from maxllama4.model.moe import RouterStatistics
from maxllama4.model.norms import RMSNorm
from maxllama4.model.vision import Llama4MultiModalProjector, Llama4VisionModel


class Llama4ForCausalLM(nnx.Module):
  """A Llama 4: a text model, and its vision tower where `vision_config` is set.

  Source: transformers 5.23, models/llama4/modeling_llama4.py, Llama4ForCausalLM and Llama4ForConditionalGeneration.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embed = Embedding(config, rngs=rngs)
    self.decoder = Llama4Decoder(config, rngs=rngs)
    self.norm = RMSNorm(config)
    if not config.tie_word_embeddings:
      self.head = Head(config, rngs=rngs)
    if config.vision_config is not None:
      self.vision = Llama4VisionModel(config, rngs=rngs)
      self.projector = Llama4MultiModalProjector(config, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    pixel_values: jax.typing.ArrayLike | None = None,
  ) -> Float[Array, "B T V"]:
    """Float32 logits of the next token at every place.

    `positions` count up by one in the token's own document (default: from 0 at each segment's first token);
    `segment_ids` tell documents in a row apart, 0 is padding (default: a new one wherever `positions` do not go on).
    `pixel_values` are all tiles of the batch in order, in -1..1; their features take the places of the patch tokens.
    Raises: ConfigError when tiles and patch tokens do not match; under a transformation only shapes can be checked.
    """
    pixel_values = None if pixel_values is None else jnp.asarray(pixel_values)
    check_images(self.config, tokens, pixel_values)
    sequences = sequences_of(tokens, positions, segment_ids, self.config)
    x = self.hidden_states(tokens, sequences, images=self.image_features(pixel_values))[0]
    return logits_of(x, self.head_weight())

  def hidden_states(
    self,
    tokens: Int[Array, "B T"],
    sequences: Sequences,
    caches: Any = None,
    remat: str = "none",
    images: Float[Array, "tiles P D"] | None = None,
  ) -> tuple[Float[Array, "B T D"], RouterStatistics | None, Any]:
    """The final norm's output, routing statistics by layer (None for a dense model), and the caches with this call's keys.

    `images` are the rows that take the places of the batch's patch tokens.
    """
    x = self.embed(tokens)
    if images is not None:
      x = merge_images(x, tokens == self.config.image_token_index, images)
    x, statistics, caches = self.decoder(x, sequences, caches, remat)
    return self.norm(x), statistics, caches

  def image_features(
    self, pixel_values: Float[Array, "tiles C S S"] | None, remat: str = "none"
  ) -> Float[Array, "tiles P D"] | None:
    """`vision_config.patch_tokens_per_tile` vectors a tile, as the decoder takes them; None for no tiles."""
    if pixel_values is None or pixel_values.shape[0] == 0:
      return None
    return self.projector(self.vision(pixel_values, remat))

  def head_weight(self) -> Float[Array, "D V"]:
    """The output head, in `param_dtype`; with tied embeddings their transpose."""
    if self.config.tie_word_embeddings:
      return self.embed.weight.get_value().T
    return self.head.weight.get_value()


def merge_images(
  x: Float[Array, "B T D"], is_patch: Bool[Array, "B T"], images: Float[Array, "tiles P D"]
) -> Float[Array, "B T D"]:
  """`x` with the k-th patch token of the batch, row after row, replaced by the k-th of the tiles' vectors."""
  place = jnp.cumsum(is_patch.reshape(-1)).reshape(is_patch.shape) - 1
  rows = images.reshape(-1, images.shape[-1]).astype(x.dtype).at[place].get(mode="clip")
  return jnp.where(is_patch[..., None], rows, x)


def check_images(config: ModelConfig, tokens: Any, pixel_values: Any) -> None:
  """Raises: ConfigError unless the tiles of `pixel_values` fill the patch tokens exactly."""
  vision = config.vision_config
  if vision is None:
    if pixel_values is not None:
      raise ConfigError(
        "pixel_values were given, but this model has no vision tower; leave them out."
      )
    return
  shape = (vision.num_channels, vision.image_size, vision.image_size)
  num_tiles = 0
  if pixel_values is not None:
    num_tiles = pixel_values.shape[0]
    if pixel_values.shape[1:] != shape:
      raise ConfigError(
        f"pixel_values are {list(pixel_values.shape)}, but tiles of this model are {list(shape)}; give [tiles,"
        " channels, side, side]."
      )
  if isinstance(tokens, jax.core.Tracer):
    return
  found = int((np.asarray(tokens) == config.image_token_index).sum())
  wanted = num_tiles * vision.patch_tokens_per_tile
  if found != wanted:
    raise ConfigError(
      f"{num_tiles} tiles make {wanted} patch tokens (id {config.image_token_index}), but the text holds {found}; give"
      f" {vision.patch_tokens_per_tile} for each tile."
    )


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
