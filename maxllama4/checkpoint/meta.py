"""Folders of Meta's: `params.json` and `consolidated.NN.pth`, of Llama 4 and of the models before it.

A file holds one of `len(files)` shards of every large tensor, cut for tensor parallelism. The table says, for every
tensor, which arrays of the model its rows hold, one after the other, and which dim of them the shards cut.
"""

import collections
import dataclasses
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from maxllama4.checkpoint import hf
from maxllama4.checkpoint.pth import StoredTensor, read_pth
from maxllama4.checkpoint.safetensors_files import check_kinds, read_json
from maxllama4.checkpoint.tensors import Box, Tensor, TensorSource
from maxllama4.config import DTYPES, ConfigError, ModelConfig, require
from maxllama4.model.weights import ModelTemplate, layer_place
from maxllama4.model_config import MAX_LAYERS
from maxllama4.settings import at_most, config_from_file

PARAMS = "params.json"
# Tables and statistics, no weights.
_IGNORABLE = re.compile(
  r"(^|\.)(rope\.freqs|freqs?_cis|_extra_state|global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)$"
)
# Settings that Llama 4 brought: without any of them a params.json is of a model before it.
_LLAMA4_PARAMS = {
  *("moe_args", "vision_args", "use_qk_norm", "attention_chunk_size"),
  *("nope_layer_interval", "attn_temperature_tuning"),
}

# Tokens that start, end and pad a text. params.json does not name them, but each vocabulary has its size.
_TOKEN_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKEN_IDS = {
  202048: (200000, (200001, 200007, 200008), 200018),  # Llama 4
  128256: (128000, (128001, 128008, 128009), 128004),  # Llama 3
  32000: (1, 2, None),  # Llama 1 and 2
}

Shards = dict[str, dict[str, StoredTensor]]  # tensors by name, by file


