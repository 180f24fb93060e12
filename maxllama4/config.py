"""The schema of a run, how YAML and `key=value` become one, and every check that needs no device.

`load_config` is the only way in. It returns a frozen `Config` whose values are complete: nothing is looked up later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import pathlib
import types
import typing
from collections.abc import Sequence
from typing import Any

import ml_collections
import yaml

DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = ("none", "full", "matmuls", "attention")
MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
LOGICAL_AXES = (
  "batch", "length", "embed", "vocab", "heads", "kv_heads", "ffn", "experts", "layers",
)  # fmt: skip


class ConfigError(ValueError):
  """A user's mistake in the configuration, already said in one sentence."""


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def _positive(section: str, config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    if value <= 0:
      raise ConfigError(f"{section}.{name}={value} must be greater than 0.")


def _not_negative(section: str, config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    if value < 0:
      raise ConfigError(f"{section}.{name}={value} must be 0 or greater.")


def _one_of(path: str, value: Any, choices: Sequence[Any]) -> None:
  if value not in choices:
    raise ConfigError(f"{path}={value} is not one of {', '.join(map(str, choices))}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Frequency scaling of long-context models, in Hugging Face's names (`rope_scaling`)."""

  rope_type: str
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int

  def __post_init__(self):
    _one_of("model.rope_scaling.rope_type", self.rope_type, ("llama3",))
    _positive(
      "model.rope_scaling", self,
      "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    )  # fmt: skip
    _require(
      self.low_freq_factor <= self.high_freq_factor,
      f"model.rope_scaling.low_freq_factor={self.low_freq_factor} exceeds"
      f" model.rope_scaling.high_freq_factor={self.high_freq_factor}; swap them.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
  """What one decoder layer is made of."""

  uses_rope: bool  # RoPE and chunked attention when true, NoPE and global attention when false
  is_moe: bool  # routed and shared experts when true, one dense MLP when false


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture, in the names of Hugging Face's `config.json`. No field has a default.

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
  nope_layer_interval: (
    int  # layer i has no RoPE when (i + 1) % interval == 0; 0 means all have RoPE
  )
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
  dtype: str
  param_dtype: str

  def __post_init__(self):
    _positive(
      "model", self,
      "vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_hidden_layers",
      "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok", "floor_scale",
      "rope_theta", "max_position_embeddings", "rms_norm_eps", "initializer_range",
    )  # fmt: skip
    _not_negative(
      "model", self, "num_local_experts", "interleave_moe_layer_step", "nope_layer_interval"
    )
    _one_of("dtype", self.dtype, DTYPES)
    _one_of("param_dtype", self.param_dtype, DTYPES)
    _require(
      self.num_attention_heads % self.num_key_value_heads == 0,
      f"model.num_attention_heads={self.num_attention_heads} is not a multiple of"
      f" model.num_key_value_heads={self.num_key_value_heads}; each key-value head serves a whole number of heads.",
    )
    _require(
      self.head_dim % 2 == 0,
      f"model.head_dim={self.head_dim} must be even: RoPE turns pairs of elements.",
    )
    _require(
      self.attention_chunk_size is None or self.attention_chunk_size > 0,
      f"model.attention_chunk_size={self.attention_chunk_size} must be greater than 0, or null for no chunks.",
    )
    for name in ("moe_layers", "nope_layers"):
      layers = getattr(self, name)
      outside = [i for i in layers or () if not 0 <= i < self.num_hidden_layers]
      _require(
        not outside,
        f"model.{name}={list(layers or ())} names layer {outside[:1]}, outside"
        f" 0..{self.num_hidden_layers - 1} (model.num_hidden_layers={self.num_hidden_layers}).",
      )
    has_moe = any(kind.is_moe for kind in self.layer_kinds)
    _require(
      not has_moe or self.num_local_experts > 0,
      f"model.num_local_experts={self.num_local_experts} but some layers are to have experts; set"
      " model.num_local_experts, or model.interleave_moe_layer_step=0 for a dense model.",
    )
    _require(
      not has_moe or self.num_experts_per_tok <= self.num_local_experts,
      f"model.num_experts_per_tok={self.num_experts_per_tok} is outside 1..{self.num_local_experts}"
      " (model.num_local_experts); lower it, or add experts.",
    )

  @property
  def layer_kinds(self) -> tuple[LayerKind, ...]:
    """One `LayerKind` a layer, in order."""
    return tuple(
      LayerKind(
        uses_rope=not determine_is_nope_layer(self, i), is_moe=determine_is_moe_layer(self, i)
      )
      for i in range(self.num_hidden_layers)
    )

  @property
  def inhomogeneous_layer_cycle_interval(self) -> int:
    """The shortest period of `layer_kinds`: lcm(nope_layer_interval, interleave_moe_layer_step) for long regular stacks."""
    kinds = self.layer_kinds
    return next(
      n
      for n in range(1, len(kinds) + 1)
      if all(kinds[i] == kinds[i - n] for i in range(n, len(kinds)))
    )

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

  `rules` is the one table from logical axis names to mesh axes (a name, a list of names, or null).
  """

  data: int = 1
  fsdp: int = -1
  expert: int = 1
  tensor: int = 1
  context: int = 1
  rules: dict[str, str | tuple[str, ...] | None] = dataclasses.field(
    default_factory=lambda: {
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
  )

  def __post_init__(self):
    sizes = [getattr(self, axis) for axis in MESH_AXES]
    for axis, size in zip(MESH_AXES, sizes):
      _require(
        size > 0 or size == -1,
        f"mesh.{axis}={size} must be a number of devices, or -1 for all that are left.",
      )
    _require(
      sizes.count(-1) <= 1,
      f"mesh has -1 on {[a for a, s in zip(MESH_AXES, sizes) if s == -1]}; only one axis can take what is left.",
    )
    _require(
      set(self.rules) == set(LOGICAL_AXES),
      f"mesh.rules must name exactly the logical axes {', '.join(LOGICAL_AXES)};"
      f" missing {sorted(set(LOGICAL_AXES) - set(self.rules))}, unknown {sorted(set(self.rules) - set(LOGICAL_AXES))}.",
    )
    for name in self.rules:
      for axis in self.axes_of(name):
        _one_of(f"mesh.rules.{name}", axis, MESH_AXES)
    for name in ("experts", "length", "kv_heads"):
      _require(
        len(self.axes_of(name)) <= 1,
        f"mesh.rules.{name}={list(self.axes_of(name))} must be one mesh axis, or null.",
      )

  def axes_of(self, logical: str) -> tuple[str, ...]:
    """The mesh axes that the logical axis `logical` is split over, possibly none."""
    axes = self.rules[logical]
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

  def resolve(self, num_devices: int) -> dict[str, int]:
    """Axis sizes on `num_devices` devices, -1 filled in. Raises: ConfigError when they do not multiply to that."""
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
      _require(
        num_devices % fixed == 0,
        f"mesh {sizes}: {num_devices} devices are not a multiple of {fixed}, the product of the axes that are set.",
      )
      return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}
    _require(
      fixed == num_devices,
      f"mesh {sizes} is for {fixed} devices, but there are {num_devices}; set one axis to -1 to take all of them.",
    )
    return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What a run reads, and how documents become rows."""

  source: str = "text"  # text: files of text or JSONL; synthetic: random tokens; tfds: a prepared TensorFlow dataset
  paths: tuple[
    str, ...
  ] = ()  # text: files, folders or globs; "stdlib:GLOB" is below Python's own standard library
  exclude: tuple[str, ...] = ()  # text: globs of paths to leave out
  text_field: str = "text"  # JSONL and tfds: the field that holds the document
  tfds_name: str | None = None  # tfds: name[/config][:version]
  tfds_dir: str | None = None  # tfds: the folder it was prepared in
  tokenizer: str | None = (
    None  # a tokenizer file or folder; null: train one of model.vocab_size pieces into the run
  )
  held_out_fraction: float = 0.03  # of the documents, by a stable hash of the file name
  prefetch: int = 2  # batches made ahead, in the background

  def __post_init__(self):
    _one_of("data.source", self.source, ("text", "synthetic", "tfds"))
    _require(
      self.source != "text" or bool(self.paths),
      "data.paths=[] names no files; set data.paths, or data.source=synthetic.",
    )
    _require(
      self.source != "tfds" or self.tfds_name is not None,
      "data.tfds_name=null names no dataset; set data.tfds_name=NAME.",
    )
    _require(
      0 <= self.held_out_fraction < 1,
      f"data.held_out_fraction={self.held_out_fraction} is outside 0..1 (1 excluded).",
    )
    _not_negative("data", self, "prefetch")


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

  def __post_init__(self):
    _positive(
      "training",
      self,
      "steps",
      "batch_size",
      "sequence_length",
      "gradient_accumulation",
      "log_every",
      "loss_chunk",
    )
    _not_negative(
      "training", self, "eval_every", "eval_batches", "z_loss", "load_balance_loss", "router_z_loss", "router_bias_update_rate",
    )  # fmt: skip
    _one_of("training.remat", self.remat, REMAT_POLICIES)
    _require(
      self.batch_size % self.gradient_accumulation == 0,
      f"training.batch_size={self.batch_size} is not a multiple of"
      f" training.gradient_accumulation={self.gradient_accumulation}; each microbatch takes the same number of rows.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW (or Muon for matrices), its schedule and clipping."""

  name: str = "adamw"
  learning_rate: float = 3e-4  # at the peak
  schedule: str = (
    "cosine"  # after the warm-up: cosine, linear, constant, or wsd (constant, then linear decay)
  )
  warmup_steps: int = 0
  decay_fraction: float = 0.2  # wsd: share of the steps spent decaying
  final_fraction: float = 0.1  # the last learning rate over the peak; ignored by constant
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1  # on matrices; vectors and embeddings are not decayed
  max_gradient_norm: float = 1.0  # global norm; 0: no clipping

  def __post_init__(self):
    _one_of("optimizer.name", self.name, ("adamw", "muon"))
    _one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
    _positive("optimizer", self, "learning_rate", "eps")
    _not_negative("optimizer", self, "warmup_steps", "weight_decay", "max_gradient_norm")
    for name in ("b1", "b2", "decay_fraction", "final_fraction"):
      value = getattr(self, name)
      _require(0 <= value <= 1, f"optimizer.{name}={value} is outside 0..1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When the whole training state is written, and what is kept."""

  every: int = 100  # steps; 0: only the last
  keep: int = 2  # newest checkpoints that stay
  keep_every: int = 0  # steps; checkpoints at its multiples stay for ever; 0: none

  def __post_init__(self):
    _not_negative("checkpoint", self, "every", "keep_every")
    _positive("checkpoint", self, "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One reproducible run."""

  model: ModelConfig
  data: DataConfig
  training: TrainingConfig
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  run_dir: str

  def __post_init__(self):
    check_mesh_divides(self, {axis: max(1, getattr(self.mesh, axis)) for axis in MESH_AXES})
    steps = self.training.steps
    _require(
      self.optimizer.warmup_steps <= steps,
      f"optimizer.warmup_steps={self.optimizer.warmup_steps} exceeds training.steps={steps}; warm up for less.",
    )


def check_mesh_divides(config: Config, sizes: dict[str, int]) -> None:
  """Checks that every dimension that the mesh splits can be split evenly.

  Raises: ConfigError naming the dimension, the mesh axes and both numbers.
  """
  model, training = config.model, config.training
  kinds = model.layer_kinds
  microbatch = training.batch_size // training.gradient_accumulation
  dimensions = [
    ("batch", "training.batch_size / training.gradient_accumulation", microbatch),
    ("length", "training.sequence_length", training.sequence_length),
    ("embed", "model.hidden_size", model.hidden_size),
    ("vocab", "model.vocab_size", model.vocab_size),
    ("heads", "model.num_attention_heads", model.num_attention_heads),
    ("kv_heads", "model.num_key_value_heads", model.num_key_value_heads),
  ]
  if any(kind.is_moe for kind in kinds):
    dimensions += [
      ("experts", "model.num_local_experts", model.num_local_experts),
      ("ffn", "model.intermediate_size", model.intermediate_size),
    ]
  if not all(kind.is_moe for kind in kinds):
    dimensions.append(("ffn", "model.intermediate_size_mlp", model.intermediate_size_mlp))
  for logical, path, size in dimensions:
    axes = config.mesh.axes_of(logical)
    parts = math.prod(sizes[axis] for axis in axes)
    _require(
      size % parts == 0,
      f"{path}={size} cannot be split evenly into {parts} parts ("
      + " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
      + "); change one of them.",
    )


# Reading: YAML and key=value to a tree of plain values, then to the dataclasses above.


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
  """The run described by the YAML file at `path`, changed by `key=value` strings.

  Keys are dotted paths (`training.steps=200`), values are YAML. `model:` may name a YAML file, relative to `path`.
  Raises: ConfigError in one sentence on any mistake; FileNotFoundError never (a missing file is a ConfigError).
  """
  return resolve_config(path, overrides)[0]


def resolve_config(
  path: str | pathlib.Path, overrides: Sequence[str] = ()
) -> tuple[Config, dict[str, str]]:
  """`load_config`, and for each dotted key where its value came from (a file, `command line`, or `default`)."""
  path = pathlib.Path(path)
  tree = read_yaml(path)
  origins = {key: str(path) for key in _leaves(tree)}
  if isinstance(tree.get("model"), str):
    model_path = path.parent / tree["model"]
    tree["model"] = read_yaml(model_path)
    origins |= {f"model.{key}": str(model_path) for key in _leaves(tree["model"])}
  # ConfigDict gives dotted access; its type locks are off because the dataclasses below check types with better words.
  settings = ml_collections.ConfigDict(tree, type_safe=False, convert_dict=True)
  for override in overrides:
    key, value = parse_override(override)
    _set(settings, key, value)
    origins[key] = "command line"
  tree = settings.to_dict()
  if "run_dir" not in tree:
    tree["run_dir"] = f"runs/{path.stem}"
  config = config_from_dict(tree)
  for key in _leaves(config_to_dict(config)):
    parent = next((p for p in _parents(key) if p in origins), None)
    origins.setdefault(key, origins[parent] if parent else "default")
  return config, {key: origins[key] for key in _leaves(config_to_dict(config))}


def config_from_dict(tree: dict[str, Any]) -> Config:
  """The inverse of `config_to_dict`. Raises: ConfigError naming the first key that is unknown, missing or ill-typed."""
  tree = {**tree}
  model = tree.get("model")
  if isinstance(model, dict):
    dtypes = {name: tree.pop(name) for name in ("dtype", "param_dtype") if name in tree}
    for name in ("dtype", "param_dtype"):
      _require(name not in model, f"model.{name} is not a setting; say {name} at the top level.")
      _require(name in dtypes, f"{name} is missing; set it to one of {', '.join(DTYPES)}.")
    tree["model"] = {**model, **dtypes}
  return _build(Config, tree, "")


def config_to_dict(config: Config) -> dict[str, Any]:
  """Plain nested values in the layout of the YAML files."""
  tree = _plain(dataclasses.asdict(config))
  return {**model_to_section(config.model), **{k: v for k, v in tree.items() if k != "model"}}


def model_to_section(model: ModelConfig) -> dict[str, Any]:
  """The top of a YAML file that describes `model`: its section and the dtypes."""
  section = _plain(dataclasses.asdict(model))
  dtypes = {name: section.pop(name) for name in ("dtype", "param_dtype")}
  return {"model": section, **dtypes}


def parse_override(text: str) -> tuple[str, Any]:
  """`key=value` as a dotted key and a YAML value."""
  key, separator, value = text.partition("=")
  _require(
    bool(separator and key), f"{text!r} is not key=value; write a setting's path, =, and its value."
  )
  try:
    return key, yaml.safe_load(value)
  except yaml.YAMLError as error:
    raise ConfigError(
      f"{key}={value} is not valid YAML ({_first_line(error)}); quote the value."
    ) from None


def read_yaml(path: pathlib.Path) -> dict[str, Any]:
  """The mapping in the YAML file at `path`. Raises: ConfigError when there is none."""
  try:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path.") from None
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path} is not valid YAML: {_first_line(error)}.") from None
  _require(isinstance(tree, dict), f"{path} holds no settings; it must be a YAML mapping.")
  return tree


def _first_line(error: Exception) -> str:
  return " ".join(str(error).split())


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
  keys = []
  for name, value in tree.items():
    if isinstance(value, dict) and value:
      keys += _leaves(value, f"{prefix}{name}.")
    else:
      keys.append(f"{prefix}{name}")
  return keys


def _parents(key: str) -> list[str]:
  parts = key.split(".")
  return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _set(settings: ml_collections.ConfigDict, key: str, value: Any) -> None:
  *parents, name = key.split(".")
  for depth, parent in enumerate(parents):
    if settings.get(parent) is None:
      settings[parent] = {}
    settings = settings[parent]
    _require(
      isinstance(settings, ml_collections.ConfigDict),
      f"{key}: {'.'.join(parents[: depth + 1])} is a single value, not a section.",
    )
  settings[name] = value


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _plain(item) for name, item in value.items()}
  if isinstance(value, tuple):
    return [_plain(item) for item in value]
  return value


def config_from_section(kind: type, section: dict[str, Any], path: str) -> Any:
  """The dataclass `kind` from plain values. Raises: ConfigError; messages say `path` before a key."""
  return _build(kind, section, path)


def _build(kind: type, tree: Any, path: str) -> Any:
  _require(isinstance(tree, dict), f"{path.rstrip('.')}={tree!r} must be a section of settings.")
  hints = typing.get_type_hints(kind)
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for name in tree:
    if name not in fields:
      near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.0)
      raise ConfigError(f"{path}{name} is not a setting; did you mean {path}{near[0]}?")
  for name, field in fields.items():
    has_default = (
      field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )
    _require(name in tree or has_default, f"{path}{name} is missing; it has no default.")
  return kind(
    **{name: _convert(hints[name], value, f"{path}{name}") for name, value in tree.items()}
  )


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _convert(hint: Any, value: Any, path: str) -> Any:
  """`value` as the type `hint`. Raises: ConfigError naming `path`."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in arguments:
      return None
    options = [option for option in arguments if option is not type(None)]
    lists = [option for option in options if typing.get_origin(option) is tuple]
    scalars = [option for option in options if option not in lists]
    chosen = lists if isinstance(value, (list, tuple)) and lists else scalars or lists
    return _convert(chosen[0], value, path)
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, f"{path}.")
  if origin is tuple:
    value = [value] if isinstance(value, (str, int)) and not isinstance(value, bool) else value
    _require(isinstance(value, (list, tuple)), f"{path}={value!r} must be a list.")
    return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
  if origin is dict:
    _require(isinstance(value, dict), f"{path}={value!r} must be a section of settings.")
    return {
      str(name): _convert(arguments[1], item, f"{path}.{name}") for name, item in value.items()
    }
  return _scalar(hint, value, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
  if hint is float and isinstance(value, str):  # YAML 1.1 reads 3e-4 as text
    with contextlib.suppress(ValueError):
      value = float(value)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if hint is int and isinstance(value, float) and value.is_integer():
    value = int(value)
  right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
  _require(right, f"{path}={value!r} must be {_NAMES[hint]}.")
  _require(hint is not float or math.isfinite(value), f"{path}={value} must be finite.")
  return value
