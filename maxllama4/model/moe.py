"""Mixture of experts: router, dispatch, expert products, combine. No token is dropped.

A token's score multiplies what goes into its experts, not what comes out, and is the sigmoid of the router's logit:
scores of several experts do not compete.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from maxllama4.config import ModelConfig, require
from maxllama4.kernels.choice import Choice, current_choice, use_kernels
from maxllama4.kernels.grouped_matmul import (
  MEGABLOX_DTYPES,
  PLATFORMS,
  automatic,
  grouped_matmul,
  has_tokamax,
  this_platform,
)
from maxllama4.model.dispatch import WIDE, Exchange, apply_experts, exchange_and_apply
from maxllama4.model.mlp import GatedMLP
from maxllama4.sharding import (
  MeshContext,
  current_mesh,
  current_platform,
  gather_embed,
  sum_over,
  weight,
  zeros,
)


class RouterBias(nnx.Variable):
  """Float32 [E], added to the router's logits for the choice of experts only; moved by counts, not by gradients."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStatistics:
  """Sums over the tokens that are no padding, so that parts of a batch add up; divide once, by all their tokens."""

  load: Float[Array, "... E"]  # rows that each expert got
  balance: Float[Array, "..."]  # Switch balance loss of each row of the batch, times its tokens
  z: Float[Array, "..."]  # squared logsumexp of the router's logits


class Router(nnx.Module):
  """Chooses the `num_experts_per_tok` experts with the largest logits for each token. Float32 throughout."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    experts = config.num_local_experts
    # Small, and whole everywhere: split along D, XLA would rather gather the tokens than it.
    self.weight = weight(rngs, (config.hidden_size, experts), (None, None), config)
    self.bias = RouterBias(jnp.zeros((experts,), jnp.float32), logical_axes=(None,))
    self.choices = config.num_experts_per_tok

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
    return jnp.einsum(
      "BTD,DE->BTE", x, self.weight.astype(x.dtype), preferred_element_type=jnp.float32
    )

  def __call__(
    self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
  ) -> tuple[Int[Array, "B T C"], Float[Array, "B T C"], RouterStatistics]:
    """Experts (E where the token is padding), their scores, and the batch's statistics."""
    logits = self.logits(x)
    biased = jax.lax.stop_gradient(logits) + self.bias.get_value()
    experts = jax.lax.top_k(biased, self.choices)[1]
    scores = jax.nn.sigmoid(jnp.take_along_axis(logits, experts, axis=-1))
    experts = jnp.where(valid[..., None], experts, logits.shape[-1])
    statistics = router_statistics(logits, experts, valid)
    factor = current_choice().expert_capacity_factor
    if factor > 0:
      experts, load = drop_beyond_capacity(experts, logits.shape[-1], factor)
      statistics = dataclasses.replace(statistics, load=load)
    return experts, scores, statistics


def drop_beyond_capacity(
  experts: Int[Array, "B T C"], num_experts: int, factor: float
) -> tuple[Int[Array, "B T C"], Float[Array, " E"]]:
  """Choices, E where the expert is full already, and how many each expert got.

  Of each row of the batch an expert takes the first `factor` times an even share: what is dropped depends neither on the
  mesh nor on the other rows. Source: Switch Transformer, arXiv:2101.03961, equation 3.
  """
  batch, length, choices = experts.shape
  capacity = math.ceil(factor * length * choices / num_experts)
  ids = experts.reshape(batch, -1)
  chosen = jax.nn.one_hot(ids, num_experts, dtype=jnp.int32)  # B R E
  kept = chosen * (jnp.cumsum(chosen, 1) <= capacity)
  ids = jnp.where(kept.any(-1), ids, num_experts)
  return ids.reshape(experts.shape), kept.sum((0, 1)).astype(jnp.float32)


def router_statistics(
  logits: Float[Array, "B T E"], experts: Int[Array, "B T C"], valid: Bool[Array, "B T"]
) -> RouterStatistics:
  """What balance losses and metrics need, from one layer's routing.

  The balance loss E * sum_e(share of choices e got * mean probability of e) is taken row by row of the batch and
  averaged over tokens: it is 1 when even, and does not depend on how rows are spread over devices or microbatches.
  Source: Switch Transformer, arXiv:2101.03961, equations 4-6.
  """
  num_experts = logits.shape[-1]
  chosen = jax.nn.one_hot(experts, num_experts).sum(2)  # B T E; padding's choice, E, counts nowhere
  counts = chosen.sum(1)  # B E
  keep = valid[..., None].astype(jnp.float32)
  probabilities = (jax.nn.softmax(logits) * keep).sum(1)  # B E
  choices = jnp.maximum(counts.sum(-1), 1)
  balance = num_experts * (counts / choices[:, None] * probabilities).sum()
  z = (jax.nn.logsumexp(logits, axis=-1) ** 2 * valid).sum()
  return RouterStatistics(load=counts.sum(0), balance=balance, z=z)


