"""The section `model`: the architecture, in the names of Hugging Face's `config.json`, and its checks."""

import dataclasses

from maxllama4.rope_scaling import RopeScaling
from maxllama4.settings import at_most, not_negative, one_of, positive, require, to_plain

DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 1000  # no model comes near; more is a slip that would keep a machine busy for hours


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """The vision tower, in the names of Hugging Face's `vision_config`."""

  hidden_size: int
  intermediate_size: int  # of an encoder layer, and channels after the pixel shuffle
  num_hidden_layers: int
  num_attention_heads: int
  num_channels: int
  image_size: int  # pixels, the side of a tile
  patch_size: int  # pixels
  pixel_shuffle_ratio: float
  projector_input_dim: int
  projector_output_dim: int
  vision_output_dim: int
  rope_theta: float

  def __post_init__(self):
    section = "model.vision_config"
    positive(section, self, "hidden_size intermediate_size num_hidden_layers num_attention_heads")
    positive(section, self, "num_channels image_size patch_size pixel_shuffle_ratio rope_theta")
    positive(section, self, "projector_input_dim projector_output_dim vision_output_dim")
    at_most(f"{section}.num_hidden_layers", self.num_hidden_layers, MAX_LAYERS)
    require(
      self.hidden_size % (4 * self.num_attention_heads) == 0,
      f"{section}.hidden_size={self.hidden_size} is not a multiple of 4 x"
      f" {section}.num_attention_heads={self.num_attention_heads}; each head turns pairs by row and by column.",
    )
    require(
      self.image_size % self.patch_size == 0,
      f"{section}.image_size={self.image_size} is not a multiple of {section}.patch_size={self.patch_size}; a tile is"
      " cut into whole patches.",
    )
    block = round(1 / self.pixel_shuffle_ratio)
    require(
      block * self.pixel_shuffle_ratio == 1 and self.patches_per_side % block == 0,
      f"{section}.pixel_shuffle_ratio={self.pixel_shuffle_ratio} must be 1 / n, where n divides the"
      f" {self.patches_per_side} patches along a tile's side.",
    )
    require(
      self.intermediate_size == self.hidden_size * block**2,
      f"{section}.intermediate_size={self.intermediate_size} must be {self.hidden_size * block**2}, the channels after"
      f" the pixel shuffle (hidden_size={self.hidden_size} x {block**2}).",
    )
    require(
      self.projector_output_dim == self.vision_output_dim,
      f"{section}.projector_output_dim={self.projector_output_dim} differs from"
      f" {section}.vision_output_dim={self.vision_output_dim}; the adapter's output is the tower's.",
    )

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  @property
  def patches_per_side(self) -> int:
    return self.image_size // self.patch_size

  @property
  def patch_tokens_per_tile(self) -> int:
    """Places that a tile takes in the text."""
    return round(self.patches_per_side * self.pixel_shuffle_ratio) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
  """What one decoder layer is made of."""

  uses_rope: bool  # RoPE and chunked attention when true, NoPE and global attention when false
  is_moe: bool  # routed and shared experts when true, one dense MLP when false


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture, in the names of Hugging Face's `config.json`. Nothing of the text model has a default.

  `nope_layers` and `moe_layers` list layer indices and win over the intervals when not null; `dtype` is that of the
  activations, `param_dtype` that of the weights (both come from the top of the run's YAML).
  """

  vocab_size: int  # V
  hidden_size: int  # D
  intermediate_size: int  # F of a routed or shared expert
  intermediate_size_mlp: int  # F of a dense layer
  num_hidden_layers: int  # L
  num_attention_heads: int  # N
  num_key_value_heads: int  # K
  head_dim: int  # H
  num_local_experts: int  # E; 0 means that no layer has experts
  num_experts_per_tok: int  # C
  interleave_moe_layer_step: int  # layer i has experts when (i + 1) % step == 0; 0 means none has
  moe_layers: tuple[int, ...] | None
  nope_layer_interval: int  # layer i has no RoPE when (i + 1) % interval == 0; 0: all have RoPE
  nope_layers: tuple[int, ...] | None
  attention_chunk_size: int | None  # positions; null: RoPE layers see everything before them
  use_qk_norm: bool
  attn_temperature_tuning: bool
  floor_scale: float  # positions
  attn_scale: float
  rope_theta: float
  rope_scaling: RopeScaling | None
  max_position_embeddings: int  # positions
  rms_norm_eps: float
  initializer_range: float  # standard deviation of fresh weights
  tie_word_embeddings: bool
  bos_token_id: int | None
  eos_token_id: int | tuple[int, ...] | None
  pad_token_id: int | None
  vision_config: VisionConfig | None = None  # null: text only
  image_token_index: int | None = (
    None  # the patch token, whose places in the text image features take
  )
  boi_token_index: int | None = None  # stands before an image
  eoi_token_index: int | None = None  # stands after an image
  dtype: str
  param_dtype: str

  def __post_init__(self):
    positive("model", self, "vocab_size hidden_size intermediate_size intermediate_size_mlp")
    positive("model", self, "num_hidden_layers num_attention_heads num_key_value_heads head_dim")
    positive("model", self, "num_experts_per_tok floor_scale rope_theta max_position_embeddings")
    positive("model", self, "rms_norm_eps initializer_range")
    not_negative("model", self, "num_local_experts interleave_moe_layer_step nope_layer_interval")
    not_negative("model", self, "attn_scale")
    at_most("model.num_hidden_layers", self.num_hidden_layers, MAX_LAYERS)
    one_of("dtype", self.dtype, DTYPES)
    one_of("param_dtype", self.param_dtype, DTYPES)
    require(
      self.num_attention_heads % self.num_key_value_heads == 0,
      f"model.num_attention_heads={self.num_attention_heads} is not a multiple of"
      f" model.num_key_value_heads={self.num_key_value_heads}; each key-value head serves a whole number of heads.",
    )
    require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even, for RoPE.")
    self._check_rope_scaling()
    if self.attention_chunk_size is not None:
      positive("model", self, "attention_chunk_size")
    for name in ("moe_layers", "nope_layers"):
      layers = getattr(self, name)
      outside = [i for i in layers or () if not 0 <= i < self.num_hidden_layers]
      require(
        not outside,
        f"model.{name}={list(layers or ())} names layers {outside}, outside 0..{self.num_hidden_layers - 1}"
        f" (model.num_hidden_layers={self.num_hidden_layers}); correct the list, or null it to go by the interval.",
      )
    self._check_tokens()
    experts, choices = self.num_local_experts, self.num_experts_per_tok
    require(
      choices <= experts or not any(kind.is_moe for kind in self.layer_kinds),
      f"model.num_experts_per_tok={choices} exceeds model.num_local_experts={experts}; lower it, add experts, or set"
      " model.interleave_moe_layer_step=0 and model.moe_layers=null for a dense model.",
    )

  def _check_tokens(self):
    require(
      self.vision_config is None or self.image_token_index is not None,
      "model.image_token_index=null must be a token where model.vision_config is set.",
    )
    names = ["bos_token_id", "eos_token_id", "pad_token_id"]
    names += (
      ["image_token_index", "boi_token_index", "eoi_token_index"] if self.vision_config else []
    )
    for name in names:
      value = getattr(self, name)
      tokens = value if isinstance(value, tuple) else () if value is None else (value,)
      require(
        all(0 <= token < self.vocab_size for token in tokens),
        f"model.{name}={to_plain(value)} is outside 0..{self.vocab_size - 1} (model.vocab_size={self.vocab_size});"
        " correct it, or null it.",
      )

  def _check_rope_scaling(self):
    scaling = self.rope_scaling or RopeScaling(rope_type="default")
    require(
      scaling.rope_type != "dynamic" or self.head_dim > 2,
      f"model.head_dim={self.head_dim} must be at least 4 for model.rope_scaling.rope_type=dynamic.",
    )
    for name in ("short_factor", "long_factor"):
      factors = getattr(scaling, name)
      require(
        factors is None or len(factors) == self.head_dim // 2,
        f"model.rope_scaling.{name} holds {len(factors or ())} numbers where model.head_dim={self.head_dim} needs"
        f" {self.head_dim // 2}, one for each pair of elements.",
      )

  @property
  def layer_kinds(self) -> tuple[LayerKind, ...]:
    """One `LayerKind` a layer, in order."""

    def kind(i):
      is_nope, is_moe = determine_is_nope_layer(self, i), determine_is_moe_layer(self, i)
      return LayerKind(uses_rope=not is_nope, is_moe=is_moe)

    return tuple(map(kind, range(self.num_hidden_layers)))

  @property
  def inhomogeneous_layer_cycle_interval(self) -> int:
    """The shortest period of `layer_kinds`: lcm(nope_layer_interval, interleave_moe_layer_step) for long regular stacks."""
    kinds = self.layer_kinds
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])

  @property
  def num_cycles(self) -> int:
    """Whole cycles that are stacked and scanned; 0 where there are fewer than two."""
    cycles = self.num_hidden_layers // self.inhomogeneous_layer_cycle_interval
    return cycles if cycles > 1 else 0

  @property
  def stop_token_ids(self) -> tuple[int, ...]:
    if self.eos_token_id is None:
      return ()
    return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)


def determine_is_nope_layer(config: ModelConfig, layer: int) -> bool:
  """Whether layer `layer` (from 0) attends globally and without RoPE."""
  if config.nope_layers is not None:
    return layer in config.nope_layers
  return config.nope_layer_interval > 0 and (layer + 1) % config.nope_layer_interval == 0


def determine_is_moe_layer(config: ModelConfig, layer: int) -> bool:
  """Whether layer `layer` (from 0) has routed experts."""
  if config.moe_layers is not None:
    return layer in config.moe_layers
  step = config.interleave_moe_layer_step
  return step > 0 and (layer + 1) % step == 0
