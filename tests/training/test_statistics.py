"""Statistics by layer, against NumPy on the layers taken one by one."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import packed_batch, tiny_arrays, tiny_config, tiny_run

from maxllama4.model.attention import Sequences
from maxllama4.model.weights import ModelTemplate
from maxllama4.training.statistics import Moments, debug_metrics
from maxllama4.training.step import microbatches_of

MODEL = tiny_config(num_hidden_layers=5)  # two scanned cycles, and one layer


def described(x):
  x = np.asarray(x, np.float64)
  return {"mean": x.mean(), "deviation": x.std(), "zeros": (x == 0).mean(), "max": abs(x).max()}


def assert_layers(found, group, expected):
  for name in ("mean", "deviation", "zeros", "max"):
    values = [described(layer)[name] for layer in expected]
    np.testing.assert_allclose(
      found[f"debug/{group}/{name}"], values, rtol=1e-4, atol=1e-6, err_msg=name
    )


def test_each_layer_is_described_over_all_microbatches():
  template, arrays = ModelTemplate(MODEL), tiny_arrays(MODEL)
  model, batch = template.model(arrays), packed_batch(8, 10)
  rng = np.random.default_rng(3)
  gradients = {
    path: jnp.asarray(rng.standard_normal(shape.shape) * (rng.random(shape.shape) < 0.7))
    for path, shape in template.shapes.items()
  }
  microbatches = microbatches_of(tiny_run(MODEL, gradient_accumulation=2), batch)
  found = jax.jit(lambda b, g: debug_metrics(model, b, g))(microbatches, gradients)

  x, streams = model.embed(batch["tokens"]), []
  sequences = Sequences.of(batch["positions"], batch["segment_ids"], MODEL)
  for i in range(MODEL.num_hidden_layers):
    x = model.decoder.layer(i)(x, sequences)[0]
    streams.append(x)
  assert_layers(found, "activations", streams)

  def of_layer(i):
    """Layers 0, 2 and 1, 3 are stacked; 4 is by itself."""
    place = f"decoder/cycles/layers/{i % 2}/" if i < 4 else "decoder/rest/layers/0/"
    mine = [np.asarray(g) for path, g in gradients.items() if path.startswith(place)]
    return np.concatenate([(g[i // 2] if i < 4 else g).ravel() for g in mine])

  assert_layers(found, "gradients", [of_layer(i) for i in range(5)])


def test_one_number_that_is_not_finite_shows():
  found = Moments.of(jnp.array([[1.0, jnp.inf], [0.0, 2.0]]), axis=(1,)).describe()
  assert np.isinf(found["max"][0]) and not np.isfinite(found["deviation"][0])
  assert found["max"][1] == 2 and found["zeros"][1] == 0.5
