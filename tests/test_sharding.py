"""Logical axes: one table decides where everything lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import tiny_config, tiny_run

from maxllama4.config import ConfigError, MeshConfig
from maxllama4.mesh import build_mesh
from maxllama4.model.weights import ModelTemplate
from maxllama4.sharding import MeshContext, constrain, current_mesh, use_mesh
from maxllama4.training.state import init_state

MODEL = tiny_config(num_hidden_layers=5)
MIXED = MeshConfig(fsdp=2, expert=2, tensor=2)


def context_of(mesh: MeshConfig) -> MeshContext:
  return MeshContext(build_mesh(tiny_run(MODEL, mesh=mesh)), mesh)


def test_the_table_splits_every_kind_of_weight():
  template = ModelTemplate(MODEL)
  shapes, shardings = template.shapes, template.shardings(context_of(MIXED))
  parts = {path: shardings[path].shard_shape(shape.shape) for path, shape in shapes.items()}
  dense, experts = "decoder/rest/layers/0", "decoder/cycles/layers/1"  # the latter a stack of two
  expected = {
    "embed/weight": (16, 4),  # vocab / tensor, embed / fsdp and expert
    "head/weight": (4, 16),
    "norm/weight": (16,),
    f"{dense}/attention/query": (4, 2, 6),  # embed / fsdp and expert, heads / tensor
    f"{dense}/attention/key": (4, 1, 6),
    f"{dense}/attention/out": (2, 6, 4),
    f"{dense}/feed_forward/gate": (4, 12),  # ffn / tensor
    f"{dense}/feed_forward/down": (12, 4),
    f"{experts}/feed_forward/gate_up": (
      2,
      2,
      2,
      8,
      4,
    ),  # layers whole, experts / expert, expert_embed / fsdp
    f"{experts}/feed_forward/down": (2, 2, 4, 8),
    f"{experts}/feed_forward/router/weight": (2, 16, 4),
    f"{experts}/feed_forward/router/bias": (2, 4),
  }
  assert {path: parts[path] for path in expected} == expected


def test_fresh_weights_are_made_in_their_parts_and_do_not_depend_on_the_mesh():
  template, context = ModelTemplate(tiny_config()), context_of(MIXED)
  alone = template.init(jax.random.key(0))
  spread = init_state(template, optax.identity(), 0, context).model
  for path, array in alone.items():
    assert spread[path].sharding == template.shardings(context)[path]
    np.testing.assert_array_equal(array, spread[path])


def test_a_changed_rule_moves_what_it_names_and_nothing_else():
  rules = MeshConfig().rules
  changed = MeshConfig(
    fsdp=2, expert=2, tensor=2, rules=rules | {"embed": None, "vocab": ["fsdp", "tensor"]}
  )
  shardings = ModelTemplate(MODEL).shardings(context_of(changed))
  assert shardings["embed/weight"].spec == P(("fsdp", "tensor"), None)
  assert shardings["decoder/rest/layers/0/attention/query"].spec == P(None, ("tensor",), None)
  before = ModelTemplate(MODEL).shardings(context_of(MIXED))
  assert shardings["norm/weight"] == before["norm/weight"]


@pytest.mark.parametrize(
  ("rules", "words"),
  [
    ({"embedding": "fsdp"}, "embedding"),
    ({"embed": "fsdb"}, "fsdb"),
    ({"experts": ["expert", "fsdp"]}, "mesh.rules.experts"),
  ],
)
def test_a_table_with_a_stranger_is_refused(rules, words):
  with pytest.raises(ConfigError) as error:
    MeshConfig(rules=MeshConfig().rules | rules)
  assert words in str(error.value)


def test_a_layer_that_names_an_unknown_axis_raises():
  with use_mesh(context_of(MIXED).mesh, MIXED), pytest.raises(KeyError, match="'heds' is not a"):
    constrain(jnp.zeros((8, 8)), ("batch", "heds"))


def test_arrays_are_laid_out_inside_a_mesh_only():
  x = jnp.zeros((8, 8))
  assert current_mesh() is None and constrain(x, ("batch", "heads")) is x
  with use_mesh(context_of(MIXED).mesh, MIXED):
    laid = jax.jit(lambda x: constrain(x, ("batch", "heads")))(x)
    assert laid.sharding.shard_shape(x.shape) == (2, 4)
  assert current_mesh() is None


def test_a_mesh_of_one_device_is_as_good_as_none():
  one = MeshConfig()
  with use_mesh(build_mesh(tiny_run(MODEL), jax.devices()[:1]), one):
    assert current_mesh() is None
