"""Schedules, decay mask, clipping, and the whole chain against AdamW in plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_arrays, tiny_config, tiny_vision_config

from maxllama4.config import ConfigError, OptimizerConfig
from maxllama4.model.weights import ModelTemplate
from maxllama4.training.optimizer import is_decayed, learning_rate_schedule, make_optimizer
from maxllama4.training.state import split_trainable

MODEL = tiny_config(num_hidden_layers=5)


@pytest.mark.parametrize(
  ("settings", "values"),
  [
    ({"schedule": "constant"}, {0: 1.0, 50: 1.0, 99: 1.0}),
    ({"schedule": "constant", "warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
    ({"schedule": "linear"}, {0: 1.0, 50: 0.55, 100: 0.1}),
    ({"schedule": "linear", "warmup_steps": 20}, {0: 0.05, 19: 1.0, 20: 1.0, 60: 0.55, 100: 0.1}),
    ({"schedule": "cosine"}, {0: 1.0, 50: 0.55, 100: 0.1}),
    ({"schedule": "cosine", "warmup_steps": 20}, {19: 1.0, 20: 1.0, 60: 0.55, 100: 0.1}),
    ({"schedule": "cosine", "final_fraction": 0.0}, {25: (1 + np.sqrt(0.5)) / 2, 100: 0.0}),
    ({"schedule": "wsd", "warmup_steps": 10}, {9: 1.0, 50: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ({"schedule": "wsd", "warmup_steps": 90}, {89: 1.0, 90: 1.0, 95: 0.55, 100: 0.1}),
    ({"schedule": "wsd", "decay_fraction": 1.0}, {0: 1.0, 50: 0.55, 100: 0.1}),
    ({"schedule": "linear", "warmup_steps": 1}, {0: 1.0, 1: 1.0, 100: 0.1}),
  ],
)
def test_a_schedule_of_100_steps_passes_its_key_values(settings, values):
  schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, **settings), 100)
  for step, value in values.items():
    np.testing.assert_allclose(schedule(jnp.int32(step)), 2.0 * value, rtol=1e-5, atol=1e-7)


def test_matrices_decay_and_norms_and_the_embedding_do_not():
  trainable = ModelTemplate(MODEL).trainable
  kept = {path for path in trainable if not is_decayed(path)}
  assert kept == {path for path in trainable if path.endswith("norm/weight")} | {"embed/weight"}
  assert "head/weight" in trainable and "decoder/cycles/layers/1/feed_forward/gate_up" not in kept
  assert not any(path.endswith("router/bias") for path in trainable)


def params_and_gradients(scale):
  template = ModelTemplate(tiny_config())
  params, fixed = split_trainable(tiny_arrays(template.config), template)
  assert list(fixed) == ["decoder/rest/layers/1/feed_forward/router/bias"]
  gradients, _ = split_trainable(tiny_arrays(template.config, seed=1), template)
  return template, params, jax.tree.map(lambda g: scale * g, gradients)


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_two_steps_are_adamw_with_clipping_and_decoupled_decay(limit):
  template, params, gradients = params_and_gradients(scale=1.0)
  config = OptimizerConfig(
    learning_rate=0.1, schedule="linear", weight_decay=0.2, max_gradient_norm=limit
  )
  optimizer = make_optimizer(config, 10, template)
  expected = {path: np.asarray(value, np.float64) for path, value in params.items()}
  norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in gradients.values()))
  assert norm > 1  # so that clipping does something
  clip = min(1.0, limit / norm) if limit else 1.0
  moments = {path: (0.0, 0.0) for path in params}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for step in range(2):
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    rate = 0.1 * (1 - 0.9 * step / 10)
    for path, value in expected.items():
      g = clip * np.asarray(gradients[path], np.float64)
      m = config.b1 * moments[path][0] + (1 - config.b1) * g
      v = config.b2 * moments[path][1] + (1 - config.b2) * g**2
      moments[path] = (m, v)
      unbiased = m / (1 - config.b1 ** (step + 1)), v / (1 - config.b2 ** (step + 1))
      move = unbiased[0] / (np.sqrt(unbiased[1]) + config.eps)
      decay = config.weight_decay * value if is_decayed(path) else 0
      expected[path] = value - rate * (move + decay)
  for path, value in expected.items():
    np.testing.assert_allclose(params[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


def test_small_gradients_are_not_clipped():
  template, params, gradients = params_and_gradients(scale=1e-3)
  results = []
  for limit in (1.0, 0.0):
    optimizer = make_optimizer(OptimizerConfig(max_gradient_norm=limit), 10, template)
    results.append(jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0])
  jax.tree.map(np.testing.assert_array_equal, *results)


def orthogonalised(matrix):
  """Five Newton-Schulz steps towards the nearest matrix with orthonormal rows or columns."""
  x = np.asarray(matrix, np.float64)
  x = x / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
  return x


def matrices_of(path, array):
  """The matrices [D, other] that Muon should see in an array."""
  array = np.asarray(array, np.float64)
  name = path.split("/", 4)[-1]
  if name in ("attention/query", "attention/key", "attention/value"):
    return [array.reshape(16, -1)]
  if name == "attention/out":
    return [array.reshape(-1, 16)]
  if name == "feed_forward/gate_up":
    return [array[e, side] for e in range(4) for side in range(2)]
  if array.ndim == 3:
    return list(array)
  return [array]


def test_muon_orthogonalises_each_matrix_of_a_stack_and_leaves_the_rest_to_adam():
  template, params, gradients = params_and_gradients(scale=1.0)
  config = OptimizerConfig(
    name="muon",
    learning_rate=0.1,
    embedding_learning_rate=0.3,
    schedule="constant",
    weight_decay=0.0,
    max_gradient_norm=0.0,
  )
  optimizer = make_optimizer(config, 10, template)
  updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
  for path, update in updates.items():
    if path.startswith(("embed", "head")) or path.endswith(("norm/weight", "router/weight")):
      adam = optax.adam(0.3, config.b1, config.b2, config.eps, nesterov=True)
      expected, _ = adam.update(gradients[path], adam.init(params[path]))
      np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=path)
      continue
    pairs = zip(matrices_of(path, update), matrices_of(path, gradients[path]), strict=True)
    for moved, gradient in pairs:
      expected = -orthogonalised(gradient)
      scale = np.vdot(moved, expected) / np.vdot(expected, expected)
      np.testing.assert_allclose(moved, scale * expected, atol=1e-3 * scale, err_msg=path)
      assert 0.01 < np.sqrt(np.mean(moved**2)) < 0.03, path  # AdamW's are about 0.2 x 0.1


@pytest.mark.parametrize(
  ("name", "model"),
  [
    ("adamw", dataclasses.replace(tiny_vision_config(num_hidden_layers=1), num_hidden_layers=1)),
    ("muon", tiny_config(num_hidden_layers=1)),
  ],
  ids=["adamw, vision", "muon"],
)
def test_what_gets_no_gradient_moves_only_where_it_decays_and_a_vision_tower_does_not(name, model):
  """The data are texts: decay alone would wear down a tower that no gradient reaches."""
  template = ModelTemplate(model)
  config = OptimizerConfig(name=name, schedule="constant", weight_decay=0.2)
  params, _ = split_trainable(tiny_arrays(template.config), template)
  optimizer = make_optimizer(config, 10, template)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
  moved = {path for path, update in updates.items() if np.any(update)}
  assert moved == {path for path in params if is_decayed(path)}
  assert "head/weight" in moved and not any(p.startswith(("vision", "projector")) for p in moved)


# Moments in another dtype than the weights


def moments_of(state):
  return [leaf for leaf in jax.tree.leaves(state) if leaf.size > 3]  # Muon keeps its coefficients


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bfloat16_are_those_of_float32_rounded_after_every_update(name):
  template, params, gradients = params_and_gradients(scale=1.0)
  states, updates = {}, {}
  for dtype in ("float32", "bfloat16"):
    config = OptimizerConfig(name=name, schedule="constant", state_dtype=dtype)
    optimizer = make_optimizer(config, 10, template)
    updates[dtype], states[dtype] = jax.jit(optimizer.update)(
      gradients, optimizer.init(params), params
    )
  for path, update in updates["bfloat16"].items():
    np.testing.assert_allclose(update, updates["float32"][path], rtol=1e-3, atol=1e-8, err_msg=path)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in moments_of(states["bfloat16"]))
  for half, whole in zip(
    moments_of(states["bfloat16"]), moments_of(states["float32"]), strict=True
  ):
    np.testing.assert_allclose(half.astype(jnp.float32), whole, rtol=2**-8, atol=1e-10)


def second_moment(b2, values):
  """AdamW's second moment in bfloat16 of one weight, after gradients of the given sizes."""
  template = ModelTemplate(tiny_config(num_hidden_layers=1))
  params, _ = split_trainable(tiny_arrays(template.config), template)
  config = OptimizerConfig(b2=b2, max_gradient_norm=0.0, state_dtype="bfloat16")
  optimizer = make_optimizer(config, 10, template)

  def step(state, value):
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)
    return optimizer.update(gradients, state, params)[1], None

  state, _ = jax.jit(lambda values: jax.lax.scan(step, optimizer.init(params), values))(values)
  return float(optax.tree.get(state, "nu")["head/weight"][0, 0])


