"""The products that lead from the residual stream into wider layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
