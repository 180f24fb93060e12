"""One training step: what is summed over what, and that nothing but the batch as a whole matters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import packed_batch, tiny_arrays, tiny_config, tiny_run, tiny_vision_config

from maxllama4.config import ConfigError
from maxllama4.model.moe import RouterStatistics, router_statistics
from maxllama4.model.weights import ModelTemplate
from maxllama4.training.health import Health
from maxllama4.training.optimizer import learning_rate_schedule, make_optimizer
from maxllama4.training.state import TrainState, split_trainable
from maxllama4.training.step import (
  batch_totals,
  make_eval_step,
  make_train_step,
  move_router_biases,
  router_metrics,
)

# Two scanned cycles of a dense chunked layer and one with experts, of which each token takes two.
MODEL = tiny_config(num_hidden_layers=4, num_experts_per_tok=2)
ALL_LOSSES = {
  "z_loss": 0.1,
  "load_balance_loss": 0.2,
  "router_z_loss": 0.1,
  "router_bias_update_rate": 0.01,
}
# Keeps the gradients as its state and moves nothing.
SHOW_GRADIENTS = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, params), gradients),
)


@functools.cache
def compiled_step(gradient_accumulation=1, remat="none"):
  template = ModelTemplate(MODEL)
  config = tiny_run(MODEL, gradient_accumulation=gradient_accumulation, remat=remat, **ALL_LOSSES)
  return jax.jit(
    make_train_step(config, template, SHOW_GRADIENTS, learning_rate_schedule(config.optimizer, 10))
  )


def fresh_state():
  template, model = ModelTemplate(MODEL), tiny_arrays(MODEL)
  params, _ = split_trainable(model, template)
  return TrainState(jnp.zeros((), jnp.int32), model, SHOW_GRADIENTS.init(params), Health.fresh())


def assert_same(one, other, tolerance=1e-6):
  one, other = (jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other))
  for (path, a), (_, b) in zip(one, other, strict=True):
    np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize(
  ("gradient_accumulation", "remat"),
  [(2, "none"), (1, "matmuls"), (4, "full"), (2, "offload"), (2, "attention")],
)
def test_microbatches_and_recomputation_change_no_loss_no_metric_and_no_gradient(
  gradient_accumulation, remat
):
  batch = packed_batch(8, 10)
  state, metrics = compiled_step()(fresh_state(), batch)
  assert metrics["gradient_norm"] > 0.1 and metrics["moe/load_balance_loss"] > 1
  other_state, other_metrics = compiled_step(gradient_accumulation, remat)(fresh_state(), batch)
  assert_same(other_metrics, metrics)
  assert_same(other_state.optimizer, state.optimizer)
  assert_same(other_state.model, state.model)  # the router's biases moved


def test_what_stands_at_padding_changes_nothing():
  batch = packed_batch(8, 10)
  padding = batch["segment_ids"] == 0
  other = batch | {
    name: jnp.where(padding, (batch[name] + 7) % MODEL.vocab_size, batch[name])
    for name in ("tokens", "targets", "positions")
  }
  assert_same(compiled_step()(fresh_state(), other), compiled_step()(fresh_state(), batch), 0)


def test_the_metrics_of_a_step_are_those_of_its_batch():
  batch = packed_batch(8, 10)
  state, metrics = compiled_step()(fresh_state(), batch)
  num_tokens = int((batch["segment_ids"] > 0).sum())
  assert metrics["step_tokens"] == num_tokens
  assert metrics["moe/dropped_tokens"] == 0
  assert metrics["moe/max_load_by_layer"].shape == (2,)
  assert metrics["learning_rate"] == learning_rate_schedule(tiny_run(MODEL).optimizer, 10)(0)
  np.testing.assert_allclose(
    metrics["gradient_norm"], optax.global_norm(state.optimizer), rtol=1e-6
  )
  assert state.step == 1
  evaluate = jax.jit(make_eval_step(tiny_run(MODEL), ModelTemplate(MODEL)))
  sums = evaluate(fresh_state().model, batch)
  np.testing.assert_allclose(sums["nats"] / sums["weight"], metrics["loss"], rtol=1e-6)


def test_totals_of_a_batch_of_padding_do_not_divide_by_zero():
  batch = jax.tree.map(jnp.zeros_like, packed_batch(2, 6))
  assert batch_totals(batch) == {"weight": 1, "tokens": 1}


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_the_balance_loss_is_the_switch_formula_row_by_row_without_padding(choices):
  num_experts, (rows, length) = 5, (3, 7)
  logits = jax.random.normal(jax.random.key(0), (rows, length, num_experts))
  valid = np.arange(length) < np.array([7, 4, 0])[:, None]  # the last row is all padding
  experts = np.argsort(-np.asarray(logits), axis=-1)[..., :choices]
  statistics = router_statistics(
    logits,
    jnp.where(valid[..., None], experts, num_experts).astype(jnp.int32),
    jnp.asarray(valid),
  )
  probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
  balance, load = 0.0, np.zeros(num_experts)
  for row in range(2):
    chosen = experts[row, valid[row]].reshape(-1)
    counts = np.bincount(chosen, minlength=num_experts)
    mean_probability = probabilities[row, valid[row]].mean(0)
    balance += valid[row].sum() * num_experts * np.sum(counts / counts.sum() * mean_probability)
    load += counts
  np.testing.assert_allclose(statistics.balance, balance, rtol=1e-5)
  np.testing.assert_array_equal(statistics.load, load)
  z = (np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2)[valid].sum()
  np.testing.assert_allclose(statistics.z, z, rtol=1e-5)


def test_the_balance_loss_is_one_where_routing_is_even():
  logits = jnp.tile(jnp.log(2.0) * jnp.eye(4), (1, 2, 1))  # each expert twice
  statistics = router_statistics(
    logits, jnp.argmax(logits, -1)[..., None], jnp.ones(logits.shape[:2], bool)
  )
  np.testing.assert_allclose(statistics.balance / 8, 1.0, rtol=1e-6)


def statistics_of(load):
  load = jnp.asarray(load, jnp.float32)
  return RouterStatistics(load=load, balance=load.sum(-1), z=2 * load.sum(-1))


def test_a_bias_rises_where_load_is_below_the_mean_falls_where_above_and_is_centred():
  config = tiny_run(tiny_config(num_hidden_layers=5), router_bias_update_rate=0.5)
  biases = {"decoder/cycles/layers/1/feed_forward/router/bias": jnp.ones((2, 4))}
  load = [[0, 2, 4, 2], [5, 1, 1, 1]]
  ((_, moved),) = move_router_biases(config, biases, statistics_of(load)).items()
  moves = 0.5 * np.array([[1, 0, -1, 0], [-1, 1, 1, 1]])
  expected = 1 + moves
  np.testing.assert_allclose(moved, expected - expected.mean(1, keepdims=True), atol=1e-7)
  still = dataclasses.replace(
    config, training=dataclasses.replace(config.training, router_bias_update_rate=0.0)
  )
  assert move_router_biases(still, biases, statistics_of(load)) is biases


def test_biases_of_scanned_and_of_left_over_layers_move_by_their_own_layers_load():
  model = tiny_config(num_hidden_layers=5, moe_layers=(0, 2, 4), nope_layers=())
  assert model.num_cycles == 2  # of layers 0 and 1, 2 and 3; 4 is left over
  biases = {
    "decoder/cycles/layers/0/feed_forward/router/bias": jnp.zeros((2, 4)),
    "decoder/rest/layers/0/feed_forward/router/bias": jnp.zeros(4),
  }
  load = [[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]]
  config = tiny_run(model, router_bias_update_rate=1.0)
  moved = move_router_biases(config, biases, statistics_of(load))
  signs = np.array([[-1, 1, 1, 1], [1, -1, 1, 1], [1, 1, -1, 1]]) - 0.5
  scanned, rest = moved.values()
  np.testing.assert_allclose(scanned, signs[:2])
  np.testing.assert_allclose(rest, signs[2])
  frozen = tiny_run(model, router_bias_update_rate=1.0, frozen=("decoder/cycles",))
  scanned, rest = move_router_biases(frozen, biases, statistics_of(load)).values()
  assert not np.any(scanned)
  np.testing.assert_allclose(rest, signs[2])


def test_load_metrics_name_the_busiest_and_idlest_expert_of_each_layer():
  model = tiny_config(interleave_moe_layer_step=1)
  load = [[4, 4, 4, 4], [8, 0, 6, 2]]
  metrics = router_metrics(tiny_run(model), statistics_of(load), jnp.int32(16))
  shares = np.array([0.5, 0.375, 0.125])
  entropy = -(shares * np.log(shares)).sum() / np.log(4)
  expected = {
    "moe/max_load_by_layer": [1, 2],
    "moe/min_load_by_layer": [1, 0],
    "moe/load_by_layer": [[1, 1, 1, 1], [2, 0, 1.5, 0.5]],
    "moe/dead_experts_by_layer": [0, 1],
    "moe/entropy_by_layer": [1, entropy],
    "moe/load_balance_loss_by_layer": [1, 1],
    "moe/max_load": 2,
    "moe/min_load": 0,
    "moe/dead_experts": 1,
    "moe/entropy": (1 + entropy) / 2,
    "moe/load_balance_loss": 1,
    "moe/router_z_loss": 2,
    "moe/dropped_tokens": 0,
  }
  assert set(metrics) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_a_few_dropped_tokens_of_a_large_batch_are_counted_exactly():
  tokens = 2**25 + 2
  load = np.full((3, 4), 2**23, np.float32)  # of each layer two are dropped
  metrics = router_metrics(tiny_run(), statistics_of(load), jnp.int32(tokens))
  assert metrics["moe/dropped_tokens"] == 6
  load[1, 2:] += (1, 1)
  metrics = router_metrics(tiny_run(), statistics_of(load), jnp.int32(tokens))
  assert metrics["moe/dropped_tokens"] == 4


def test_a_step_compiles_once_lowers_the_loss_and_gives_its_buffers_to_the_next():
  config = tiny_run(tiny_config(), load_balance_loss=0.01)
  template = ModelTemplate(config.model)
  optimizer = make_optimizer(config.optimizer, 10, template)
  traced = []

  def step(state, batch):
    traced.append(state)
    schedule = learning_rate_schedule(config.optimizer, 10)
    return make_train_step(config, template, optimizer, schedule)(state, batch)

  params, _ = split_trainable(tiny_arrays(config.model), template)
  arrays, moments = tiny_arrays(config.model), optimizer.init(params)
  health = jax.tree.map(jnp.copy, Health.fresh())  # buffers of their own, to be given away
  state = TrainState(jnp.zeros((), jnp.int32), arrays, moments, health)
  step = jax.jit(step, donate_argnums=0)
  losses = []
  for seed in (0, 0, 0, 1):
    before = state
    state, metrics = step(state, packed_batch(8, 10, seed=seed))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    losses.append(float(metrics["loss"]))
  assert len(traced) == 1
  assert losses[2] < losses[1] < losses[0]


def test_frozen_parts_stay_and_have_no_moments():
  config = tiny_run(tiny_config(num_hidden_layers=1), frozen=("embed", "decoder"))
  template = ModelTemplate(config.model, config.training.frozen)
  assert template.trainable == {"norm/weight", "head/weight"}
  optimizer = make_optimizer(config.optimizer, 10, template)
  arrays = tiny_arrays(config.model)
  moments = optimizer.init(split_trainable(arrays, template)[0])
  assert len(jax.tree.leaves(moments)) == 2 * 2 + 2  # two of each weight, two counters
  schedule = learning_rate_schedule(config.optimizer, 10)
  step = jax.jit(make_train_step(config, template, optimizer, schedule))
  state = TrainState(jnp.zeros((), jnp.int32), arrays, moments, Health.fresh())
  state, _ = step(state, packed_batch(8, 10))
  moved = {path for path in arrays if np.any(state.model[path] != arrays[path])}
  assert moved == template.trainable
  with pytest.raises(
    ConfigError, match=r"training.frozen=visions is no part .*decoder, embed, head"
  ):
    ModelTemplate(config.model, ("visions",))


def test_texts_train_a_model_with_a_vision_tower_as_they_train_one_without():
  model = dataclasses.replace(tiny_vision_config(num_hidden_layers=1), num_hidden_layers=1)
  text = dataclasses.replace(model, vision_config=None)
  config = tiny_run(model, frozen=("vision", "projector"))
  template, arrays = ModelTemplate(model, config.training.frozen), tiny_arrays(model)
  optimizer = make_optimizer(config.optimizer, 10, template)
  moments = optimizer.init(split_trainable(arrays, template)[0])
  step = make_train_step(config, template, optimizer, learning_rate_schedule(config.optimizer, 10))
  batch = packed_batch(8, 10)
  state = TrainState(jnp.zeros((), jnp.int32), arrays, moments, Health.fresh())
  state, metrics = jax.jit(step)(state, batch)
  moved = {path for path in arrays if np.any(state.model[path] != arrays[path])}
  assert moved == set(ModelTemplate(text).shapes)
  sums = make_eval_step(tiny_run(text), ModelTemplate(text))({p: arrays[p] for p in moved}, batch)
  np.testing.assert_allclose(metrics["loss"], sums["nats"] / sums["weight"], rtol=1e-6)