def test_a_second_moment_in_bfloat16_follows_gradients_up_and_down():
  ups, downs = jnp.full(200, 2.0), jnp.full(200, 0.1)
  assert second_moment(0.95, ups) == pytest.approx(4, rel=0.08)
  assert second_moment(0.95, jnp.concatenate([ups, downs])) == pytest.approx(0.01, rel=0.08)


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_a_decay_at_which_a_moment_in_bfloat16_would_never_fall_is_refused(name):
  with pytest.raises(
    ConfigError, match=rf"optimizer.{name}=0.999 .* optimizer.state_dtype=bfloat16"
  ):
    OptimizerConfig(**{name: 0.999}, state_dtype="bfloat16")
  OptimizerConfig(**{name: 0.996}, state_dtype="bfloat16")


def test_weights_in_bfloat16_may_have_moments_in_float32():
  template = ModelTemplate(tiny_config(param_dtype="bfloat16"))
  params, _ = split_trainable(tiny_arrays(template.config), template)
  optimizer = make_optimizer(OptimizerConfig(state_dtype="float32"), 10, template)
  state = jax.eval_shape(optimizer.init, params)
  assert {leaf.dtype for leaf in moments_of(state)} == {jnp.dtype("float32")}
  updates, after = jax.eval_shape(optimizer.update, params, state, params)
  assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(
    lambda leaf: leaf.dtype, state
  )
  moved = jax.eval_shape(optax.apply_updates, params, updates)
  assert {leaf.dtype for leaf in moved.values()} == {jnp.dtype("bfloat16")}
