"""Token embedding and output head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from maxllama4.config import ModelConfig
from maxllama4.sharding import MeshContext, constrain, current_mesh, sum_over, weight


class Embedding(nnx.Module):
  """Token ids to vectors in `dtype`, unscaled."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.weight = weight(rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"), config)
    self.dtype = config.dtype

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    table, context = self.weight.astype(self.dtype), current_mesh()
    if context is not None and _moves_rows(context):
      return _look_up_on_mesh(context, table, tokens)
    return constrain(table.at[tokens].get(mode="clip"), ("batch", "length", None))


def _moves_rows(context: MeshContext) -> bool:
  """Whether devices along the axes that split the vocabulary have the same tokens. Else the lookup is XLA's to split."""
  split = {axis for name in ("batch", "length") for axis in context.axes_of(name)}
  return not split & set(context.axes_of("vocab"))


def _look_up_on_mesh(
  context: MeshContext, table: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
  """table[tokens]: a device looks up its part of the vectors of all tokens, and sends each other one those of its tokens.

  That is less than the table, which XLA would gather where several mesh axes split it, and add up its whole gradient on
  every device.
  """
  split = tuple(axis for axis in context.axes_of("embed") if context.mesh.shape[axis] > 1)
  rows, columns = len(table), context.axes_of("vocab")

  def local(table, tokens):
    ids = jnp.clip(tokens, 0, rows - 1)
    ids = jax.lax.all_gather(ids, split) if split else ids[None]  # S B T
    if len(table) < rows:  # the rest of the vocabulary gives zeros, and is added
      ids = ids - jax.lax.axis_index(columns) * len(table)
      ids = jnp.where(ids < 0, len(table), ids)
    x = table.at[ids].get(mode="fill", fill_value=0)
    x = jax.lax.all_to_all(x, split, 0, 3, tiled=True) if split else x
    return sum_over(context, x[0], "vocab")

  return jax.shard_map(
    local,
    mesh=context.mesh,
    in_specs=(context.spec(("vocab", "embed")), context.spec(("batch", "length"))),
    out_specs=context.spec(("batch", "length", None)),
    check_vma=False,
  )(table, tokens)


class Head(nnx.Module):
  """Vectors to logits, with a weight of its own ([D, V])."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.weight = weight(rngs, (config.hidden_size, config.vocab_size), ("embed", "vocab"), config)


def logits_of(x: Float[Array, "B T D"], head: Float[Array, "D V"]) -> Float[Array, "B T V"]:
  """Scores of every token: the product in the dtype of `x`, sums and result in float32."""
  return jnp.einsum("BTD,DV->BTV", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
