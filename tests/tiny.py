"""The smallest models and batches that cross the boundaries tests are about."""

import jax.numpy as jnp
import numpy as np

from maxllama4.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  KernelsConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  ReportingConfig,
  TrainingConfig,
  VisionConfig,
)
from maxllama4.model.llama4 import Llama4ForCausalLM
from maxllama4.model.weights import Arrays, ModelTemplate

Batch = dict[str, jnp.ndarray]


def tiny_config(**changes) -> ModelConfig:
  """A model of one dense chunked RoPE layer and one NoPE layer with experts; chunks of 4 positions.

  With `num_hidden_layers=5` two cycles of both are scanned and one layer is left over. Weights are large enough for
  every part to matter.
  """
  settings = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "intermediate_size_mlp": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "moe_layers": None,
    "nope_layer_interval": 2,
    "nope_layers": None,
    "attention_chunk_size": 4,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 3.0,
    "attn_scale": 0.5,
    "rope_theta": 100.0,
    "rope_scaling": None,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "dtype": "float32",
    "param_dtype": "float32",
  }
  return ModelConfig(**settings | changes)


def tiny_vision_config(initializer_range: float = 0.3, **changes) -> ModelConfig:
  """Tiles of 8 x 8 pixels, 4 x 4 patches, 2 x 2 places in the text (token 9); `changes` are of the tower."""
  settings = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 8,
    "patch_size": 2,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 12,
    "projector_output_dim": 12,
    "vision_output_dim": 12,
    "rope_theta": 100.0,
  }
  return tiny_config(
    vision_config=VisionConfig(**settings | changes),
    image_token_index=9,
    boi_token_index=7,
    eoi_token_index=8,
    initializer_range=initializer_range,
  )


def tiny_arrays(config: ModelConfig, seed: int = 0) -> Arrays:
  """Weights by path, drawn by NumPy (compiling the model's own initialiser takes longer than most tests)."""
  rng = np.random.default_rng(seed)

  def draw(path, shape):
    noise = rng.standard_normal(shape.shape)
    if path.endswith("router/bias"):
      noise = np.zeros(shape.shape)
    elif path.endswith("norm/weight"):
      noise = 1 + 0.2 * noise
    else:
      noise *= config.initializer_range
    return jnp.asarray(noise, shape.dtype)

  shapes = ModelTemplate(config).shapes
  return {path: draw(path, shapes[path]) for path in sorted(shapes)}


def tiny_model(config: ModelConfig | None = None, seed: int = 0) -> Llama4ForCausalLM:
  config = config or tiny_config()
  return ModelTemplate(config).model(tiny_arrays(config, seed))


def tiny_run(
  model: ModelConfig | None = None,
  *,
  mesh: MeshConfig | None = None,
  kernels: KernelsConfig | None = None,
  data: DataConfig | None = None,
  optimizer: OptimizerConfig | None = None,
  checkpoint: CheckpointConfig | None = None,
  reporting: ReportingConfig | None = None,
  run_dir: object = "unused",
  **training,
) -> Config:
  """A run of `model`, on synthetic data unless said otherwise; other keyword arguments are settings of `training`."""
  settings = {"steps": 10, "batch_size": 8, "sequence_length": 10, "loss_chunk": 32}
  return Config(
    model=model or tiny_config(),
    data=data or DataConfig(source="synthetic"),
    training=TrainingConfig(**settings | training),
    mesh=mesh or MeshConfig(),
    kernels=kernels or KernelsConfig(),
    optimizer=optimizer or OptimizerConfig(),
    checkpoint=checkpoint or CheckpointConfig(),
    reporting=reporting or ReportingConfig(),
    compilation_cache=None,
    run_dir=str(run_dir),
  )


def packed_batch(rows: int, length: int, vocab_size: int = 32, seed: int = 0) -> Batch:
  """Rows of one to three documents, the first row full, every other one with padding at its end."""
  rng = np.random.default_rng(seed)
  batch = {name: np.zeros((rows, length), np.int32) for name in ("segment_ids", "positions")}
  for row in range(rows):
    used = length if row == 0 else length - rng.integers(1, length // 2)
    cuts = np.sort(rng.choice(np.arange(1, used), size=min(row % 3, used - 1), replace=False))
    for segment, (start, stop) in enumerate(zip([0, *cuts], [*cuts, used]), 1):
      batch["segment_ids"][row, start:stop] = segment
      batch["positions"][row, start:stop] = np.arange(stop - start)
  for name in ("tokens", "targets"):
    batch[name] = rng.integers(vocab_size, size=(rows, length), dtype=np.int32)
  batch["weights"] = (batch["segment_ids"] > 0).astype(np.float32)
  return {name: jnp.asarray(value) for name, value in batch.items()}
