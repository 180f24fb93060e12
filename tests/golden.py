"""Golden cases: tiny checkpoints and what a reference implementation computes on them; never part of this repository.

The environment variable MAXLLAMA4_GOLDEN names the folder that holds the cases; without it tests that need one skip.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest

VARIABLE = "MAXLLAMA4_GOLDEN"
TEXT_CASES = (
  "p01_scout_gqa5",
  "p02_maverick",
  "p03_rope_scaled",
  "p04_chunked_decode",
  "p05_temp_tuning",
  "p07_padded",
  "p08_meta_text",
  "p09_bf16_sharded",
  "p10_dense_nochunk",
)
VISION_CASES = ("p06_vlm",)
# Max |delta| against the reference in float32; the reference itself has 1e-5 of noise on logits.
LOGITS, ACTIVATIONS, LOSS, GRADIENT_NORM_RELATIVE = 5e-5, 1e-4, 1e-5, 1e-4


@dataclasses.dataclass(frozen=True)
class GoldenCase:
  """One folder: a checkpoint in Hugging Face's format, the reference's arrays, and its loss and gradient norms."""

  folder: pathlib.Path
  arrays: dict[str, np.ndarray]
  facts: dict[str, Any]

  @property
  def batches(self) -> list[str]:
    """Prefixes of the arrays of each batch: several where one batch is padded in several ways."""
    return ["left.", "right."] if "left.input_ids" in self.arrays else [""]

  @property
  def generations(self) -> list[int]:
    return [i for i in range(len(self.arrays)) if f"gen{i}.prompt" in self.arrays]


def golden_folder() -> pathlib.Path:
  """The folder of all cases; skips the test without it."""
  if VARIABLE not in os.environ:
    pytest.skip(f"{VARIABLE} is not set: it names the folder of golden cases")
  return pathlib.Path(os.environ[VARIABLE])


def golden_case(name: str) -> GoldenCase:
  folder = golden_folder() / name
  return GoldenCase(
    folder, dict(np.load(folder / "golden.npz")), json.loads((folder / "golden.json").read_text())
  )


def golden_table(name: str) -> Any:
  """A table in JSON, of tokenizers, chats or images."""
  return json.loads((golden_folder() / "units" / f"{name}.json").read_text(encoding="utf-8"))


def golden_tokenizer_file() -> pathlib.Path:
  """Meta's tokenizer of Llama 4, in the folder `assets` beside the cases; skips the test without it."""
  path = golden_folder().parent / "assets" / "llama4_tokenizer.model"
  if not path.exists():
    pytest.skip(f"{path} does not exist: Meta's tokenizer of Llama 4")
  return path


def golden_units() -> dict[str, np.ndarray]:
  """Tables of single formulas."""
  return dict(np.load(golden_folder() / "units" / "units.npz"))