@dataclasses.dataclass(frozen=True)
class Part(Tensor):
  """An array of the model, or of one of its layers, among the rows of a tensor of Meta's."""

  split: int | None = None  # dim of our array that the shards cut; None: each shard has all of it
  half: int | None = None  # 0 gate, 1 up, where our array is the experts' gate_up; None: all of it

  def whole_shape(self, template: ModelTemplate) -> tuple[int, ...]:
    """Shape of our array, without its stack of layers and its halves."""
    shape = template.shapes[self.path].shape[0 if self.stack_index is None else 1 :]
    return shape if self.half is None else shape[:1] + shape[2:]

  def block_shape(self, template: ModelTemplate, num_shards: int) -> tuple[int, ...]:
    """The part of that shape that one shard has."""
    shape = list(self.whole_shape(template))
    if self.split is not None:
      shape[self.split] //= num_shards
    return tuple(shape)

  def shard_shape(self, template: ModelTemplate, num_shards: int) -> tuple[int, ...]:
    """Shape in the file of what one shard has."""
    return self.file_shape(self.block_shape(template, num_shards))


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Where the array of a part is, or a half of it."""

  part: Part
  row: int  # of the tensors, where the array starts
  block: tuple[int, ...]  # shape of what one shard has of our array
  shards: list[StoredTensor]


# The table. An array of the model is (path, groups of its dims in the file, dim that shards cut, half).
_VECTOR, _MATRIX, _TRANSPOSED = ((0,),), ((0,), (1,)), ((1,), (0,))
_IN_PROJECTION, _OUT_PROJECTION = ((1, 2), (0,)), ((2,), (0, 1))
_EXPERTS, _EXPERTS_IN_ROWS = ((0,), (1,), (2,)), ((0, 1), (2,))


def _mlp(path: str) -> tuple[tuple, tuple, tuple]:
  """Gate, up and down of a dense MLP."""
  return (
    (f"{path}/gate", _TRANSPOSED, 1),
    (f"{path}/up", _TRANSPOSED, 1),
    (f"{path}/down", _TRANSPOSED, 0),
  )


_QUERY, _KEY, _VALUE = (
  (f"attention/{name}", _IN_PROJECTION, 1) for name in ("query", "key", "value")
)
_OUT = ("attention/out", _OUT_PROJECTION, 0)
_INPUT_NORM, _POST_NORM = (
  (f"{name}/weight", _VECTOR, None) for name in ("input_norm", "post_attention_norm")
)
_GATE, _UP, _DOWN = _mlp("feed_forward")
_SHARED_GATE, _SHARED_UP, _SHARED_DOWN = _mlp("feed_forward/shared_expert")

# Each entry lists the spellings of the same tensors, that of the releases of Llama 4 first.
_LAYER = (
  ({"attention.wqkv.layer_norm_weight": [_INPUT_NORM]}, {"attention_norm.weight": [_INPUT_NORM]}),
  (
    {"attention.wqkv.weight": [_QUERY, _KEY, _VALUE]},
    {
      "attention.wq.weight": [_QUERY],
      "attention.wk.weight": [_KEY],
      "attention.wv.weight": [_VALUE],
    },
  ),
  ({"attention.wo.weight": [_OUT]},),
)
_DENSE = (
  ({"feed_forward.mlp.layer_norm_weight": [_POST_NORM]}, {"ffn_norm.weight": [_POST_NORM]}),
  (
    {"feed_forward.mlp.fc1_weight": [_GATE, _UP], "feed_forward.mlp.fc2_weight": [_DOWN]},
    {
      "feed_forward.w1.weight": [_GATE],
      "feed_forward.w3.weight": [_UP],
      "feed_forward.w2.weight": [_DOWN],
    },
  ),
)
_MOE = (
  ({"feed_forward.norm.weight": [_POST_NORM]}, {"ffn_norm.weight": [_POST_NORM]}),
  ({"feed_forward.router_DE": [("feed_forward/router/weight", _MATRIX, None)]},),
  (
    {
      "feed_forward.experts.moe_w_in_eD_F": [("feed_forward/gate_up", _EXPERTS_IN_ROWS, 2, 0)],
      "feed_forward.experts.moe_w_swiglu_eD_F": [("feed_forward/gate_up", _EXPERTS_IN_ROWS, 2, 1)],
      "feed_forward.experts.moe_w_out_eF_D": [("feed_forward/down", _EXPERTS_IN_ROWS, 1)],
    },
    {
      "feed_forward.experts.w1": [("feed_forward/gate_up", _EXPERTS, 2, 0)],
      "feed_forward.experts.w3": [("feed_forward/gate_up", _EXPERTS, 2, 1)],
      "feed_forward.experts.w2": [("feed_forward/down", _EXPERTS, 1)],
    },
  ),
  (
    {
      "feed_forward.w_in_shared_FD.weight": [_SHARED_GATE],
      "feed_forward.w_swiglu_FD.weight": [_SHARED_UP],
      "feed_forward.w_out_shared_DF.weight": [_SHARED_DOWN],
    },
    {
      "feed_forward.shared_expert.w1.weight": [_SHARED_GATE],
      "feed_forward.shared_expert.w3.weight": [_SHARED_UP],
      "feed_forward.shared_expert.w2.weight": [_SHARED_DOWN],
    },
  ),
)
_ENCODER = "vision_embeddings.vision_encoder."
_VISION = {
  f"{_ENCODER}conv1._linear.weight": [("vision/patch_embedding/weight", _TRANSPOSED, 1)],
  f"{_ENCODER}class_embedding": [("vision/class_embedding", _VECTOR, None)],
  f"{_ENCODER}positional_embedding_vlm": [("vision/positional_embedding", _MATRIX, None)],
  **{
    f"{_ENCODER}{theirs}.{kind}": [(f"vision/{ours}/{kind}", _VECTOR, None)]
    for theirs, ours in (("ln_pre", "pre_norm"), ("ln_post", "post_norm"))
    for kind in ("weight", "bias")
  },
  "vision_embeddings.vision_adapter.mlp.c_fc.weight": [("vision/adapter/fc1", _TRANSPOSED, 1)],
  "vision_embeddings.vision_adapter.mlp.c_proj.weight": [("vision/adapter/fc2", _TRANSPOSED, 0)],
  "vision_projection.weight": [("projector/weight", _TRANSPOSED, 1)],
}
_VISION_LAYER = {
  **{
    f"{theirs}.{kind}": [(f"{ours}/{kind}", _VECTOR, None)]
    for theirs, ours in (("ln_1", "input_norm"), ("ln_2", "post_attention_norm"))
    for kind in ("weight", "bias")
  },
  "attn.wq.weight": [_QUERY],
  "attn.wk.weight": [_KEY],
  "attn.wv.weight": [_VALUE],
  "attn.wo.weight": [_OUT],
  "attn.wq.bias": [("attention/query_bias", ((0, 1),), 0)],
  "attn.wk.bias": [("attention/key_bias", ((0, 1),), 0)],
  "attn.wv.bias": [("attention/value_bias", ((0, 1),), 0)],
  "attn.wo.bias": [("attention/out_bias", _VECTOR, None)],
  "mlp.c_fc.weight": [("mlp/fc1", _TRANSPOSED, 1)],
  "mlp.c_fc.bias": [("mlp/fc1_bias", _VECTOR, 0)],
  "mlp.c_proj.weight": [("mlp/fc2", _TRANSPOSED, 0)],
  "mlp.c_proj.bias": [("mlp/fc2_bias", _VECTOR, None)],
}


def tensor_table(config: ModelConfig, shard: dict[str, StoredTensor]) -> dict[str, list[Part]]:
  """The parts of every tensor of a shard by its name, in the spelling that the shard uses."""
  table: dict[str, list[Part]] = {}

  def add(spellings, prefix="", place="", index=None):
    found = [s for s in spellings if any(f"{prefix}{name}" in shard for name in s)]
    for name, parts in (found or spellings)[0].items():
      name = f"{prefix}{name}"
      table[name] = [Part(name, f"{place}{p[0]}", p[1], index, (), *p[2:]) for p in parts]

  # Llama 1 and 2 cut the embedding across its width, later models across the vocabulary.
  embedding = shard.get("tok_embeddings.weight")
  across_width = embedding is not None and embedding.shape[1:] != (config.hidden_size,)
  add([{"tok_embeddings.weight": [("embed/weight", _MATRIX, int(across_width))]}])
  for i, kind in enumerate(config.layer_kinds):
    place, index = layer_place(config, i)
    for spellings in (*_LAYER, *(_MOE if kind.is_moe else _DENSE)):
      add(spellings, f"layers.{i}.", f"{place}/", index)
  add([{"norm.weight": [("norm/weight", _VECTOR, None)]}])
  add([{"output.weight": [("head/weight", _TRANSPOSED, 1)]}])
  if config.vision_config is not None:
    add([_VISION])
    for i in range(config.vision_config.num_hidden_layers):
      add([_VISION_LAYER], f"{_ENCODER}transformer.resblocks.{i}.", "vision/encoder/layers/", i)
  return table


# Tensors


class MetaFolder(TensorSource):
  """The tensors of a folder, put together from its shards, under Hugging Face's names.

  Raises: ConfigError listing every tensor that is missing, unexpected or of another shape, before anything is read.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder, self.name = folder, str(folder)
    shards = _read_shards(folder)
    self.files = [folder / PARAMS, *(folder / name for name in shards)]
    config = read_config(folder, shards)
    template = ModelTemplate(config)
    self._pieces = _pieces(folder, shards, template)
    self.table = hf.tensor_table(config)
    self.tensors = {}
    for tensor in self.table:
      shape = tensor.file_shape(tensor.part_shape(template.shapes[tensor.path].shape))
      self.tensors[tensor.name] = jax.ShapeDtypeStruct(shape, self._dtype(tensor))
    dtype = str(self.tensors[self.table[0].name].dtype)
    self.config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    self._shapes = template.shapes

  def _dtype(self, tensor: Tensor) -> np.dtype:
    pieces = self._pieces[tensor.path, tensor.stack_index]
    return np.result_type(*(piece.shards[0].dtype for piece in pieces))

  def read(self, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in self.table if tensor.name == name)
    shape = self._shapes[tensor.path].shape
    dims = tensor.dims(shape)
    whole = self.view(tensor, dims)[tuple(slice(0, dim) for dim in dims)]
    return whole.reshape(tensor.file_shape(tensor.part_shape(shape)))

  def view(self, tensor: Tensor, dims: tuple[int, ...]) -> "_ShardsView":
    return _ShardsView(tensor, self._pieces[tensor.path, tensor.stack_index], self._dtype(tensor))


