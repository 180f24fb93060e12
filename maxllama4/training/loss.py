"""Cross-entropy without the logits of a whole batch in memory. Everything here is a sum over tokens; nothing is a mean.

The head's product, the softmax and their gradients are computed chunk by chunk of positions, in one pass: what the
backward pass needs is already there when the forward pass ends, so no logits are kept or computed twice.

On a mesh each device goes through its own tokens. Before the first chunk the head is gathered, in the dtype of the
product, over the axes that split tokens as well; after the last one its gradient is summed and scattered back, in that
dtype. An axis that splits only the vocabulary keeps it split: devices exchange a maximum and two sums a token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from maxllama4.model.embeddings import logits_of
from maxllama4.sharding import MeshContext, current_mesh, gather_parts, scatter_sum

LANES = 128  # of a TPU
NO_TOKEN = -1  # what a column that only fills up stands for
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

  def local(axes, x, head, targets, weights):
    head, columns = axes.gathered(head, x.dtype)

    def add(sums, chunk):
      _, _, objective, nats = _chunk_terms(axes, head, columns, chunk, z_loss)
      return (sums[0] + objective, sums[1] + nats), None

    sums, _ = jax.lax.scan(add, (0.0, 0.0), _chunks(x, targets, weights, chunk_tokens))
    return axes.summed(sums)

  return _on_mesh(local, lambda tokens, head: PartitionSpec())(x, head, targets, weights)


def _forward(x, head, targets, weights, z_loss, chunk_tokens):
  def local(axes, x, head, targets, weights):
    whole, columns = axes.gathered(head, x.dtype)

    def add(carry, chunk):
      (objective_sum, nats_sum), gradient_head = carry
      logits, normalizer, objective, nats = _chunk_terms(axes, whole, columns, chunk, z_loss)
      rows, chunk_targets, chunk_weights = chunk
      probabilities = jnp.exp(logits - normalizer[..., None])
      hits = columns == chunk_targets[..., None]
      scale = chunk_weights * (1 + 2 * z_loss * normalizer)
      gradient = probabilities * scale[..., None] - hits * chunk_weights[..., None]
      gradient = gradient.astype(rows.dtype)
      gradient_rows = jnp.einsum("BTV,DV->BTD", gradient, whole)
      gradient_head += jnp.einsum("BTD,BTV->DV", rows, gradient, preferred_element_type=jnp.float32)
      return ((objective_sum + objective, nats_sum + nats), gradient_head), gradient_rows

    zero = ((0.0, 0.0), jnp.zeros(whole.shape, jnp.float32))
    (sums, gradient_head), gradient_x = jax.lax.scan(
      add, zero, _chunks(x, targets, weights, chunk_tokens)
    )
    batch, length, dim = x.shape
    gradient_x = gradient_x.swapaxes(0, 1).reshape(batch, -1, dim)[:, :length]
    gradients = axes.summed_over_columns(gradient_x), axes.scattered(gradient_head, head, x.dtype)
    # The layers' backward pass waits for both: else the compiler scatters the head's gradient after it, and keeps it
    # whole until then.
    return axes.summed(sums), jax.lax.optimization_barrier(gradients)

  def outputs(tokens, head):
    return PartitionSpec(), (tokens, head)

  return _on_mesh(local, outputs)(x, head, targets, weights)


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


@dataclasses.dataclass(frozen=True)
class _Axes:
  """The mesh axes, those longer than 1, that split the tokens, the head's rows and its columns; on one device none."""

  tokens: tuple[str, ...] = ()
  embed: tuple[str, ...] = ()
  vocab: tuple[str, ...] = ()
  context: MeshContext | None = None

  @classmethod
  def of(cls, context: MeshContext) -> "_Axes":
    def long(*names):
      axes = [axis for name in names for axis in context.axes_of(name)]
      return tuple(axis for axis in axes if context.mesh.shape[axis] > 1)

    return cls(long("batch", "length"), long("embed"), long("vocab"), context)

  @property
  def _split_columns(self) -> tuple[str, ...]:
    """Axes along which devices hold the same tokens, and each computes with its own columns."""
    return tuple(axis for axis in self.vocab if axis not in self.tokens)

  @property
  def _gathered_columns(self) -> tuple[str, ...]:
    return tuple(axis for axis in self.vocab if axis in self.tokens)

  def gathered(self, head, dtype):
    """The head with all that this device's tokens need, in `dtype`, and the token that each of its columns stands for."""
    head, width = head.astype(dtype), head.shape[1]
    start = jax.lax.axis_index(self.vocab) * width if self.vocab else 0
    columns = start + jnp.arange(width)
    if self._pads_columns:
      padding = -width % LANES
      head = jnp.pad(head, ((0, 0), (0, padding)))
      columns = jnp.pad(columns, (0, padding), constant_values=NO_TOKEN)
    head = self._gather(head, self.embed, 0)
    head = self._gather(head, self._gathered_columns, 1)
    return head, self._gather(columns, self._gathered_columns, 0)

  @property
  def _pads_columns(self) -> bool:
    """Whether the head's gradient is scattered over its rows.

    The vocabulary of the released models is no multiple of a TPU's lanes. XLA does not scatter the sum of such an array:
    it sums all of it on every chip, which sends twice the bytes. So the columns are filled up to whole lanes, and sent
    as a third dimension.
    """
    return bool(self.embed) and not self._gathered_columns

  def _gather(self, x, axes, dim):
    for axis in reversed(axes):
      x = gather_parts(self.context, x, axis, dim)
    return x

  def scattered(self, gradient, head, dtype):
    """This device's part of the sum over all tokens of the gradient of the gathered head; what is sent is in `dtype`."""
    if self.tokens:
      gradient = gradient.astype(dtype)
    if self._pads_columns:
      gradient = gradient.reshape(len(gradient), -1, LANES)
    for dim, axes in ((1, self._gathered_columns), (0, self.embed)):
      for axis in axes:
        if axis in self.tokens:
          gradient = scatter_sum(self.context, gradient, axis, dim)
        else:  # all devices along it have the same gradient
          size = gradient.shape[dim] // jax.lax.axis_size(axis)
          start = jax.lax.axis_index(axis) * size
          gradient = jax.lax.dynamic_slice_in_dim(gradient, start, size, dim)
    copies = tuple(axis for axis in self.tokens if axis not in self.embed + self.vocab)
    gradient = jax.lax.psum(gradient, copies) if copies else gradient
    if self._pads_columns:
      gradient = gradient.reshape(len(gradient), -1)[:, : head.shape[1]]
    return gradient.astype(head.dtype)

  def summed(self, sums):
    """The sums over the tokens of all devices."""
    return jax.lax.psum(sums, self.tokens) if self.tokens else sums

  def summed_over_columns(self, x):
    """What devices with different columns of the head found for the same tokens, put together."""
    return jax.lax.psum(x, self._split_columns) if self._split_columns else x

  def largest_over_columns(self, x):
    return jax.lax.pmax(x, self._split_columns) if self._split_columns else x


