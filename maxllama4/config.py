"""The schema of a run, how YAML and `key=value` become one, and every check that needs no device.

`load_config` is the only way in. It returns a frozen `Config` whose values are complete: nothing is looked up later.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from maxllama4.model_config import (  # noqa: F401 - whoever needs the schema finds all of it here
  DTYPES,
  LayerKind,
  ModelConfig,
  RopeScaling,
  VisionConfig,
  determine_is_moe_layer,
  determine_is_nope_layer,
)
from maxllama4.settings import (
  ConfigError,
  config_from_section,
  flatten,
  not_empty,
  not_negative,
  one_of,
  parse_override,
  positive,
  read_yaml,
  require,
  set_dotted,
  setting_names,
  to_plain,
)

GROUPED_MATMULS = ("auto", "megablox", "ragged_dot", "tokamax", "blockwise")
EXPERTS_DISPATCHES = ("auto", "ring", "ragged_all_to_all")
ATTENTION_KERNELS = ("auto", "splash", "cudnn", "blockwise", "reference")
REMAT_POLICIES = ("none", "full", "offload", "matmuls", "attention")
MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
# Which mesh axes each logical axis is split over, unless `mesh.rules` says otherwise.
DEFAULT_RULES = {
  "batch": ("data", "fsdp", "expert"),
  "length": "context",
  "embed": ("fsdp", "context", "expert"),
  "expert_embed": ("fsdp", "context"),  # in the weights of routed experts
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "ffn": "tensor",
  "experts": "expert",
}
LOGICAL_AXES = tuple(DEFAULT_RULES)
# The dimension of a weight along which it is gathered for each product.
EMBED_AXES = ("embed", "expert_embed")
# Logical axes that meet in one array: no two of them may be split over the same mesh axis.
_ARRAYS = (
  ("batch", "length", "heads"),
  ("batch", "length", "ffn"),
  ("batch", "length", "kv_heads"),
  ("vocab", "embed"),
  ("embed", "heads"),
  ("embed", "kv_heads"),
  ("embed", "ffn"),
  ("experts", "expert_embed", "ffn"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How many devices of a slice lie along each mesh axis; one axis may be -1, all of them that the others leave.

  A slice is a set of devices with a fast network of their own. `dcn_AXIS` says how many slices the axis spans besides,
  across the network of the data centre; the whole axis has AXIS x dcn_AXIS devices, and so counts everywhere else.

  `rules` is the one table from logical axis names to mesh axes (a name, a list of names, or null); a rule that is not
  given is the one of `DEFAULT_RULES`.
  """

  data: int = 1
  fsdp: int = -1
  expert: int = 1
  tensor: int = 1
  context: int = 1
  dcn_data: int = 1
  dcn_fsdp: int = 1
  dcn_expert: int = 1
  dcn_tensor: int = 1
  dcn_context: int = 1
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
    positive("mesh", self, " ".join(f"dcn_{axis}" for axis in MESH_AXES))
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

  def slices_along(self, axis: str) -> int:
    """How many slices the mesh axis `axis` spans."""
    return getattr(self, f"dcn_{axis}")

  @property
  def num_slices(self) -> int:
    """How many slices the mesh needs."""
    return math.prod(map(self.slices_along, MESH_AXES))

  @property
  def known_sizes(self) -> dict[str, int]:
    """Whole sizes of the axes; -1 counts as 1 in a slice, for how many devices there will be is not known."""
    return {axis: max(1, getattr(self, axis)) * self.slices_along(axis) for axis in MESH_AXES}

  def resolve(self, num_devices: int) -> dict[str, int]:
    """Whole sizes of the axes on `num_devices` devices of all slices, -1 filled in.

    Raises: ConfigError when they do not multiply to that.
    """
    sizes, slices = {axis: getattr(self, axis) for axis in MESH_AXES}, self.num_slices
    fixed = math.prod(self.known_sizes.values())
    rest = num_devices // fixed if -1 in sizes.values() else 1
    spanned = {f"dcn_{a}": self.slices_along(a) for a in MESH_AXES if self.slices_along(a) > 1}
    require(
      fixed * rest == num_devices,
      f"mesh {sizes | spanned} cannot be laid over {num_devices} devices: the axes that are set multiply to {fixed}"
      f"{f' ({fixed // slices} in each of {slices} slices)' if spanned else ''}; change them, or set one to -1 to take"
      " all that are left.",
    )
    return {
      axis: (rest if size == -1 else size) * self.slices_along(axis) for axis, size in sizes.items()
    }


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

  @property
  def whole_rows(self) -> bool:
    """Whether each row is one document from its first token on."""
    return self.source == "synthetic"

  def __post_init__(self):
    one_of("data.source", self.source, ("text", "synthetic", "tfds"))
    if self.source == "text" and not self.paths:
      raise ConfigError("data.paths=[] names no files; set it, or set data.source=synthetic.")
    if self.source == "tfds" and self.tfds_name is None:
      raise ConfigError("data.tfds_name=null names no dataset; set it.")
    require(
      self.source != "text" or self.tfds_name is None,
      f"data.tfds_name={self.tfds_name} is not read where data.source=text; set data.source=tfds, or null it.",
    )
    for name in ("tfds_name", "tfds_dir", "tokenizer"):
      not_empty(f"data.{name}", getattr(self, name))
    for position, entry in enumerate(self.paths):
      not_empty(f"data.paths[{position}]", entry)
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
class KernelsConfig:
  """How layers compute what they can compute in several ways. `auto` goes by the devices and the shapes."""

  attention: str = "auto"  # splash, cudnn, blockwise or reference; see kernels/attention.py
  grouped_matmul: str = "auto"  # the experts' products: megablox, ragged_dot, tokamax or blockwise
  experts_dispatch: str = "auto"  # rows to their experts: ring, or ragged_all_to_all
  expert_capacity_factor: float = (
    0.0  # of an even share, what an expert takes of a row of tokens; 0: all
  )

  def __post_init__(self):
    one_of("kernels.attention", self.attention, ATTENTION_KERNELS)
    one_of("kernels.grouped_matmul", self.grouped_matmul, GROUPED_MATMULS)
    one_of("kernels.experts_dispatch", self.experts_dispatch, EXPERTS_DISPATCHES)
    not_negative("kernels", self, "expert_capacity_factor")


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
  state_dtype: str | None = None  # what moments are kept in between steps; null: param_dtype
  state_memory: str = (
    "device"  # where they are kept between steps; host: in its memory, page-locked
  )

  def __post_init__(self):
    one_of("optimizer.name", self.name, ("adamw", "muon"))
    one_of("optimizer.state_memory", self.state_memory, ("device", "host"))
    if self.state_dtype is not None:
      one_of("optimizer.state_dtype", self.state_dtype, ("float32", "bfloat16"))
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
    for name in ("b1", "b2"):
      value = getattr(self, name)
      require(0 <= value < 1, f"optimizer.{name}={value} must be at least 0 and below 1.")
      # A bfloat16 times a number nearer to 1 than this rounds to itself.
      require(
        self.state_dtype != "bfloat16" or 1 - value > 2**-8,
        f"optimizer.{name}={value} would never let a moment of optimizer.state_dtype=bfloat16 fall; set it to at most"
        " 0.996, or the other to float32.",
      )
    for name in ("decay_fraction", "final_fraction"):
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
    require(
      self.keep_every == 0 or (self.every > 0 and self.keep_every % self.every == 0),
      f"checkpoint.keep_every={self.keep_every} is not a multiple of checkpoint.every={self.every}; of the steps to"
      " keep, some or all would not be written.",
    )


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
  sample_prompts: tuple[str, ...] = ()  # continued at each evaluation
  sample_tokens: int = 64  # new tokens of each
  wandb_project: str | None = None  # a Weights & Biases project that gets the metrics, too

  def __post_init__(self):
    not_negative("reporting", self, "report_every_seconds")
    positive("reporting", self, "sample_tokens")
    not_empty("reporting.wandb_project", self.wandb_project)


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
  kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
  reporting: ReportingConfig = dataclasses.field(default_factory=ReportingConfig)
  profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
  compilation_cache: str | None = (
    "compiled"  # a folder, relative to run_dir; null: compile anew each time
  )
  # Of XLA, over the preset of xla_flags.py; those that begin with xla_tpu_ count on TPUs alone.
  compiler_options: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
  run_dir: str

  def __post_init__(self):
    check_mesh_divides(self, self.mesh.known_sizes)
    for name in ("run_dir", "compilation_cache"):
      not_empty(name, getattr(self, name))
    self._check_profile()
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
    require(
      training.eval_every == 0 or self.data.held_out_fraction > 0,
      f"training.eval_every={training.eval_every}, but data.held_out_fraction=0 leaves nothing to evaluate on; raise it,"
      " or set training.eval_every=0.",
    )

  def _check_profile(self):
    profiled = self.profile.steps
    require(
      not profiled or profiled[1] <= self.training.steps,
      f"profile.steps={list(profiled)} reach beyond training.steps={self.training.steps}; take earlier ones.",
    )


