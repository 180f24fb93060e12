"""Two checkpoints side by side: what each layer makes of the same tokens, and where they first depart."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maxllama4.config import ConfigError
from maxllama4.model.embeddings import logits_of
from maxllama4.model.llama4 import Llama4ForCausalLM, sequences_of
from maxllama4.model.vision import patch_rope_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareRequest:
  """The settings of `maxllama4 compare`."""

  prompt: str | None = None
  tokens: tuple[int, ...] = ()  # ids, in place of a prompt
  tokenizer: str | None = None  # a file or folder; null: the first checkpoint's
  tolerance: float = 1e-4  # of a difference over the size of the values; float32 noise is near 1e-6
  output: str = "text"

  def __post_init__(self):
    if (self.prompt is None) == (not self.tokens):
      raise ConfigError("give either prompt=TEXT or tokens=[IDS].")
    if self.output not in ("text", "json"):
      raise ConfigError(f"output={self.output} is not one of text, json.")
    if not self.tolerance >= 0:
      raise ConfigError(f"tolerance={self.tolerance} must be 0 or greater.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDifference:
  """How far apart two models are behind one block."""

  layer: int | None  # None: outside the layers
  block: str  # embedding; attention, feed_forward; norm, logits; of a vision tower: "vision " + its block
  max_difference: float
  relative_difference: float  # over the root mean square of the first model's values

  @property
  def name(self) -> str:
    if self.layer is None:
      return self.block
    tower, _, block = self.block.rpartition(" ")
    return f"{tower} layer {self.layer} {block}".lstrip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """All blocks in order, the first that departs (None: none does), and settings that differ, with both values."""

  blocks: tuple[BlockDifference, ...]
  first: BlockDifference | None
  settings: dict[str, tuple]


# Without these two models have no blocks in common.
_NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size")


def compare_models(
  one: Llama4ForCausalLM, other: Llama4ForCausalLM, tokens: list[int], tolerance: float
) -> Comparison:
  """What each block of both gives for `tokens`, each model on its own activations.

  So for the vision towers, where both have one of the same sizes, and a tile of noise. Raises: ConfigError when their layers cannot be set side by side, or a token is not in the vocabulary.
  """
  settings = {
    field.name: (getattr(one.config, field.name), getattr(other.config, field.name))
    for field in dataclasses.fields(one.config)
    if getattr(one.config, field.name) != getattr(other.config, field.name)
  }
  for name in _NEEDED:
    if name in settings:
      raise ConfigError(
        f"the models differ in {name}: {settings[name][0]} and {settings[name][1]}; take two of the same."
      )
  if not all(0 <= token < one.config.vocab_size for token in tokens):
    raise ConfigError(f"tokens={tokens} must lie in 0..{one.config.vocab_size - 1}.")
  batch = jnp.asarray([tokens], jnp.int32)
  pairs = zip(_blocks(one, batch), _blocks(other, batch))
  if one.config.vision_config is not None and "vision_config" not in settings:
    pairs = itertools.chain(zip(_vision_blocks(one), _vision_blocks(other)), pairs)
  blocks = []
  for (layer, block, mine), (_, _, theirs) in pairs:
    mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
    difference = float(np.abs(mine - theirs).max())
    size = float(np.sqrt(np.mean(np.square(mine, dtype=np.float64))))
    relative = difference / size if size else float(difference > 0)
    blocks.append(
      BlockDifference(
        layer=layer, block=block, max_difference=difference, relative_difference=relative
      )
    )
  # Not "greater": a difference that is not a number departs, too.
  first = next((block for block in blocks if not block.relative_difference <= tolerance), None)
  return Comparison(blocks=tuple(blocks), first=first, settings=settings)


def _blocks(
  model: Llama4ForCausalLM, tokens: jax.Array
) -> Iterator[tuple[int | None, str, jax.Array]]:
  """Layer, block and output of every block; those of attention and feed-forward as they are added to the stream."""
  sequences = sequences_of(tokens, None, None, model.config)
  x = model.embed(tokens)
  yield None, "embedding", x
  for i in range(model.config.num_hidden_layers):
    graph, state = nnx.split(model.decoder.layer(i))
    attention, feed_forward, x = _layer(graph, state, x, sequences)
    yield i, "attention", attention
    yield i, "feed_forward", feed_forward
  x = model.norm(x)
  yield None, "norm", x
  yield None, "logits", logits_of(x, model.head_weight())


def _vision_blocks(model: Llama4ForCausalLM) -> Iterator[tuple[int | None, str, jax.Array]]:
  """Layer, block and output of every block of the vision tower, for a tile of noise."""
  vision = model.config.vision_config
  shape = (1, vision.num_channels, vision.image_size, vision.image_size)
  noise = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
  x, tables = model.vision.embed(jnp.asarray(noise)), patch_rope_tables(vision)
  yield None, "vision embedding", x
  for i in range(vision.num_hidden_layers):
    attention, feed_forward, x = _vision_layer(*nnx.split(model.vision.encoder.layer(i)), x, tables)
    yield i, "vision attention", attention
    yield i, "vision feed_forward", feed_forward
  features = model.vision.features(x)
  yield None, "vision adapter", features
  yield None, "vision projector", model.projector(features)


@functools.partial(jax.jit, static_argnums=0)
def _vision_layer(graph, state, x, tables):
  """As `_layer`, for one of the tower's."""
  layer = nnx.merge(graph, state)
  attention = layer.attention(layer.input_norm(x), *tables)
  after = layer(x, *tables)
  return attention, after - x - attention, after


@functools.partial(jax.jit, static_argnums=0)
def _layer(graph, state, x, sequences):
  """What attention and feed-forward add, and the stream behind both; compiled once for each kind of layer."""
  layer = nnx.merge(graph, state)
  attention, _ = layer.attention(layer.input_norm(x), sequences, None)
  after = layer(x, sequences)[0]
  return attention, after - x - attention, after


def print_comparison(comparison: Comparison, tolerance: float) -> None:
  for name, (mine, theirs) in comparison.settings.items():
    print(f"{name}: {mine} in the first, {theirs} in the second")
  width = max(len(block.name) for block in comparison.blocks)
  print(f"{'behind':<{width}}  max difference  relative")
  for block in comparison.blocks:
    print(f"{block.name:<{width}}  {block.max_difference:<14.3g}  {block.relative_difference:.3g}")
  first = comparison.first
  if first is None:
    print(f"no block departs by more than {tolerance:g} of its values")
  else:
    print(f"first departure: {first.name} (relative {first.relative_difference:.3g})")