class RoutedAndSharedMoE(nnx.Module):
  """shared(x) + sum over chosen experts e of expert_e(score_e * x), in the dtype of `x`."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    num_experts, features = config.num_local_experts, config.intermediate_size
    # Gate, then up. Not side by side along a row: on a mesh each is split alike.
    shape = (num_experts, 2, config.hidden_size, features)
    self.router = Router(config, rngs=rngs)
    self.gate_up = weight(rngs, shape, ("experts", None, "expert_embed", "ffn"), config)
    shape = (num_experts, features, config.hidden_size)
    self.down = zeros(shape, ("experts", "ffn", "expert_embed"), config)
    self.shared_expert = GatedMLP(config, features, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
  ) -> tuple[Float[Array, "B T D"], RouterStatistics]:
    """`valid` is False at padding, which is neither routed nor counted."""
    experts, scores, statistics = self.router(x, valid)
    scores = scores.astype(x.dtype)
    gate_up, down = self.gate_up.get_value(), self.down.get_value()
    context = current_mesh()
    _check_products(x.dtype.name)
    if context is None:
      routed = route(x, experts, scores, gate_up, down)
    else:
      routed = _route_on_mesh(context, x, experts, scores, gate_up, down)
    return routed + self.shared_expert(x), statistics


def route(
  x: Float[Array, "B T D"],
  experts: Int[Array, "B T C"],
  scores: Float[Array, "B T C"],
  gate_up: Float[Array, "E 2 D F"],
  down: Float[Array, "E F D"],
) -> Float[Array, "B T D"]:
  """The sum of each token's experts, in the dtype of `x`. Choices outside 0..E-1 (padding) give zero."""
  # All gates and ups are one stack of matrices, of which a product takes every other one: cut out, they would be copied.
  stack = gate_up.reshape(-1, *gate_up.shape[2:]).astype(x.dtype)

  def apply(rows, sizes):
    none = jnp.zeros_like(sizes)
    gate, up = (
      grouped_matmul(rows, stack, jnp.stack(pair, 1).reshape(-1))
      for pair in ((sizes, none), (none, sizes))
    )
    return grouped_matmul(jax.nn.silu(gate) * up, down.astype(x.dtype), sizes)

  return _route(x, experts, scores, len(down), apply)


def _route(x, experts, scores, num_experts: int, apply):
  """`route` by `apply(rows, sizes)`: rows [R, D] sorted by expert, and how many each has, to rows in the same order."""
  batch, length, dim = x.shape
  choices = experts.shape[-1]
  ids = experts.reshape(-1)
  order = jnp.argsort(ids, stable=True)  # R: sorted place -> row
  inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
  sizes = jnp.bincount(ids, length=num_experts + 1)[:-1]

  # Rows of no expert stand last; what comes back for them, or as their gradient, may be anything.
  chosen = (experts < num_experts)[..., None]
  rows = jnp.where(chosen, x[:, :, None] * scores[..., None], 0).reshape(-1, dim)  # R D
  rows = apply(permute_rows(rows, order, inverse), sizes)
  rows = permute_rows(rows, inverse, order).reshape(batch, length, choices, dim)
  return jnp.where(chosen, rows, 0).sum(2)


@jax.custom_vjp
def permute_rows(
  rows: Float[Array, "R D"], order: Int[Array, " R"], inverse: Int[Array, " R"]
) -> Float[Array, "R D"]:
  """rows[order]; its gradient is a gather by `inverse` where automatic differentiation would scatter."""
  return rows[order]


permute_rows.defvjp(
  lambda rows, order, inverse: (rows[order], inverse),
  lambda inverse, gradient: (gradient[inverse], None, None),
)


