"""Experts: one token at a time in NumPy, a dense product for the gradients, and what must not be routed or counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny import packed_batch, tiny_arrays, tiny_config, tiny_model

from maxllama4.kernels import grouped_matmul
from maxllama4.kernels.choice import Choice
from maxllama4.model import moe as model_moe
from maxllama4.model.moe import expert_kernels, route
from maxllama4.model.weights import ModelTemplate

LAYER = 1  # of tiny_config(): the one with experts
PREFIX = f"decoder/rest/layers/{LAYER}/feed_forward/"


@functools.cache
def layer(choices=1, dtype="float32"):
  """A layer with experts and its weights in float64."""
  config = tiny_config(num_experts_per_tok=choices, dtype=dtype)
  arrays = tiny_arrays(config)
  weights = reference.part(reference.layer_weights(arrays, config, LAYER), "feed_forward")
  return ModelTemplate(config).model(arrays).decoder.layer(LAYER).feed_forward, weights, config


def tokens_and_padding(rows=3, length=9):
  batch = packed_batch(rows, length)
  x = jax.random.normal(jax.random.key(0), (rows, length, 16))
  return x, batch["segment_ids"]


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_each_token_gets_its_best_experts_and_padding_only_the_shared_one(choices):
  moe, weights, config = layer(choices)
  x, segments = tokens_and_padding()
  found, statistics = jax.jit(lambda x: moe(x, segments > 0))(x)
  expected = [
    reference.mixture(np.asarray(row, np.float64), weights, np.asarray(s), config)
    for row, s in zip(x, segments)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  valid = np.asarray(segments) > 0
  best = np.argsort(-np.asarray(x, np.float64)[valid] @ weights["router/weight"])[:, :choices]
  np.testing.assert_array_equal(statistics.load, np.bincount(best.ravel(), minlength=4))


def test_a_layer_of_padding_alone_is_its_shared_expert_and_counts_nothing():
  moe, _, _ = layer(2)
  x, segments = tokens_and_padding()
  found, statistics = jax.jit(moe.__call__)(x, jnp.zeros_like(segments, bool))
  np.testing.assert_allclose(found, jax.jit(moe.shared_expert.__call__)(x), rtol=1e-6, atol=1e-6)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(statistics))


def dense_route(x, experts, scores, gate_up, down):
  """Every expert on every token, kept where chosen: what `route` is, without sorting."""
  chosen = jax.nn.one_hot(experts, gate_up.shape[0]) * scores[..., None]  # B T C E
  z = jnp.einsum("BTD,BTCE->EBTCD", x, chosen)
  hidden = jnp.einsum("EBTCD,EGDF->EBTCGF", z, gate_up)
  hidden = jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
  return jnp.einsum("EBTCF,EFD->BTD", hidden, down)


def test_gradients_through_sorting_and_scores_are_those_of_a_dense_product():
  moe, _, _ = layer(2)
  x, segments = tokens_and_padding()
  logits = jax.random.normal(jax.random.key(1), (*x.shape[:2], 4))
  # Expert 3 is chosen by none, 4 stands for padding.
  experts = jnp.where(segments[..., None] > 0, jax.lax.top_k(logits[..., :3], 2)[1], 4)
  gate_up, down = moe.gate_up.get_value(), moe.down.get_value()
  direction = jax.random.normal(jax.random.key(2), x.shape)

  def gradients(routing):
    def objective(x, logits, gate_up, down):
      scores = jax.nn.sigmoid(jnp.take_along_axis(logits, jnp.minimum(experts, 3), axis=-1))
      return (routing(x, experts, scores, gate_up, down) * direction).sum()

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3)))(x, logits, gate_up, down)

  (value, ours), (expected_value, expected) = gradients(route), gradients(dense_route)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  for one, other in zip(ours, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
  for gradient in ours[2:]:
    assert np.all(np.asarray(gradient[3]) == 0) and np.all(np.isfinite(gradient))


def test_a_bias_changes_which_experts_are_chosen_but_not_their_scores_and_has_no_gradient():
  config = tiny_config()
  template, arrays = ModelTemplate(config), tiny_arrays(config)
  x, segments = tokens_and_padding()
  valid = segments > 0

  @jax.jit
  def choose(x, bias):
    model = template.model(arrays | {f"{PREFIX}router/bias": bias})
    router = model.decoder.layer(LAYER).feed_forward.router
    return *router(x, valid), router.logits(x)

  bias = jnp.array([0.0, 0.0, 100.0, 0.0])
  experts, scores, statistics, logits = choose(x, bias)
  assert np.all(np.asarray(experts)[np.asarray(valid)] == 2)
  np.testing.assert_allclose(scores[..., 0], jax.nn.sigmoid(logits[..., 2]), rtol=1e-6)
  assert statistics.load.tolist() == [0, 0, int(valid.sum()), 0]
  plain = choose(x, jnp.zeros(4))
  assert len(np.unique(np.asarray(plain[0])[np.asarray(valid)])) > 1
  # The balance loss looks at the router's own probabilities, not at biased ones.
  np.testing.assert_allclose(statistics.z, plain[2].z, rtol=1e-6)
  gradient = jax.grad(lambda bias: choose(x, bias)[1].sum() + choose(x, bias)[2].balance)(bias)
  assert not np.any(gradient)


def test_equal_logits_go_to_the_lowest_expert():
  moe, _, _ = layer(2)
  x = jnp.zeros((1, 3, 16))
  experts, scores, _ = moe.router(x, jnp.ones((1, 3), bool))
  assert experts.tolist() == [[[0, 1]] * 3] and np.all(np.asarray(scores) == 0.5)


def test_bfloat16_tokens_are_routed_by_float32_logits_and_scores():
  moe, _, _ = layer(2, "bfloat16")
  x, segments = tokens_and_padding()
  x = x.astype(jnp.bfloat16)
  logits = moe.router.logits(x)
  weight = moe.router.weight.get_value().astype(jnp.bfloat16)
  exact = jnp.einsum("BTD,DE->BTE", x.astype(jnp.float32), weight.astype(jnp.float32))
  np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
  _, scores, statistics = jax.eval_shape(moe.router.__call__, x, segments > 0)
  float32 = (logits, scores, *jax.tree.leaves(statistics))
  assert {array.dtype for array in float32} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(moe.__call__, x, segments > 0)[0].dtype == jnp.bfloat16


def test_a_dense_layer_is_swiglu():
  mlp = tiny_model().decoder.layer(0).feed_forward
  x = jax.random.normal(jax.random.key(0), (2, 3, 16))
  weights = [np.asarray(w.get_value(), np.float64) for w in (mlp.gate, mlp.up, mlp.down)]
  expected = reference.gated_mlp(np.asarray(x, np.float64), *weights)
  np.testing.assert_allclose(mlp(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("gpu", "product"), [("cuda", "tokamax"), ("rocm", "blockwise")])
def test_a_run_says_the_products_that_its_gpus_get(gpu, product, monkeypatch):
  monkeypatch.setattr(grouped_matmul, "has_tokamax", lambda: True)
  monkeypatch.setattr(model_moe, "current_platform", lambda: "gpu")
  for module in (grouped_matmul, model_moe):
    monkeypatch.setattr(module, "this_platform", lambda: gpu)
  assert expert_kernels(tiny_config(), Choice()) == {"grouped_matmul": product}
