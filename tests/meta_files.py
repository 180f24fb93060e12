"""Folders as Meta writes them, made without torch and without our own table: the layouts are spelled out once more."""

import json
import pathlib
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from maxllama4.checkpoint.hf import tensor_table
from maxllama4.config import ModelConfig
from maxllama4.model.weights import Arrays

STORAGES = {
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
}

# Pickle's own spelling of values, in protocol 2


def name_op(module: str, name: str) -> bytes:
  return f"c{module}\n{name}\n".encode()


def value_op(value: Any) -> bytes:
  if isinstance(value, str):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
  if isinstance(value, tuple):
    return b"(" + b"".join(map(value_op, value)) + b"t"
  return b"I%d\n" % value


def call_op(function: bytes, arguments: Iterable[bytes]) -> bytes:
  return function + b"(" + b"".join(arguments) + b"tR"


def storage_op(key: str, dtype: str, count: int) -> bytes:
  words = (value_op(key), value_op("cpu"), value_op(count))
  return b"(" + value_op("storage") + name_op("torch", STORAGES[dtype]) + b"".join(words) + b"tQ"


def tensor_op(storage: bytes, offset: int, shape: tuple, strides: tuple) -> bytes:
  hooks = call_op(name_op("collections", "OrderedDict"), ())
  words = (storage, *map(value_op, (offset, shape, strides)), b"\x89", hooks)
  return call_op(name_op("torch._utils", "_rebuild_tensor_v2"), words)


def write_archive(
  path: pathlib.Path,
  values: dict[str, bytes],
  storages: dict[str, bytes],
  compression: int = zipfile.ZIP_STORED,
) -> None:
  """A `.pth` whose pickle is a dictionary of `values`, which are spelled already."""
  pickle = b"".join(value_op(name) + value for name, value in values.items())
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("consolidated/data.pkl", b"\x80\x02(" + pickle + b"d.")
    archive.writestr("consolidated/byteorder", "little")
    for key, content in storages.items():
      archive.writestr(f"consolidated/data/{key}", content)


