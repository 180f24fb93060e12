"""Grouped products on TPU by the megablox kernels of JAX, with the tiles of each of the three products of a gradient.

`jax.lax.ragged_dot` compiles to a kernel, too, but its gradient with respect to the matrices multiplies every row by
every group, and the one with respect to the rows starts by transposing the matrices in memory
(benchmarks/results/grouped_products.json). Here both are kernels that read the matrices as they lie.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Bytes of fast memory that a kernel's tiles may take, buffers counted twice; the compiler gives a kernel 16 MiB.
TILE_BYTES = 14 * 2**20
SIDE = 1024  # of a tile of matrices that are read again for every tile of rows
LANES = 128


def megablox(
  rows: Float[Array, "R D"],
  matrices: Float[Array, "E _ _"],
  sizes: Int[Array, " E"],
  transposed: bool = False,
  interpret: bool = False,
) -> Float[Array, "R F"]:
  """`grouped_matmul` by Pallas kernels; `interpret` runs them anywhere, slowly. Rows of no group are not written."""
  return _megablox(rows, matrices, sizes, transposed, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _megablox(rows, matrices, sizes, transposed, interpret):
  return _product(rows, matrices, sizes, transposed, interpret)


def _forward(rows, matrices, sizes, transposed, interpret):
  return _megablox(rows, matrices, sizes, transposed, interpret), (rows, matrices, sizes)


def _backward(transposed, interpret, saved, gradient):
  rows, matrices, sizes = saved
  to_rows = _product(gradient, matrices, sizes, not transposed, interpret)
  pair = (gradient, rows) if transposed else (rows, gradient)
  return to_rows, _outer_product(*pair, sizes, matrices.dtype, interpret), None


_megablox.defvjp(_forward, _backward)


def row_tile(num_rows: int, num_groups: int) -> int:
  """Rows of a tile. A tile where groups meet is computed once for each, so tiles are small beside a group."""
  mean = num_rows // num_groups
  return next((tile for tile in (512, 256) if 4 * tile <= mean), LANES)


def product_tiles(rows: int, contracted: int, out: int, bytes_each: int) -> tuple[int, int, int]:
  """Tiles (rows, contracted, out) of rows @ matrix, for `rows` of a tile.

  Few rows a tile: whole columns of a matrix stay in fast memory while all the rows of its group pass by. Many: a
  square of the matrix is read again for every tile, which that many rows are worth.
  """

  def fits(side):
    tiles = rows * contracted + contracted * side + rows * side
    return 2 * bytes_each * tiles + 4 * rows * side <= TILE_BYTES

  if rows < 512:
    for side in (1024, 512, 256):
      if fits(min(side, out)):
        return rows, contracted, min(side, out)
  return rows, min(SIDE, contracted), min(SIDE, out)


def _padded(rows, sizes, tile):
  """Rows padded to whole tiles; and sizes with one more group, of the rows that belong to none."""
  padding = -rows.shape[0] % tile
  rows = jnp.pad(rows, ((0, padding), (0, 0)))
  rest = rows.shape[0] - sizes.sum()
  return rows, jnp.append(sizes, rest).astype(jnp.int32)


def _product(rows, matrices, sizes, transposed, interpret):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  num_rows, contracted = rows.shape
  out = matrices.shape[1 if transposed else 2]
  tile = row_tile(num_rows, sizes.size)
  rows, _ = _padded(rows, sizes, tile)
  tiles = product_tiles(tile, contracted, out, rows.dtype.itemsize)
  product = gmm(
    rows, matrices, sizes, rows.dtype, tiles, transpose_rhs=transposed, interpret=interpret
  )
  return product[:num_rows]


def _outer_product(left, right, sizes, dtype, interpret):
  """left^T @ right of each group, [E, columns of left, columns of right]."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  groups, columns = sizes.size, (left.shape[1], right.shape[1])
  tile = row_tile(left.shape[0], groups)
  left, _ = _padded(left, sizes, tile)
  right, sizes = _padded(right, sizes, tile)
  # A tile of the result is summed in float32 and written twice buffered.
  side = SIDE if dtype.itemsize == 2 else SIDE // 2
  tiles = (tile, *(min(side, size) for size in columns))
  left = left.swapaxes(0, 1)  # undone by the kernel's caller
  return tgmm(left, right, sizes, dtype, tiles, num_actual_groups=groups, interpret=interpret)