def _route_on_mesh(context: MeshContext, x, experts, scores, gate_up, down):
  """`route` on each device's tokens; experts spread over a mesh axis get their rows from all of it (dispatch.py).

  The features of an expert may be split, too; their partial sums are added. Weights come in split as they are stored and
  are gathered here, in the dtype of `x`: so their gradients are summed and scattered in that dtype, and no device ever
  holds the gradient of a whole layer in float32.
  """
  exchange, num_experts = _exchange(context), len(gate_up)

  def local(x, experts, scores, gate_up, down):
    # Laid out as the products want it before the gather: after it, that would be a copy of a whole layer. What is
    # gathered along its last dimension is such a copy, too.
    parts = (gate_up[:, 0], gate_up[:, 1], down.swapaxes(1, 2))
    axes = ("experts", "expert_embed", "ffn")
    weights = [gather_embed(context, part, axes, x.dtype) for part in parts]

    def apply(rows, sizes):
      if exchange is None:
        return apply_experts(rows, sizes, *weights)
      return exchange_and_apply(exchange, rows, sizes, *weights)

    return sum_over(context, _route(x, experts, scores, num_experts, apply), "ffn")

  tokens = context.spec(("batch", "length", None))
  return jax.shard_map(
    local,
    mesh=context.mesh,
    in_specs=(
      tokens,
      tokens,
      tokens,
      context.spec(("experts", None, "expert_embed", "ffn")),
      context.spec(("experts", "ffn", "expert_embed")),
    ),
    out_specs=tokens,
    check_vma=False,
  )(x, experts, scores, gate_up.astype(x.dtype), down.astype(x.dtype))


def expert_kernels(config: ModelConfig, choice: Choice) -> dict[str, str]:
  """What `kernels.grouped_matmul` and, where experts are spread, `kernels.experts_dispatch` come to on the current mesh.

  Raises: ConfigError when an explicit choice cannot be met.
  """
  if not any(kind.is_moe for kind in config.layer_kinds):
    return {}
  context, platform = current_mesh(), current_platform() or jax.default_backend()
  with use_kernels(choice):
    _check_products(config.dtype)
    exchange = None if context is None else _exchange(context)
  features = config.intermediate_size // (1 if context is None else context.size("ffn"))
  shape = (config.num_local_experts, config.hidden_size, features)
  product = choice.grouped_matmul
  if product == "auto":
    product = automatic(this_platform() if platform == "gpu" else platform, shape, config.dtype)
  return {"grouped_matmul": product} | ({"experts_dispatch": exchange.kind} if exchange else {})


def _check_products(dtype: str) -> None:
  """Raises: ConfigError when the products that are asked for do not run here, or not in `dtype`."""
  kind, platform = current_choice().grouped_matmul, current_platform() or jax.default_backend()
  platforms = PLATFORMS.get(kind, (platform,))
  require(
    platform in platforms,
    f"kernels.grouped_matmul={kind} runs on {' and '.join(platforms)} alone, and these devices are {platform}; set"
    " kernels.grouped_matmul=auto.",
  )
  require(
    kind != "megablox" or dtype in MEGABLOX_DTYPES,
    f"kernels.grouped_matmul=megablox multiplies {' and '.join(MEGABLOX_DTYPES)} alone, and dtype={dtype}; set"
    " kernels.grouped_matmul=auto.",
  )
  require(
    kind != "tokamax" or has_tokamax(),
    "kernels.grouped_matmul=tokamax needs the package tokamax, which is not installed; install it, or set"
    " kernels.grouped_matmul=auto.",
  )


def _exchange(context: MeshContext) -> Exchange | None:
  """How rows get to their experts; None where every device has all experts.

  Raises: ConfigError when the way that is asked for does not exist on this mesh.
  """
  kind, parts = current_choice().experts_dispatch, context.size("experts")
  axes = context.axes_of("experts")
  spread = parts > 1 and axes[0] in context.axes_of("batch")
  require(
    kind == "auto" or spread or parts == 1,
    f"kernels.experts_dispatch={kind} moves tokens along the mesh axis that splits the experts, but"
    f" mesh.rules.batch={list(context.axes_of('batch'))} splits no tokens over {', '.join(axes)}; add it there, or set"
    " kernels.experts_dispatch=auto.",
  )
  if parts == 1:
    return None
  if not spread:
    return Exchange(axes[0], parts, "alike")
  if kind == "auto":
    on_tpu = current_platform() == "tpu"
    kind = "ragged_all_to_all" if on_tpu and parts >= WIDE else "ring"
  return Exchange(axes[0], parts, kind)
