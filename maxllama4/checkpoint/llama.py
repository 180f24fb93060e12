"""Hugging Face folders of the models before Llama 4 (`LlamaForCausalLM`): dense models of this architecture.

Every layer has RoPE and sees everything before it; there is no norm of queries and keys, and no temperature. The files
pair elements (j, j + H/2) of a head for RoPE where Llama 4 pairs (2j, 2j + 1), so rows of queries and keys are
reordered. Meta's own files of these models pair as Llama 4's; `meta.py` reads them.
"""

import dataclasses
import pathlib
from typing import Any

from maxllama4.checkpoint import hf
from maxllama4.checkpoint.safetensors_files import check_kinds, read_json
from maxllama4.checkpoint.tensors import Tensor
from maxllama4.config import ModelConfig, require
from maxllama4.settings import config_from_file

# What transformers assumes where a config.json is silent.
_DEFAULTS = {
  "vocab_size": 32000,
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-6,
  "initializer_range": 0.02,
  "tie_word_embeddings": False,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": None,
}
# What a dense model without Llama 4's additions has.
_DENSE = {
  "num_local_experts": 0,
  "num_experts_per_tok": 1,
  "interleave_moe_layer_step": 0,
  "moe_layers": None,
  "nope_layer_interval": 0,
  "nope_layers": None,
  "attention_chunk_size": None,
  "use_qk_norm": False,
  "attn_temperature_tuning": False,
  "floor_scale": 8192,
  "attn_scale": 0.1,
}


# What is computed with before the section as a whole is checked.
_KINDS = {
  **dict.fromkeys(("rope_parameters", "rope_scaling"), dict),
  **dict.fromkeys(("num_attention_heads", "hidden_size", "head_dim"), int),
}


def read_config(source: pathlib.Path) -> ModelConfig:
  """The architecture in the config.json `source`. Raises: ConfigError for what is not supported."""
  raw = read_json(source)
  for name, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
    require(
      raw.get(name, only) == only,
      f"{source}: {name}={raw.get(name)} is not supported; it must be {only}.",
    )
  section = {name: raw.get(name, default) for name, default in _DEFAULTS.items()}
  check_kinds(raw, _KINDS, source)
  heads = section["num_attention_heads"]
  require(
    heads is not None and heads > 0 and section["hidden_size"] is not None,
    f"{source}: num_attention_heads={heads} and hidden_size={section['hidden_size']} must be greater than 0.",
  )
  rope = raw.get("rope_parameters") or {}
  scaling = raw.get("rope_scaling") or rope
  section |= {
    "intermediate_size_mlp": section["intermediate_size"],
    "num_key_value_heads": raw.get("num_key_value_heads") or heads,
    "head_dim": raw.get("head_dim") or (section["hidden_size"] or 0) // heads,
    "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
    "rope_scaling": hf.rope_scaling_from_hf(scaling, section | raw, source),
    "dtype": "float32",
    "param_dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
  }
  return config_from_file(ModelConfig, _DENSE | section, source)


class LlamaFolder(hf.HuggingFaceFolder):
  """The tensors of a `LlamaForCausalLM`, of which queries and keys are turned into Llama 4's order as they are read."""

  def _read_config(self) -> ModelConfig:
    return read_config(self.folder / "config.json")

  def _table(self) -> list[Tensor]:
    return [
      dataclasses.replace(tensor, name=tensor.name.replace(".feed_forward.", ".mlp."))
      for tensor in hf.tensor_table(self.config)
    ]

  def view(self, tensor: Tensor, dims: tuple[int, ...]) -> Any:
    if not tensor.path.endswith(("attention/query", "attention/key")):
      return super().view(tensor, dims)
    heads, size, dim = dims
    halves = self.read(tensor.name).reshape(heads, 2, size // 2, dim)
    return halves.swapaxes(1, 2).reshape(dims)
