"""The training and evaluation steps: pure functions of state and batch."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from maxllama4.config import Config
from maxllama4.kernels.choice import Choice, use_kernels
from maxllama4.model.attention import Sequences
from maxllama4.model.moe import RouterStatistics
from maxllama4.model.weights import Arrays, ModelTemplate, is_inside, layer_place
from maxllama4.sharding import MeshContext, constrain
from maxllama4.training.health import FINE, judge
from maxllama4.training.loss import cross_entropy_sums
from maxllama4.training.state import TrainState, split_trainable, to_device, to_host
from maxllama4.training.statistics import debug_metrics

Batch = dict[
  str, jax.Array
]  # tokens, targets, segment_ids, positions: int32 [B, T]; weights: float32 [B, T]
Metrics = dict[str, jax.Array]


def make_train_step(
  config: Config,
  template: ModelTemplate,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """One optimizer step over a batch, microbatch by microbatch. Gradients do not depend on how many there are."""

  @use_kernels(kernel_choice(config))
  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    params, fixed = split_trainable(state.model, template)
    totals = batch_totals(batch)
    gradients, sums = batch_gradients(config, template, params, fixed, batch, totals)
    loss, gradient_norm = sums["nats"] / totals["weight"], optax.global_norm(gradients)
    verdict, health = judge(config.training, state.health, loss, gradient_norm)
    on_host = config.optimizer.state_memory == "host"
    before = to_device(state.optimizer) if on_host else state.optimizer
    updates, optimizer_state = optimizer.update(gradients, before, params)
    moved = optax.apply_updates(params, updates)
    moved |= move_router_biases(config, fixed, sums.get("router"))
    accepted = (verdict == FINE) & ~health.halted
    model, optimizer_state = jax.tree.map(
      lambda new, old: jnp.where(accepted, new, old),
      (moved, optimizer_state),
      (state.model, before),
    )
    optimizer_state = to_host(optimizer_state) if on_host else optimizer_state
    metrics = {
      "loss": loss,
      "step_tokens": jnp.where(accepted, totals["weight"], 0),
      "learning_rate": schedule(state.step - state.health.skipped),
      "gradient_norm": gradient_norm,
      "verdict": verdict,
      "halted": health.halted,
      "skipped_steps": health.skipped,
      **router_metrics(config, sums.get("router"), totals["tokens"]),
    }
    if config.training.debug_statistics:
      metrics |= debug_metrics(
        template.model(state.model), microbatches_of(config, batch), gradients
      )
    return TrainState(state.step + ~health.halted, model, optimizer_state, health), metrics

  return train_step


def lower_train_step(
  config: Config,
  template: ModelTemplate,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  state: TrainState,
  context: MeshContext,
) -> jax.stages.Lowered:
  """The step of a run, ready to be compiled; `state` may be shapes with shardings, and its arrays are given away."""
  shape = (config.training.batch_size, config.training.sequence_length)
  sharding = context.sharding(("batch", "length"))
  dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for name, dtype in (dtypes | {"weights": jnp.float32}).items()
  }
  step = make_train_step(config, template, optimizer, schedule)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, context.sharding(())))
  return compiled.lower(state, batch)


def batch_gradients(
  config: Config,
  template: ModelTemplate,
  params: Arrays,
  fixed: Arrays,
  batch: Batch,
  totals: Metrics,
) -> tuple[Arrays, dict]:
  """Gradients of the objective with respect to `params`, and the sums of `microbatch_objective`, over a whole batch.

  Layers compute in `dtype`, so weights are cast to it here, once: the gradients of a microbatch are then as narrow. They
  come back in the dtype of the weights.
  """
  narrow = {path: _narrowed(value, config.model.dtype) for path, value in params.items()}

  def gradients_of(microbatch):
    def objective(params):
      return microbatch_objective(config, template, params | fixed, microbatch, totals)

    return jax.grad(objective, has_aux=True)(narrow)

  if config.training.gradient_accumulation == 1:
    gradients, sums = gradients_of(batch)
  else:
    gradients, sums = _accumulate(gradients_of, microbatches_of(config, batch))
  return {path: g.astype(params[path].dtype) for path, g in gradients.items()}, sums


def _narrowed(value: jax.Array, dtype: str) -> jax.Array:
  return value.astype(dtype) if jnp.dtype(dtype).itemsize < value.dtype.itemsize else value


def batch_totals(batch: Batch) -> Metrics:
  """What sums over a whole batch are divided by: counted targets, and tokens that are no padding."""
  return {
    "weight": jnp.maximum(batch["weights"].sum(), 1),
    "tokens": jnp.maximum((batch["segment_ids"] > 0).sum(), 1),
  }


def microbatch_objective(
  config: Config, template: ModelTemplate, model: Arrays, batch: Batch, totals: Metrics
) -> tuple[jax.Array, dict]:
  """This microbatch's share of the objective, which adds up over microbatches; and its sums."""
  training = config.training
  objective, nats, statistics = forward_sums(config, template, model, batch)
  objective = objective / totals["weight"]
  sums = {"nats": nats}
  if statistics is not None:
    per_token_and_layer = totals["tokens"] * statistics.z.shape[0]
    objective += training.load_balance_loss * statistics.balance.sum() / per_token_and_layer
    objective += training.router_z_loss * statistics.z.sum() / per_token_and_layer
    sums["router"] = statistics
  return objective, sums


