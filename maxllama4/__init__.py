"""maxllama4: train, fine-tune and decode Llama 4 models with JAX and Flax NNX."""

from maxllama4.checkpoint.folders import load_model, save_model
from maxllama4.config import ConfigError, load_config
from maxllama4.data.tokenizer import load_tokenizer
from maxllama4.decoding.generate import generate

__all__ = ["ConfigError", "generate", "load_config", "load_model", "load_tokenizer", "save_model"]
