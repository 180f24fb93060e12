"""Hugging Face folders: every byte kept, every mistake listed."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from golden import TEXT_CASES, VISION_CASES, golden_case
from safetensors.numpy import load_file, save_file
from tensor_files import tensors_in
from tiny import tiny_arrays, tiny_config, tiny_model

import maxllama4
from maxllama4.checkpoint import hf
from maxllama4.config import ConfigError, RopeScaling
from maxllama4.model.weights import ModelTemplate, arrays_of

SCALING = RopeScaling(
  rope_type="llama3",
  factor=16.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)


def same_arrays(one, other):
  return set(one) == set(other) and all(
    one[path].dtype == other[path].dtype and np.array_equal(one[path], other[path]) for path in one
  )


@pytest.mark.parametrize("name", (*TEXT_CASES, *VISION_CASES))
def test_a_checkpoint_that_is_read_and_written_has_the_same_bytes(name, tmp_path):
  case = golden_case(name)
  model = maxllama4.load_model(case.folder)
  maxllama4.save_model(model, tmp_path / "out", format="hf")
  theirs, ours = tensors_in(case.folder), tensors_in(tmp_path / "out")
  assert set(ours) == set(theirs)
  assert [name for name in theirs if ours[name] != theirs[name]] == []
  again = maxllama4.load_model(tmp_path / "out")
  assert again.config.layer_kinds == model.config.layer_kinds
  assert dataclasses.replace(
    again.config,
    nope_layers=model.config.nope_layers,
    nope_layer_interval=model.config.nope_layer_interval,
  ) == dataclasses.replace(model.config, moe_layers=again.config.moe_layers)


@pytest.mark.parametrize(
  "changes",
  [
    {"num_hidden_layers": 5, "param_dtype": "bfloat16"},
    {"tie_word_embeddings": True, "moe_layers": (), "nope_layers": ()},
    {"num_hidden_layers": 3, "moe_layers": (0, 2), "nope_layers": (1, 2)},
  ],
  ids=lambda changes: "-".join(changes),
)
def test_a_model_that_is_written_and_read_is_the_same(changes, tmp_path):
  model = tiny_model(tiny_config(**changes))
  maxllama4.save_model(model, tmp_path / "out", format="hf")
  again = maxllama4.load_model(tmp_path / "out")
  assert same_arrays(arrays_of(again), arrays_of(model))
  assert again.config.layer_kinds == model.config.layer_kinds
  assert ("lm_head.weight" in tensors_in(tmp_path / "out")) != model.config.tie_word_embeddings


def test_layouts_are_those_of_the_files():
  """[out, in] matrices, heads folded into them, gate before up, experts whole."""
  config = tiny_config()
  arrays = tiny_arrays(config)
  file = {}
  for tensor in hf.tensor_table(config):
    file[tensor.name] = tensor.to_file(np.asarray(arrays[tensor.path])[tensor.index])
  dense, experts = "decoder/rest/layers/0", "decoder/rest/layers/1/feed_forward"
  query = np.asarray(arrays[f"{dense}/attention/query"])
  assert np.array_equal(
    file["model.layers.0.self_attn.q_proj.weight"].reshape(4, 6, 16)[2], query[:, 2].T
  )
  out = np.asarray(arrays[f"{dense}/attention/out"])
  assert np.array_equal(file["model.layers.0.self_attn.o_proj.weight"][:, 6:12], out[1].T)
  gate_up = np.asarray(arrays[f"{experts}/gate_up"])
  assert np.array_equal(
    file["model.layers.1.feed_forward.experts.gate_up_proj"],
    np.concatenate([gate_up[:, 0], gate_up[:, 1]], axis=-1),
  )
  head = np.asarray(arrays["head/weight"])
  assert np.array_equal(file["lm_head.weight"], head.T)


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_all_named(tmp_path):
  maxllama4.save_model(tiny_model(), tmp_path, format="hf")
  tensors = load_file(tmp_path / hf.SINGLE)
  del tensors["model.layers.1.feed_forward.experts.down_proj"], tensors["lm_head.weight"]
  tensors["model.norm.weight"] = np.zeros(17, np.float32)
  tensors["model.layers.2.input_layernorm.weight"] = np.zeros(16, np.float32)
  save_file(tensors, tmp_path / hf.SINGLE)
  with pytest.raises(ConfigError) as error:
    maxllama4.load_model(tmp_path)
  for words in (
    "model.layers.1.feed_forward.experts.down_proj [4, 8, 16] is missing",
    "lm_head.weight [32, 16] is missing",
    "model.norm.weight is [17] where [16] was expected",
    "model.layers.2.input_layernorm.weight is not part of the model",
  ):
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(name, tmp_path):
  folder = tmp_path / "folder"
  maxllama4.save_model(tiny_model(), folder, format="hf")
  (folder / hf.SINGLE).rename(tmp_path / "other.safetensors")
  (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
  with pytest.raises(ConfigError, match="outside its folder"):
    maxllama4.load_model(folder)


@pytest.mark.parametrize(
  ("index", "words"),
  [
    ([], "where an object was expected"),
    ({}, "has no weight_map"),
    ({"weight_map": ["a"]}, "has no weight_map"),
    ({"weight_map": {"lm_head.weight": {}}}, "has no weight_map"),
    ({"weight_map": {}}, "names no files"),
    ({"weight_map": {"lm_head.weight": ".."}}, "outside its folder"),
    ({"weight_map": {"lm_head.weight": ""}}, "outside its folder"),
  ],
)
def test_an_index_that_is_damaged_is_one_sentence(index, words, tmp_path):
  maxllama4.save_model(tiny_model(), tmp_path, format="hf")
  (tmp_path / hf.INDEX).write_text(json.dumps(index))
  with pytest.raises(ConfigError, match=words):
    maxllama4.load_model(tmp_path)


def test_a_tensor_that_two_files_hold_is_named(tmp_path):
  maxllama4.save_model(tiny_model(), tmp_path, format="hf")
  save_file({"lm_head.weight": np.zeros((32, 16), np.float32)}, tmp_path / "b.safetensors")
  weight_map = {"lm_head.weight": "b.safetensors", "model.norm.weight": hf.SINGLE}
  (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
  with pytest.raises(ConfigError, match=r"holds lm_head\.weight, which another file does"):
    maxllama4.load_model(tmp_path)


def with_header(path, change):
  """Writes the file's header anew, after `change`."""
  content = path.read_bytes()
  length = int.from_bytes(content[:8], "little")
  header = json.loads(content[8 : 8 + length])
  change(header)
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
  ("entry", "words"),
  [
    ({"data_offsets": [-64, 0]}, "is no shape and place"),
    ({"data_offsets": [0, 1e3]}, "is no shape and place"),
    ({"data_offsets": [0]}, "no safetensors header"),
    ({"data_offsets": [64, 0]}, "has -64 bytes where 64"),
    ({"data_offsets": [0, 128]}, "has 128 bytes where 64 were expected"),
    ({"data_offsets": [32, 96]}, "overlaps the tensor before it"),
    ({"data_offsets": [10**9, 10**9 + 64]}, "is cut short"),
    ({"shape": [-4, -4]}, "is no shape and place"),
    ({"shape": [True] * 3}, "is no shape and place"),
    ({"shape": 16}, "no safetensors header"),
    ({"dtype": "F16"}, "has 64 bytes where 32 were expected"),
    ({"dtype": ["F32"]}, "no safetensors header"),
    ({"dtype": "X7"}, "dtype X7 is unknown"),
  ],
)
def test_a_header_that_lies_about_a_tensor_is_refused_before_anything_is_read(
  entry, words, tmp_path
):
  maxllama4.save_model(tiny_model(), tmp_path, format="hf")
  with_header(tmp_path / hf.SINGLE, lambda header: header["model.norm.weight"].update(entry))
  with pytest.raises(ConfigError, match=words):
    maxllama4.load_model(tmp_path)


