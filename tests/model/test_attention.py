"""Who sees whom, one attention layer against NumPy, and what does not depend on how the work is cut up."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden import golden_units
from tiny import packed_batch, tiny_config, tiny_model, tiny_run

from maxllama4.config import ConfigError, MeshConfig, RopeScaling
from maxllama4.kernels import attention as kernels
from maxllama4.kernels.choice import Choice, use_kernels
from maxllama4.mesh import build_mesh
from maxllama4.model import attention as model_attention
from maxllama4.model.attention import (
  Sequences,
  attend,
  attention_kernel,
  attention_mask,
  self_attend,
  temperature,
)
from maxllama4.sharding import use_mesh


@functools.cache
def layer(uses_rope, **changes):
  return tiny_model(tiny_config(**changes)).decoder.layer(0 if uses_rope else 1).attention


def sequences(segment_ids, config, positions=None):
  segment_ids = jnp.atleast_2d(jnp.asarray(segment_ids, jnp.int32))
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
  return Sequences.of(jnp.atleast_2d(positions).astype(jnp.int32), segment_ids, config)


@pytest.mark.parametrize("uses_rope", [True, False])
def test_a_position_depends_only_on_the_keys_its_layer_may_see(uses_rope):
  attention = layer(uses_rope)
  rows = sequences(np.ones(10), attention.config)  # chunks of 4: two edges lie inside
  x = jax.random.normal(jax.random.key(1), (1, 10, 16))
  jacobian = jax.jit(jax.jacobian(lambda x: attention(x, rows)[0][0]))(x)[:, :, 0]  # T D S D
  depends = np.any(np.asarray(jacobian) != 0, axis=(1, 3))  # T S
  t, s = np.indices((10, 10))
  np.testing.assert_array_equal(depends, (s <= t) & ((s // 4 == t // 4) | (not uses_rope)))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_the_mask_is_the_rule_applied_pair_by_pair(chunk_size):
  batch = packed_batch(6, 11)
  positions, segments = (np.asarray(batch[name]) for name in ("positions", "segment_ids"))
  mask = attention_mask(
    batch["positions"], batch["positions"], batch["segment_ids"], batch["segment_ids"], chunk_size
  )
  expected = [
    [[reference.sees(i, j, p, s, chunk_size) for j in range(11)] for i in range(11)]
    for p, s in zip(positions, segments)
  ]
  np.testing.assert_array_equal(mask, expected)


def test_chunk_borders_count_from_the_first_real_token_of_a_left_padded_row():
  units = golden_units()
  length, chunk_size, *padding = units["mask.args"].tolist()
  index = np.arange(length) - np.array(padding)[:, None]
  segments = jnp.asarray(index >= 0, jnp.int32)
  positions = jnp.asarray(np.maximum(index, 0), jnp.int32)
  mask = np.asarray(attention_mask(positions, positions, segments, segments, chunk_size))
  pairs = (index >= 0)[:, :, None] & (index >= 0)[:, None, :]
  np.testing.assert_array_equal(mask & pairs, (units["mask.chunked"] > 0) & pairs)


SCALING = RopeScaling(
  rope_type="llama3",
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=2.0,
  original_max_position_embeddings=32,
)


@pytest.mark.parametrize(
  ("uses_rope", "changes"),
  [
    (True, {}),
    (True, {"use_qk_norm": False, "rope_scaling": SCALING, "num_key_value_heads": 1}),
    (True, {"attention_chunk_size": None}),
    (False, {}),
    (False, {"attn_temperature_tuning": False, "num_key_value_heads": 4}),
  ],
)
def test_a_layer_of_packed_rows_computes_what_numpy_does(uses_rope, changes):
  attention = layer(uses_rope, **changes)
  batch = packed_batch(3, 11)
  x = jax.random.normal(jax.random.key(0), (3, 11, 16))
  rows = sequences(batch["segment_ids"], attention.config, batch["positions"])
  found, cache = jax.jit(lambda x: attention(x, rows))(x)
  assert cache is None
  weights = {
    name: np.asarray(getattr(attention, name).get_value(), np.float64)
    for name in ("query", "key", "value", "out")
  }
  for row in range(3):
    positions, segments = (np.asarray(batch[name][row]) for name in ("positions", "segment_ids"))
    expected = reference.attention(
      np.asarray(x[row], np.float64), weights, positions, segments, attention.config, uses_rope
    )
    valid = segments > 0
    np.testing.assert_allclose(found[row][valid], expected[valid], rtol=1e-5, atol=1e-5)
  assert np.all(np.isfinite(found))  # padding too


@pytest.mark.parametrize("chunk_size", [None, 50, 200, 1000])
def test_long_rows_cut_into_blocks_of_queries_see_what_whole_ones_do(chunk_size):
  length = 700  # several blocks; chunk borders fall inside and between them
  config = tiny_config(head_dim=2)
  segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], [300, 380, 20], axis=1))
  positions = jnp.asarray(np.concatenate([np.arange(300), np.arange(380), np.zeros(20)]), jnp.int32)
  positions = jnp.stack([positions, jnp.arange(length) % 680])
  rows = sequences(segments, config, positions)
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (2, length, n, 2)) for key, n in zip(keys, (2, 1, 1)))
  found = jax.jit(lambda q, k, v: self_attend(q, k, v, rows, chunk_size, config))(q, k, v)
  mask = attention_mask(positions, positions, segments, segments, chunk_size)
  expected = attend(q, k, v, mask)
  valid = np.asarray(segments) > 0
  np.testing.assert_allclose(found[valid], expected[valid], rtol=1e-5, atol=1e-5)


COLLECTIVES = re.compile(
  r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
)


def attention_on(mesh, chunk_size, whole_rows, kernel="auto"):
  """Self-attention and its gradients on a mesh, and without one, compiled for rows of 256."""
  config = tiny_config(head_dim=8, max_position_embeddings=256)

  def run(q, k, v, dy, positions, segments):
    rows = Sequences.of(positions, segments, config, whole_rows=whole_rows)
    attend = functools.partial(self_attend, sequences=rows, chunk_size=chunk_size, config=config)
    with use_kernels(Choice(attention=kernel)):
      y, backward = jax.vjp(attend, q, k, v)
      return y, *backward(dy)

  shapes = [jax.ShapeDtypeStruct((2, 256, n, 8), jnp.float32) for n in (4, 2, 2, 4)]
  shapes += [jax.ShapeDtypeStruct((2, 256), jnp.int32)] * 2
  if mesh is None:
    return jax.jit(run).lower(*shapes).compile()
  with use_mesh(build_mesh(tiny_run(config, mesh=mesh, sequence_length=256)), mesh) as context:
    heads, tokens = ("batch", "length", "heads", None), ("batch", "length")
    keys = ("batch", "length", "kv_heads", None)
    axes = (heads, keys, keys, heads, tokens, tokens)
    shardings = [context.sharding(axis) for axis in axes]
    results = tuple(shardings[i] for i in (0, 0, 1, 2))
    return jax.jit(run, in_shardings=shardings, out_shardings=results).lower(*shapes).compile()


def split_rows(whole_rows):
  positions, segments = np.zeros((2, 2, 256), np.int32)
  for row, cuts in enumerate([[0, 256], [0, 256]] if whole_rows else [[0, 100, 250], [0, 30, 256]]):
    for segment, (start, stop) in enumerate(itertools.pairwise(cuts), 1):
      segments[row, start:stop], positions[row, start:stop] = segment, np.arange(stop - start)
  rng = np.random.default_rng(0)
  arrays = [rng.standard_normal((2, 256, n, 8), np.float32) for n in (4, 2, 2, 4)]
  arrays[3] *= (segments > 0)[..., None, None]
  return *arrays, positions, segments


@pytest.mark.parametrize(
  ("chunk_size", "whole_rows", "fetched"),
  [
    (None, False, {"all-gather", "reduce-scatter"}),
    (64, True, set()),  # each part of 128 is two chunks
    (64, False, {"collective-permute"}),
    (200, False, {"all-gather", "reduce-scatter"}),  # more than a part
  ],
)
def test_rows_split_over_devices_fetch_the_keys_that_they_see_and_give_the_same(
  chunk_size, whole_rows, fetched
):
  mesh = MeshConfig(fsdp=2, tensor=2, context=2)
  arrays = split_rows(whole_rows)
  step = attention_on(mesh, chunk_size, whole_rows)
  assert set(COLLECTIVES.findall(step.as_text())) == fetched
  expected = attention_on(None, chunk_size, whole_rows, "reference")(*arrays)
  for one, other in zip(step(*arrays), expected, strict=True):
    valid = arrays[5] > 0
    np.testing.assert_allclose(one[valid], other[valid], atol=1e-5, rtol=1e-5)


def test_key_heads_that_are_not_split_serve_query_heads_that_are():
  mesh = MeshConfig(fsdp=2, tensor=4, rules={"kv_heads": None})
  arrays = split_rows(False)
  step = attention_on(mesh, 64, False)
  assert "[1,320" not in step.as_text()  # rows are whole: none has a chunk of a neighbour in front
  found, expected = step(*arrays), attention_on(None, 64, False, "reference")(*arrays)
  for one, other in zip(found, expected, strict=True):
    valid = arrays[5] > 0
    np.testing.assert_allclose(one[valid], other[valid], atol=1e-5, rtol=1e-5)


def test_splash_gives_the_same_on_a_mesh_that_splits_rows_batch_and_heads(monkeypatch):
  monkeypatch.setattr(model_attention, "current_platform", lambda: "tpu")
  interpreted = functools.partial(kernels.splash_attention, interpret=True)
  monkeypatch.setattr(kernels, "splash_attention", interpreted)
  arrays = split_rows(False)
  found = attention_on(MeshConfig(fsdp=2, tensor=2, context=2), 64, False)(*arrays)
  expected = attention_on(None, 64, False, "reference")(*arrays)
  for one, other in zip(found, expected, strict=True):
    valid = arrays[5] > 0
    np.testing.assert_allclose(one[valid], other[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
  ("choice", "platform", "words"),
  [
    ("splash", "cpu", "kernels.attention=splash needs devices of the platform tpu; they are cpu"),
    ("cudnn", "tpu", "kernels.attention=cudnn needs devices of the platform gpu; they are tpu"),
    ("cudnn", "gpu", "needs dtype to be bfloat16 or float16; it is float32"),
  ],
)
def test_a_kernel_that_cannot_run_is_refused_by_name(choice, platform, words):
  with pytest.raises(ConfigError) as error:
    attention_kernel(choice, tiny_config(), platform, 8)
  assert words in str(error.value)


@pytest.mark.parametrize(
  ("length", "parts", "chunk", "kernel"),
  [
    (12, 1, 3, "cudnn"),  # rows are whole: chunks are a matter of the mask
    (12, 4, 4, "blockwise"),  # three queries
    (12, 2, 3, "blockwise"),  # six queries, and three keys of the part before
    (12, 2, 7, "cudnn"),  # longer than a part, which gathers all twelve keys
    (12, 2, None, "cudnn"),
  ],
)
def test_what_counts_for_a_kernel_is_what_a_device_holds_and_fetches(length, parts, chunk, kernel):
  config = tiny_config(dtype="bfloat16", head_dim=8, attention_chunk_size=chunk)
  assert attention_kernel("auto", config, "gpu", length, parts) == kernel
  if kernel != "cudnn":
    with pytest.raises(ConfigError, match=r"even numbers of queries and of keys .* are [39]\."):
      attention_kernel("cudnn", config, "gpu", length, parts)


def test_scores_and_softmax_are_float32_for_bfloat16_queries():
  """Scores of 256 and 257 are one number in bfloat16; their softmax is not even."""
  q = jnp.full((1, 1, 1, 4), 16.0, jnp.bfloat16)
  k = jnp.array([[8, 8, 8, 8], [8, 8, 8, 8.125]], jnp.bfloat16)[None, :, None]
  v = jnp.array([[0.0] * 4, [1.0] * 4], jnp.bfloat16)[None, :, None]
  out = attend(q, k, v, jnp.ones((1, 1, 2), bool))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), jax.nn.sigmoid(1.0), rtol=2**-8)


def test_temperature_steps_where_the_logarithm_says_also_far_out():
  units = golden_units()
  positions = jnp.asarray(units["temperature.positions"], jnp.int32)[None]
  config = tiny_config(floor_scale=8192.0, attn_scale=0.1)
  np.testing.assert_allclose(
    temperature(positions, config)[0], units["temperature.scale"], rtol=1e-6
  )


def test_temperature_of_every_early_position_is_the_formula_in_float32():
  config = tiny_config(dtype="bfloat16")  # floor_scale 3, attn_scale 0.5
  found = temperature(jnp.arange(12, dtype=jnp.int32)[None], config)
  assert found.dtype == jnp.float32
  expected = [1 + 0.5 * np.log1p((p + 1) // 3) for p in range(12)]
  np.testing.assert_allclose(found[0], expected, rtol=1e-6)
