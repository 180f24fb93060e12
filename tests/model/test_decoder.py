"""The stack: exactly the layers asked for, scanned or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import packed_batch, tiny_arrays, tiny_config

from maxllama4.model.attention import Sequences
from maxllama4.model.decoder import stack
from maxllama4.model.mlp import GatedMLP
from maxllama4.model.moe import RoutedAndSharedMoE
from maxllama4.model.weights import ModelTemplate, layer_place

PATTERNS = {
  "two whole cycles": ({"num_hidden_layers": 4}, 2),
  "a cycle and a half": ({"num_hidden_layers": 3}, 0),
  "two cycles of four, two left over": (
    {"num_hidden_layers": 10, "nope_layer_interval": 4, "interleave_moe_layer_step": 2},
    2,
  ),
  "a cycle of six": ({"num_hidden_layers": 12, "interleave_moe_layer_step": 3}, 2),
  "every layer alike": (
    {"num_hidden_layers": 3, "nope_layer_interval": 0, "interleave_moe_layer_step": 1},
    3,
  ),
  "irregular lists": ({"num_hidden_layers": 6, "nope_layers": (0, 1, 5), "moe_layers": (2,)}, 0),
  "lists that repeat": ({"num_hidden_layers": 5, "nope_layers": (), "moe_layers": (0, 2, 4)}, 2),
  "one layer": ({"num_hidden_layers": 1}, 0),
  "intervals longer than the stack": (
    {"num_hidden_layers": 2, "nope_layer_interval": 9, "interleave_moe_layer_step": 9},
    2,
  ),
}


def expected_kinds(config):
  """(no RoPE, experts) of each layer, from the settings' definition."""
  nope, moe = config.nope_layers, config.moe_layers
  every = lambda n, i: n > 0 and (i + 1) % n == 0  # noqa: E731
  return [
    (
      i in nope if nope is not None else every(config.nope_layer_interval, i),
      i in moe if moe is not None else every(config.interleave_moe_layer_step, i),
    )
    for i in range(config.num_hidden_layers)
  ]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stack_has_exactly_the_layers_asked_for(pattern):
  changes, num_cycles = PATTERNS[pattern]
  config = tiny_config(**changes)
  assert config.num_cycles == num_cycles
  template = ModelTemplate(config)
  decoder = template.model(
    {path: jnp.zeros(s.shape, s.dtype) for path, s in template.shapes.items()}
  ).decoder
  layers = [decoder.layer(i) for i in range(config.num_hidden_layers)]
  kinds = [
    (not layer.attention.uses_rope, isinstance(layer.feed_forward, RoutedAndSharedMoE))
    for layer in layers
  ]
  assert kinds == expected_kinds(config)
  assert all(
    isinstance(layer.feed_forward, GatedMLP) != kind[1] for layer, kind in zip(layers, kinds)
  )
  queries = [path for path in template.shapes if path.endswith("attention/query")]
  stacked = {path: template.shapes[path].shape[:-3] for path in queries}
  assert sum(shape[0] if shape else 1 for shape in stacked.values()) == len(layers)


def test_every_layer_has_a_place_of_its_own():
  for changes, _ in PATTERNS.values():
    config = tiny_config(**changes)
    places = {layer_place(config, i) for i in range(config.num_hidden_layers)}
    assert len(places) == config.num_hidden_layers
    paths = {path.rsplit("/attention/query")[0] for path in ModelTemplate(config).shapes}
    assert {path for path, _ in places} <= paths


@pytest.mark.parametrize("num_layers", [4, 5])
def test_scanned_layers_compute_what_they_do_one_by_one_and_report_in_order(num_layers):
  config = tiny_config(num_hidden_layers=num_layers, num_experts_per_tok=2)
  assert config.num_cycles == 2
  template, batch = ModelTemplate(config), packed_batch(3, 9)
  x = jax.random.normal(jax.random.key(0), (3, 9, 16))

  @jax.jit
  def both(arrays, x):
    decoder = template.model(arrays).decoder
    rows = Sequences.of(batch["positions"], batch["segment_ids"], config)
    scanned = decoder(x, rows)[:2]
    statistics = []
    for i in range(num_layers):
      x, layer_statistics, _ = decoder.layer(i)(x, rows)
      statistics += [] if layer_statistics is None else [layer_statistics]
    return scanned, (x, jax.tree.map(lambda *layers: jnp.stack(layers), *statistics))

  scanned, one_by_one = both(tiny_arrays(config), x)
  assert scanned[1].load.shape == (2, 4)
  assert len(np.unique(np.asarray(scanned[1].z))) == 2  # layers differ, so their order shows
  for one, other in zip(jax.tree.leaves(scanned), jax.tree.leaves(one_by_one), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_fresh_layer_passes_its_input_on_and_can_learn():
  config = tiny_config(num_hidden_layers=5)
  template = ModelTemplate(config)
  arrays = jax.jit(template.init)(jax.random.key(0))
  tokens = packed_batch(1, 7)["tokens"]
  positions = jnp.arange(7)[None]
  sequences = Sequences.of(positions, jnp.ones_like(positions), config)

  def stream(arrays):
    model = template.model(arrays)
    return model.decoder(model.embed(tokens), sequences)[0]

  found, pull = jax.vjp(jax.jit(stream), arrays)
  np.testing.assert_array_equal(found, arrays["embed/weight"][tokens])
  gradients = pull(jax.random.normal(jax.random.key(1), found.shape))[0]
  for path, gradient in gradients.items():
    if path.endswith(("/attention/out", "/down")):
      assert np.abs(gradient).max() > 0, path


def test_layers_of_a_stack_are_initialised_each_on_its_own():
  config = tiny_config(hidden_size=64, initializer_range=0.5)
  made = stack(lambda rngs: GatedMLP(config, 32, rngs=rngs), 3, nnx.Rngs(0))
  gate = np.asarray(made.gate.get_value())
  assert gate.shape == (3, 64, 32)
  assert len(np.unique(gate)) > 0.99 * gate.size
  np.testing.assert_allclose(gate.std(axis=(1, 2)), 0.5, rtol=0.05)
