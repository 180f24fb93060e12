"""The whole model against NumPy; packing; released sizes."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny import packed_batch, tiny_arrays, tiny_config, tiny_model

from maxllama4.config import RopeScaling, load_config
from maxllama4.model.llama4 import count_parameters, sequences_of, train_flops_per_token
from maxllama4.model.weights import ModelTemplate, arrays_of

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SCALING = RopeScaling(
  rope_type="llama3",
  factor=16.0,
  low_freq_factor=1.0,
  high_freq_factor=1.0,
  original_max_position_embeddings=16,
)


@functools.cache
def forward(config):
  template = ModelTemplate(config)
  return jax.jit(lambda arrays, *inputs: template.model(arrays)(*inputs))


@pytest.mark.parametrize(
  "changes",
  [
    {"num_hidden_layers": 5, "num_experts_per_tok": 3},
    {"tie_word_embeddings": True, "use_qk_norm": False, "rope_scaling": SCALING},
    {"moe_layers": (0,), "nope_layers": (0,), "attention_chunk_size": None},
  ],
  ids=lambda changes: "-".join(changes),
)
def test_logits_of_packed_rows_are_those_of_a_model_in_numpy(changes):
  config = tiny_config(**changes)
  batch, arrays = packed_batch(4, 9), tiny_arrays(config)
  inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
  found = forward(config)(arrays, *inputs)
  assert found.dtype == jnp.float32 and ("head/weight" in arrays) != config.tie_word_embeddings
  expected = reference.logits(arrays, config, *inputs)
  valid = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(found[valid], expected[valid], rtol=1e-4, atol=1e-4)


def test_documents_packed_in_a_row_get_the_logits_that_they_get_alone():
  config = tiny_config(num_hidden_layers=5)
  arrays, run = tiny_arrays(config), forward(config)
  lengths = [5, 7, 4]
  tokens = np.random.default_rng(0).integers(32, size=(3, 16), dtype=np.int32)
  packed = np.zeros((3, 16), np.int32)
  packed[0] = np.concatenate([row[:n] for row, n in zip(tokens, lengths)])
  segments = np.ones((3, 16), np.int32)
  segments[0] = np.repeat([1, 2, 3], lengths)
  positions = np.tile(np.arange(16, dtype=np.int32), (3, 1))
  positions[0] = np.concatenate([np.arange(n) for n in lengths])
  together = run(arrays, packed, positions, segments)[0]
  alone = run(arrays, tokens, np.tile(np.arange(16, dtype=np.int32), (3, 1)), np.ones((3, 16), int))
  expected = np.concatenate([row[:n] for row, n in zip(alone, lengths)])
  np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-5)


def known(batch):
  return np.asarray(batch["segment_ids"]) > 0


def test_positions_and_segments_may_each_be_left_out():
  """Either tells the other, and with neither a row is one document."""
  config, batch = tiny_config(), packed_batch(6, 9)
  tokens, positions, segments = (batch[name] for name in ("tokens", "positions", "segment_ids"))
  from_segments = sequences_of(tokens, None, segments, config)
  np.testing.assert_array_equal(from_segments.positions[known(batch)], positions[known(batch)])
  from_positions = sequences_of(tokens[:1], positions[:1], None, config)  # the row without padding
  assert np.all(np.diff(from_positions.segment_ids) == np.diff(segments[:1]))
  neither = sequences_of(tokens, None, None, config)
  assert np.all(np.asarray(neither.segment_ids) == 1)
  np.testing.assert_array_equal(neither.positions, np.tile(np.arange(9), (6, 1)))


def test_a_document_may_start_at_any_position():
  """A later part of a document, as context parallelism or a cache would see it, keeps its chunk borders."""
  config = tiny_config()
  tokens = jnp.arange(9, dtype=jnp.int32)[None]
  rows = sequences_of(tokens, 6 + tokens, None, config)
  assert np.all(np.asarray(rows.segment_ids) == 1)
  np.testing.assert_array_equal(rows.positions, 6 + tokens)


def test_bfloat16_activations_give_float32_logits_near_those_of_float32():
  config = tiny_config(moe_layers=())  # routing may flip on a rounding
  batch, arrays = packed_batch(4, 9), tiny_arrays(config)
  inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
  exact = forward(config)(arrays, *inputs)
  rounded = forward(dataclasses.replace(config, dtype="bfloat16"))(arrays, *inputs)
  assert rounded.dtype == jnp.float32
  error = np.abs(rounded - exact)[known(batch)]
  assert 0 < error.mean() < 0.02 * np.abs(exact).mean()


def test_pixels_are_refused_by_a_model_without_a_vision_tower():
  with pytest.raises(ValueError, match="no vision tower"):
    tiny_model()(jnp.zeros((1, 2), jnp.int32), pixel_values=jnp.zeros((1, 3, 4, 4)))


def test_a_model_taken_apart_and_put_together_is_the_same():
  template = ModelTemplate(tiny_config(num_hidden_layers=5))
  arrays = tiny_arrays(template.config)
  again = arrays_of(template.model(arrays))
  assert set(again) == set(arrays) == set(template.shapes) == set(template.axes)
  assert all(again[path] is arrays[path] for path in arrays)
  biases = {path for path in arrays if path.endswith("router/bias")}
  assert template.trainable == set(arrays) - biases and len(biases) == 1


@pytest.mark.parametrize(
  ("name", "billions"), [("llama4_scout", 107.77), ("llama4_maverick", 400.71)]
)
def test_released_sizes_have_the_published_parameters_and_flops(name, billions):
  config = load_config(CONFIGS / f"{name}.yml").model
  template = ModelTemplate(config)  # shapes alone: nothing of this size is made
  total = sum(math.prod(template.shapes[path].shape) for path in template.trainable)
  assert count_parameters(config)[0] == total
  assert round(total / 1e9, 2) == billions
  assert round(count_parameters(config)[1] / 1e9, 2) == 16.13
  assert round(train_flops_per_token(config, 8192) / 1e9, 2) == 108.88
  assert config.num_cycles == 12 and config.inhomogeneous_layer_cycle_interval == 4


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"moe_layers": ()}])
def test_parameters_are_counted_as_they_are_made(changes):
  config = tiny_config(num_hidden_layers=5, **changes)
  template = ModelTemplate(config)
  total = sum(math.prod(template.shapes[path].shape) for path in template.trainable)
  assert count_parameters(config)[0] == total
  if config.moe_layers == ():
    norms = (2 * 5 + 1) * config.hidden_size
    assert count_parameters(config)[1] == total - norms - config.vocab_size * config.hidden_size


def test_beyond_a_chunk_only_global_layers_cost_more_attention():
  config = tiny_config(num_hidden_layers=5)  # chunks of 4; two of five layers are global
  width = config.num_attention_heads * config.head_dim
  more = train_flops_per_token(config, 100) - train_flops_per_token(config, 50)
  assert more == 2 * 12 * width * (100 - 50) / 2