def check_mesh_divides(config: Config, sizes: dict[str, int]) -> None:
  """Checks that every dimension that the mesh splits can be split evenly; `sizes` are those of whole axes.

  Raises: ConfigError naming the dimension, the mesh axes and both numbers.
  """
  training = config.training
  microbatch = training.batch_size // training.gradient_accumulation
  dimensions = [
    ("batch", "training.batch_size / training.gradient_accumulation", microbatch),
    ("length", "training.sequence_length", training.sequence_length),
    *model_dimensions(config.model),
  ]
  for logical, path, size in dimensions:
    axes = config.mesh.axes_of(logical)
    parts = math.prod(sizes[axis] for axis in axes)
    require(
      size % parts == 0,
      f"{path}={size} cannot be split evenly into {parts} parts ("
      + " x ".join(_spelt(config.mesh, axis, sizes[axis]) for axis in axes)
      + "); change one of them.",
    )


def model_dimensions(model: ModelConfig) -> list[tuple[str, str, int]]:
  """Logical axis, setting and size of every dimension of the model's arrays that has a logical axis."""
  kinds = model.layer_kinds
  fields = ["embed hidden_size", "vocab vocab_size"]
  fields += ["heads num_attention_heads", "kv_heads num_key_value_heads"]
  if any(kind.is_moe for kind in kinds):
    fields += ["experts num_local_experts", "expert_embed hidden_size", "ffn intermediate_size"]
  if not all(kind.is_moe for kind in kinds):
    fields += ["ffn intermediate_size_mlp"]
  if model.vision_config is not None:
    fields += ["embed vision_config.hidden_size", "heads vision_config.num_attention_heads"]
    fields += ["embed vision_config.intermediate_size", "ffn vision_config.intermediate_size"]
    fields += ["embed vision_config.projector_input_dim", "ffn vision_config.projector_input_dim"]
    fields += ["embed vision_config.projector_output_dim"]
  return [
    (logical, f"model.{name}", operator.attrgetter(name)(model))
    for logical, name in map(str.split, fields)
  ]


