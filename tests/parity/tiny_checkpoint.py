"""Tiny checkpoints in Hugging Face's format, of every kind of Llama 4 text model: python tiny_checkpoint.py FOLDER"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np

from maxllama4 import save_model
from maxllama4.config import ModelConfig, RopeScaling
from maxllama4.model.llama4 import Llama4ForCausalLM
from maxllama4.model.weights import ModelTemplate

# Chunks of 6 positions, temperature that already grows at position 5: short sequences cross all borders.
SCOUT = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 40,
  "intermediate_size_mlp": 56,
  "num_hidden_layers": 5,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "num_local_experts": 4,
  "num_experts_per_tok": 1,
  "interleave_moe_layer_step": 1,
  "moe_layers": None,
  "nope_layer_interval": 4,
  "nope_layers": None,
  "attention_chunk_size": 6,
  "use_qk_norm": True,
  "attn_temperature_tuning": True,
  "floor_scale": 5.0,
  "attn_scale": 0.4,
  "rope_theta": 10000.0,
  "rope_scaling": RopeScaling(
    rope_type="llama3",
    factor=16.0,
    low_freq_factor=1.0,
    high_freq_factor=1.0,
    original_max_position_embeddings=32,
  ),
  "max_position_embeddings": 512,
  "rms_norm_eps": 1e-5,
  "initializer_range": 0.02,
  "tie_word_embeddings": False,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
  "dtype": "float32",
  "param_dtype": "float32",
}
VARIANTS = {
  "scout": {},
  "maverick": {
    "interleave_moe_layer_step": 2,
    "num_hidden_layers": 8,
    "use_qk_norm": False,
    "rope_scaling": None,
    "num_local_experts": 8,
  },
  "top2": {
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "nope_layers": (1,),
    "moe_layers": (0, 2),
  },
  "tied": {"tie_word_embeddings": True, "num_hidden_layers": 2, "nope_layer_interval": 2},
}


def tiny_config(variant: str) -> ModelConfig:
  return ModelConfig(**SCOUT | VARIANTS[variant])


def tiny_model(variant: str, seed: int = 0) -> Llama4ForCausalLM:
  """Weights large enough for routing, attention and norms to matter: products keep a variance of about one.

  They come from NumPy, so that they are the same with every version of JAX.
  """
  template = ModelTemplate(tiny_config(variant))
  rng = np.random.default_rng(seed)
  arrays = {}
  for path, shape in sorted(template.shapes.items()):
    values = rng.normal(size=shape.shape)
    if path.endswith("router/bias"):
      values = 0 * values  # a Hugging Face folder has no place for it
    elif path.endswith("norm/weight"):
      values = 1 + 0.2 * values
    elif path.endswith("embed/weight"):
      values = 0.5 * values
    else:
      values = 1.3 * values / np.sqrt(template.config.hidden_size)
    arrays[path] = jnp.asarray(values, jnp.float32)
  return template.model(arrays)


def main(folder: str) -> None:
  for variant in VARIANTS:
    save_model(tiny_model(variant), pathlib.Path(folder) / variant, format="hf")


if __name__ == "__main__":
  main(*sys.argv[1:])
