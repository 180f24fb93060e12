"""The shipped runs, whole, compiled for TPUs that are not here: what they take, do and send. Two to ten minutes each."""

import importlib.util
import pathlib
import re

import pytest

from maxllama4.config import load_config
from maxllama4.planning.chips import parse_topology
from maxllama4.planning.plan import split_request

ROOT = pathlib.Path(__file__).parents[2]
SCOUT = ROOT / "configs" / "llama4_scout.yml"
PLANNED = [path for path in sorted(ROOT.glob("configs/*.yml")) if " plan: " in path.read_text()]
LONG_ROWS = {  # machine: tokens a row, rows, mesh.context
  "v5p:4x4x4": (262144, 4, 16),
  "v5p:8x8x8": (1048576, 8, 64),
}

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not there",
  ),
]


def compile_run(config, topology):
  from maxllama4.planning.compile import compile_train_step

  return compile_train_step(config, topology)[0]


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_run_takes_the_memory_that_its_header_says(path):
  header = path.read_text()
  words = re.search(r"plan: +maxllama4 plan configs/\S+ +(.*?)(?: +\(.*)?\n", header)[1].split()
  request, overrides = split_request(words)
  topology = parse_topology(request.topology, request.slices)
  said = re.search(r"([\d.]+) of ([\d.]+) GB a chip, by the compiler", header)
  compiled = compile_run(load_config(path, overrides), topology)
  assert compiled.fits
  taken = topology.chip.devices * compiled.peak_hbm_bytes / 1e9
  assert taken == pytest.approx(float(said[1]), rel=0.02)
  assert topology.chip.hbm_bytes / 1e9 == pytest.approx(float(said[2]), abs=0.06)


def test_scout_sends_its_weights_three_times_early_and_computes_little_in_vain():
  compiled = compile_run(load_config(SCOUT), parse_topology("v5p:4x4x4"))
  summary = compiled.summary
  assert compiled.peak_hbm_bytes <= 42e9
  assert summary.wire_bytes <= 0.66e12 and summary.emulated_gather_bytes == 0
  early = sum(c.bytes for c in summary.collectives if c.asynchronous)
  assert early >= 0.99 * summary.wire_bytes
  assert {c.dtype for c in summary.collectives if c.bytes > 1e9} == {"bf16"}
  assert {c.kind for c in summary.collectives if c.bytes > 1e9} == {"all-gather", "reduce-scatter"}
  assert summary.matmul_flops + summary.grouped_flops <= 1.02e15
  assert summary.estimated_cycles <= 0.9 * 4.18e9


@pytest.mark.parametrize("name", LONG_ROWS)
def test_scout_takes_long_rows_and_chunked_layers_exchange_no_keys(name):
  length, rows, context = LONG_ROWS[name]
  settings = [f"training.sequence_length={length}", f"training.batch_size={rows}"]
  config = load_config(SCOUT, [*settings, f"mesh.context={context}"])
  compiled = compile_run(config, parse_topology(name))
  assert compiled.fits and compiled.peak_hbm_bytes <= 50e9
  along = [c for c in compiled.summary.collectives if "context" in c.axes]
  assert not [c for c in along if c.kind == "collective-permute" and c.bytes > 1e9]