@dataclasses.dataclass(frozen=True)
class _ShardsView:
  """A tensor cut into shards; indexed with a box it reads that, from the shards that reach into it."""

  tensor: Tensor
  pieces: list[_Piece]
  dtype: np.dtype

  def __getitem__(self, box: Box) -> np.ndarray:
    order = self.tensor.order
    wanted = [box[place] for place in np.argsort(order)]  # along the dims of our array
    result = np.empty([part.stop - part.start for part in wanted], self.dtype)
    for piece in self.pieces:
      _fill(result, wanted, piece)
    return result.transpose(order)


def _pieces(
  folder: pathlib.Path, shards: Shards, template: ModelTemplate
) -> dict[tuple[str, int | None], list[_Piece]]:
  """What makes up each array, by path and place in the stack."""
  first, *_ = shards.values()
  table = tensor_table(template.config, first)
  ignored = {name for shard in shards.values() for name in shard if _IGNORABLE.search(name)}
  if ignored:
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in ignored})
    warnings.warn(f"{folder}: skipped {', '.join(kinds)}: these are no weights.", stacklevel=2)
  problems = [
    f"{name} {problem} ({file})" if len(shards) > 1 else f"{name} {problem}"
    for file, shard in shards.items()
    for name, problem in _problems(shard, table, template, len(shards))
  ]
  if problems:
    raise ConfigError(
      f"{folder} does not hold the model that its {PARAMS} describes: {'; '.join(problems)}."
    )
  pieces: dict[tuple[str, int | None], list[_Piece]] = {}
  for name, parts in table.items():
    row, tensors = 0, [shard[name] for shard in shards.values()]
    for part in parts:
      block = part.block_shape(template, len(shards))
      piece = _Piece(part, row, block, tensors)
      pieces.setdefault((part.path, part.stack_index), []).append(piece)
      row += part.file_shape(block)[0]
  return pieces


