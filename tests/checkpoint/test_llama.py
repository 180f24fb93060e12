"""Hugging Face folders of the models before Llama 4: rows reordered exactly, and what differs is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import tiny_arrays, tiny_config

import maxllama4
from maxllama4.checkpoint.hf import tensor_table
from maxllama4.checkpoint.llama import read_config
from maxllama4.config import ConfigError
from maxllama4.model.weights import arrays_of

CONFIG = tiny_config(
  num_local_experts=0,
  interleave_moe_layer_step=0,
  nope_layer_interval=0,
  attention_chunk_size=None,
  use_qk_norm=False,
  attn_temperature_tuning=False,
  intermediate_size=24,
  num_hidden_layers=3,
)
RAW = {
  "model_type": "llama",
  "vocab_size": 32,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 6,
  "rope_theta": 100.0,
  "rope_scaling": None,
  "torch_dtype": "float32",
}


def write(folder, extra=(), without=(), **raw):
  """A folder whose queries and keys have elements 0, 2, 4 of each head before 1, 3, 5."""
  tensors, arrays = {}, tiny_arrays(CONFIG)
  for tensor in tensor_table(CONFIG):
    array = np.asarray(arrays[tensor.path])
    value = tensor.to_file(array if tensor.stack_index is None else array[tensor.stack_index])
    if tensor.name.endswith(("q_proj.weight", "k_proj.weight")):
      rows = [6 * head + j for head in range(len(value) // 6) for j in (0, 2, 4, 1, 3, 5)]
      value = value[rows]
    tensors[tensor.name.replace("feed_forward", "mlp")] = value
  for name in without:
    del tensors[name]
  folder.mkdir(exist_ok=True)
  save_file(tensors | dict(extra), folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(RAW | raw))
  return arrays


def test_every_array_is_that_of_a_dense_model_with_pairs_side_by_side(tmp_path):
  table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
  arrays = write(tmp_path, extra=table)
  with pytest.warns(UserWarning, match=r"skipped model\.layers\.0\.self_attn\.rotary_emb"):
    model = maxllama4.load_model(tmp_path)
  found = arrays_of(model)
  assert set(found) == set(arrays)
  for path, array in arrays.items():
    np.testing.assert_array_equal(found[path], array, err_msg=path)
  assert model.config.layer_kinds == CONFIG.layer_kinds


def test_a_head_that_is_tied_may_be_written_out_or_not(tmp_path):
  write(tmp_path / "out", without=["lm_head.weight"], tie_word_embeddings=True)
  write(tmp_path / "twice", tie_word_embeddings=True)
  first = arrays_of(maxllama4.load_model(tmp_path / "out"))
  with pytest.warns(UserWarning, match=r"skipped lm_head\.weight"):
    second = arrays_of(maxllama4.load_model(tmp_path / "twice"))
  assert set(first) == set(second) and "head/weight" not in first


def test_mistakes_are_listed_in_the_names_of_the_files(tmp_path):
  names = ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
  write(tmp_path, without=names, extra={"model.layers.0.mlp.up_proj.bias": np.ones(24, np.float32)})
  with pytest.raises(ConfigError) as error:
    maxllama4.load_model(tmp_path)
  for words in (
    "lm_head.weight [32, 16] is missing",
    "model.layers.1.mlp.up_proj.weight [24, 16] is missing",
    "model.layers.0.mlp.up_proj.bias is not part of the model",
  ):
    assert words in str(error.value)


@pytest.mark.parametrize(
  "raw", [{"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}]
)
def test_models_that_are_not_ours_are_refused(tmp_path, raw):
  write(tmp_path, **raw)
  ((name, value),) = raw.items()
  with pytest.raises(ConfigError, match=f"{name}={value} is not supported"):
    maxllama4.load_model(tmp_path)


def test_a_silent_config_means_what_transformers_assumes(tmp_path):
  write(tmp_path)
  silent = {name: RAW[name] for name in ("model_type", "hidden_size", "num_attention_heads")}
  (tmp_path / "config.json").write_text(json.dumps(silent))
  config = read_config(tmp_path / "config.json")
  assert (config.num_key_value_heads, config.head_dim) == (4, 4)
  assert (config.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (
    10000,
    1e-6,
    2048,
  )
  assert (config.vocab_size, config.intermediate_size_mlp) == (32000, 11008)
