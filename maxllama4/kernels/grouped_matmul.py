"""Rows sorted by group, each group times its own matrix: the products of a mixture of experts.

`jax.lax.ragged_dot` multiplies every row by every matrix on a CPU and on a GPU, and for one of its gradients on a TPU.
`blockwise` below walks over the groups instead and multiplies blocks of rows, so its work follows the rows that are
there; megablox.py does so on a TPU, and the library tokamax, if it is there, on a GPU.
"""

import functools
import importlib.util

import jax
import jax.extend.backend
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxllama4.kernels.choice import current_choice
from maxllama4.kernels.megablox import LANES, megablox

# Rows a block, largest first: a group is cut greedily, so few calls do most of the work and little is computed in vain.
BLOCKS = (512, 320, 192, 128, 72, 40)
# Up to so many rows in all (decoding), one row a block: a vector product is bound by reading the matrix, not by work.
FEW_ROWS = 32


# Kinds that do not run everywhere, with the platforms that they run on.
PLATFORMS = {"megablox": ("tpu",), "tokamax": ("tpu", "gpu")}
MEGABLOX_DTYPES = ("bfloat16", "float32")


def grouped_matmul(
  rows: Float[Array, "R D"],
  matrices: Float[Array, "E _ _"],
  sizes: Int[Array, " E"],
  transposed: bool = False,
) -> Float[Array, "R F"]:
  """rows[i] @ matrices[e], where e is the group that row i lies in: groups are consecutive, `sizes` rows each.

  Matrices are [E, D, F], or [E, F, D] if `transposed`. Rows beyond the sum of `sizes` give anything. A group without rows
  gets a zero gradient. Result in the dtype of `rows`.
  """
  kind = current_choice().grouped_matmul
  if kind != "auto":
    return _product_by(kind, transposed)(rows, matrices, sizes)
  by_platform = {
    platform: _product_by(automatic(platform, matrices.shape, rows.dtype.name), transposed)
    for platform in ("cpu", "tpu", "cuda", "rocm")
  }
  return jax.lax.platform_dependent(rows, matrices, sizes, **by_platform)


def automatic(platform: str, shape: tuple[int, int, int], dtype: str) -> str:
  """The kind that `auto` stands for, for matrices [E, D, F] of `shape`; reasons in docs/decisions/0009."""
  if platform == "tpu":
    fits = dtype in MEGABLOX_DTYPES and all(size % LANES == 0 for size in shape[1:])
    return "megablox" if fits else "ragged_dot"
  # Traced where there is no such GPU, be it for a branch that is never taken, tokamax raises.
  is_met = platform == "cuda" and has_tokamax() and this_platform() == "cuda"
  return "tokamax" if is_met else "blockwise"


def this_platform() -> str:
  """What this process runs on, in the words of `jax.lax.platform_dependent`: cpu, tpu, cuda or rocm."""
  backend = jax.extend.backend.get_backend()
  if backend.platform != "gpu":
    return backend.platform
  return "rocm" if "rocm" in backend.platform_version else "cuda"


def has_tokamax() -> bool:
  """Whether the library is installed."""
  return importlib.util.find_spec("tokamax") is not None


def _product_by(kind: str, transposed: bool):
  if kind == "megablox":
    return functools.partial(megablox, transposed=transposed)
  product = {"blockwise": blockwise, "ragged_dot": jax.lax.ragged_dot, "tokamax": _tokamax}[kind]
  if not transposed:
    return product
  return lambda rows, matrices, sizes: product(rows, matrices.swapaxes(1, 2), sizes)


def _tokamax(rows, matrices, sizes):
  import tokamax

  inside = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]
  # Zeros on both sides: what the kernels write beyond the groups, and its gradient, is not defined.
  rows = jnp.where(inside, rows, 0)
  kernels = ("mosaic", "triton")  # not its third one, which is XLA's
  product = tokamax.ragged_dot(
    rows, matrices, sizes, preferred_element_type=rows.dtype, implementation=kernels
  )
  return jnp.where(inside, product, 0)


