"""The vision tower: image tiles to vectors that take the places of patch tokens in the text.

Tiles never see each other, so a batch holds the tiles that are there, of however many images, and no padding. Here B is
tiles, T a tile's patches (row by row) with the class token last, and D the tower's own hidden size.
Source: transformers 5.23, models/llama4/modeling_llama4.py; Meta's llama-models agrees.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from maxllama4.config import ModelConfig, VisionConfig
from maxllama4.model.attention import attend
from maxllama4.model.decoder import rematerialize, stack
from maxllama4.model.linear import project
from maxllama4.model.rope import half_split, rotate
from maxllama4.sharding import ones, weight, zeros

LAYER_NORM_EPS = 1e-5  # fixed in the reference, whatever config.json says


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(variance + eps) * weight + bias: statistics in float32, result in the dtype of `x`.

  Source: arXiv:1607.06450, equation 4.
  """

  def __init__(self, size: int, config: ModelConfig):
    self.weight = ones(size, config)
    self.bias = zeros((size,), (None,), config)

  def __call__(self, x: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPS)
    return (normed * self.weight.get_value() + self.bias.get_value()).astype(x.dtype)


class Llama4UnfoldConvolution(nnx.Module):
  """Tiles cut into patches, row by row, each flattened (channel, row, column) and projected."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    vision = config.vision_config
    self.patch_size = vision.patch_size
    size = vision.num_channels * vision.patch_size**2
    self.weight = weight(rngs, (size, vision.hidden_size), (None, "embed"), config)

  def __call__(self, pixels: Float[Array, "B C S S"]) -> Float[Array, "B T D"]:
    sides = (self.patch_size, self.patch_size)
    # The patches are found by a convolution with zeros and ones; at full precision it changes no pixel.
    patches = jax.lax.conv_general_dilated_patches(
      pixels, sides, sides, "VALID", precision=jax.lax.Precision.HIGHEST
    )
    patches = patches.reshape(*patches.shape[:2], -1).swapaxes(1, 2)  # B T C*P*P
    return project(patches, self.weight.get_value())


class Llama4VisionAttention(nnx.Module):
  """Every patch of a tile sees every other, with rotary positions in two dimensions."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    vision = config.vision_config
    dim, heads, size = vision.hidden_size, vision.num_attention_heads, vision.head_dim
    shape, axes = (dim, heads, size), ("embed", "heads", None)
    self.query, self.key, self.value = (weight(rngs, shape, axes, config) for _ in range(3))
    self.query_bias, self.key_bias, self.value_bias = (
      zeros((heads, size), ("heads", None), config) for _ in range(3)
    )
    self.out = zeros((heads, size, dim), ("heads", None, "embed"), config)
    self.out_bias = zeros((dim,), (None,), config)

  def __call__(
    self, x: Float[Array, "B T D"], cos: Float[Array, "1 T half"], sin: Float[Array, "1 T half"]
  ) -> Float[Array, "B T D"]:
    q, k = (
      rotate(affine(x, half_split(w.get_value()), half_split(b.get_value())), cos, sin)
      for w, b in ((self.query, self.query_bias), (self.key, self.key_bias))
    )
    v = affine(x, self.value.get_value(), self.value_bias.get_value())
    y = attend(q, k, v, mask=None)
    return jnp.einsum("BTNH,NHD->BTD", y, self.out.astype(x.dtype)) + self.out_bias.astype(x.dtype)


def affine(
  x: Float[Array, "B T D"], weight: Float[Array, "D ..."], bias: Float[Array, "..."]
) -> Float[Array, "B T ..."]:
  """x @ weight + bias in the dtype of `x`."""
  return project(x, weight) + bias.astype(x.dtype)


def patch_rope_tables(vision: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and sine [1, T, head_dim / 2] for the patches of a tile and the class token: float32.

  The first half of the pairs turns with the column, the second with the row, both counted from 1; the class token not.
  """
  side, quarter = vision.patches_per_side, vision.head_dim // 4
  exponents = np.arange(quarter, dtype=np.float32) / np.float32(quarter)
  frequencies = 1 / np.power(vision.rope_theta, exponents, dtype=np.float64).astype(np.float32)
  rows, columns = np.indices((side, side), dtype=np.float32).reshape(2, -1, 1) + 1
  angles = np.concatenate([columns * frequencies, rows * frequencies], axis=1)
  angles = np.concatenate([angles, np.zeros((1, 2 * quarter), np.float32)])[None]
  return np.cos(angles), np.sin(angles)


class Llama4VisionMLP(nnx.Module):
  """fc2(gelu(fc1(x))) with biases and the exact (erf) GELU."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    dim, features = config.vision_config.hidden_size, config.vision_config.intermediate_size
    self.fc1 = weight(rngs, (dim, features), ("embed", "ffn"), config)
    self.fc1_bias = zeros((features,), ("ffn",), config)
    self.fc2 = zeros((features, dim), ("ffn", "embed"), config)
    self.fc2_bias = zeros((dim,), (None,), config)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    hidden = affine(x, self.fc1.get_value(), self.fc1_bias.get_value())
    hidden = jax.nn.gelu(hidden, approximate=False)
    return affine(hidden, self.fc2.get_value(), self.fc2_bias.get_value())


class Llama4VisionEncoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.input_norm = LayerNorm(config.vision_config.hidden_size, config)
    self.attention = Llama4VisionAttention(config, rngs=rngs)
    self.post_attention_norm = LayerNorm(config.vision_config.hidden_size, config)
    self.mlp = Llama4VisionMLP(config, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], cos: Float[Array, "1 T half"], sin: Float[Array, "1 T half"]
  ) -> Float[Array, "B T D"]:
    x = x + self.attention(self.input_norm(x), cos, sin)
    return x + self.mlp(self.post_attention_norm(x))


