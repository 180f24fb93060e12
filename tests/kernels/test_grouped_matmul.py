"""Grouped products against plain NumPy, for every way in which rows can be spread over groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllama4.kernels import grouped_matmul as kernels
from maxllama4.kernels.grouped_matmul import automatic, grouped_matmul
from maxllama4.kernels.megablox import LANES, TILE_BYTES, megablox, product_tiles, row_tile

E, D, F = 5, 6, 7
ROWS = (1, 24, 100, 300, 2100)  # row by row twice, then in blocks of one size, of two, of all


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


@pytest.mark.parametrize("num_rows", [24, 300])
def test_it_equals_ragged_dot(num_rows):
  rows, matrices, _ = inputs(num_rows)
  sizes = jnp.asarray(spread("random", num_rows), jnp.int32)
  expected = jax.lax.ragged_dot(rows, matrices, sizes)
  np.testing.assert_allclose(grouped_matmul(rows, matrices, sizes), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [24, 300])
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


def test_transposed_matrices_give_the_same_values_and_gradients():
  rows, matrices, gradient = inputs(24)
  sizes = jnp.asarray(spread("skewed", 24), jnp.int32)

  def pulled(transposed, matrices):
    product = lambda r, m: grouped_matmul(r, m, sizes, transposed)  # noqa: E731
    y, pull = jax.vjp(product, rows, matrices)
    return y, *pull(gradient)

  expected = pulled(False, matrices)
  *found, to_matrices = pulled(True, matrices.swapaxes(1, 2))
  for one, other in zip((*found, to_matrices.swapaxes(1, 2)), expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@functools.cache
def interpreted(transposed: bool):
  """Megablox in Pallas' interpreter, all sizes by one compilation."""

  def run(rows, matrices, sizes, gradient):
    product = functools.partial(megablox, transposed=transposed, interpret=True)
    y, pull = jax.vjp(lambda r, m: product(r, m, sizes), rows, matrices)
    return y, *pull(gradient)

  return jax.jit(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_megablox_gives_the_values_and_gradients_of_a_product_a_group(kind, transposed):
  rows, matrices, gradient = inputs(200)  # two tiles of rows, the second not full
  sizes = spread(kind, 200)
  laid = matrices.swapaxes(1, 2) if transposed else matrices
  *found, to_matrices = interpreted(transposed)(rows, laid, jnp.asarray(sizes, jnp.int32), gradient)
  found.append(to_matrices.swapaxes(1, 2) if transposed else to_matrices)
  inside = sizes.sum()  # beyond, rows are not written
  places = (slice(inside), slice(inside), slice(None))
  expected = plain(rows, matrices, sizes, gradient)
  for one, other, place in zip(found, expected, places, strict=True):
    np.testing.assert_allclose(one[place], other[place], rtol=1e-5, atol=1e-5)


def test_tiles_of_rows_are_small_beside_a_group_and_all_tiles_fit_into_fast_memory():
  assert [row_tile(rows, 16) for rows in (16, 8192, 16384, 65536)] == [LANES, LANES, 256, 512]
  for rows in (128, 256, 512):
    for contracted, out in ((5120, 16384), (8192, 5120), (16384, 5120), (5120, 8192), (256, 128)):
      tile = product_tiles(rows, contracted, out, 2)
      assert tile[0] == rows and tile[1] <= contracted and tile[2] <= out
      buffers = rows * tile[1] + tile[1] * tile[2] + rows * tile[2]
      assert 4 * buffers + 4 * rows * tile[2] <= TILE_BYTES
  # Few rows of a group: its matrix is read once, whole columns at a time.
  assert product_tiles(128, 5120, 16384, 2) == (128, 5120, 512)


def test_what_is_taken_where_nothing_is_said():
  large = (16, 5120, 16384)
  assert automatic("tpu", large, "bfloat16") == "megablox"
  assert automatic("tpu", large, "float16") == "ragged_dot"  # not among the kernel's dtypes
  assert automatic("tpu", (4, 16, 8), "bfloat16") == "ragged_dot"  # smaller than its tiles
  assert {automatic(platform, large, "bfloat16") for platform in ("cpu", "rocm")} == {"blockwise"}


def test_float16_is_multiplied_where_the_widths_are_those_of_a_kernel_that_refuses_it():
  shapes = ((24, LANES), (E, LANES, LANES))
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float16) for shape in shapes]
  product = jax.eval_shape(grouped_matmul, *arrays, jax.ShapeDtypeStruct((E,), jnp.int32))
  assert (product.shape, product.dtype) == ((24, LANES), jnp.float16)


def test_tokamax_is_not_even_traced_but_in_a_process_with_an_nvidia_gpu(monkeypatch):
  def refuse(*_):
    raise NotImplementedError("Not supported on cpu.")

  monkeypatch.setattr(kernels, "has_tokamax", lambda: True)
  monkeypatch.setattr(kernels, "_tokamax", refuse)
  rows, matrices, _ = inputs(24)
  sizes = jnp.asarray(spread("random", 24), jnp.int32)
  grouped_matmul(rows, matrices, sizes)
  for here, kind in (("cuda", "tokamax"), ("rocm", "blockwise"), ("cpu", "blockwise")):
    monkeypatch.setattr(kernels, "this_platform", lambda here=here: here)
    assert automatic("cuda", matrices.shape, "float32") == kind


def test_groups_under_vmap_and_grad_keep_apart():
  """Stacks of layers are mapped over when they are made; sizes differ from one to the next."""
  rows, matrices, _ = inputs(24)
  sizes = jnp.asarray([spread("random", 24), spread("one group", 24)], jnp.int32)
  both = jax.vmap(lambda sizes: grouped_matmul(rows, matrices, sizes))(sizes)
  for one, size in zip(both, sizes):
    np.testing.assert_allclose(one, grouped_matmul(rows, matrices, size), rtol=1e-5, atol=1e-6)
