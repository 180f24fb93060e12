"""Attention kernels against the mask: values, gradients, memory, and what is not computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllama4.kernels.attention import (
  attend,
  attention,
  blockwise,
  choose_kernel,
  is_cudnn_forward,
  library_attention,
  obstacle,
  run_mask,
)
from maxllama4.kernels.splash import choose_block, key_blocks, query_blocks, splash_attention
from maxllama4.model.attention import attention_mask, run_starts

LENGTH = 300  # three blocks of 128, the last one padded
CHUNK = 128


def rows_of(*documents: list[int]):
  """Positions and segments of rows made of documents of these lengths, the rest padding; then one whole document."""
  positions, segments = np.zeros((2, len(documents) + 1, LENGTH), np.int32)
  for row, lengths in enumerate([*documents, [LENGTH]]):
    for segment, length in enumerate(lengths, 1):
      first = sum(lengths[: segment - 1])
      positions[row, first : first + length] = np.arange(length)
      segments[row, first : first + length] = segment
  return jnp.asarray(positions), jnp.asarray(segments)


def heads(batch, length, counts=(4, 2, 2, 4), size=8):
  """Queries, keys, values, and gradients of the output."""
  rng = np.random.default_rng(length)
  return [rng.standard_normal((batch, length, n, size), np.float32) for n in counts]


def by_splash(q, k, v, starts, offset, longest_run):
  return splash_attention(q, k, v, starts, offset, longest_run=longest_run, interpret=True)


def by_blocks(q, k, v, starts, offset, longest_run):
  return blockwise(q, k, v, starts, jnp.asarray(offset, jnp.int32))


def by_mask(q, k, v, starts, offset, longest_run):
  return attend(q, k, v, run_mask(starts, offset, q.shape[1]))


def by_library(q, k, v, starts, offset, longest_run):
  return library_attention(q, k, v, starts, offset, None, "xla")


@functools.cache
def step(kernel, chunk_size):
  """Output and gradients with `kernel`, compiled once."""

  def run(q, k, v, dy, positions, segments):
    starts = run_starts(positions, segments, chunk_size)
    y, backward = jax.vjp(lambda q, k, v: kernel(q, k, v, starts, 0, chunk_size), q, k, v)
    return y, *backward(dy)

  return jax.jit(run)


@pytest.mark.parametrize(
  ("kernel", "chunk_size"),
  [(by_blocks, None), (by_blocks, 100), (by_library, CHUNK), (by_splash, CHUNK)],
)
def test_a_kernel_gives_the_values_and_gradients_of_the_mask(kernel, chunk_size):
  positions, segments = rows_of([70, 190, 20])
  q, k, v, dy = heads(2, LENGTH)
  valid = (segments > 0)[:, :, None, None]
  dy *= valid  # of padding nothing is asked
  found, *gradients = step(kernel, chunk_size)(q, k, v, dy, positions, segments)
  y, *expected = step(by_mask, chunk_size)(q, k, v, dy, positions, segments)
  assert np.all(np.isfinite(found))
  for one, other in zip([found * valid, *gradients], [y * valid, *expected], strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 1, 100, 128])
def test_the_first_token_that_each_sees_says_what_the_mask_says(chunk_size):
  positions, segments = (z[:, ::3] for z in rows_of([70, 190, 20]))  # documents of 24, 63 and 7
  positions //= 3
  starts = run_starts(positions, segments, chunk_size)
  found = run_mask(starts, 0, 100) & (segments > 0)[:, :, None]
  expected = attention_mask(positions, positions, segments, segments, chunk_size)
  np.testing.assert_array_equal(found, expected)


def test_splash_computes_nothing_between_chunks_forward_or_backward():
  """Where blocks of keys and queries of different chunks met, a value that is no number would spread."""
  positions, segments = rows_of([LENGTH])
  q, k, v, dy = heads(2, LENGTH)
  poisoned = v.copy()
  poisoned[:, :CHUNK] = np.nan
  found = step(by_splash, CHUNK)(q, k, poisoned, dy, positions, segments)
  expected = step(by_splash, CHUNK)(q, k, v, dy, positions, segments)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_array_equal(one[:, CHUNK:], other[:, CHUNK:])
  assert np.all(np.isnan(found[0][:, :CHUNK]))


@pytest.mark.parametrize(
  ("documents", "chunk_size"), [([2048], 512), ([300, 900, 37, 400], 512), ([300, 1300], None)]
)
def test_splash_visits_the_blocks_that_hold_a_pair_and_no_others(documents, chunk_size):
  length, block = 2048, 128
  segments = np.zeros(length, np.int32)
  positions = np.zeros(length, np.int32)
  for segment, size in enumerate(documents, 1):
    first = sum(documents[: segment - 1])
    segments[first : first + size], positions[first : first + size] = segment, np.arange(size)
  starts = run_starts(jnp.asarray(positions)[None], jnp.asarray(segments)[None], chunk_size)
  pairs = np.asarray(run_mask(starts, 0, length))[0]
  meets = pairs.reshape(length // block, block, -1, block).any((1, 3))
  of_queries, of_keys = key_blocks(starts, 0, length, block), query_blocks(starts, 0, length, block)
  index = np.arange(length // block)
  for (first, last), blocks in ((of_queries, meets), (of_keys, meets.T)):
    visited = (index >= np.asarray(first).T) & (index <= np.asarray(last).T)
    np.testing.assert_array_equal(visited, blocks)
  if documents == [2048]:
    assert meets.sum() == 4 * (
      4 * 5 // 2
    )  # four chunks of four blocks, half of each; 136 without chunks


def test_a_part_of_the_queries_visits_the_keys_before_it_and_gives_the_same():
  """As on a device that holds the middle third of a row and has gathered the keys."""
  positions, segments = rows_of([70, 190, 40])
  q, k, v, _ = heads(2, LENGTH)
  starts = run_starts(positions, segments, None)
  parts = [
    jax.jit(kernel, static_argnums=5)(q[:, 100:200], k, v, starts, 100, None)
    for kernel in (by_mask, by_splash, by_blocks)
  ]
  for part in parts[1:]:
    np.testing.assert_allclose(part, parts[0], atol=1e-5, rtol=1e-5)


def test_a_block_is_large_unless_that_pads_much():
  assert [choose_block(n) for n in (100, 1000, 1024, 1100, 8192, 8300, 12288)] == [
    *(128, 1024, 1024, 128, 1024, 512, 1024)
  ]


def test_whole_documents_need_no_mask_of_pairs():
  q, k, v, _ = heads(2, LENGTH)
  positions, segments = rows_of([LENGTH])

  @jax.jit
  def both(q, k, v):
    pairs = []
    for run in (100, LENGTH, 128):  # the last does not divide the row: by the mask
      starts = run_starts(positions, segments, run)
      pairs.append(library_attention(q, k, v, starts, 0, run, "xla"))
      pairs.append(attend(q, k, v, run_mask(starts, 0, LENGTH)))
    return pairs

  found = both(q, k, v)
  np.testing.assert_allclose(found[::2], found[1::2], atol=1e-5, rtol=1e-5)


def scratch_bytes(kernel, length):
  starts = jax.ShapeDtypeStruct((1, length), jnp.int32)
  arrays = [jax.ShapeDtypeStruct((1, length, n, 8), jnp.float32) for n in (4, 2, 2)]

  def total(q, k, v, starts):
    return attention(q, k, v, starts, kernel=kernel).sum()

  step = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays, starts).compile()
  return step.memory_analysis().temp_size_in_bytes


def test_blockwise_memory_grows_with_the_length_and_not_with_its_square():
  assert scratch_bytes("blockwise", 4096) < 4.2 * scratch_bytes("blockwise", 1024)
  assert scratch_bytes("reference", 2048) > 3.8 * scratch_bytes("reference", 1024)


def test_bfloat16_differs_from_float32_by_its_own_rounding():
  positions, segments = rows_of([70, 190, 20])
  arrays = heads(2, LENGTH)
  found = step(by_blocks, None)(
    *(jnp.asarray(z, jnp.bfloat16) for z in arrays), positions, segments
  )
  expected = step(by_blocks, None)(*arrays, positions, segments)
  valid = np.asarray(segments) > 0
  for one, other in zip(found, expected, strict=True):
    assert one.dtype == jnp.bfloat16
    error = np.abs(np.asarray(one, np.float32) - other)[valid]
    assert error.max() < 2**-6 * np.abs(other).max()


@pytest.mark.parametrize(("policy", "runs"), [("attention", 1), (None, 2)])
def test_keeping_attention_spares_the_backward_pass_the_kernel_on_a_tpu(policy, runs):
  """Lowered for a TPU, with the shape of a released model."""
  policy = policy and jax.checkpoint_policies.save_only_these_names(policy)

  def total(q, k, v, starts):
    layer = jax.checkpoint(
      lambda q, k, v: attention(q, k, v, starts, kernel="splash", longest_run=8192), policy=policy
    )
    return (layer(q, k, v).astype(jnp.float32) ** 2).sum()

  shapes = [jax.ShapeDtypeStruct((1, 16384, n, 128), jnp.bfloat16) for n in (40, 8, 8)]
  shapes.append(jax.ShapeDtypeStruct((1, 16384), jnp.int32))
  program = jax.jit(jax.grad(total, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("tpu",))
  assert program.as_text().count('kernel_name = "splash_mha_fwd') == runs


def test_devices_and_numbers_choose_the_kernel():
  assert choose_kernel("tpu", "float32", 6, 10) == "splash"
  assert choose_kernel("gpu", "bfloat16", 128, 8192) == "cudnn"
  assert choose_kernel("gpu", "float32", 128, 8192) == "blockwise"
  assert choose_kernel("cpu", "bfloat16", 128, 8192) == "blockwise"
  assert choose_kernel(None, "bfloat16", 128, 8192) == "blockwise"
  assert obstacle("reference", "cpu", "float32", 5, 3) is None
  assert "16" not in obstacle("splash", "cpu", "bfloat16", 128, 8192)


@pytest.mark.parametrize("even_runs", [True, False])
def test_cudnn_runs_forward_once_where_a_policy_keeps_it(even_runs, monkeypatch):
  # Traced only: there is no cuDNN here.
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 92200)
  x, starts = jnp.zeros((1, 128, 2, 64), jnp.bfloat16), jnp.zeros((1, 128), jnp.int32)

  @functools.partial(jax.checkpoint, policy=is_cudnn_forward)
  def layer(x):
    y = attention(x, x, x, starts, kernel="cudnn", even_runs=even_runs)
    return (y * y).sum(dtype=jnp.float32)

  text = str(jax.make_jaxpr(jax.grad(layer))(x))
  assert text.count("= dot_product_attention_fwd_wrapper") == 1
  assert text.count("= dot_product_attention_bwd_wrapper") == 1
