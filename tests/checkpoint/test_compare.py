"""Where two checkpoints depart: the layer and sub-block whose weights were changed."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from tiny import tiny_arrays, tiny_config, tiny_model, tiny_vision_config

import maxllama4
from maxllama4 import cli
from maxllama4.checkpoint.compare import CompareRequest, compare_models
from maxllama4.config import ConfigError
from maxllama4.model.weights import ModelTemplate

MODEL = tiny_config(num_hidden_layers=5)  # layers 0 to 3 are scanned
TOKENS = [1, 5, 9, 3, 7, 2]


def changed(path, index=()):
  """The model with one array, or one layer of a stack, 1 % larger."""
  arrays = dict(tiny_arrays(MODEL))
  arrays[path] = arrays[path].at[index].multiply(1.01)
  return ModelTemplate(MODEL).model(arrays)


def test_a_model_does_not_depart_from_itself():
  comparison = compare_models(tiny_model(MODEL), tiny_model(MODEL), TOKENS, 0.0)
  assert comparison.first is None and comparison.settings == {}
  names = [block.name for block in comparison.blocks]
  assert names[:3] == ["embedding", "layer 0 attention", "layer 0 feed_forward"]
  assert names[-3:] == ["layer 4 feed_forward", "norm", "logits"]


@pytest.mark.parametrize(
  ("path", "index", "name"),
  [
    ("embed/weight", (), "embedding"),
    ("decoder/cycles/layers/0/attention/out", 1, "layer 2 attention"),
    ("decoder/cycles/layers/1/feed_forward/shared_expert/down", 1, "layer 3 feed_forward"),
    ("decoder/rest/layers/0/post_attention_norm/weight", (), "layer 4 feed_forward"),
    ("norm/weight", (), "norm"),
    ("head/weight", (), "logits"),
  ],
)
def test_the_first_block_whose_weights_were_changed_is_named(path, index, name):
  comparison = compare_models(tiny_model(MODEL), changed(path, index), TOKENS, 1e-5)
  assert comparison.first.name == name
  before = [b for b in comparison.blocks[: comparison.blocks.index(comparison.first)]]
  assert all(block.max_difference < 1e-5 for block in before)


@pytest.mark.parametrize(
  ("path", "index", "name"),
  [
    ("vision/positional_embedding", (), "vision embedding"),
    ("vision/encoder/layers/attention/out", 1, "vision layer 1 attention"),
    ("vision/encoder/layers/mlp/fc2", 0, "vision layer 0 feed_forward"),
    ("vision/post_norm/bias", (), "vision adapter"),
    ("projector/weight", (), "vision projector"),
    ("norm/weight", (), "norm"),
  ],
)
def test_vision_towers_are_compared_too(path, index, name):
  config = tiny_vision_config()
  arrays = dict(tiny_arrays(config))
  arrays[path] = arrays[path].at[index].multiply(1.01)
  other = ModelTemplate(config).model(arrays)
  assert compare_models(tiny_model(config), other, TOKENS, 1e-5).first.name == name


def test_a_tower_that_only_one_model_has_is_said():
  text = dataclasses.replace(tiny_vision_config(), vision_config=None)
  comparison = compare_models(tiny_model(tiny_vision_config()), tiny_model(text), TOKENS, 1e3)
  assert comparison.settings["vision_config"][1] is None
  assert not any(block.block.startswith("vision") for block in comparison.blocks)


def test_a_value_that_is_not_a_number_departs():
  arrays = tiny_arrays(MODEL) | {"norm/weight": jnp.full(16, jnp.nan)}
  broken = ModelTemplate(MODEL).model(arrays)
  assert compare_models(tiny_model(MODEL), broken, TOKENS, 1.0).first.name == "norm"


def test_settings_that_differ_are_listed_and_sizes_that_differ_are_refused():
  other = dataclasses.replace(MODEL, rope_theta=50.0)
  comparison = compare_models(tiny_model(MODEL), tiny_model(other), TOKENS, 1e-4)
  assert comparison.settings == {"rope_theta": (100.0, 50.0)}
  assert comparison.first.name == "layer 0 attention"
  with pytest.raises(ConfigError, match="differ in num_hidden_layers: 5 and 2"):
    compare_models(tiny_model(MODEL), tiny_model(), TOKENS, 1e-4)
  with pytest.raises(ConfigError, match=r"must lie in 0\.\.31"):
    compare_models(tiny_model(MODEL), tiny_model(MODEL), [1, 32], 1e-4)


def test_the_command_takes_folders_of_any_kind(tmp_path, capsys):
  maxllama4.save_model(tiny_model(MODEL), tmp_path / "one", format="hf")
  path = "decoder/cycles/layers/1/attention/out"
  maxllama4.save_model(changed(path, 0), tmp_path / "other", format="maxllama4")
  words = ["compare", str(tmp_path / "one"), str(tmp_path / "other"), "tokens=[1,5,9,3]"]
  assert cli.main(words) == 0
  assert "first departure: layer 1 attention" in capsys.readouterr().out
  assert cli.main([*words, "output=json"]) == 0
  assert json.loads(capsys.readouterr().out)["first"]["layer"] == 1
  assert cli.main([*words, "tolerance=1"]) == 0
  assert "no block departs by more than 1 of" in capsys.readouterr().out


@pytest.mark.parametrize(
  "settings", [{}, {"prompt": "a", "tokens": (1,)}, {"prompt": "a", "output": "xml"}]
)
def test_a_request_that_says_nothing_or_too_much_is_refused(settings):
  with pytest.raises(ConfigError):
    CompareRequest(**settings)
