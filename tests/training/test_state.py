"""The training state: complete, sharded as the model is, and known before it is made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_arrays, tiny_config, tiny_run

from maxllama4.checkpoint.store import CheckpointStore
from maxllama4.config import MeshConfig, OptimizerConfig
from maxllama4.mesh import build_mesh
from maxllama4.model.weights import ModelTemplate
from maxllama4.sharding import MeshContext
from maxllama4.training.footprint import bytes_per_device
from maxllama4.training.optimizer import make_optimizer
from maxllama4.training.state import (
  abstract_state,
  init_state,
  split_trainable,
  to_device,
  to_host,
)

MODEL = tiny_config(num_hidden_layers=4)
MESH = MeshConfig(fsdp=2, expert=2, tensor=2)


def context():
  return MeshContext(build_mesh(tiny_run(MODEL, mesh=MESH)), MESH)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_as_their_weights_do_and_numbers_everywhere(name):
  template = ModelTemplate(MODEL)
  optimizer = make_optimizer(OptimizerConfig(name=name), 10, template)
  state = abstract_state(template, optimizer, context())
  shardings = template.shardings(context())
  moments = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    if keys and keys[-1] in shardings:
      assert leaf.shape == template.shapes[keys[-1]].shape
      assert leaf.sharding == shardings[keys[-1]], path
      moments[keys[-1]] = moments.get(keys[-1], 0) + 1
    else:
      assert leaf.size <= 3 and leaf.sharding.is_fully_replicated, path
  assert set(moments) == template.trainable
  assert set(moments.values()) == ({2} if name == "adamw" else {1, 2})  # Muon keeps one of a matrix


def test_a_fresh_state_is_what_was_announced():
  model = tiny_config(num_hidden_layers=1)
  template, here = ModelTemplate(model), context()
  optimizer = make_optimizer(OptimizerConfig(), 10, template)
  state = init_state(template, optimizer, 0, here)
  announced = abstract_state(template, optimizer, here)
  assert jax.tree.structure(state) == jax.tree.structure(announced)
  for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(announced), strict=True):
    assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)
  assert state.step == 0 and np.std(state.model["embed/weight"]) > 0


def test_the_bias_of_a_router_is_the_only_array_that_gradients_do_not_move():
  template = ModelTemplate(MODEL)
  arrays = tiny_arrays(MODEL)
  params, fixed = split_trainable(arrays, template)
  assert params | fixed == arrays and not set(params) & set(fixed)
  assert list(fixed) == ["decoder/cycles/layers/1/feed_forward/router/bias"]
  assert fixed[next(iter(fixed))].dtype == jnp.float32


def test_bytes_by_arithmetic_are_those_of_the_parts_on_a_device():
  config = tiny_run(MODEL, mesh=MESH, optimizer=OptimizerConfig(name="adamw"))
  template = ModelTemplate(MODEL)
  state = abstract_state(template, make_optimizer(config.optimizer, 10, template), context())

  def size(tree):
    return sum(
      np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
    )

  found = bytes_per_device(config)
  assert found["devices"] == 8
  assert found["parameters_bytes"] == size(state.model)
  assert found["gradients_bytes"] == size({path: state.model[path] for path in template.trainable})
  assert found["optimizer_bytes"] == size(state.optimizer)


@pytest.fixture(scope="module")
def stepping():
  """A step of the optimizer alone, with moments in bfloat16 on the host, and a fresh state."""
  model = tiny_config(num_hidden_layers=1)
  template, here = ModelTemplate(model), context()
  optimizer = make_optimizer(OptimizerConfig(state_dtype="bfloat16"), 10, template)
  state = init_state(template, optimizer, 0, here, "host")
  shardings = jax.tree.map(lambda leaf: leaf.sharding, (state.model, state.optimizer))

  @functools.partial(jax.jit, out_shardings=shardings)
  def step(arrays, moments, accepted):
    params, fixed = split_trainable(arrays, template)
    gradients = jax.tree.map(lambda leaf: jnp.cos(100 * leaf), params)
    before = to_device(moments)
    updates, after = optimizer.update(gradients, before, params)
    kept = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), after, before)
    return optax.apply_updates(params, updates) | fixed, to_host(kept)

  return template, optimizer, here, state, step


def kinds(tree):
  return {
    (leaf.dtype.name, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(tree) if leaf.ndim
  }


def test_moments_on_the_host_stay_there_from_step_to_step(stepping):
  template, optimizer, here, state, step = stepping
  assert kinds(state.optimizer) == {("bfloat16", "pinned_host")}
  assert kinds(state.model) == {("float32", "device")}
  announced = abstract_state(template, optimizer, here, "host")
  for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(announced), strict=True):
    assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)
  arrays, moments = step(state.model, state.optimizer, True)
  assert kinds(moments) == {("bfloat16", "pinned_host")} and kinds(arrays) == kinds(state.model)
  assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(moments))
  _, kept = step(arrays, moments, False)  # a step that the guard leaves out
  jax.tree.map(np.testing.assert_array_equal, *jax.tree.map(np.asarray, (kept, moments)))


def test_moments_on_the_host_in_bfloat16_resume_to_the_bit(stepping, tmp_path):
  template, optimizer, here, state, step = stepping
  arrays, moments = step(state.model, state.optimizer, True)
  store = CheckpointStore(tmp_path)
  store.save(1, arrays, {"optimizer": moments}, {})
  shapes = abstract_state(template, optimizer, here, "host")
  restored, rest, _ = store.restore(1, shapes.model, {"optimizer": shapes.optimizer})
  store.close()
  assert kinds(rest["optimizer"]) == {("bfloat16", "pinned_host")}
  on, again = step(arrays, moments, True), step(restored, rest["optimizer"], True)
  jax.tree.map(np.testing.assert_array_equal, *jax.tree.map(np.asarray, (on, again)))