def _problems(
  shard: dict[str, Any], table: dict[str, list[Part]], template: ModelTemplate, num_shards: int
) -> Iterator[tuple[str, str]]:
  """Names of tensors that are not as they should be, and what is wrong with each."""
  for name in sorted(set(shard) - set(table)):
    if not _IGNORABLE.search(name):
      yield name, "is not part of the model"
  for name, parts in table.items():
    shapes = [part.shard_shape(template, num_shards) for part in parts]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    tensor = shard.get(name)
    if tensor is None:
      yield name, f"{list(expected)} is missing"
    elif not isinstance(tensor, StoredTensor):
      yield name, "is not a tensor"
    elif tensor.shape != expected:
      yield name, f"is {list(tensor.shape)} where {list(expected)} was expected"
    elif str(tensor.dtype) not in DTYPES:
      yield name, f"is of {tensor.dtype} where one of {', '.join(DTYPES)} was expected"


def _fill(target: np.ndarray, wanted: list[slice], piece: _Piece) -> None:
  """Copies into `target`, the box `wanted` of an array, what the shards have of it."""
  part = piece.part
  if part.half is not None:  # dim 1 is gate and up
    if not wanted[1].start <= part.half < wanted[1].stop:
      return
    target = target[:, part.half - wanted[1].start]
    wanted = [*wanted[:1], *wanted[2:]]
  rows = slice(piece.row, piece.row + part.file_shape(piece.block)[0])
  if part.split is None:  # every shard has all of it
    block = part.from_file(piece.shards[0].read()[rows], piece.block)
    target[...] = block[tuple(wanted)]
    return
  size, first, last = piece.block[part.split], wanted[part.split].start, wanted[part.split].stop
  for number, stored in enumerate(piece.shards):
    start, stop = max(first, number * size), min(last, (number + 1) * size)
    if start < stop:
      source, place = list(wanted), [slice(None)] * len(wanted)
      source[part.split] = slice(start - number * size, stop - number * size)
      place[part.split] = slice(start - first, stop - first)
      block = part.from_file(stored.read()[rows], piece.block)
      target[tuple(place)] = block[tuple(source)]


def _read_shards(folder: pathlib.Path) -> Shards:
  names = sorted(path.name for path in folder.glob("consolidated.*.pth"))
  for i in range(max(1, len(names))):
    name = f"consolidated.{i:02}.pth"
    require(name in names, f"{folder / name} is missing; copy the whole checkpoint folder.")
  return {name: read_pth(folder / name) for name in names}