@pytest.mark.parametrize(
  "content", [b"", b"\1", b"\0" * 8, b"\xff" * 99, b"\2" + b"\0" * 7 + b"[]"]
)
def test_a_file_without_a_header_is_refused(content, tmp_path):
  maxllama4.save_model(tiny_model(), tmp_path, format="hf")
  (tmp_path / hf.SINGLE).write_bytes(content)
  with pytest.raises(ConfigError, match=r"model\.safetensors"):
    maxllama4.load_model(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path):
  maxllama4.save_model(tiny_model(), tmp_path, format="hf")
  (tmp_path / hf.SINGLE).unlink()
  with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
    maxllama4.load_model(tmp_path)


def test_a_balancing_bias_that_would_be_lost_is_warned_of(tmp_path):
  config = tiny_config()
  arrays = tiny_arrays(config)
  (path,) = (path for path in arrays if path.endswith("router/bias"))
  model = ModelTemplate(config).model(arrays | {path: jnp.ones(4)})
  with pytest.warns(UserWarning, match="bias is not zero"):
    maxllama4.save_model(model, tmp_path, format="hf")
  assert not np.any(arrays_of(maxllama4.load_model(tmp_path))[path])


BASE = {
  "model_type": "llama4_text",
  "vocab_size": 32,
  "hidden_size": 16,
  "intermediate_size": 8,
  "intermediate_size_mlp": 24,
  "num_hidden_layers": 8,
  "num_attention_heads": 4,
}


def read(**raw):
  return hf.model_config_from_hf(BASE | raw, "float32", pathlib.Path("config.json"))


def test_a_silent_config_means_what_transformers_assumes():
  config = read(num_attention_heads=8)
  assert (config.num_key_value_heads, config.head_dim, config.num_local_experts) == (8, 128, 16)
  assert (config.attention_chunk_size, config.floor_scale, config.attn_scale) == (8192, 8192, 0.1)
  assert config.use_qk_norm and config.attn_temperature_tuning and not config.tie_word_embeddings
  assert (config.rope_theta, config.rope_scaling, config.rms_norm_eps) == (500000, None, 1e-5)
  assert all(kind.is_moe for kind in config.layer_kinds)


