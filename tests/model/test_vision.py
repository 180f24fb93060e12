"""The vision tower, part by part, and the places that its vectors take in the text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import ACTIVATIONS, LOGITS, VISION_CASES, golden_case, golden_units
from tiny import tiny_model, tiny_vision_config

import maxllama4
from maxllama4.config import ConfigError
from maxllama4.model.llama4 import merge_images
from maxllama4.model.vision import (
  LayerNorm,
  Llama4UnfoldConvolution,
  patch_rope_tables,
  pixel_shuffle,
)


@pytest.fixture(scope="module", params=VISION_CASES)
def golden(request):
  case = golden_case(request.param)
  return case, maxllama4.load_model(case.folder)


def test_every_part_of_the_tower_computes_what_the_reference_does(golden):
  case, model = golden
  arrays, tower = case.arrays, model.vision
  x = tower.patch_embedding(jnp.asarray(arrays["pixel_values"]))
  assert np.abs(x - arrays["vision.patch_embed"]).max() <= ACTIVATIONS
  x = jnp.asarray(arrays["vision.pre_norm"][:, 0])
  cos, sin = map(jnp.asarray, patch_rope_tables(model.config.vision_config))
  np.testing.assert_allclose(cos[0], arrays["vision.rope_cos"], atol=1e-6)
  np.testing.assert_allclose(sin[0], arrays["vision.rope_sin"], atol=1e-6)
  graph, states = nnx.split(tower.encoder.layers)
  for i, theirs in enumerate(arrays["vision.layer_out"]):
    x = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], states))(x, cos, sin)
    assert np.abs(x - theirs).max() <= ACTIVATIONS, i
  assert np.abs(tower.post_norm(x) - arrays["vision.post_norm"]).max() <= ACTIVATIONS
  features = jax.jit(lambda pixels: tower(pixels))(arrays["pixel_values"])
  assert np.abs(features - arrays["vision.features"]).max() <= LOGITS
  projected = model.projector(features).reshape(-1, model.config.hidden_size)
  assert np.abs(projected - arrays["vision.projected"]).max() <= LOGITS


def test_tables_and_rearrangements_are_the_references():
  units = golden_units()
  vision = dataclasses.replace(
    tiny_vision_config().vision_config,
    hidden_size=176,
    num_attention_heads=2,
    intermediate_size=704,
    image_size=336,
    patch_size=14,
    rope_theta=10000.0,
  )
  cos, sin = patch_rope_tables(vision)
  np.testing.assert_allclose(cos[0], units["vision.rope_cos_336_14_88"], atol=1e-6)
  np.testing.assert_allclose(sin[0], units["vision.rope_sin_336_14_88"], atol=1e-6)
  shuffled = pixel_shuffle(jnp.asarray(units["vision.pixel_shuffle_in"]), 0.5)
  np.testing.assert_array_equal(shuffled, units["vision.pixel_shuffle_out"])
  config = tiny_vision_config(hidden_size=48, intermediate_size=192, image_size=8, patch_size=4)
  unfold = Llama4UnfoldConvolution(config, rngs=nnx.Rngs(0))
  unfold.weight.set_value(jnp.eye(48))
  np.testing.assert_array_equal(
    unfold(jnp.asarray(units["vision.unfold_in"])), units["vision.unfold_out_patch4"]
  )


def test_patches_run_row_by_row_and_flatten_channel_row_column():
  config = tiny_vision_config()
  vision = config.vision_config
  side, patch, channels = vision.image_size, vision.patch_size, vision.num_channels
  unfold = Llama4UnfoldConvolution(config, rngs=nnx.Rngs(0))
  pixels = np.random.default_rng(0).normal(size=(2, channels, side, side)).astype(np.float32)
  expected = [
    [
      tile[:, y : y + patch, x : x + patch].reshape(-1)
      for y in range(0, side, patch)
      for x in range(0, side, patch)
    ]
    for tile in pixels
  ]
  found = unfold(jnp.asarray(pixels))
  np.testing.assert_allclose(found, np.array(expected) @ unfold.weight.get_value(), atol=1e-5)


def test_a_pair_turns_with_its_column_or_its_row_counted_from_one_and_the_class_token_not():
  vision = tiny_vision_config(hidden_size=16, image_size=8, patch_size=2).vision_config  # 4 x 4
  cos, sin = patch_rope_tables(vision)  # heads of 8: two pairs a direction, at 1 and 100^-1/2
  for y in range(4):
    for x in range(4):
      angles = np.array([x + 1, (x + 1) / 10, y + 1, (y + 1) / 10])
      np.testing.assert_allclose(cos[0, 4 * y + x], np.cos(angles), atol=1e-6)
      np.testing.assert_allclose(sin[0, 4 * y + x], np.sin(angles), atol=1e-6)
  np.testing.assert_array_equal(cos[0, 16], 1)
  np.testing.assert_array_equal(sin[0, 16], 0)


def test_four_neighbouring_patches_stand_side_by_side_row_before_column():
  x = np.random.default_rng(0).normal(size=(2, 16, 3))
  found = pixel_shuffle(jnp.asarray(x, jnp.float32), 0.5)
  for row in range(2):
    for column in range(2):
      first = 4 * (2 * row) + 2 * column  # upper left of the four
      expected = np.concatenate([x[:, first + i] for i in (0, 1, 4, 5)], axis=-1)
      np.testing.assert_allclose(found[:, 2 * row + column], expected, rtol=1e-6)


def test_a_layer_norm_centres_scales_weighs_and_shifts_in_float32():
  norm = LayerNorm(4, tiny_vision_config())
  norm.weight.set_value(jnp.array([1.0, 2.0, 3.0, 4.0]))
  norm.bias.set_value(jnp.array([0.5, 0.0, 0.0, -0.5]))
  x = np.array([[1.0, 2.0, 3.0, 6.0]]) + 1000
  expected = (x - 1003) / np.sqrt(3.5 + 1e-5) * [1, 2, 3, 4] + [0.5, 0, 0, -0.5]
  np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4)
  assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_tiles_do_not_see_each_other_and_recomputation_changes_nothing():
  tower = tiny_model(tiny_vision_config(initializer_range=0.2)).vision
  see = jax.jit(lambda pixels: tower(pixels))
  pixels = jax.random.normal(jax.random.key(1), (3, 3, 8, 8))
  together = see(pixels)
  alone = jnp.concatenate([see(tile[None]) for tile in pixels])
  np.testing.assert_allclose(together, alone, atol=1e-6)
  assert np.abs(together[0] - together[1]).max() > 0.01

  def gradient(remat):
    return jax.jit(jax.grad(lambda pixels: (tower(pixels, remat) ** 2).sum()))(pixels)

  gradients = gradient("none")
  scale = np.abs(gradients).max()  # what float32 rounds to: small elements are sums of large ones
  np.testing.assert_allclose(gradients, gradient("full"), rtol=1e-5, atol=3e-7 * scale)


def test_patch_tokens_of_a_batch_take_the_tiles_vectors_in_order():
  x = jnp.zeros((2, 4, 1))
  is_patch = jnp.array([[False, True, True, False], [True, False, False, True]])
  merged = merge_images(x - 1, is_patch, jnp.arange(4.0).reshape(2, 2, 1))
  np.testing.assert_array_equal(merged[..., 0], [[-1, 0, 1, -1], [2, -1, -1, 3]])


@pytest.mark.parametrize(
  ("tokens", "tiles", "words"),
  [
    ([[5, 9, 9, 9]], 1, "make 4 patch tokens (id 9), but the text holds 3"),
    ([[5, 9, 9, 9, 9]], 2, "make 8 patch tokens (id 9), but the text holds 4"),
    ([[5, 9]], 0, "0 tiles make 0 patch tokens (id 9), but the text holds 1"),
  ],
)
def test_tiles_that_do_not_fill_the_patch_tokens_are_an_error_with_both_numbers(
  tokens, tiles, words
):
  model = tiny_model(tiny_vision_config())
  pixels = jnp.zeros((tiles, 3, 8, 8)) if tiles else None
  with pytest.raises(ConfigError) as error:
    model(jnp.asarray(tokens), pixel_values=pixels)
  assert words in str(error.value)
  with pytest.raises(ConfigError, match="patch tokens"):
    maxllama4.generate(model, tokens, pixel_values=pixels)


def test_tiles_of_another_size_are_an_error_with_both_shapes():
  model = tiny_model(tiny_vision_config())
  with pytest.raises(ConfigError, match=r"\[1, 3, 4, 4\].*\[3, 8, 8\]"):
    model(jnp.asarray([[9, 9, 9, 9]]), pixel_values=jnp.zeros((1, 3, 4, 4)))
