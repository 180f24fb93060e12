"""Rows sorted by group, each group times its own matrix: the products of a mixture of experts.

`jax.lax.ragged_dot` is native on TPU; on a CPU it multiplies every row by every matrix. `blockwise` below walks over the
groups instead and multiplies blocks of rows, so its work follows the rows that are there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows a block, largest first: a group is cut greedily, so few calls do most of the work and little is computed in vain.
BLOCKS = (512, 256, 128, 64)
# Up to so many rows (decoding), rows are multiplied one by one.
FEW_ROWS = 32


def grouped_matmul(
  rows: Float[Array, "R D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
  """rows[i] @ matrices[e], where e is the group that row i lies in: groups are consecutive, `sizes` rows each.

  Rows beyond the sum of `sizes` give zeros. A group without rows gets a zero gradient. Result in the dtype of `rows`.
  """
  return jax.lax.platform_dependent(rows, matrices, sizes, cpu=blockwise, default=jax.lax.ragged_dot)


@jax.custom_vjp
def blockwise(
  rows: Float[Array, "R D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
  """`grouped_matmul` group by group, in blocks of rows; row by row where there are few."""
  if rows.shape[0] <= FEW_ROWS:
    return _row_products(rows, matrices, sizes)
  return _products(rows, matrices, sizes, "rd,df->rf")


def _forward(rows, matrices, sizes):
  return blockwise(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(saved, gradient):
  rows, matrices, sizes = saved
  gradient_rows = _products(gradient, matrices, sizes, "rf,df->rd")
  return gradient_rows, _outer_products(rows, gradient, sizes).astype(matrices.dtype), None


blockwise.defvjp(_forward, _backward)


def _for_each_block(start, end, carry, body):
  """Folds `body(carry, first_row, block)` over the blocks that cover rows start..end; the last may reach beyond."""
  for block, smaller in zip(BLOCKS, (*BLOCKS[1:], 0)):
    # A loop that runs zero or more times, not a conditional: XLA updates a loop's carry in place but copies a branch's.
    def step(state, block=block):
      first, carry = state
      return first + block, body(carry, first, block)

    start, carry = jax.lax.while_loop(
      lambda state, smaller=smaller: end - state[0] > smaller, step, (start, carry)
    )
  return carry


def _pad(rows):
  """`rows` and one block of zeros, so that the last block's reach stays inside."""
  return jnp.pad(rows, ((0, BLOCKS[0]), (0, 0)))


def _products(rows, matrices, sizes, equation):
  """Each group's rows times its matrix by `equation`."""
  num_rows = rows.shape[0]
  width = matrices.shape[1 if equation.endswith("d") else 2]
  rows, ends = _pad(rows), jnp.cumsum(sizes)

  def group(e, out):
    matrix = matrices[e]

    def block_product(out, first, block):
      # What a group's last block writes beyond its end, the next group overwrites: groups go in order.
      product = jnp.einsum(equation, jax.lax.dynamic_slice_in_dim(rows, first, block), matrix)
      return jax.lax.dynamic_update_slice_in_dim(out, product, first, 0)

    return _for_each_block(ends[e] - sizes[e], ends[e], out, block_product)

  out = jax.lax.fori_loop(0, sizes.shape[0], group, jnp.zeros((rows.shape[0], width), rows.dtype))
  inside = jnp.arange(num_rows) < ends[-1]
  return jnp.where(inside[:, None], out[:num_rows], 0)


def _row_products(rows, matrices, sizes):
  """Each row times its group's matrix, which a vector product reads where it lies; a block's would be sliced out first."""
  ends = jnp.cumsum(sizes)
  group = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")

  def row(i, out):
    matrix = jax.lax.dynamic_index_in_dim(matrices, group[i], keepdims=False)
    return out.at[i].set(rows[i] @ matrix)

  out = jnp.zeros((rows.shape[0], matrices.shape[-1]), rows.dtype)
  return jax.lax.fori_loop(0, ends[-1], row, out)


def _outer_products(rows, gradient, sizes):
  """Each group's rows^T @ gradient, float32 [E, D, F]."""
  rows, gradient, ends = _pad(rows), _pad(gradient), jnp.cumsum(sizes)
  shape = (rows.shape[1], gradient.shape[1])

  def group(e, out):
    def add_block(total, first, block):
      index = first + jnp.arange(block)
      block_rows = jax.lax.dynamic_slice_in_dim(rows, first, block)
      block_rows = jnp.where((index < ends[e])[:, None], block_rows, 0)
      block_gradient = jax.lax.dynamic_slice_in_dim(gradient, first, block)
      return total + jnp.einsum(
        "rd,rf->df", block_rows, block_gradient, preferred_element_type=jnp.float32
      )

    total = jnp.zeros(shape, jnp.float32)
    total = _for_each_block(ends[e] - sizes[e], ends[e], total, add_block)
    return out.at[e].set(total)

  return jax.lax.fori_loop(0, sizes.shape[0], group, jnp.zeros((sizes.shape[0], *shape)))