def test_the_old_spelling_of_a_config_is_understood():
  config = read(
    num_key_value_heads=2,
    attn_temperature_tuning=4,
    no_rope_layers=[],
    rope_scaling=None,
    rope_theta=1000.0,
    torch_dtype="bfloat16",
    for_llm_compressor=False,
    cache_implementation="static",
    attention_chunk_size=None,
    eos_token_id=[1, 2],
  )
  assert config.attn_temperature_tuning is True
  assert (config.rope_scaling, config.rope_theta) == (None, 1000.0)
  assert (config.dtype, config.param_dtype) == ("float32", "bfloat16")
  assert config.attention_chunk_size is None and config.stop_token_ids == (1, 2)
  assert [kind.uses_rope for kind in config.layer_kinds] == [True, True, True, False] * 2
  assert all(kind.is_moe for kind in config.layer_kinds)


@pytest.mark.parametrize(
  ("raw", "nope"),
  [
    ({"no_rope_layers": [1, 0] * 4}, [1, 3, 5, 7]),
    ({"no_rope_layer_interval": 3}, [2, 5]),
    ({"no_rope_layers": [0] + [1] * 7}, [0]),
    ({"no_rope_layers": [1] * 8}, []),
    ({"no_rope_layers": [0] + [1] * 7, "layer_types": ["full_attention"] * 8}, [0]),
  ],
)
def test_layers_without_rope_are_those_that_the_file_means(raw, nope):
  kinds = read(num_key_value_heads=2, **raw).layer_kinds
  assert [i for i, kind in enumerate(kinds) if not kind.uses_rope] == nope


def test_a_model_without_chunks_says_so_in_a_way_that_transformers_can_read():
  """There a size is needed; it is that of everything, and no layer is chunked."""
  config = tiny_config(attention_chunk_size=None)
  raw = hf.config_to_hf(config, "float32")
  assert (raw["attention_chunk_size"], raw["no_rope_layers"]) == (64, [1, 0])
  assert set(raw["layer_types"]) == {"full_attention"}
  again = hf.model_config_from_hf(raw, "float32", pathlib.Path("config.json"))
  assert again.attention_chunk_size is None and again.layer_kinds == config.layer_kinds


@pytest.mark.parametrize(
  ("raw", "words"),
  [
    ({"layer_types": ["full_attention"] + ["chunked_attention"] * 7}, r"chunks in layers \[1, 2,"),
    ({"no_rope_layers": [1] * 7}, "no_rope_layers has 7 entries, fewer than num_hidden_layers=8"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ({"num_hidden_layers": None}, "num_hidden_layers=None must be a whole number"),
    ({"num_hidden_layers": "8"}, "num_hidden_layers='8' must be a JSON whole number"),
    ({"moe_layers": 3}, "moe_layers=3 must be a JSON array"),
    ({"rope_parameters": "llama3"}, "rope_parameters='llama3' must be a JSON object"),
    ({"rope_scaling": {"rope_type": ["llama3"]}}, "must be a JSON string"),
    ({"text_config": {}}, "vision_config is missing"),
    ({"text_config": [], "vision_config": {}}, r"text_config=\[\] must be a JSON object"),
    ({"text_config": {}, "vision_config": {"rope_parameters": 1}}, "vision_config: rope_par"),
  ],
)
def test_a_config_that_is_damaged_or_contradicts_itself_is_one_sentence(raw, words):
  with pytest.raises(ConfigError, match=words):
    read(num_key_value_heads=2, **raw)


@pytest.mark.parametrize(
  ("raw", "words"),
  [
    ({"model_type": "llama"}, "model_type=llama"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope_type=su"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
  ],
)
def test_a_config_of_what_we_do_not_compute_is_refused(raw, words):
  with pytest.raises(ConfigError, match=words):
    read(num_key_value_heads=2, **raw)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_found_wherever_a_file_says_it(section, key):
  values = dataclasses.asdict(SCALING)
  values[key] = values.pop("rope_type")
  assert read(num_key_value_heads=2, **{section: values}).rope_scaling == SCALING


def test_a_config_that_is_written_is_read_as_the_same():
  config = tiny_config(num_hidden_layers=5, rope_scaling=SCALING, moe_layers=(0, 3))
  raw = hf.config_to_hf(config, "float32")
  again = hf.model_config_from_hf(
    json.loads(json.dumps(raw)), "float32", pathlib.Path("config.json")
  )
  assert again.layer_kinds == config.layer_kinds
  names = [field.name for field in dataclasses.fields(config)]
  for name in set(names) - {"nope_layers", "nope_layer_interval"}:
    assert getattr(again, name) == getattr(config, name), name
