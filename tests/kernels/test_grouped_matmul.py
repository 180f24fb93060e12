"""Grouped products against plain NumPy, for every way in which rows can be spread over groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllama4.kernels.grouped_matmul import grouped_matmul

E, D, F = 5, 6, 7
ROWS = (
  1,
  24,
  200,
  1300,
)  # fewer than any block, a decoding step's few, between blocks, more than the largest


def spread(kind: str, rows: int) -> np.ndarray:
  """Sizes of the groups."""
  rng = np.random.default_rng(rows)
  if kind == "random":
    return np.bincount(rng.integers(E, size=rows), minlength=E)
  if kind == "skewed":  # the middle group nearly all, the first none
    return np.array([0, rows // 9, rows - rows // 9 - rows // 20, 0, rows // 20])
  if kind == "one group":
    return np.array([0, 0, 0, rows, 0])
  if kind == "with a tail":
    return np.bincount(rng.integers(E, size=rows * 2 // 3), minlength=E)
  assert kind == "no rows"
  return np.zeros(E, int)


KINDS = ("random", "skewed", "one group", "with a tail", "no rows")


@functools.cache
def product_and_gradients():
  """One function for all sizes, so that only a number of rows is compiled anew."""

  def run(rows, matrices, sizes, gradient):
    product, pull = jax.vjp(lambda r, m: grouped_matmul(r, m, sizes), rows, matrices)
    return product, *pull(gradient)

  return jax.jit(run)


def inputs(num_rows, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(num_rows), 3)
  shapes = ((num_rows, D), (E, D, F), (num_rows, F))
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def plain(rows, matrices, sizes, gradient):
  """The same in NumPy, float64."""
  rows, matrices, gradient = (np.asarray(a, np.float64) for a in (rows, matrices, gradient))
  product, to_rows = np.zeros_like(gradient), np.zeros_like(rows)
  to_matrices = np.zeros_like(matrices)
  ends = np.cumsum(sizes)
  for e, (start, end) in enumerate(zip(ends - sizes, ends)):
    product[start:end] = rows[start:end] @ matrices[e]
    to_rows[start:end] = gradient[start:end] @ matrices[e].T
    to_matrices[e] = rows[start:end].T @ gradient[start:end]
  return product, to_rows, to_matrices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", ROWS)
def test_values_and_gradients_are_those_of_a_product_a_group(num_rows, kind):
  rows, matrices, gradient = inputs(num_rows)
  sizes = spread(kind, num_rows)
  ours = product_and_gradients()(rows, matrices, jnp.asarray(sizes, jnp.int32), gradient)
  for one, other in zip(ours, plain(rows, matrices, sizes, gradient), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4 if num_rows > 1000 else 1e-5)
  product, to_rows, to_matrices = ours
  assert np.all(np.asarray(product)[sizes.sum() :] == 0)  # not only close to it
  assert np.all(np.asarray(to_rows)[sizes.sum() :] == 0)
  assert np.all(np.asarray(to_matrices)[sizes == 0] == 0)


@pytest.mark.parametrize("num_rows", [24, 200])
def test_it_equals_ragged_dot(num_rows):
  rows, matrices, _ = inputs(num_rows)
  sizes = jnp.asarray(spread("random", num_rows), jnp.int32)
  expected = jax.lax.ragged_dot(rows, matrices, sizes)
  np.testing.assert_allclose(grouped_matmul(rows, matrices, sizes), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [24, 200])
def test_bfloat16_rows_give_bfloat16_and_sum_their_gradients_in_float32(num_rows):
  arguments = inputs(num_rows, jnp.bfloat16)
  rows, matrices, gradient = arguments
  sizes = spread("one group", num_rows)
  ours = product_and_gradients()(rows, matrices, jnp.asarray(sizes, jnp.int32), gradient)
  exact = plain(rows, matrices, sizes, gradient)
  for one, other in zip(ours, exact, strict=True):
    assert one.dtype == jnp.bfloat16
    # Half a unit in the last of 8 bits, of sums that lost nothing before.
    np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-8, atol=1e-2)


def test_groups_under_vmap_and_grad_keep_apart():
  """Stacks of layers are mapped over when they are made; sizes differ from one to the next."""
  rows, matrices, _ = inputs(24)
  sizes = jnp.asarray([spread("random", 24), spread("one group", 24)], jnp.int32)
  both = jax.vmap(lambda sizes: grouped_matmul(rows, matrices, sizes))(sizes)
  for one, size in zip(both, sizes):
    np.testing.assert_allclose(one, grouped_matmul(rows, matrices, size), rtol=1e-5, atol=1e-6)
