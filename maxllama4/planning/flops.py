"""FLOPs of matrix products in an optimised TPU program: dots, convolutions, grouped matmuls and attention kernels."""

import json
import math
import re

import numpy as np

from maxllama4.planning.hlo_text import Instruction, dims_of

# Matrix products a block of each kernel of splash attention, by its name.
# Source: jax/experimental/pallas/ops/tpu/splash_attention/splash_attention_kernel.py
SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def dot_flops(instruction: Instruction, left: str, right: str) -> float:
  """Of a dot, or of a grouped one, each row of which meets one group's weights."""
  found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
  sizes = dims_of(left)
  contracted = (
    math.prod(sizes[int(dim)] for dim in found[1].split(",")) if found and found[1] else 1
  )
  return 2.0 * math.prod(dims_of(instruction.shape)) * contracted


def convolution_flops(instruction: Instruction, left: str, right: str) -> float:
  """Of a convolution, as which TPUs do all products; what falls on padding or between dilated places is not counted."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
  input_labels, kernel_labels, output_labels = labels.groups()
  input_size = dict(zip(input_labels, dims_of(left)))
  kernel_size = dict(zip(kernel_labels, dims_of(right)))
  output_size = dict(zip(output_labels, dims_of(instruction.shape)))
  window = _window(instruction.rest)
  places = 1
  for label in kernel_labels:
    if label.isdigit():
      places *= _places(
        input_size[label], kernel_size[label], output_size[label], window, int(label)
      )
  groups = _number(instruction.rest, "batch_group_count")
  # The kernel's input features are those of one feature group already.
  return 2.0 * places * kernel_size["i"] * output_size["b"] * output_size["f"] / groups


def _number(attributes: str, name: str) -> int:
  found = re.search(rf"\b{name}=(\d+)", attributes)
  return int(found[1]) if found else 1


def _window(attributes: str) -> dict[str, list[str]]:
  """The window's sizes, strides, padding and dilations by spatial dimension."""
  found = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(field.split("=") for field in found[1].split()) if found else {}
  return {name: value.split("x") for name, value in fields.items()}


def _places(size: int, kernel: int, output: int, window: dict[str, list[str]], dim: int) -> int:
  """How many pairs of a kernel's and an output's place meet an element of the input, along one dimension."""
  stride, before, spread, reach = (
    int(window[name][dim].split("_")[0]) if name in window else default
    for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
  )
  if kernel == 1 and (stride, before, spread) == (1, 0, 1):
    return min(output, size)
  index = np.arange(output)[:, None] * stride + np.arange(kernel)[None] * reach - before
  inside = (index >= 0) & (index < (size - 1) * spread + 1) & (index % spread == 0)
  return int(inside.sum())


def kernel_flops(instruction: Instruction, operands: list[str]) -> float:
  """Of a custom call: what it says itself, or what its name and shapes tell; 0 for those that multiply nothing."""
  found = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.rest)
  if found:
    return float(found[1])
  products = [n for name, n in SPLASH_PRODUCTS.items() if instruction.name.startswith(name)]
  return _splash_flops(instruction, operands, products[0]) if products else 0.0


def _splash_flops(instruction: Instruction, operands: list[str], products: int) -> float:
  """Of the blocks of splash attention that are computed.

  The mask's table is [heads, rows of blocks, blocks a row]; whatever lies wholly outside a chunk is not in it, and of
  the rest a causal mask leaves (width + 1) / 2 blocks a row on average.
  """
  found = re.search(r'"xprof_metadata":\s*"(.*?[^\\])"', instruction.rest, re.DOTALL)
  blocks = json.loads(found[1].replace('\\"', '"')) if found else {}
  tables = [dims_of(shape) for shape in operands if shape.startswith("s8[")]
  suffix = next((f"_{part}" for part in ("dkv", "dq") if f"_mha_{part}" in instruction.name), "")
  if not tables or f"block_q{suffix}" not in blocks:
    return 0.0
  if suffix == "_dkv" and blocks.get("use_fused_bwd_kernel"):
    products += 1  # dq, too
  query = next(dims_of(shape) for shape in operands if shape.startswith(("bf16[", "f32[")))
  heads, dim = query[0], query[-1]
  _, rows, width = tables[0]
  area = blocks[f"block_q{suffix}"] * blocks[f"block_kv{suffix}"]
  return 2.0 * products * heads * dim * area * rows * (width + 1) / 2