def forward_sums(
  config: Config, template: ModelTemplate, arrays: Arrays, batch: Batch
) -> tuple[jax.Array, jax.Array, RouterStatistics | None]:
  """Sums over a batch: cross-entropy with and without its z term, in nats; and the routing statistics by layer."""
  training = config.training
  model = template.model(arrays)
  sequences = Sequences.of(
    batch["positions"], batch["segment_ids"], config.model, whole_rows=config.data.whole_rows
  )
  x, statistics, _ = model.hidden_states(batch["tokens"], sequences, remat=training.remat)
  objective, nats = cross_entropy_sums(
    x, model.head_weight(), batch["targets"], batch["weights"], training.z_loss, training.loss_chunk
  )
  return objective, nats, statistics


def make_eval_step(config: Config, template: ModelTemplate) -> Callable[[Arrays, Batch], Metrics]:
  """Nats and counted targets of one held-out batch, as sums."""

  @use_kernels(kernel_choice(config))
  def eval_step(model: Arrays, batch: Batch) -> Metrics:
    _, nats, _ = forward_sums(config, template, model, batch)
    return {"nats": nats, "weight": batch["weights"].sum()}

  return eval_step


def kernel_choice(config: Config) -> Choice:
  """The run's choice of kernels."""
  return Choice(**dataclasses.asdict(config.kernels))


def microbatches_of(config: Config, batch: Batch) -> Batch:
  """The batch with a leading axis of microbatches; each device's rows are dealt out, so none has to move."""
  count = config.training.gradient_accumulation

  def split(x):
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, (None, "batch", "length"))

  return jax.tree.map(split, batch)


def _accumulate(gradients_of, microbatches):
  """Sums of gradients (in float32) and of sums over the microbatches."""

  def add(total, microbatch):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients_of(microbatch)), None

  first = jax.tree.map(lambda x: x[0], microbatches)
  shapes = jax.eval_shape(gradients_of, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
  total, _ = jax.lax.scan(add, zeros, microbatches)
  return total


def move_router_biases(
  config: Config, biases: Arrays, statistics: RouterStatistics | None
) -> Arrays:
  """Biases raised for experts that got fewer rows than the mean and lowered for the others, then centred.

  Source: auxiliary-loss-free load balancing, arXiv:2408.15664, algorithm 1.
  """
  rate = config.training.router_bias_update_rate
  if statistics is None or rate == 0:
    return biases
  load = statistics.load  # one row a layer with experts, in order
  moves = rate * jnp.sign(load.mean(-1, keepdims=True) - load)
  moe_layers = [i for i, kind in enumerate(config.model.layer_kinds) if kind.is_moe]
  biases = dict(biases)
  for row, layer in enumerate(moe_layers):
    prefix, index = layer_place(config.model, layer)
    path = f"{prefix}/feed_forward/router/bias"
    if is_inside(path, config.training.frozen):
      continue
    place = () if index is None else (index,)
    moved = biases[path][place] + moves[row]
    biases[path] = biases[path].at[place].set(moved - moved.mean())
  return biases


def router_metrics(
  config: Config, statistics: RouterStatistics | None, tokens: jax.Array
) -> Metrics:
  """How evenly experts are loaded: over all layers, and (`..._by_layer`) for each layer with experts."""
  if statistics is None:
    return {}
  num_experts, choices = config.model.num_local_experts, config.model.num_experts_per_tok
  load = statistics.load  # layers with experts, E
  # Whole numbers: in float32 a difference of sums beyond 2^24 would be off.
  dropped = tokens * choices - load.astype(jnp.int32).sum(-1)
  rows = jnp.maximum(load.sum(-1, keepdims=True), 1)
  share = load / rows
  relative = share * num_experts  # 1 where even
  entropy = -(share * jnp.log(jnp.maximum(share, 1e-30))).sum(-1) / jnp.log(max(num_experts, 2))
  by_layer = {
    "load_balance_loss": statistics.balance / tokens,
    "max_load": relative.max(-1),
    "min_load": relative.min(-1),
    "entropy": entropy,  # 1 where even, 0 where one expert gets everything
    "dead_experts": (load == 0).sum(-1).astype(jnp.float32),
  }
  return {
    "moe/load_balance_loss": by_layer["load_balance_loss"].mean(),
    "moe/max_load": by_layer["max_load"].max(),
    "moe/min_load": by_layer["min_load"].min(),
    "moe/entropy": by_layer["entropy"].mean(),
    "moe/dead_experts": by_layer["dead_experts"].sum(),
    "moe/router_z_loss": statistics.z.mean() / tokens,
    "moe/load_by_layer": relative,
    "moe/dropped_tokens": dropped.astype(jnp.float32).sum(),
    **{f"moe/{name}_by_layer": value for name, value in by_layer.items()},
  }
