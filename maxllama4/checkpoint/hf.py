"""Hugging Face folders: one table of names and layouts, used to read and to write.

Weights are stored there as [out, in]; ours are [in, out] with heads apart. Reading and writing only permutes and
reshapes, so a round trip gives back every byte, in the dtype that the file had.
"""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from maxllama4.checkpoint.safetensors_files import (
  Entry,
  FileView,
  SafetensorsWriter,
  check_kinds,
  num_bytes,
  read_header,
  read_json,
  write_json,
)
from maxllama4.checkpoint.tensors import Box, Tensor, TensorSink, TensorSource
from maxllama4.config import (
  ConfigError,
  ModelConfig,
  VisionConfig,
  require,
)
from maxllama4.model.weights import Arrays, ModelTemplate, layer_place
from maxllama4.model_config import MAX_LAYERS
from maxllama4.rope_scaling import ROPE_TYPES
from maxllama4.settings import at_most, config_from_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9


_SAME, _MATRIX, _TRANSPOSED = ((0,),), ((0,), (1,)), ((1,), (0,))
_IN_PROJECTION, _OUT_PROJECTION = ((1, 2), (0,)), ((2,), (0, 1))
_MLP = (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"))
_LAYER = (
  ("input_layernorm.weight", "input_norm/weight", _SAME),
  ("self_attn.q_proj.weight", "attention/query", _IN_PROJECTION),
  ("self_attn.k_proj.weight", "attention/key", _IN_PROJECTION),
  ("self_attn.v_proj.weight", "attention/value", _IN_PROJECTION),
  ("self_attn.o_proj.weight", "attention/out", _OUT_PROJECTION),
  ("post_attention_layernorm.weight", "post_attention_norm/weight", _SAME),
)
_DENSE = tuple(
  (f"feed_forward.{theirs}.weight", f"feed_forward/{ours}", _TRANSPOSED) for theirs, ours in _MLP
)
_MOE = (
  ("feed_forward.router.weight", "feed_forward/router/weight", _TRANSPOSED),
  ("feed_forward.experts.gate_up_proj", "feed_forward/gate_up", ((0,), (2,), (1, 3))),
  ("feed_forward.experts.down_proj", "feed_forward/down", ((0,), (1,), (2,))),
  *(
    (
      f"feed_forward.shared_expert.{theirs}.weight",
      f"feed_forward/shared_expert/{ours}",
      _TRANSPOSED,
    )
    for theirs, ours in _MLP
  ),
)


# What the two fused tensors of experts are in quantised exports and older conversions, a matrix an expert:
# name, path, places along [gate or up, D, F] and [F, D].
_UNFUSED = (
  ("gate_proj", "feed_forward/gate_up", (0,)),
  ("up_proj", "feed_forward/gate_up", (1,)),
  ("down_proj", "feed_forward/down", ()),
)
_HEAD_BIAS = ((0, 1),)
_VISION = (
  ("patch_embedding.linear.weight", "patch_embedding/weight", _TRANSPOSED),
  ("class_embedding", "class_embedding", _SAME),
  ("positional_embedding_vlm", "positional_embedding", _MATRIX),
  ("layernorm_pre.weight", "pre_norm/weight", _SAME),
  ("layernorm_pre.bias", "pre_norm/bias", _SAME),
  ("layernorm_post.weight", "post_norm/weight", _SAME),
  ("layernorm_post.bias", "post_norm/bias", _SAME),
  ("vision_adapter.mlp.fc1.weight", "adapter/fc1", _TRANSPOSED),
  ("vision_adapter.mlp.fc2.weight", "adapter/fc2", _TRANSPOSED),
)
_VISION_LAYER = (
  ("input_layernorm.weight", "input_norm/weight", _SAME),
  ("input_layernorm.bias", "input_norm/bias", _SAME),
  *(
    entry
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    for entry in (
      (f"self_attn.{theirs}.weight", f"attention/{ours}", _IN_PROJECTION),
      (f"self_attn.{theirs}.bias", f"attention/{ours}_bias", _HEAD_BIAS),
    )
  ),
  ("self_attn.o_proj.weight", "attention/out", _OUT_PROJECTION),
  ("self_attn.o_proj.bias", "attention/out_bias", _SAME),
  ("post_attention_layernorm.weight", "post_attention_norm/weight", _SAME),
  ("post_attention_layernorm.bias", "post_attention_norm/bias", _SAME),
  *(
    entry
    for name in ("fc1", "fc2")
    for entry in (
      (f"mlp.{name}.weight", f"mlp/{name}", _TRANSPOSED),
      (f"mlp.{name}.bias", f"mlp/{name}_bias", _SAME),
    )
  ),
)


def tensor_table(config: ModelConfig, unfused_experts: bool = False) -> list[Tensor]:
  """Every tensor of a checkpoint: the text model's, then the vision tower's.

  With `unfused_experts` each expert has matrices of its own, in the orientation of all others.
  """
  prefix = "" if config.vision_config is None else "language_model."
  table = [Tensor(f"{prefix}model.embed_tokens.weight", "embed/weight", _MATRIX)]
  for i, kind in enumerate(config.layer_kinds):
    place, index = layer_place(config, i)
    layer = f"{prefix}model.layers.{i}."
    for name, path, groups in (*_LAYER, *(_MOE if kind.is_moe else _DENSE)):
      if unfused_experts and ".experts." in name:
        continue
      table.append(Tensor(f"{layer}{name}", f"{place}/{path}", groups, index))
    if unfused_experts and kind.is_moe:
      table += [
        Tensor(
          f"{layer}feed_forward.experts.{expert}.{name}.weight",
          f"{place}/{path}",
          _TRANSPOSED,
          index,
          (expert, *within),
        )
        for expert in range(config.num_local_experts)
        for name, path, within in _UNFUSED
      ]
  table.append(Tensor(f"{prefix}model.norm.weight", "norm/weight", _SAME))
  if not config.tie_word_embeddings:
    table.append(Tensor(f"{prefix}lm_head.weight", "head/weight", _TRANSPOSED))
  return table if config.vision_config is None else table + _vision_tensors(config)


def _vision_tensors(config: ModelConfig) -> list[Tensor]:
  table = [
    Tensor(f"vision_model.{name}", f"vision/{path}", groups) for name, path, groups in _VISION
  ]
  table += [
    Tensor(f"vision_model.model.layers.{i}.{name}", f"vision/encoder/layers/{path}", groups, i)
    for i in range(config.vision_config.num_hidden_layers)
    for name, path, groups in _VISION_LAYER
  ]
  return [
    *table,
    Tensor("multi_modal_projector.linear_1.weight", "projector/weight", _TRANSPOSED),
  ]


# Reading


def model_config_from_hf(raw: dict[str, Any], dtype: str, source: pathlib.Path) -> ModelConfig:
  """`ModelConfig` from a config.json in its old (4.51) or new (5.x) spelling, with a vision tower or text only."""
  check_kinds(raw, {"text_config": dict, "vision_config": dict}, source)
  images: dict[str, Any] = dict.fromkeys(("vision_config", *IMAGE_TOKENS))
  if raw.get("text_config") is not None:
    images = {"vision_config": _vision_section(raw, source)}
    images |= {name: raw.get(name, default) for name, default in IMAGE_TOKENS.items()}
    outer = {name: raw[name] for name in ("dtype", "torch_dtype") if raw.get(name)}
    raw = {**raw["text_config"], **outer}
  for name, only in (
    ("model_type", "llama4_text"),
    ("attention_bias", False),
    ("hidden_act", "silu"),
  ):
    if raw.get(name, only) != only:
      raise ConfigError(f"{source}: {name}={raw[name]} is not supported; it must be {only}.")
  check_kinds(raw, _KINDS, source)
  rope = raw.get("rope_parameters") or {}
  scaling = rope if raw.get("rope_scaling") is None else raw["rope_scaling"]
  num_layers = raw.get("num_hidden_layers") or 0
  at_most(f"{source}: num_hidden_layers", num_layers, MAX_LAYERS)
  nope_layers, nope_interval, has_chunks = _nope_layers(raw, num_layers, source)
  step = raw.get("interleave_moe_layer_step", 1)
  moe_layers = raw.get("moe_layers")
  if moe_layers == [i for i in range(num_layers) if step and (i + 1) % step == 0]:
    moe_layers = None
  names = {field.name for field in dataclasses.fields(ModelConfig)}
  section = _DEFAULTS | {name: value for name, value in raw.items() if name in names}
  section |= {
    "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 500000.0)),
    "rope_scaling": rope_scaling_from_hf(scaling, _DEFAULTS | raw, source),
    "nope_layers": nope_layers,
    "nope_layer_interval": nope_interval,
    **({} if has_chunks else {"attention_chunk_size": None}),
    "interleave_moe_layer_step": step,
    "moe_layers": moe_layers,
    "attn_temperature_tuning": bool(raw.get("attn_temperature_tuning", True)),
    "dtype": dtype,
    "param_dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
    **images,
  }
  return config_from_file(ModelConfig, section, source)


# What is computed with before the section as a whole is checked.
_KINDS = {
  **dict.fromkeys(("rope_parameters", "rope_scaling"), dict),
  **dict.fromkeys(("no_rope_layers", "layer_types", "moe_layers"), list),
  **dict.fromkeys(
    ("num_hidden_layers", "interleave_moe_layer_step", "no_rope_layer_interval"), int
  ),
}


def _vision_section(raw: dict[str, Any], source: pathlib.Path) -> dict[str, Any]:
  """The section `vision_config`; what is silent there is as transformers has it."""
  require(raw.get("vision_config") is not None, f"{source}: vision_config is missing.")
  vision = {"rope_theta": 10000.0, **raw["vision_config"]}
  check_kinds(vision, {"rope_parameters": dict}, f"{source}: vision_config")
  rope = vision.get("rope_parameters") or {}
  vision["rope_theta"] = rope.get("rope_theta", vision["rope_theta"])
  if vision.get("multi_modal_projector_bias"):
    raise ConfigError(
      f"{source}: vision_config.multi_modal_projector_bias=true is not supported; it must be false."
    )
  names = {field.name for field in dataclasses.fields(VisionConfig)}
  return {name: value for name, value in vision.items() if name in names}


# The tokens around and of an image, and what transformers assumes where a config.json is silent.
IMAGE_TOKENS = {
  "image_token_index": 200092,
  "boi_token_index": 200080,
  "eoi_token_index": 200081,
}


# What transformers assumes where a config.json is silent.
_DEFAULTS = {
  "num_key_value_heads": 8,
  "head_dim": 128,
  "num_experts_per_tok": 1,
  "num_local_experts": 16,
  "attention_chunk_size": 8192,
  "use_qk_norm": True,
  "floor_scale": 8192,
  "attn_scale": 0.1,
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1e-5,
  "initializer_range": 0.02,
  "tie_word_embeddings": False,
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": None,
}


def _nope_layers(
  raw: dict[str, Any], num_layers: int, source: pathlib.Path
) -> tuple[list[int] | None, int, bool]:
  """NoPE layers as a list (None where the interval says the same), the interval, and whether RoPE goes with chunks.

  `no_rope_layers` says where there is RoPE, and `layer_types` where there are chunks. Raises: ConfigError where they
  contradict each other.
  """
  interval = raw.get("no_rope_layer_interval") or 4
  regular = [i for i in range(num_layers) if (i + 1) % interval == 0]
  nope = regular
  if raw.get("no_rope_layers"):  # 1 where RoPE is used; an empty list means the default
    _check_length(raw, "no_rope_layers", num_layers, source)
    nope = [i for i in range(num_layers) if not raw["no_rope_layers"][i]]
  with_rope = [i for i in range(num_layers) if i not in nope]
  chunked = with_rope
  if raw.get("layer_types"):
    _check_length(raw, "layer_types", num_layers, source)
    chunked = [i for i in range(num_layers) if raw["layer_types"][i] == "chunked_attention"]
  require(
    chunked in (with_rope, []),
    f"{source}: layer_types has chunks in layers {chunked}, but layers {with_rope} have RoPE (no_rope_layers); only"
    " layers with RoPE can be chunked, all or none.",
  )
  return None if nope == regular else nope, interval, chunked == with_rope


def _check_length(raw: dict[str, Any], name: str, wanted: int, source: pathlib.Path) -> None:
  require(
    len(raw[name]) >= wanted,
    f"{source}: {name} has {len(raw[name])} entries, fewer than num_hidden_layers={wanted}; add what is missing.",
  )


def rope_scaling_from_hf(
  scaling: dict[str, Any], raw: dict[str, Any], source: pathlib.Path
) -> dict[str, Any] | None:
  """The section `rope_scaling`; a length that it does not name is that of the whole config, `raw`."""
  check_kinds(scaling, {"rope_type": str, "type": str}, f"{source}: rope_scaling")
  kind = scaling.get("rope_type") or scaling.get("type") or "default"  # `type` in the oldest files
  require(
    kind in ROPE_TYPES,
    f"{source}: rope_scaling.rope_type={kind} is not supported; it must be one of {', '.join(ROPE_TYPES)}.",
  )
  turned = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1
  require(turned == 1, f"{source}: partial_rotary_factor={turned} is not supported; it must be 1.")
  if kind == "default":
    return None
  needed, optional = ROPE_TYPES[kind]
  section = {name: scaling[name] for name in (*needed, *optional) if name in scaling}
  length = "original_max_position_embeddings"
  if length in needed:
    section[length] = raw.get(length) or section.get(length) or raw.get("max_position_embeddings")
  return section | {"rope_type": kind}


class HuggingFaceFolder(TensorSource):
  """A folder with config.json and safetensors: one file, or those that an index names.

  Raises: ConfigError for a configuration that is not supported, and for files that are missing or cut short.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder, self.name = folder, str(folder)
    config = self._read_config()
    self.files = [folder / "config.json", *_files(folder)]
    self._places: dict[str, Entry] = {}
    for file in self.files[1:]:
      entries = read_header(file)
      twice = sorted(set(entries) & set(self._places))
      require(
        not twice, f"{file} holds {', '.join(twice)}, which another file does, too; keep one."
      )
      self._places |= entries
    self.tensors = {name: entry.shape for name, entry in self._places.items()}
    embedding = self.tensors.get(tensor_table(config)[0].name)
    dtype = config.param_dtype if embedding is None else str(embedding.dtype)
    self.config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    self._unfused = any(".experts.0." in name for name in self.tensors)
    self.table = self._table()

  def _read_config(self) -> ModelConfig:
    path = self.folder / "config.json"
    return model_config_from_hf(read_json(path), "float32", path)

  def _table(self) -> list[Tensor]:
    return tensor_table(self.config, unfused_experts=self._unfused)

  def read(self, name: str) -> np.ndarray:
    return self._places[name].open()

  def view(self, tensor: Tensor, dims: tuple[int, ...]) -> FileView:
    return FileView(self._places[tensor.name], dims)

  def check_exportable(self) -> None:
    if self._unfused:
      raise ConfigError(
        f"{self.folder} has a matrix an expert, which are fused on import alone; convert it to=maxllama4, and that to=hf."
      )


class ModelTensors(TensorSource):
  """The tensors of a model in memory."""

  def __init__(self, config: ModelConfig, arrays: Arrays):
    self.config, self.table, self._arrays = config, tensor_table(config), arrays
    self.name, self.files = "the model", []
    self.tensors = {
      t.name: jax.ShapeDtypeStruct(
        t.file_shape(t.part_shape(arrays[t.path].shape)), arrays[t.path].dtype
      )
      for t in self.table
    }

  def read(self, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in self.table if tensor.name == name)
    return tensor.to_file(np.asarray(self._arrays[tensor.path][tensor.index]))

  def check_exportable(self) -> None:
    warn_of_biases(v for path, v in self._arrays.items() if path.endswith("router/bias"))


def warn_of_biases(biases: Iterable[Any]) -> None:
  """Warns unless all are zero: the router's balancing biases, which a Hugging Face folder has no place for."""
  if any(np.any(np.asarray(bias)) for bias in biases):
    warnings.warn(
      "The router's balancing bias is not zero and has no place in a Hugging Face checkpoint; the exported"
      " model chooses experts without it.",
      stacklevel=2,
    )


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a folder; those of its index when it has one."""
  if (folder / INDEX).exists():
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
      raise ConfigError(f"{folder / INDEX} has no weight_map of files by tensor; copy it again.")
    require(weight_map, f"{folder / INDEX} names no files; copy it again.")
    names = sorted(set(weight_map.values()))
  else:
    names = [SINGLE]
  for name in names:
    if name in ("", "..") or pathlib.PurePath(name).name != name:
      raise ConfigError(f"{folder / INDEX} names {name!r}, a file outside its folder; refuse it.")
    if not os.path.isfile(folder / name):
      raise ConfigError(f"{folder / name} is missing; copy the whole checkpoint folder.")
  return [folder / name for name in names]


# Writing


class HuggingFaceWriter(TensorSink):
  """A folder that transformers loads: config.json, generation_config.json and safetensors, in shards where it is large."""

  def __init__(
    self, folder: pathlib.Path, config: ModelConfig, dtypes: dict[str, Any], shard_bytes: int
  ):
    """`dtypes` are those to write, by the path of the tensor's array."""
    self._folder, self._config = folder, config
    table, shapes = tensor_table(config), ModelTemplate(config).shapes
    tensors = {
      t.name: jax.ShapeDtypeStruct(t.file_shape(t.part_shape(shapes[t.path].shape)), dtypes[t.path])
      for t in table
    }
    self._dtype = str(tensors[table[0].name].dtype)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
      if shards[-1] and size + num_bytes(tensor) > shard_bytes:
        shards, size = [*shards, {}], 0
      shards[-1][name] = tensor
      size += num_bytes(tensor)
    names = [SINGLE]
    if len(shards) > 1:
      names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    self._shards = dict(zip(names, shards))
    self._total = sum(map(num_bytes, tensors.values()))

  def prepare(self) -> None:
    if len(self._shards) > 1:
      weight_map = {tensor: name for name, shard in self._shards.items() for tensor in shard}
      index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
      write_json(self._folder / INDEX, index)
    for name, shard in self._shards.items():
      SafetensorsWriter.create(self._folder / name, shard)
    config = self._config
    write_json(self._folder / "config.json", config_to_hf(config, self._dtype))
    if not (self._folder / "generation_config.json").exists():
      ids = ("bos_token_id", "eos_token_id", "pad_token_id")
      generation = {name: getattr(config, name) for name in ids}
      write_json(self._folder / "generation_config.json", generation)

  def open(self) -> None:
    self._writers = [SafetensorsWriter(self._folder / name) for name in self._shards]
    writer_of = {name: writer for writer in self._writers for name in writer.names}
    # By place in the model: a source may have names of its own.
    self._targets = {
      (t.path, t.stack_index): (writer_of[t.name], t.name) for t in tensor_table(self._config)
    }

  def write(self, tensor: Tensor, dims: tuple[int, ...], box: Box, piece: np.ndarray) -> None:
    start = np.ravel_multi_index([part.start for part in box], dims)
    writer, name = self._targets[tensor.path, tensor.stack_index]
    writer.write(name, int(start), piece)

  def sync(self) -> None:
    for writer in self._writers:
      writer.sync()

  def close(self) -> None:
    for writer in self._writers:
      writer.close()


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """The config.json of a model, in the spelling of transformers 5."""
  text = _text_to_hf(config, dtype)
  if config.vision_config is None:
    return {"architectures": ["Llama4ForCausalLM"], **text}
  vision = dataclasses.asdict(config.vision_config)
  theta = vision.pop("rope_theta")
  return {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "dtype": dtype,
    "tie_word_embeddings": config.tie_word_embeddings,
    **{name: getattr(config, name) for name in IMAGE_TOKENS},
    "text_config": text,
    "vision_config": {
      "model_type": "llama4_vision_model",
      **vision,
      "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    },
  }


def _text_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
  kinds = config.layer_kinds
  same = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "interleave_moe_layer_step",
    "use_qk_norm",
    "attn_temperature_tuning",
    "attn_scale",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
  ]
  rope = (
    {"rope_type": "default"}
    if config.rope_scaling is None
    else {k: v for k, v in dataclasses.asdict(config.rope_scaling).items() if v is not None}
  )
  return {
    "model_type": "llama4_text",
    "dtype": dtype,
    "hidden_act": "silu",
    "attention_bias": False,
    **{name: getattr(config, name) for name in same},
    "floor_scale": int(config.floor_scale)
    if config.floor_scale.is_integer()
    else config.floor_scale,
    "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    # transformers cannot do without a size; then no layer is chunked, and to others all positions are one chunk.
    "attention_chunk_size": config.attention_chunk_size or config.max_position_embeddings,
    "no_rope_layers": [int(kind.uses_rope) for kind in kinds],
    "layer_types": [
      "chunked_attention" if kind.uses_rope and config.attention_chunk_size else "full_attention"
      for kind in kinds
    ],
    "moe_layers": [i for i, kind in enumerate(kinds) if kind.is_moe],
  }
