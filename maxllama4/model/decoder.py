"""One decoder layer, the repeating cycle of layers, and the stack: scanned cycles, then whatever is left over."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from maxllama4.config import LayerKind, ModelConfig
from maxllama4.kernels.attention import is_cudnn_forward
from maxllama4.model.attention import Attention, Sequences
from maxllama4.model.kv_cache import LayerCache, init_cache
from maxllama4.model.mlp import GatedMLP
from maxllama4.model.moe import RoutedAndSharedMoE, RouterStatistics
from maxllama4.model.norms import RMSNorm
from maxllama4.sharding import current_mesh, current_platform

# What a layer keeps for its backward pass besides its input, by name: nothing; nothing, and the input goes to the host's
# memory; the matmuls of weights; the attention's output.
_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["layer_input"],
    offload_src="device",
    offload_dst="pinned_host",
  ),
  "matmuls": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("matmul"),  # inside shard_map dots are not seen
  ),
  "attention": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names("attention"), is_cudnn_forward
  ),
}


class Llama4DecoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x)).

  Source: transformers 5.23, models/llama4/modeling_llama4.py, Llama4TextDecoderLayer.
  """

  def __init__(self, config: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
    self.input_norm = RMSNorm(config)
    self.attention = Attention(config, uses_rope=kind.uses_rope, rngs=rngs)
    self.post_attention_norm = RMSNorm(config)
    if kind.is_moe:
      self.feed_forward = RoutedAndSharedMoE(config, rngs=rngs)
    else:
      self.feed_forward = GatedMLP(config, config.intermediate_size_mlp, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], sequences: Sequences, cache: LayerCache | None = None
  ) -> tuple[Float[Array, "B T D"], RouterStatistics | None, LayerCache | None]:
    """The residual stream after this layer, its routing statistics (None when dense), and its cache."""
    x = checkpoint_name(_row_major(x), "layer_input")
    y, cache = self.attention(self.input_norm(x), sequences, cache)
    x = x + y
    y = _row_major(self.post_attention_norm(x))
    if isinstance(self.feed_forward, RoutedAndSharedMoE):
      y, statistics = self.feed_forward(y, sequences.valid)
      return x + y, statistics, cache
    return x + self.feed_forward(y), None, cache