def _on_mesh(local, outputs):
  """`local(axes, x, head, targets, weights)` on every device of the mesh; without one, as it is.

  `outputs` gives the specs of its results from those of the tokens' vectors and of the head.
  """
  context = current_mesh()
  if context is None:
    return functools.partial(local, _Axes())
  x, head = context.spec(("batch", "length", None)), context.spec(("embed", "vocab"))
  tokens = context.spec(("batch", "length"))
  return jax.shard_map(
    functools.partial(local, _Axes.of(context)),
    mesh=context.mesh,
    in_specs=(x, head, tokens, tokens),
    out_specs=outputs(x, head),
    check_vma=False,
  )


def _chunk_terms(axes, head, columns, chunk, z_loss):
  """Logits (of this device's columns) and logsumexp (of all) of one chunk, and its two sums."""
  rows, targets, weights = chunk
  logits = jnp.where(columns == NO_TOKEN, -jnp.inf, logits_of(rows, head))
  largest = axes.largest_over_columns(logits.max(axis=-1))
  # By a masked sum, for the target's column may be another device's.
  of_target = jnp.where(columns == targets[..., None], logits, 0).sum(axis=-1)
  exponentials = jnp.exp(logits - largest[..., None]).sum(axis=-1)
  exponentials, of_target = axes.summed_over_columns((exponentials, of_target))
  normalizer = largest + jnp.log(exponentials)
  nats = normalizer - of_target
  nats_sum = (weights * nats).sum()
  return logits, normalizer, nats_sum + z_loss * (weights * normalizer**2).sum(), nats_sum


def _chunks(x, targets, weights, chunk_tokens):
  """The batch cut along its length into equal chunks, padded with weight 0; chunks lead."""
  batch, length = targets.shape
  size = min(length, max(1, chunk_tokens // batch))
  padding = -length % size

  def cut(a):
    a = jnp.pad(a, ((0, 0), (0, padding)) + ((0, 0),) * (a.ndim - 2))
    return a.reshape(batch, -1, size, *a.shape[2:]).swapaxes(0, 1)

  return cut(x), cut(targets), cut(weights)
