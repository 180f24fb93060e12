"""Cross-entropy without the logits of a whole batch in memory. Everything here is a sum over tokens; nothing is a mean.

The head's product, the softmax and their gradients are computed chunk by chunk of positions, in one pass: what the
backward pass needs is already there when the forward pass ends, so no logits are kept or computed twice.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxllama4.model.embeddings import logits_of
from maxllama4.sharding import current_mesh

Sums = tuple[Float[Array, ""], Float[Array, ""]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sums(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  z_loss: float,
  chunk_tokens: int,
) -> Sums:
  """Sum over tokens of weight x (nats + z_loss x logsumexp^2), and the same without the z term (not differentiated).

  At most about `chunk_tokens` tokens' float32 logits exist at once on a device.
  """

  def add(sums, chunk):
    _, _, objective, nats = _chunk_terms(head, chunk, z_loss)
    return (sums[0] + objective, sums[1] + nats), None

  return jax.lax.scan(add, (0.0, 0.0), _chunks(x, targets, weights, chunk_tokens))[0]


def _forward(x, head, targets, weights, z_loss, chunk_tokens):
  def add(carry, chunk):
    (objective_sum, nats_sum), gradient_head = carry
    logits, normalizer, objective, nats = _chunk_terms(head, chunk, z_loss)
    rows, chunk_targets, chunk_weights = chunk
    probabilities = jnp.exp(logits - normalizer[..., None])
    hits = jnp.arange(logits.shape[-1]) == chunk_targets[..., None]
    scale = chunk_weights * (1 + 2 * z_loss * normalizer)
    gradient = probabilities * scale[..., None] - hits * chunk_weights[..., None]
    gradient = gradient.astype(rows.dtype)
    gradient_rows = jnp.einsum("BTV,DV->BTD", gradient, head.astype(rows.dtype))
    gradient_head += jnp.einsum("BTD,BTV->DV", rows, gradient, preferred_element_type=jnp.float32)
    return ((objective_sum + objective, nats_sum + nats), gradient_head), gradient_rows

  zero = ((0.0, 0.0), jnp.zeros(head.shape, jnp.float32))
  (sums, gradient_head), gradient_x = jax.lax.scan(
    add, zero, _chunks(x, targets, weights, chunk_tokens)
  )
  batch, length, dim = x.shape
  gradient_x = gradient_x.swapaxes(0, 1).reshape(batch, -1, dim)[:, :length]
  return sums, (gradient_x, gradient_head.astype(head.dtype))


def _backward(z_loss, chunk_tokens, saved, cotangents):
  gradient_x, gradient_head = saved
  scale = cotangents[0]
  return (
    (scale * gradient_x).astype(gradient_x.dtype),
    (scale * gradient_head).astype(gradient_head.dtype),
    None,
    None,
  )


cross_entropy_sums.defvjp(_forward, _backward)


def _chunk_terms(head, chunk, z_loss):
  """Logits and logsumexp of one chunk, and its two sums."""
  rows, targets, weights = chunk
  logits = logits_of(rows, head)
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  nats = normalizer - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nats_sum = (weights * nats).sum()
  return logits, normalizer, nats_sum + z_loss * (weights * normalizer**2).sum(), nats_sum


def _chunks(x, targets, weights, chunk_tokens):
  """The batch cut along its length into equal chunks, padded with weight 0; chunks lead."""
  batch, length = targets.shape
  context = current_mesh()
  rows = batch if context is None else max(1, batch // context.size("batch"))
  size = min(length, max(1, chunk_tokens // rows))
  padding = -length % size

  def cut(a):
    a = jnp.pad(a, ((0, 0), (0, padding)) + ((0, 0),) * (a.ndim - 2))
    return a.reshape(batch, -1, size, *a.shape[2:]).swapaxes(0, 1)

  return cut(x), cut(targets), cut(weights)