# Configuration

# What is computed with before the section as a whole is checked.
_KINDS = {
  **dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size"), int),
  **dict.fromkeys(("moe_args", "vision_args"), dict),
}


def read_config(folder: pathlib.Path, shards: Shards) -> ModelConfig:
  """The architecture in `folder`/params.json; widths are those of the tensors.

  Raises: ConfigError for what is missing or not supported.
  """
  source = folder / PARAMS
  params = read_json(source)
  check_kinds(params, {"model": dict}, source)
  params = params.get("model") or params
  check_kinds(params, _KINDS, source)
  for name in ("dim", "n_layers", "n_heads"):
    require(params.get(name) is not None, f"{source}: {name} is missing; it must be a number.")
    require(params[name] > 0, f"{source}: {name}={params[name]} must be greater than 0.")
  at_most(f"{source}: n_layers", params["n_layers"], MAX_LAYERS)
  moe = params.get("moe_args") or {}
  check_kinds(moe, {"interleave_moe_layer_step": int}, f"{source}: moe_args")
  section = {
    "hidden_size": params["dim"],
    "num_hidden_layers": params["n_layers"],
    "num_attention_heads": params["n_heads"],
    "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
    "num_local_experts": moe.get("num_experts", 0),
    "num_experts_per_tok": moe.get("top_k", 1),
    "interleave_moe_layer_step": moe.get("interleave_moe_layer_step", 1) if moe else 0,
    "moe_layers": None,
    "nope_layer_interval": params.get("nope_layer_interval") or 0,
    "nope_layers": None,
    "attention_chunk_size": params.get("attention_chunk_size"),
    "use_qk_norm": params.get("use_qk_norm", False),
    "attn_temperature_tuning": bool(params.get("attn_temperature_tuning", False)),
    "floor_scale": params.get("floor_scale", 8192),
    "attn_scale": params.get("attn_scale", 0.1),
    "max_position_embeddings": params.get("max_seq_len", 131072),
    "rms_norm_eps": params.get("norm_eps", 1e-5),
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    **_rope(params),
    "dtype": "float32",
  }
  section |= _text_sizes(section, params, shards, source)
  section |= zip(_TOKEN_NAMES, _TOKEN_IDS.get(section["vocab_size"], (None, None, None)))
  if params.get("vision_args"):
    section["vision_config"] = _vision_section(params["vision_args"], shards, source)
    section |= {name: params.get(name, default) for name, default in hf.IMAGE_TOKENS.items()}
  return config_from_file(ModelConfig, section, source)


def _rope(params: dict[str, Any]) -> dict[str, Any]:
  """RoPE and its scaling; what a file leaves unsaid is what Meta's code for that generation of models assumes."""
  is_llama4 = bool(_LLAMA4_PARAMS & set(params))
  factor, high_freq_factor, theta = (16, 1, 500000.0) if is_llama4 else (8, 4, 10000.0)
  scaling = {
    "rope_type": "llama3",
    "factor": params.get("rope_scaling_factor") or factor,
    "low_freq_factor": 1,
    "high_freq_factor": params.get("rope_high_freq_factor") or high_freq_factor,
    "original_max_position_embeddings": 8192,
  }
  is_scaled = params.get("use_scaled_rope", False)
  return {
    "rope_theta": params.get("rope_theta") or theta,
    "rope_scaling": scaling if is_scaled else None,
  }


def _size(shards: Shards, source: pathlib.Path, *places: tuple[str, int, int]) -> int:
  """The size that most of the tensors at `places` agree on.

  A place is a pattern for the end of a name, a dim, and how many of that size lie along it over all shards. Raises:
  ConfigError where there is no such tensor.
  """
  first, *_ = shards.values()
  found = collections.Counter(
    tensor.shape[dim] * len(shards) // count
    for ending, dim, count in places
    for name, tensor in first.items()
    if isinstance(tensor, StoredTensor)
    and dim < len(tensor.shape)
    and re.search(rf"(^|\.){ending}$", name)
  )
  wanted = places[0][0].replace(r"\d+", "N").replace("\\", "")
  require(found.total() > 0, f"{source.parent}: {wanted} is missing, from which a size is read.")
  return found.most_common(1)[0][0]