@jax.custom_vjp
def _row_major(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  """`x`, a token's numbers next to each other in memory. XLA for TPUs would lay them the other way, which suits the norms,
  and turn them over for the experts and back, layer by layer.

  So lies its gradient. Left to automatic differentiation, `shard_map` would add up over `tensor` what all devices there
  have alike.
  """
  if current_platform() != "tpu":
    return x

  def lay(x):
    return with_layout_constraint(x, Layout((0, 1, 2)))

  context = current_mesh()
  if context is None:
    return lay(x)
  tokens = context.spec(
    ("batch", "length", None)
  )  # left to the partitioner, all of `x` is gathered
  return jax.shard_map(lay, mesh=context.mesh, in_specs=tokens, out_specs=tokens, check_vma=False)(
    x
  )


_row_major.defvjp(lambda x: (_row_major(x), None), lambda _, gradient: (_row_major(gradient),))


class Llama4ScannableBlock(nnx.Module):
  """Consecutive layers of the given kinds; one cycle of the stack when scanned."""

  def __init__(self, config: ModelConfig, kinds: Sequence[LayerKind], *, rngs: nnx.Rngs):
    self.layers = nnx.List([Llama4DecoderLayer(config, kind, rngs=rngs) for kind in kinds])

  def __call__(
    self,
    x: Float[Array, "B T D"],
    sequences: Sequences,
    caches: list[LayerCache] | None = None,
    remat: str = "none",
  ) -> tuple[Float[Array, "B T D"], list[RouterStatistics], list[LayerCache] | None]:
    """`x` after the layers, the statistics of those with experts, and their caches, in order."""
    statistics, stored = [], []
    for i, layer in enumerate(self.layers):
      x, layer_statistics, cache = rematerialize(layer, remat)(
        x, sequences, None if caches is None else caches[i]
      )
      statistics += [] if layer_statistics is None else [layer_statistics]
      stored.append(cache)
    return x, statistics, None if caches is None else stored


def rematerialize(layer: nnx.Module, remat: str):
  """`layer` as a function that keeps what the policy `remat` says for its backward pass."""
  if remat == "none":
    return layer
  graph, state = nnx.split(layer)

  def run(state, *arguments):
    return nnx.merge(graph, state)(*arguments)

  return lambda *arguments: jax.checkpoint(run, policy=_POLICIES[remat])(state, *arguments)


class Llama4Decoder(nnx.Module):
  """All layers: `cycles` whole cycles stacked and scanned, and the `rest` of the layers one by one.

  Any list of layer kinds is built as it stands: with fewer than two whole cycles nothing is scanned.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    kinds, period = config.layer_kinds, config.inhomogeneous_layer_cycle_interval
    self.num_cycles = config.num_cycles
    self.num_scanned = self.num_cycles * period
    if self.num_cycles:
      self.cycles = stack(
        lambda rngs: Llama4ScannableBlock(config, kinds[:period], rngs=rngs), self.num_cycles, rngs
      )
    self.rest = Llama4ScannableBlock(config, kinds[self.num_scanned :], rngs=rngs)
    assert self.num_scanned + len(self.rest.layers) == config.num_hidden_layers

  def __call__(
    self,
    x: Float[Array, "B T D"],
    sequences: Sequences,
    caches: Any = None,
    remat: str = "none",
  ) -> tuple[Float[Array, "B T D"], RouterStatistics | None, Any]:
    """`x` after all layers, statistics stacked over the layers with experts (None if there are none), and the caches."""
    caches = {"cycles": None, "rest": None} if caches is None else caches
    statistics: list[RouterStatistics] = []
    cycle_caches = None
    if self.num_cycles:
      x, stacked, cycle_caches = self._scan(x, sequences, caches["cycles"], remat)
      statistics += [
        jax.tree.map(lambda leaf, i=i: leaf[i], layer)
        for i in range(self.num_cycles)
        for layer in stacked
      ]
    x, rest, rest_caches = self.rest(x, sequences, caches["rest"], remat)
    statistics += rest
    stacked = (
      jax.tree.map(lambda *layers: jax.numpy.stack(layers), *statistics) if statistics else None
    )
    return x, stacked, {"cycles": cycle_caches, "rest": rest_caches}

  def _scan(self, x, sequences, caches, remat):
    graph, states = nnx.split(self.cycles)

    def cycle(carry, i_and_state):
      x, caches = carry
      i, state = i_and_state
      # The caches ride in the carry and are updated in place; as scanned inputs and outputs they would exist twice.
      mine = jax.tree.map(lambda leaf: leaf[i], caches)
      x, statistics, mine = nnx.merge(graph, state)(x, sequences, mine, remat)
      caches = jax.tree.map(lambda leaf, new: leaf.at[i].set(new), caches, mine)
      return (x, caches), statistics

    (x, caches), statistics = jax.lax.scan(
      cycle, (x, caches), (jax.numpy.arange(self.num_cycles), states)
    )
    return x, statistics, caches

  def layer(self, index: int) -> Llama4DecoderLayer:
    """Layer `index` on its own; a scanned layer's weights are sliced out of their stack."""
    if index >= self.num_scanned:
      return self.rest.layers[index - self.num_scanned]
    cycle, place = divmod(index, self.num_scanned // self.num_cycles)
    graph, state = nnx.split(self.cycles.layers[place])
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[cycle], state))


def init_caches(config: ModelConfig, batch: int, max_length: int) -> Any:
  """Empty caches for all layers, in the structure that `Llama4Decoder` takes and gives back."""
  kinds, period = config.layer_kinds, config.inhomogeneous_layer_cycle_interval
  num_cycles = config.num_cycles

  def make(kinds, stack=()):
    return [
      init_cache(config, batch, max_length, uses_rope=kind.uses_rope, stack=stack) for kind in kinds
    ]

  return {
    "cycles": make(kinds[:period], (num_cycles,)) if num_cycles else None,
    "rest": make(kinds[num_cycles * period :]),
  }


def stack(make, size: int, rngs: nnx.Rngs):
  """`size` modules from `make(rngs)`, each with weights of its own, as one module whose weights have a leading axis."""
  keys = jax.random.split(rngs.params(), size)
  graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=keys[0]))))[0]
  states = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(params=key)))[1])(keys)
  return nnx.merge(graph, states)