@jax.custom_vjp
def blockwise(
  rows: Float[Array, "R D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
  """`grouped_matmul` group by group, in blocks of rows."""
  return _products(rows, matrices, sizes, "rd,df->rf")


def _forward(rows, matrices, sizes):
  return blockwise(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(saved, gradient):
  rows, matrices, sizes = saved
  gradient_rows = _products(gradient, matrices, sizes, "rf,df->rd")
  return gradient_rows, _outer_products(rows, gradient, sizes).astype(matrices.dtype), None


blockwise.defvjp(_forward, _backward)


def _blocks(rows) -> tuple[int, ...]:
  """Sizes of blocks for so many rows. One that is most of all rows would be compiled and hardly ever used."""
  if rows.shape[0] <= FEW_ROWS:
    return (1,)
  return tuple(block for block in BLOCKS if 4 * block <= rows.shape[0]) or BLOCKS[-1:]


def _pad(rows):
  """`rows` and one block of zeros, so that the last block's reach stays inside."""
  return jnp.pad(rows, ((0, _blocks(rows)[0] - 1), (0, 0)))


def _for_each_group(sizes, carry, body):
  """Folds `body(carry, group, first_row, end_row)` over the groups that have rows, in order."""
  ends = jnp.cumsum(sizes)
  groups = jnp.argsort(sizes == 0, stable=True)

  def step(i, carry):
    e = groups[i]
    return body(carry, e, ends[e] - sizes[e], ends[e])

  return jax.lax.fori_loop(0, (sizes > 0).sum(), step, carry)


def _for_each_block(blocks, start, end, carry, body):
  """Folds `body(carry, first_row, block)` over the blocks that cover rows start..end; the last may reach beyond."""
  for block, smaller in zip(blocks, (*blocks[1:], 0)):
    # A loop that runs zero or more times, not a conditional: XLA updates a loop's carry in place but copies a branch's.
    def step(state, block=block):
      first, carry = state
      return first + block, body(carry, first, block)

    start, carry = jax.lax.while_loop(
      lambda state, smaller=smaller: end - state[0] > smaller, step, (start, carry)
    )
  return carry


def _products(rows, matrices, sizes, equation):
  """Each group's rows times its matrix by `equation`."""
  num_rows, blocks = rows.shape[0], _blocks(rows)
  width = matrices.shape[1 if equation.endswith("d") else 2]
  rows = _pad(rows)

  def group(out, e, start, end):
    matrix = matrices[e]

    def block_product(out, first, block):
      # What a group's last block writes beyond its end, the next group overwrites: groups go in order.
      product = jnp.einsum(equation, jax.lax.dynamic_slice_in_dim(rows, first, block), matrix)
      return jax.lax.dynamic_update_slice_in_dim(out, product, first, 0)

    return _for_each_block(blocks, start, end, out, block_product)

  out = _for_each_group(sizes, jnp.zeros((rows.shape[0], width), rows.dtype), group)
  inside = jnp.arange(num_rows) < sizes.sum()
  return jnp.where(inside[:, None], out[:num_rows], 0)


def _outer_products(rows, gradient, sizes):
  """Each group's rows^T @ gradient, float32 [E, D, F]."""
  blocks, rows, gradient = _blocks(rows), _pad(rows), _pad(gradient)
  ends = jnp.cumsum(sizes)

  def group(_, start_and_end):
    start, end = start_and_end

    def add_block(total, first, block):
      index = first + jnp.arange(block)
      block_rows = jax.lax.dynamic_slice_in_dim(rows, first, block)
      block_rows = jnp.where((index < end)[:, None], block_rows, 0)
      block_gradient = jax.lax.dynamic_slice_in_dim(gradient, first, block)
      return total + jnp.einsum(
        "rd,rf->df", block_rows, block_gradient, preferred_element_type=jnp.float32
      )

    # A group's sum stays in the processor's cache until it is whole; one without rows is zero.
    zero = jnp.zeros((rows.shape[1], gradient.shape[1]), jnp.float32)
    return None, _for_each_block(blocks, start, end, zero, add_block)

  return jax.lax.scan(group, None, (ends - sizes, ends))[1]
