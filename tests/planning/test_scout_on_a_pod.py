"""The shipped run of Scout, whole, compiled for 64 chips of v5p that are not here: what it takes, does and sends."""

import importlib.util
import pathlib

import pytest

from maxllama4.config import load_config
from maxllama4.planning.chips import parse_topology

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "llama4_scout.yml"

pytestmark = [
  pytest.mark.slow,  # two minutes on two quiet cores
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not there",
  ),
]


def test_scout_fits_sends_its_weights_three_times_early_and_computes_little_in_vain():
  from maxllama4.planning.compile import compile_train_step

  compiled, _ = compile_train_step(load_config(CONFIG), parse_topology("v5p:4x4x4"))
  summary = compiled.summary
  assert compiled.fits and compiled.peak_hbm_bytes <= 42e9
  assert summary.wire_bytes <= 0.66e12 and summary.emulated_gather_bytes == 0
  early = sum(c.bytes for c in summary.collectives if c.asynchronous)
  assert early >= 0.99 * summary.wire_bytes
  assert {c.dtype for c in summary.collectives if c.bytes > 1e9} == {"bf16"}
  assert {c.kind for c in summary.collectives if c.bytes > 1e9} == {"all-gather", "reduce-scatter"}
  assert summary.matmul_flops + summary.grouped_flops <= 1.02e15
  assert summary.estimated_cycles <= 0.9 * 4.18e9
