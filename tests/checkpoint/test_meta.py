"""Meta's folders: any number of shards, every spelling, to the same bytes; every mistake listed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import LOGITS, golden_case
from meta_files import meta_params, meta_shard, write_meta_folder, write_pth
from tiny import tiny_arrays, tiny_config, tiny_run, tiny_vision_config

import maxllama4
from maxllama4.checkpoint import meta
from maxllama4.config import ConfigError, MeshConfig
from maxllama4.mesh import build_mesh
from maxllama4.model.weights import ModelTemplate, arrays_of

# Sizes that four shards cut evenly; layers of both kinds, in a scanned stack and beside it.
TEXT = tiny_config(num_hidden_layers=5, num_key_value_heads=4, param_dtype="bfloat16")
VISION = dataclasses.replace(
  tiny_vision_config(num_attention_heads=4, rope_theta=10000.0),
  num_key_value_heads=4,
  nope_layer_interval=4,
)
MODELS = {"text": TEXT, "vision": VISION}


def assert_same_arrays(found, expected):
  assert set(found) == set(expected)
  for path, array in expected.items():
    assert found[path].dtype == array.dtype, path
    np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize("shards", ["meta_mp1", "meta_mp2"])
def test_the_golden_model_is_the_same_in_metas_format(shards):
  case = golden_case("p08_meta_text")
  model, same = (maxllama4.load_model(case.folder / name) for name in (shards, "."))
  assert_same_arrays(arrays_of(model), arrays_of(same))
  differing = {"max_position_embeddings", "bos_token_id", "pad_token_id"}  # params.json is silent
  names = {field.name for field in dataclasses.fields(model.config)} - differing
  for name in names:
    assert getattr(model.config, name) == getattr(same.config, name), name
  template = ModelTemplate(model.config)
  tokens = jnp.asarray(case.arrays["input_ids"], jnp.int32)
  logits = jax.jit(lambda arrays: template.model(arrays)(tokens))(arrays_of(model))
  for name in ("meta.logits", "logits"):
    assert np.abs(logits - case.arrays[name]).max() <= LOGITS


@pytest.mark.parametrize("released", [True, False], ids=["released", "older names"])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_any_number_of_shards_in_any_spelling_is_put_together(tmp_path, kind, num_shards, released):
  config = MODELS[kind]
  arrays = tiny_arrays(config)
  write_meta_folder(tmp_path, config, arrays, num_shards=num_shards, released=released)
  model = maxllama4.load_model(tmp_path)
  assert_same_arrays(arrays_of(model), arrays)
  tokens = {"bos_token_id": None, "pad_token_id": None, "initializer_range": 0.02}
  assert model.config == dataclasses.replace(config, **tokens)


def test_a_folder_is_loaded_straight_onto_a_mesh(tmp_path):
  arrays = tiny_arrays(TEXT)
  write_meta_folder(tmp_path, TEXT, arrays, num_shards=2)
  mesh = build_mesh(tiny_run(TEXT, mesh=MeshConfig(fsdp=2, expert=2, tensor=2)))
  found = arrays_of(maxllama4.load_model(tmp_path, mesh=mesh))
  assert_same_arrays(found, arrays)
  assert all(len(array.sharding.device_set) == 8 for array in found.values())


def test_reading_touches_the_tensors_of_one_array_at_a_time(tmp_path, monkeypatch):
  write_meta_folder(tmp_path, TEXT, tiny_arrays(TEXT), num_shards=2)
  mapped, memmap = [], np.memmap
  monkeypatch.setattr(np, "memmap", lambda *a: mapped.append(a) or memmap(*a))
  source = meta.MetaFolder(tmp_path)
  assert mapped == []
  source.read("model.embed_tokens.weight")
  assert len(mapped) == 2
  source.read("model.layers.2.input_layernorm.weight")
  assert len(mapped) == 2 + 1  # every shard has all of a norm


# Mistakes


def spoiled(folder, change, num_shards=2):
  """A folder in whose last shard `change` has been made, and what loading it says."""
  arrays = tiny_arrays(TEXT)
  write_meta_folder(folder, TEXT, arrays, num_shards=num_shards)
  tensors = meta_shard(TEXT, arrays, num_shards - 1, num_shards, True)
  change(tensors)
  write_pth(folder / f"consolidated.{num_shards - 1:02}.pth", tensors)
  with pytest.raises(ConfigError) as error:
    maxllama4.load_model(folder)
  return str(error.value)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_tensors_that_are_missing_unknown_or_of_another_shape_are_all_named(tmp_path, num_shards):
  def change(tensors):
    del tensors["layers.0.attention.wo.weight"], tensors["output.weight"]
    tensors["norm.weight"] = np.zeros(17, np.float32)
    tensors["layers.2.attention.wqkv.weight"] = np.zeros((5, 16), np.float32)
    tensors["layers.1.feed_forward.mlp.fc2_weight"] = np.zeros(3, np.float32)
    tensors["layers.4.feed_forward.mlp.fc1_weight"] = np.zeros((48 // num_shards, 16), np.int64)

  message = spoiled(tmp_path, change, num_shards)
  where = " (consolidated.01.pth)" if num_shards == 2 else ""
  for words in (
    f"layers.0.attention.wo.weight [16, {24 // num_shards}] is missing",
    f"output.weight [{32 // num_shards}, 16] is missing",
    "norm.weight is [17] where [16] was expected",
    f"layers.2.attention.wqkv.weight is [5, 16] where [{72 // num_shards}, 16] was expected",
    "layers.1.feed_forward.mlp.fc2_weight is not part of the model",
    "layers.4.feed_forward.mlp.fc1_weight is of int64 where one of float32, bfloat16, float16 was expected",
  ):
    assert words + where in message
  assert message.count(";") == 5  # and nothing else


@pytest.mark.parametrize("name", ["feed_forward.router_DE", "feed_forward.w_in_shared_FD.weight"])
def test_a_missing_tensor_is_named_even_where_sizes_are_read_from_it(tmp_path, name):
  message = spoiled(tmp_path, lambda tensors: tensors.pop(f"layers.1.{name}"), 1)
  assert f"layers.1.{name} [" in message and message.count(";") == 0


def test_an_embedding_of_positions_from_before_the_release_is_not_guessed_at(tmp_path):
  write_meta_folder(tmp_path, VISION, tiny_arrays(VISION))
  tensors = meta_shard(VISION, tiny_arrays(VISION), 0, 1, True)
  name = "vision_embeddings.vision_encoder.positional_embedding"
  tensors[name] = tensors.pop(f"{name}_vlm")
  write_pth(tmp_path / "consolidated.00.pth", tensors)
  with pytest.raises(ConfigError, match=rf"{name} is not part .* {name}_vlm \[17, 16\] is missing"):
    maxllama4.load_model(tmp_path)


def test_tables_and_statistics_are_skipped_and_said(tmp_path):
  arrays = tiny_arrays(TEXT)
  write_meta_folder(tmp_path, TEXT, arrays)
  tensors = meta_shard(TEXT, arrays, 0, 1, True)
  names = ("rope.freqs", "layers.3.attention.wqkv._extra_state", "freq_cis")
  names += tuple(
    f"layers.1.feed_forward.{name}"
    for name in ("global_gate_stats_3E", "running_gate_stats_3E", "expert_activation_DE")
  )
  write_pth(
    tmp_path / "consolidated.00.pth", tensors | dict.fromkeys(names, np.zeros((3, 4), np.float32))
  )
  with pytest.warns(UserWarning, match="skipped") as said:
    model = maxllama4.load_model(tmp_path)
  assert_same_arrays(arrays_of(model), arrays)
  for name in names:
    assert name.replace(".1.", ".*.").replace(".3.", ".*.") in str(said[0].message)


def test_a_missing_shard_is_seen(tmp_path):
  write_meta_folder(tmp_path, TEXT, tiny_arrays(TEXT), num_shards=4)
  (tmp_path / "consolidated.03.pth").unlink()
  with pytest.raises(ConfigError, match=r"tok_embeddings\.weight is \[8, 16\] where"):
    maxllama4.load_model(tmp_path)
  (tmp_path / "consolidated.01.pth").unlink()
  with pytest.raises(ConfigError, match=r"consolidated\.01\.pth is missing"):
    maxllama4.load_model(tmp_path)


@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads"])
def test_what_params_json_has_to_say_is_asked_for(tmp_path, name):
  params = {key: value for key, value in meta_params(TEXT).items() if key != name}
  write_meta_folder(tmp_path, TEXT, tiny_arrays(TEXT), params=params)
  with pytest.raises(ConfigError, match=rf"params\.json: {name} is missing"):
    maxllama4.load_model(tmp_path)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"n_layers": 0}, "n_layers=0 must be greater than 0"),
    ({"n_layers": -1}, "n_layers=-1 must be greater than 0"),
    ({"dim": "16"}, "dim='16' must be a JSON whole number"),
    ({"n_kv_heads": 1.5}, r"n_kv_heads=1\.5 must be a JSON whole number"),
    ({"moe_args": 3}, "moe_args=3 must be a JSON object"),
    ({"moe_args": {"interleave_moe_layer_step": "2"}}, "interleave_moe_layer_step='2' must be"),
    ({"vision_args": {"image_size": 336}}, "image_size=336 must be a JSON object"),
    ({"vision_args": {"image_size": None}}, "image_size is None x None"),
  ],
)
def test_a_params_json_that_is_damaged_is_one_sentence(changes, words, tmp_path):
  write_meta_folder(tmp_path, TEXT, tiny_arrays(TEXT), params=meta_params(TEXT) | changes)
  with pytest.raises(ConfigError, match=words):
    maxllama4.load_model(tmp_path)


# What params.json leaves unsaid


def read_config(folder, config=TEXT, without=(), **changes):
  params = meta_params(config) | changes
  params = {name: value for name, value in params.items() if name not in without}
  write_meta_folder(folder, config, tiny_arrays(config), params={"model": params})
  return meta.MetaFolder(folder).config


def test_a_silent_llama4_file_means_what_metas_code_assumes(tmp_path):
  silent = ("attn_temperature_tuning", "floor_scale", "attn_scale", "norm_eps", "rope_theta")
  config = read_config(
    tmp_path, without=(*silent, "use_qk_norm", "max_seq_len"), use_scaled_rope=True
  )
  assert (config.attn_temperature_tuning, config.use_qk_norm) == (False, False)
  assert (config.floor_scale, config.attn_scale, config.rms_norm_eps) == (8192, 0.1, 1e-5)
  scaling = config.rope_scaling
  assert (config.rope_theta, scaling.rope_type, scaling.factor) == (500000, "llama3", 16)
  assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1, 1)
  assert scaling.original_max_position_embeddings == 8192


def test_what_a_file_says_of_the_scaling_wins(tmp_path):
  said = {"rope_scaling_factor": 8.0, "rope_high_freq_factor": 4.0}
  scaling = read_config(tmp_path, use_scaled_rope=True, **said).rope_scaling
  assert (scaling.factor, scaling.high_freq_factor) == (8, 4)
  assert read_config(tmp_path, use_scaled_rope=False, **said).rope_scaling is None


# The models before Llama 4

LLAMA = tiny_config(
  moe_layers=None,
  num_local_experts=0,
  interleave_moe_layer_step=0,
  nope_layer_interval=0,
  attention_chunk_size=None,
  use_qk_norm=False,
  attn_temperature_tuning=False,
  intermediate_size=24,
  num_hidden_layers=3,
  head_dim=4,
  param_dtype="float16",
)
# As Llama 2's: formulas, no vocabulary.
LLAMA_PARAMS = {"dim": 16, "multiple_of": 256, "n_heads": 4, "n_kv_heads": 2, "n_layers": 3}
LLAMA_PARAMS |= {"norm_eps": 1e-5, "vocab_size": -1}


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("across_width", [True, False], ids=["Llama 2", "Llama 3"])
def test_files_of_earlier_models_load_as_dense_ones(tmp_path, num_shards, across_width):
  arrays = tiny_arrays(LLAMA)
  params = LLAMA_PARAMS if across_width else LLAMA_PARAMS | {"vocab_size": 32, "rope_theta": 5e5}
  write_meta_folder(tmp_path, LLAMA, arrays, num_shards=num_shards, released=False, params=params)
  embedding = np.asarray(arrays["embed/weight"])
  for i in range(num_shards):
    tensors = meta_shard(LLAMA, arrays, i, num_shards, False)
    if across_width:
      tensors["tok_embeddings.weight"] = np.split(embedding, num_shards, 1)[i]
    tensors["rope.freqs"] = np.zeros(2, np.float32)
    write_pth(tmp_path / f"consolidated.{i:02}.pth", tensors)
  with pytest.warns(UserWarning, match=r"rope\.freqs"):
    model = maxllama4.load_model(tmp_path)
  assert_same_arrays(arrays_of(model), arrays)  # pairs as Llama 4's: nothing is reordered
  config = model.config
  assert config.layer_kinds == LLAMA.layer_kinds and config.vocab_size == 32
  assert (config.intermediate_size_mlp, config.head_dim, config.param_dtype) == (24, 4, "float16")
  assert (config.attention_chunk_size, config.use_qk_norm) == (None, False)
  assert (config.attn_temperature_tuning, config.rope_scaling) == (False, None)
  assert config.rope_theta == (10000 if across_width else 500000)


def test_the_scaling_of_llama_31_is_that_of_metas_code(tmp_path):
  params = LLAMA_PARAMS | {"use_scaled_rope": True, "rope_theta": 500000.0}
  write_meta_folder(tmp_path, LLAMA, tiny_arrays(LLAMA), released=False, params=params)
  scaling = meta.MetaFolder(tmp_path).config.rope_scaling
  assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (8, 1, 4)
  json.dumps(dataclasses.asdict(scaling))  # plain values