def _text_sizes(
  section: dict[str, Any], params: dict[str, Any], shards: Shards, source: pathlib.Path
) -> dict[str, Any]:
  """Settings that are read off tensors: params.json has formulas for them, rounded in several ways, or nothing."""
  heads, kv_heads = section["num_attention_heads"], section["num_key_value_heads"]
  first, *_ = shards.values()
  dense = (
    (r"layers\.\d+\.feed_forward\.mlp\.fc1_weight", 0, 2),
    (r"layers\.\d+\.feed_forward\.mlp\.fc2_weight", 1, 1),
    *((rf"layers\.\d+\.feed_forward\.w{i}\.weight", int(i == 2), 1) for i in (1, 2, 3)),
  )
  experts = (
    (r"feed_forward\.w_(in|swiglu)_shared_FD\.weight", 0, 1),
    (r"feed_forward\.w_out_shared_DF\.weight", 1, 1),
    *((rf"shared_expert\.w{i}\.weight", int(i == 2), 1) for i in (1, 2, 3)),
  )
  step = section["interleave_moe_layer_step"]
  kinds = [bool(step) and (i + 1) % step == 0 for i in range(section["num_hidden_layers"])]
  widths = {
    "intermediate_size": _size(shards, source, *experts) if any(kinds) else None,
    "intermediate_size_mlp": _size(shards, source, *dense) if not all(kinds) else None,
  }
  # Where no layer is of a kind, its width means nothing, and is set to the other.
  some = next(width for width in widths.values() if width)
  vocab_size = params.get("vocab_size") or -1  # Llama 2 says -1
  if vocab_size < 0:
    vocab_size = _size(shards, source, (r"output\.weight", 0, 1))
  embedding = first.get("tok_embeddings.weight")
  return {
    **{name: width or some for name, width in widths.items()},
    "vocab_size": vocab_size,
    "head_dim": _size(
      shards,
      source,
      (r"layers\.\d+\.attention\.wo\.weight", 1, heads),
      (r"layers\.\d+\.attention\.wq\.weight", 0, heads),
      (r"layers\.\d+\.attention\.wqkv\.weight", 0, heads + 2 * kv_heads),
    ),
    "param_dtype": str(embedding.dtype) if isinstance(embedding, StoredTensor) else "float32",
  }


def _vision_section(vision: dict[str, Any], shards: Shards, source: pathlib.Path) -> dict[str, Any]:
  """The section `vision_config`; widths are those of the tensors."""
  sides = {}
  check_kinds(vision, {"image_size": dict, "patch_size": dict}, f"{source}: vision_args")
  for name in ("image_size", "patch_size"):
    height, width = ((vision.get(name) or {}).get(side) for side in ("height", "width"))
    require(
      isinstance(height, int) and height == width and height > 0,
      f"{source}: vision_args.{name} is {height} x {width}; it must be a square.",
    )
    sides[name] = height
  for name in ("dim", "n_layers", "n_heads"):
    require(isinstance(vision.get(name), int), f"{source}: vision_args.{name} is missing; set it.")
  pixels = len(shards) * sides["patch_size"] ** 2  # every shard has all columns
  adapter = r"vision_adapter\.mlp"
  return {
    "hidden_size": vision["dim"],
    "intermediate_size": _size(
      shards,
      source,
      (r"resblocks\.\d+\.mlp\.c_fc\.weight", 0, 1),
      (r"resblocks\.\d+\.mlp\.c_proj\.weight", 1, 1),
    ),
    "num_hidden_layers": vision["n_layers"],
    "num_attention_heads": vision["n_heads"],
    "num_channels": _size(shards, source, (r"conv1\._linear\.weight", 1, pixels)),
    **sides,
    "pixel_shuffle_ratio": vision.get("pixel_shuffle_ratio", 0.5),
    "projector_input_dim": _size(
      shards, source, (rf"{adapter}\.c_fc\.weight", 0, 1), (rf"{adapter}\.c_proj\.weight", 1, 1)
    ),
    "projector_output_dim": vision.get("output_dim", 4096),
    "vision_output_dim": vision.get("output_dim", 4096),
    "rope_theta": 10000.0,
  }