def _spelt(mesh: MeshConfig, axis: str, size: int) -> str:
  """The settings that make the whole axis `size` long."""
  slices = mesh.slices_along(axis)
  spanned = f" x mesh.dcn_{axis}={slices}" if slices > 1 else ""
  return f"mesh.{axis}={size // slices}{spanned}"


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


# Fields of the model that stand at the top of a file.
_DTYPES = ("dtype", "param_dtype")
_NO_SETTINGS = tuple(f"model.{name}" for name in _DTYPES)


def config_from_dict(tree: dict[str, Any]) -> Config:
  """The inverse of `config_to_dict`. Raises: ConfigError naming the first key that is unknown, missing or ill-typed."""
  tree = {**tree}
  dtypes = {name: tree.pop(name) for name in _DTYPES if name in tree}
  model = tree.get("model")
  if isinstance(model, dict):
    for name in _DTYPES:
      require(name not in model, f"model.{name} is not a setting; say {name} at the top level.")
      require(name in dtypes, f"{name} is missing; set it to one of {', '.join(DTYPES)}.")
    tree["model"] = {**model, **dtypes}
  names = [*setting_names(Config, ""), *_DTYPES]
  return config_from_section(Config, tree, "", [n for n in names if n not in _NO_SETTINGS])


def config_to_dict(config: Config) -> dict[str, Any]:
  """Plain nested values in the layout of the YAML files."""
  tree = to_plain(dataclasses.asdict(config))
  return {**model_to_section(config.model), **{k: v for k, v in tree.items() if k != "model"}}


def model_to_section(model: ModelConfig) -> dict[str, Any]:
  """The top of a YAML file that describes `model`: its section and the dtypes."""
  section = to_plain(dataclasses.asdict(model))
  dtypes = {name: section.pop(name) for name in _DTYPES}
  return {"model": section, **dtypes}
