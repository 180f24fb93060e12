"""The released models whole, text and vision: every tensor's name and shape, mapped both ways. Nothing is allocated."""

import dataclasses
import pathlib

import numpy as np
import pytest

from maxllama4.checkpoint.hf import tensor_table
from maxllama4.config import VisionConfig, load_config
from maxllama4.model.weights import ModelTemplate

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
VISION = VisionConfig(
  hidden_size=1408,
  intermediate_size=5632,
  num_hidden_layers=34,
  num_attention_heads=16,
  num_channels=3,
  image_size=336,
  patch_size=14,
  pixel_shuffle_ratio=0.5,
  projector_input_dim=4096,
  projector_output_dim=4096,
  vision_output_dim=4096,
  rope_theta=10000.0,
)
MOE_LAYERS = {"llama4_scout": range(48), "llama4_maverick": range(1, 48, 2)}
EXPERTS = {"llama4_scout": 16, "llama4_maverick": 128}


def published_shapes(name):
  """Names and shapes of all tensors of a release, written down from its files' listing."""
  shapes = {
    "language_model.model.embed_tokens.weight": (202048, 5120),
    "language_model.lm_head.weight": (202048, 5120),
    "language_model.model.norm.weight": (5120,),
    "vision_model.patch_embedding.linear.weight": (1408, 588),
    "vision_model.class_embedding": (1408,),
    "vision_model.positional_embedding_vlm": (577, 1408),
    "vision_model.vision_adapter.mlp.fc1.weight": (4096, 5632),
    "vision_model.vision_adapter.mlp.fc2.weight": (4096, 4096),
    "multi_modal_projector.linear_1.weight": (5120, 4096),
  }
  for norm in ("layernorm_pre", "layernorm_post"):
    shapes |= {f"vision_model.{norm}.{kind}": (1408,) for kind in ("weight", "bias")}
  for i in range(34):
    layer = f"vision_model.model.layers.{i}."
    for part, out, into in (
      *((f"self_attn.{side}_proj", 1408, 1408) for side in "qkvo"),
      ("mlp.fc1", 5632, 1408),
      ("mlp.fc2", 1408, 5632),
    ):
      shapes |= {f"{layer}{part}.weight": (out, into), f"{layer}{part}.bias": (out,)}
    for norm in ("input_layernorm", "post_attention_layernorm"):
      shapes |= {f"{layer}{norm}.{kind}": (1408,) for kind in ("weight", "bias")}
  for i in range(48):
    layer = f"language_model.model.layers.{i}."
    shapes |= {
      f"{layer}input_layernorm.weight": (5120,),
      f"{layer}post_attention_layernorm.weight": (5120,),
      f"{layer}self_attn.q_proj.weight": (5120, 5120),
      f"{layer}self_attn.k_proj.weight": (1024, 5120),
      f"{layer}self_attn.v_proj.weight": (1024, 5120),
      f"{layer}self_attn.o_proj.weight": (5120, 5120),
    }
    mlp, width = f"{layer}feed_forward.", 16384
    if i in MOE_LAYERS[name]:
      experts = EXPERTS[name]
      shapes |= {
        f"{mlp}router.weight": (experts, 5120),
        f"{mlp}experts.gate_up_proj": (experts, 5120, 16384),
        f"{mlp}experts.down_proj": (experts, 8192, 5120),
      }
      mlp, width = f"{mlp}shared_expert.", 8192
    shapes |= {
      f"{mlp}gate_proj.weight": (width, 5120),
      f"{mlp}up_proj.weight": (width, 5120),
      f"{mlp}down_proj.weight": (5120, width),
    }
  return shapes


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_every_tensor_of_a_release_has_its_name_shape_and_place(name):
  text = load_config(CONFIGS / f"{name}.yml").model
  config = dataclasses.replace(text, vision_config=VISION, image_token_index=200092)
  ours = ModelTemplate(config).shapes
  table = tensor_table(config)
  shapes = {}
  places = set()
  for tensor in table:
    shape = ours[tensor.path].shape
    if tensor.stack_index is not None:
      assert 0 <= tensor.stack_index < shape[0]
      shape = shape[1:]
    shapes[tensor.name] = tensor.file_shape(shape)
    places.add((tensor.path, tensor.stack_index))
  assert shapes == published_shapes(name)
  assert len(places) == len(table)  # no two tensors share a place
  mapped = sum(np.prod(shape, dtype=np.int64) for shape in shapes.values())
  biases = {path for path in ours if path.endswith("router/bias")}
  total = sum(np.prod(s.shape, dtype=np.int64) for path, s in ours.items() if path not in biases)
  assert mapped == total  # and nothing of the model is left out