def write_pth(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  values, storages = {}, {}
  for i, (name, array) in enumerate(tensors.items()):
    strides = np.empty(array.shape, np.uint8).strides  # in elements, for these are bytes
    storage = storage_op(str(i), str(array.dtype), array.size)
    values[name] = tensor_op(storage, 0, array.shape, strides)
    storages[str(i)] = np.ascontiguousarray(array).tobytes()
  write_archive(path, values, storages)


# Meta's layouts


def hugging_face_tensors(config: ModelConfig, arrays: Arrays) -> dict[str, np.ndarray]:
  """The model's tensors by their names in a Hugging Face folder, without the prefix of models with vision."""
  tensors = {}
  for tensor in tensor_table(config):
    array = np.asarray(arrays[tensor.path])
    array = array if tensor.stack_index is None else array[tensor.stack_index]
    tensors[tensor.name.removeprefix("language_model.")] = tensor.to_file(array)
  return tensors


def meta_shard(config: ModelConfig, arrays: Arrays, shard: int, of: int, released: bool) -> dict:
  """What shard `shard` of `of` holds; `released`: in the names that Meta released Llama 4 with, else in the older ones."""
  hf, out = hugging_face_tensors(config, arrays), {}

  def cut(array, dim):
    return np.split(array, of, dim)[shard]

  out["tok_embeddings.weight"] = cut(hf["model.embed_tokens.weight"], 0)
  out["norm.weight"] = hf["model.norm.weight"]
  out["output.weight"] = cut(hf["lm_head.weight"], 0)
  for i, kind in enumerate(config.layer_kinds):
    theirs, ours = f"model.layers.{i}.", f"layers.{i}."
    q, k, v = (cut(hf[f"{theirs}self_attn.{n}_proj.weight"], 0) for n in "qkv")
    norm = hf[f"{theirs}input_layernorm.weight"]
    if released:
      out[f"{ours}attention.wqkv.weight"] = np.concatenate([q, k, v])
      out[f"{ours}attention.wqkv.layer_norm_weight"] = norm
    else:
      out |= {f"{ours}attention.w{n}.weight": w for n, w in zip("qkv", (q, k, v))}
      out[f"{ours}attention_norm.weight"] = norm
    out[f"{ours}attention.wo.weight"] = cut(hf[f"{theirs}self_attn.o_proj.weight"], 1)
    post_norm = hf[f"{theirs}post_attention_layernorm.weight"]
    feed = {n: w for n, w in hf.items() if n.startswith(f"{theirs}feed_forward.")}
    feed = {n.removeprefix(f"{theirs}feed_forward."): w for n, w in feed.items()}
    make = _moe if kind.is_moe else _dense
    for name, tensor in make(feed, post_norm, cut, released).items():
      out[f"{ours}{name}"] = tensor
  return out if config.vision_config is None else out | _vision(hf, config, cut)


def _dense(hf, norm, cut, released):
  gate, up = cut(hf["gate_proj.weight"], 0), cut(hf["up_proj.weight"], 0)
  down = cut(hf["down_proj.weight"], 1)
  if released:
    return {
      "feed_forward.mlp.layer_norm_weight": norm,
      "feed_forward.mlp.fc1_weight": np.concatenate([gate, up]),
      "feed_forward.mlp.fc2_weight": down,
    }
  return {
    "ffn_norm.weight": norm,
    "feed_forward.w1.weight": gate,
    "feed_forward.w3.weight": up,
    "feed_forward.w2.weight": down,
  }


def _moe(hf, norm, cut, released):
  gate, up = np.split(hf["experts.gate_up_proj"], 2, axis=-1)  # E D F
  gate, up, down = cut(gate, 2), cut(up, 2), cut(hf["experts.down_proj"], 1)
  shared = [
    cut(hf[f"shared_expert.{n}_proj.weight"], int(n == "down")) for n in ("gate", "up", "down")
  ]
  router = hf["router.weight"].T
  if released:
    names = ("w_in_shared_FD", "w_swiglu_FD", "w_out_shared_DF")
    return {
      "feed_forward.norm.weight": norm,
      "feed_forward.router_DE": router,
      "feed_forward.experts.moe_w_in_eD_F": gate.reshape(-1, gate.shape[-1]),
      "feed_forward.experts.moe_w_swiglu_eD_F": up.reshape(-1, up.shape[-1]),
      "feed_forward.experts.moe_w_out_eF_D": down.reshape(-1, down.shape[-1]),
      **{f"feed_forward.{n}.weight": w for n, w in zip(names, shared)},
    }
  return {
    "ffn_norm.weight": norm,
    "feed_forward.router_DE": router,
    "feed_forward.experts.w1": gate,
    "feed_forward.experts.w3": up,
    "feed_forward.experts.w2": down,
    **{f"feed_forward.shared_expert.w{n}.weight": w for n, w in zip((1, 3, 2), shared)},
  }


def _vision(hf, config, cut):
  encoder, out = "vision_embeddings.vision_encoder.", {}
  out[f"{encoder}conv1._linear.weight"] = cut(hf["vision_model.patch_embedding.linear.weight"], 0)
  for name in ("class_embedding", "positional_embedding_vlm"):
    out[f"{encoder}{name}"] = hf[f"vision_model.{name}"]
  for kind in ("weight", "bias"):
    for name in ("pre", "post"):
      out[f"{encoder}ln_{name}.{kind}"] = hf[f"vision_model.layernorm_{name}.{kind}"]
    for i in range(config.vision_config.num_hidden_layers):
      block, layer = f"{encoder}transformer.resblocks.{i}.", f"vision_model.model.layers.{i}."
      for n in "qkv":
        out[f"{block}attn.w{n}.{kind}"] = cut(hf[f"{layer}self_attn.{n}_proj.{kind}"], 0)
      out[f"{block}mlp.c_fc.{kind}"] = cut(hf[f"{layer}mlp.fc1.{kind}"], 0)
      for ours, theirs in (("attn.wo", "self_attn.o_proj"), ("mlp.c_proj", "mlp.fc2")):
        whole = hf[f"{layer}{theirs}.{kind}"]
        out[f"{block}{ours}.{kind}"] = cut(whole, 1) if kind == "weight" else whole
      out[f"{block}ln_1.{kind}"] = hf[f"{layer}input_layernorm.{kind}"]
      out[f"{block}ln_2.{kind}"] = hf[f"{layer}post_attention_layernorm.{kind}"]
  adapter = "vision_adapter.mlp"
  for dim, (ours, theirs) in enumerate((("c_fc", "fc1"), ("c_proj", "fc2"))):
    whole = hf[f"vision_model.{adapter}.{theirs}.weight"]
    out[f"vision_embeddings.{adapter}.{ours}.weight"] = cut(whole, dim)
  out["vision_projection.weight"] = cut(hf["multi_modal_projector.linear_1.weight"], 0)
  return out


def meta_params(config: ModelConfig) -> dict[str, Any]:
  """The params.json of a model; widths are left to the tensors, but for formulas that do not give them."""
  params = {
    "dim": config.hidden_size,
    "n_layers": config.num_hidden_layers,
    "n_heads": config.num_attention_heads,
    "n_kv_heads": config.num_key_value_heads,
    "vocab_size": config.vocab_size,
    "multiple_of": 2048,
    "ffn_exp": 4.0,
    "ffn_dim_multiplier": 1.2,
    "norm_eps": config.rms_norm_eps,
    "rope_theta": config.rope_theta,
    "max_seq_len": config.max_position_embeddings,
    "use_scaled_rope": config.rope_scaling is not None,
    "nope_layer_interval": config.nope_layer_interval,
    "use_qk_norm": config.use_qk_norm,
    "attention_chunk_size": config.attention_chunk_size,
    "attn_temperature_tuning": config.attn_temperature_tuning,
    "floor_scale": config.floor_scale,
    "attn_scale": config.attn_scale,
  }
  if config.num_local_experts:
    params["moe_args"] = {
      "num_experts": config.num_local_experts,
      "top_k": config.num_experts_per_tok,
      "interleave_moe_layer_step": config.interleave_moe_layer_step,
    }
  if (vision := config.vision_config) is not None:
    params |= {
      "image_token_index": config.image_token_index,
      "boi_token_index": config.boi_token_index,
      "eoi_token_index": config.eoi_token_index,
      "vision_args": {
        "image_size": {"height": vision.image_size, "width": vision.image_size},
        "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
        "dim": vision.hidden_size,
        "n_layers": vision.num_hidden_layers,
        "n_heads": vision.num_attention_heads,
        "mlp_ratio": 4.0,
        "output_dim": vision.vision_output_dim,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
      },
    }
  return params


def write_meta_folder(
  folder: pathlib.Path,
  config: ModelConfig,
  arrays: Arrays,
  *,
  num_shards: int = 1,
  released: bool = True,
  params: dict[str, Any] | None = None,
) -> pathlib.Path:
  """`folder`, filled with the model in Meta's format."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "params.json").write_text(json.dumps(params or meta_params(config)))
  for shard in range(num_shards):
    tensors = meta_shard(config, arrays, shard, num_shards, released)
    write_pth(folder / f"consolidated.{shard:02}.pth", tensors)
  return folder