class Llama4VisionEncoder(nnx.Module):
  """All layers, stacked and scanned."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.vision = config.vision_config
    self.layers = stack(
      lambda rngs: Llama4VisionEncoderLayer(config, rngs=rngs), self.vision.num_hidden_layers, rngs
    )

  def __call__(self, x: Float[Array, "B T D"], remat: str = "none") -> Float[Array, "B T D"]:
    graph, states = nnx.split(self.layers)
    cos, sin = map(jnp.asarray, patch_rope_tables(self.vision))

    def layer(x, state):
      return rematerialize(nnx.merge(graph, state), remat)(x, cos, sin), None

    return jax.lax.scan(layer, x, states)[0]

  def layer(self, index: int) -> Llama4VisionEncoderLayer:
    """Layer `index` by itself."""
    graph, states = nnx.split(self.layers)
    return nnx.merge(graph, jax.tree.map(lambda x: x[index], states))


def pixel_shuffle(x: Float[Array, "B T D"], ratio: float) -> Float[Array, "B t d"]:
  """Squares of (1 / ratio)^2 neighbouring patches, row by row, side by side in one vector: fewer places, more channels."""
  tiles, patches, dim = x.shape
  block, side = round(1 / ratio), round(patches**0.5)
  x = x.reshape(tiles, side // block, block, side // block, block, dim)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(tiles, (side // block) ** 2, block**2 * dim)


class Llama4VisionPixelShuffleMLP(nnx.Module):
  """gelu(fc2(gelu(fc1(pixel_shuffle(x))))), without biases."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    vision = config.vision_config
    self.ratio = vision.pixel_shuffle_ratio
    shape = (vision.intermediate_size, vision.projector_input_dim)
    self.fc1 = weight(rngs, shape, ("embed", "ffn"), config)
    shape = (vision.projector_input_dim, vision.projector_output_dim)
    self.fc2 = weight(rngs, shape, ("ffn", "embed"), config)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B t d"]:
    x = project(pixel_shuffle(x, self.ratio), self.fc1.get_value())
    x = project(jax.nn.gelu(x, approximate=False), self.fc2.get_value())
    return jax.nn.gelu(x, approximate=False)


class Llama4VisionModel(nnx.Module):
  """Tiles to features: `vision_config.patch_tokens_per_tile` vectors of `vision_output_dim` a tile."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    vision = config.vision_config
    dim, places = vision.hidden_size, vision.patches_per_side**2 + 1
    self.patch_embedding = Llama4UnfoldConvolution(config, rngs=rngs)
    self.class_embedding = weight(rngs, (dim,), (None,), config)
    self.positional_embedding = weight(rngs, (places, dim), (None, "embed"), config)
    self.pre_norm = LayerNorm(dim, config)
    self.encoder = Llama4VisionEncoder(config, rngs=rngs)
    self.post_norm = LayerNorm(dim, config)
    self.adapter = Llama4VisionPixelShuffleMLP(config, rngs=rngs)
    self.dtype = config.dtype

  def __call__(self, pixels: Float[Array, "B C S S"], remat: str = "none") -> Float[Array, "B t d"]:
    return self.features(self.encoder(self.embed(pixels), remat))

  def embed(self, pixels: Float[Array, "B C S S"]) -> Float[Array, "B T D"]:
    """What the encoder starts from: patches and the class token, each with its place."""
    x = self.patch_embedding(pixels.astype(self.dtype))
    class_token = self.class_embedding.astype(x.dtype)
    class_token = jnp.broadcast_to(class_token, (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([x, class_token], axis=1) + self.positional_embedding.astype(x.dtype)
    return self.pre_norm(x)

  def features(self, x: Float[Array, "B T D"]) -> Float[Array, "B t d"]:
    """What becomes of the encoder's result."""
    return self.adapter(self.post_norm(x)[:, :-1])


class Llama4MultiModalProjector(nnx.Module):
  """Features of the tower to the text's hidden size."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shape = (config.vision_config.vision_output_dim, config.hidden_size)
    self.weight = weight(rngs, shape, (None, "embed"), config)

  def __call__(self, features: Float[Array, "B t d"]) -> Float[Array, "B t D"]:
    return project(features, self.weight.get_value())
