"""The products that lead from the residual stream into wider layers, and back."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from maxllama4.sharding import current_mesh, gather_embed, sum_over

Axes = tuple[str | None, ...]


def column_parallel(
  x: Float[Array, "B T D"], weights: Sequence[Float[Array, "D ..."]], axes: Sequence[Axes]
) -> list[Float[Array, "B T ..."]]:
  """x @ weight for each weight, whose dimensions `axes` name, `embed` first.

  On a mesh a device gathers its columns of each weight and multiplies its own rows: what it gets is split as `axes`
  say. Source of the name: Megatron-LM, arXiv:1909.08053, section 3.
  """
  context = current_mesh()
  if context is None:
    return [project(x, weight) for weight in weights]

  def local(x, *weights):
    whole = [gather_embed(context, *pair, x.dtype) for pair in zip(weights, axes, strict=True)]
    return [project(x, weight) for weight in whole]

  products = jax.shard_map(
    local,
    mesh=context.mesh,
    in_specs=(context.spec(("batch", "length", None)), *map(context.spec, axes)),
    out_specs=[context.spec(("batch", "length", *names[1:])) for names in axes],
    check_vma=False,
  )(x, *weights)
  return [checkpoint_name(product, "matmul") for product in products]


def row_parallel(
  x: Float[Array, "B T ..."], weight: Float[Array, "... D"], axes: Axes
) -> Float[Array, "B T D"]:
  """x @ weight over all dimensions of `weight` but its last, `embed`.

  On a mesh a device multiplies the columns of `x` that it has by its rows of `weight`, and the products are summed.
  """
  width = weight.ndim - 1

  def product(x, weight):
    return jnp.tensordot(x, weight.astype(x.dtype), axes=width)

  context = current_mesh()
  if context is None:
    return product(x, weight)

  def local(x, weight):
    y = product(x, gather_embed(context, weight, axes, x.dtype))
    return sum_over(context, y, axes[0])

  return jax.shard_map(
    local,
    mesh=context.mesh,
    in_specs=(context.spec(("batch", "length", *axes[:-1])), context.spec(axes)),
    out_specs=context.spec(("batch", "length", None)),
    check_vma=False,
  )(x, weight)


@jax.custom_vjp
def project(x: Float[Array, "B T D"], weight: Float[Array, "D ..."]) -> Float[Array, "B T ..."]:
  """x @ weight, `weight` cast to the dtype of `x`.

  The gradient of the weight is the product that automatic differentiation would take, with its operands the other way
  round: on a CPU, XLA transposes the first operand, and `x` is both narrower than the gradient and shared by the
  projections of a layer (10 % of a training step of the quickstart).
  """
  return jnp.tensordot(x, weight.astype(x.dtype), axes=1)


def _forward(x, weight):
  return project(x, weight), (x, weight)


def _backward(saved, gradient):
  x, weight = saved
  width = weight.ndim - 1
  gradient_x = jnp.tensordot(
    gradient, weight.astype(x.dtype), axes=(tuple(range(2, 2 + width)), tuple(range(1, 1 + width)))
  )
  gradient_weight = jnp.tensordot(x, gradient, axes=((0, 1), (0, 1)))
  return gradient_x, gradient_weight.astype(weight.dtype)


project.defvjp(_forward, _backward)
