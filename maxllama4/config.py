"""The schema of a run, how YAML and `key=value` become one, and every check that needs no device.

`load_config` is the only way in. It returns a frozen `Config` whose values are complete: nothing is looked up later.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from maxllama4.rope_scaling import RopeScaling
from maxllama4.settings import (
  ConfigError,
  config_from_section,
  flatten,
  not_negative,
  one_of,
  parse_override,
  positive,
  read_yaml,
  require,
  set_dotted,
  to_plain,
)

DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = ("none", "full", "matmuls", "attention")
MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
# Which mesh axes each logical axis is split over, unless `mesh.rules` says otherwise.
DEFAULT_RULES = {
  "batch": ("data", "fsdp", "expert"),
  "length": "context",
  "embed": "fsdp",
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "ffn": "tensor",
  "experts": "expert",
  "layers": None,
}
LOGICAL_AXES = tuple(DEFAULT_RULES)
# Logical axes that meet in one array: no two of them may be split over the same mesh axis.
_ARRAYS = (
  ("batch", "length", "heads"),
  ("batch", "length", "ffn"),
  ("batch", "kv_heads"),
  ("vocab", "embed"),
  ("embed", "heads"),
  ("embed", "kv_heads"),
  ("experts", "embed", "ffn"),
)


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
    if self.vision_config is not None:
      require(
        self.image_token_index is not None and 0 <= self.image_token_index < self.vocab_size,
        f"model.image_token_index={self.image_token_index} must be a token, 0..{self.vocab_size - 1}, where"
        " model.vision_config is set.",
      )
    experts, choices = self.num_local_experts, self.num_experts_per_tok
    require(
      choices <= experts or not any(kind.is_moe for kind in self.layer_kinds),
      f"model.num_experts_per_tok={choices} exceeds model.num_local_experts={experts}; lower it, add experts, or set"
      " model.interleave_moe_layer_step=0 and model.moe_layers=null for a dense model.",
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How many devices lie along each mesh axis; one axis may be -1, all devices that the others leave.

  `rules` is the one table from logical axis names to mesh axes (a name, a list of names, or null); a rule that is not
  given is the one of `DEFAULT_RULES`.
  """

  data: int = 1
  fsdp: int = -1
  expert: int = 1
  tensor: int = 1
  context: int = 1
  rules: dict[str, str | tuple[str, ...] | None] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name in self.rules:
      one_of("mesh.rules: the logical axis", name, LOGICAL_AXES)
    object.__setattr__(self, "rules", DEFAULT_RULES | self.rules)
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
      require(
        size > 0 or size == -1,
        f"mesh.{axis}={size} must be a number of devices, or -1 for all that are left.",
      )
    rest = [f"mesh.{axis}=-1" for axis, size in sizes.items() if size == -1]
    require(
      len(rest) <= 1, f"{' and '.join(rest)}: only one axis can be -1; give the others a size."
    )
    for name in LOGICAL_AXES:
      axes, single = self.axes_of(name), name in ("experts", "length", "kv_heads")
      require(
        set(axes) <= set(MESH_AXES) and len(axes) <= (1 if single else len(MESH_AXES)),
        f"mesh.rules.{name}={list(axes)} must be null or {'one' if single else 'some'} of {', '.join(MESH_AXES)}.",
      )
    for names in _ARRAYS:
      axes = [axis for name in names for axis in self.axes_of(name)]
      require(
        len(axes) == len(set(axes)),
        f"mesh.rules splits {' and '.join(names)}, which meet in one array, over {', '.join(axes)}; no mesh axis may"
        " stand there twice.",
      )

  def axes_of(self, logical: str) -> tuple[str, ...]:
    """The mesh axes that the logical axis `logical` is split over, possibly none."""
    axes = self.rules[logical]
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

  def resolve(self, num_devices: int) -> dict[str, int]:
    """Axis sizes on `num_devices` devices, -1 filled in. Raises: ConfigError when they do not multiply to that."""
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest = num_devices // fixed if -1 in sizes.values() else 1
    require(
      fixed * rest == num_devices,
      f"mesh {sizes} cannot be laid over {num_devices} devices: the axes that are set multiply to {fixed}; change"
      " them, or set one to -1 to take all that are left.",
    )
    return {axis: rest if size == -1 else size for axis, size in sizes.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What a run reads, and how documents become rows."""

  source: str = "text"  # text: files of text or JSONL; synthetic: random ids; tfds: see tfds_name
  paths: tuple[str, ...] = ()  # text: files, folders or globs; "stdlib:GLOB": Python's own library
  exclude: tuple[str, ...] = ()  # text: globs of paths to leave out
  text_field: str = "text"  # JSONL and tfds: the field that holds the document
  tfds_name: str | None = None  # tfds: a prepared TensorFlow dataset, name[/config][:version]
  tfds_dir: str | None = None  # tfds: the folder it was prepared in
  tokenizer: str | None = None  # a file or folder; null: one of model.vocab_size pieces is trained
  held_out_fraction: float = 0.03  # of the documents, by a stable hash of the file name
  excerpt_length: int = 0  # characters; longer training documents are cut, at line ends, and their parts shuffled; 0: not
  prefetch: int = 2  # batches made ahead, in the background

  def __post_init__(self):
    one_of("data.source", self.source, ("text", "synthetic", "tfds"))
    if self.source == "text" and not self.paths:
      raise ConfigError("data.paths=[] names no files; set it, or set data.source=synthetic.")
    if self.source == "tfds" and self.tfds_name is None:
      raise ConfigError("data.tfds_name=null names no dataset; set it.")
    fraction = self.held_out_fraction
    require(0 <= fraction < 1, f"data.held_out_fraction={fraction} must be at least 0 and below 1.")
    not_negative("data", self, "excerpt_length prefetch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """The step, the losses, and what is logged."""

  steps: int
  batch_size: int  # rows a step, over all devices and accumulation steps
  sequence_length: int  # tokens a row
  gradient_accumulation: int = 1  # microbatches a step
  seed: int = 0
  log_every: int = 10  # steps
  eval_every: int = 0  # steps; 0: never
  eval_batches: int = 0  # held-out batches an evaluation reads; 0: all
  loss_chunk: int = 1024  # tokens whose logits exist at once, per device
  z_loss: float = 0.0  # weight of mean logsumexp^2
  load_balance_loss: float = 0.0  # weight of the Switch balance loss, mean over MoE layers
  router_z_loss: float = 0.0  # weight of mean logsumexp(router logits)^2, mean over MoE layers
  router_bias_update_rate: float = 0.0  # step of the aux-free balancing bias; 0: bias stays
  remat: str = "none"  # what a layer keeps for its backward pass; see model/decoder.py
  frozen: tuple[str, ...] = ()  # parts whose weights stay: vision, projector, embed, decoder, ...
  skip_nonfinite: bool = False  # leave out steps with bad numbers; false: stop at the first
  loss_spike_sigmas: float = 0.0  # a loss so many deviations above its mean is bad, too; 0: never
  debug_statistics: bool = False  # log what activations and gradients look like, layer by layer

  def __post_init__(self):
    positive("training", self, "steps batch_size sequence_length gradient_accumulation")
    positive("training", self, "log_every loss_chunk")
    not_negative("training", self, "seed eval_every eval_batches z_loss load_balance_loss")
    not_negative("training", self, "router_z_loss router_bias_update_rate loss_spike_sigmas")
    one_of("training.remat", self.remat, REMAT_POLICIES)
    require(
      self.batch_size % self.gradient_accumulation == 0,
      f"training.batch_size={self.batch_size} is not a multiple of"
      f" training.gradient_accumulation={self.gradient_accumulation}; each microbatch takes the same number of rows.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW (or Muon for matrices), its schedule and clipping."""

  name: str = "adamw"
  learning_rate: float = 3e-4  # at the peak
  embedding_learning_rate: float | None = (
    None  # muon: of what it leaves to AdamW; null: learning_rate
  )
  schedule: str = "cosine"  # after the warm-up; linear, constant, or wsd: constant, then linear
  warmup_steps: int = 0  # a shorter run ends inside the warm-up
  decay_fraction: float = 0.2  # wsd: share of the steps spent decaying
  final_fraction: float = 0.1  # the last learning rate over the peak; ignored by constant
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1  # on matrices; vectors and embeddings are not decayed
  max_gradient_norm: float = 1.0  # global norm; 0: no clipping

  def __post_init__(self):
    one_of("optimizer.name", self.name, ("adamw", "muon"))
    one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
    positive("optimizer", self, "learning_rate eps")
    if self.embedding_learning_rate is not None:
      positive("optimizer", self, "embedding_learning_rate")
      require(
        self.name == "muon",
        f"optimizer.embedding_learning_rate={self.embedding_learning_rate} is a setting of muon, but optimizer.name="
        f"{self.name}; take muon, or null it.",
      )
    not_negative("optimizer", self, "warmup_steps weight_decay max_gradient_norm")
    for name in ("b1", "b2", "decay_fraction", "final_fraction"):
      value = getattr(self, name)
      require(0 <= value <= 1, f"optimizer.{name}={value} must be between 0 and 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When the whole training state is written, and what is kept."""

  every: int = 100  # steps; 0: only the last
  keep: int = 2  # newest checkpoints that stay
  keep_every: int = 0  # steps; checkpoints at its multiples stay for ever; 0: none

  def __post_init__(self):
    not_negative("checkpoint", self, "every keep_every")
    positive("checkpoint", self, "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
  """Several processes, one a host, as one run; see hosts.py. What is null, a TPU pod, GKE or Slurm says."""

  enabled: bool | None = None  # null: whether somebody says that there are several
  coordinator_address: str | None = None  # host:port of process 0
  num_processes: int | None = None
  process_id: int | None = None  # from 0
  start_timeout_seconds: int = 300  # for all of them to come

  def __post_init__(self):
    address, count, place = self.coordinator_address, self.num_processes, self.process_id
    for name in ("start_timeout_seconds", "num_processes"):
      if getattr(self, name) is not None:
        positive("distributed", self, name)
    require(
      self.enabled is not False or (address, count, place) == (None, None, None),
      "distributed.enabled=false, but distributed also says which process this is; null one of them.",
    )
    require(
      place is None or 0 <= place < (count or math.inf),
      f"distributed.process_id={place} must be from 0 to distributed.num_processes={count} less 1.",
    )
    host, _, port = (address or "host0:8476").rpartition(":")
    require(
      bool(host) and port.isdecimal() and 0 < int(port) < 65536,
      f"distributed.coordinator_address={address} is not host:port, such as host0:8476.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportingConfig:
  """What a run shows besides its metrics."""

  report_every_seconds: float = 60.0  # between rewrites of report.html; 0: only at the end
  sample_prompts: tuple[str, ...] = ()  # continued greedily at each evaluation
  sample_tokens: int = 64  # new tokens of each
  wandb_project: str | None = None  # a Weights & Biases project that gets the metrics, too

  def __post_init__(self):
    not_negative("reporting", self, "report_every_seconds")
    positive("reporting", self, "sample_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
  """What is recorded for a closer look; see docs/profiling.md."""

  steps: tuple[int, ...] = ()  # first and last step of an XProf trace; empty: none
  memory: bool = (
    False  # a profile of device memory, after the last of those steps or the first of all
  )

  def __post_init__(self):
    first_and_last = len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]
    require(
      not self.steps or first_and_last,
      f"profile.steps={list(self.steps)} must be a first and a last step, such as [10, 13], or empty.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One reproducible run."""

  model: ModelConfig
  data: DataConfig
  training: TrainingConfig
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
  reporting: ReportingConfig = dataclasses.field(default_factory=ReportingConfig)
  profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
  compilation_cache: str | None = (
    "compiled"  # a folder, relative to run_dir; null: compile anew each time
  )
  run_dir: str

  def __post_init__(self):
    check_mesh_divides(self, {axis: max(1, getattr(self.mesh, axis)) for axis in MESH_AXES})
    training = self.training
    require(
      training.sequence_length <= self.model.max_position_embeddings,
      f"training.sequence_length={training.sequence_length} exceeds model.max_position_embeddings"
      f"={self.model.max_position_embeddings}; lower the first, or raise the second.",
    )
    require(
      training.eval_every == 0 or self.data.source != "synthetic",
      f"training.eval_every={training.eval_every}, but data.source=synthetic holds no documents to evaluate on;"
      " set training.eval_every=0.",
    )


def check_mesh_divides(config: Config, sizes: dict[str, int]) -> None:
  """Checks that every dimension that the mesh splits can be split evenly.

  Raises: ConfigError naming the dimension, the mesh axes and both numbers.
  """
  training, kinds = config.training, config.model.layer_kinds
  microbatch = training.batch_size // training.gradient_accumulation
  dimensions = [
    ("batch", "training.batch_size / training.gradient_accumulation", microbatch),
    ("length", "training.sequence_length", training.sequence_length),
  ]
  fields = ["embed hidden_size", "vocab vocab_size"]
  fields += ["heads num_attention_heads", "kv_heads num_key_value_heads"]
  if any(kind.is_moe for kind in kinds):
    fields += ["experts num_local_experts", "ffn intermediate_size"]
  if not all(kind.is_moe for kind in kinds):
    fields += ["ffn intermediate_size_mlp"]
  for logical, name in map(str.split, fields):
    dimensions.append((logical, f"model.{name}", getattr(config.model, name)))
  for logical, path, size in dimensions:
    axes = config.mesh.axes_of(logical)
    parts = math.prod(sizes[axis] for axis in axes)
    require(
      size % parts == 0,
      f"{path}={size} cannot be split evenly into {parts} parts ("
      + " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
      + "); change one of them.",
    )


# Reading: YAML and key=value to a tree of plain values, then to the dataclasses above.


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
  """The run described by the YAML file at `path`, changed by `key=value` strings.

  Keys are dotted paths (`training.steps=200`), values are YAML. `model:` may name a YAML file, relative to `path` (as
  `model=FILE` among the overrides: to the working directory). Raises: ConfigError, one sentence, on any mistake.
  """
  return resolve_config(path, overrides)[0]


def resolve_config(
  path: str | pathlib.Path, overrides: Sequence[str] = ()
) -> tuple[Config, dict[str, str]]:
  """`load_config`, and for each dotted key where its value came from (a file, `command line`, or `default`)."""
  path = pathlib.Path(path)
  tree, changes = read_yaml(path), [parse_override(text) for text in overrides]
  origins = dict.fromkeys(flatten(tree), str(path))
  model_files = [pathlib.Path(v) for k, v in changes if k == "model" and isinstance(v, str)]
  if isinstance(tree.get("model"), str):
    model_files.insert(0, path.parent / tree["model"])
  if model_files:
    tree["model"] = read_yaml(model_files[-1])
    origins |= dict.fromkeys(flatten(tree["model"], "model."), str(model_files[-1]))
  # ConfigDict gives dotted access; its type locks are off because the dataclasses below check types with better words.
  settings = ml_collections.ConfigDict(tree, type_safe=False, convert_dict=True)
  for key, value in changes:
    if key == "model" and isinstance(value, str):
      continue
    set_dotted(settings, key, value)
    origins = {k: v for k, v in origins.items() if not k.startswith(f"{key}.")}
    origins[key] = "command line"
  tree = settings.to_dict()
  tree.setdefault("run_dir", f"runs/{path.stem}")
  config = config_from_dict(tree)

  def origin(key: str) -> str:
    parents = itertools.accumulate(key.split("."), "{}.{}".format)
    return ["default", *(origins[p] for p in parents if p in origins)][-1]

  return config, {key: origin(key) for key in flatten(config_to_dict(config))}


def config_from_dict(tree: dict[str, Any]) -> Config:
  """The inverse of `config_to_dict`. Raises: ConfigError naming the first key that is unknown, missing or ill-typed."""
  tree = {**tree}
  dtypes = {name: tree.pop(name) for name in ("dtype", "param_dtype") if name in tree}
  model = tree.get("model")
  if isinstance(model, dict):
    for name in ("dtype", "param_dtype"):
      require(name not in model, f"model.{name} is not a setting; say {name} at the top level.")
      require(name in dtypes, f"{name} is missing; set it to one of {', '.join(DTYPES)}.")
    tree["model"] = {**model, **dtypes}
  return config_from_section(Config, tree, "")


def config_to_dict(config: Config) -> dict[str, Any]:
  """Plain nested values in the layout of the YAML files."""
  tree = to_plain(dataclasses.asdict(config))
  return {**model_to_section(config.model), **{k: v for k, v in tree.items() if k != "model"}}


def model_to_section(model: ModelConfig) -> dict[str, Any]:
  """The top of a YAML file that describes `model`: its section and the dtypes."""
  section = to_plain(dataclasses.asdict(model))
  dtypes = {name: section.pop(name) for name in ("dtype", "param_dtype")}
  return {"model": section, **dtypes}
