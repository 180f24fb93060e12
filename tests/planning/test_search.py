"""The search: what it tries, what it keeps, and the file that it writes."""

import dataclasses
import math

import pytest

from maxllama4.config import ConfigError, check_mesh_divides, load_config
from maxllama4.planning.chips import parse_topology
from maxllama4.planning.compile import CompilerError
from maxllama4.planning.estimate import estimate
from maxllama4.planning.search import (
  MEMORY_MARGIN,
  candidates,
  factorizations,
  search,
  variants,
  write_config,
)
from maxllama4.planning.step_time import links_of, predict
from tests.tiny import tiny_config, tiny_run

V5P = parse_topology("v5p:2x2x2")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A stand-in for what compiling tells."""

  seconds: float
  fits: bool = True
  peak_hbm_bytes: int = 10**10


@pytest.fixture(scope="module")
def run():
  return tiny_run(tiny_config(num_hidden_layers=5), sequence_length=16)


@pytest.fixture(scope="module")
def ranked(run):
  return candidates(run, V5P)


def test_all_factorizations_and_none_twice():
  found = list(factorizations(64, 5))
  assert len(found) == len(set(found)) == math.comb(6 + 4, 4)
  assert {math.prod(sizes) for sizes in found} == {64}


def test_no_candidate_fails_to_divide(run, ranked):
  assert len(ranked) > 50
  for candidate in ranked:
    assert math.prod(candidate.sizes.values()) == 8
    check_mesh_divides(candidate.config, candidate.sizes)
    assert candidate.config.mesh.resolve(8) == candidate.sizes


def test_candidates_differ_in_nothing_but_mesh_remat_and_microbatches(run, ranked):
  for candidate in ranked:
    training = dataclasses.replace(
      candidate.config.training,
      remat=run.training.remat,
      gradient_accumulation=run.training.gradient_accumulation,
    )
    same = dataclasses.replace(candidate.config, mesh=run.mesh, training=training)
    assert same == run


def test_the_best_is_no_slower_than_the_given_mesh(run, ranked):
  sizes = run.mesh.resolve(8)
  given = predict(V5P.chip, estimate(run, sizes).work(links_of(V5P, run.mesh, sizes)))
  assert ranked[0].step_time.seconds <= given.seconds
  times = [candidate.seconds_per_token for candidate in ranked]
  assert times == sorted(times)


def test_every_candidate_leaves_the_margin_free():
  settings = ["training.batch_size=8", "model.num_hidden_layers=8"]
  config = load_config("configs/llama4_scout.yml", settings)
  topology = parse_topology("v5p:2x2x2")
  tried = sum(1 for _ in variants(config, topology))
  kept = candidates(config, topology)
  limit = (1 - MEMORY_MARGIN) * topology.chip.hbm_bytes
  assert all(candidate.estimate.peak_hbm_bytes <= limit for candidate in kept)
  assert 0 < len(kept) < tried


def test_slices_are_spanned_by_data_or_fsdp(run):
  two = parse_topology("v5p:2x2x1", 2)
  spans = {
    (config.mesh.dcn_data, config.mesh.dcn_fsdp): sizes for config, sizes in variants(run, two)
  }
  assert set(spans) == {(2, 1), (1, 2)}
  assert all(math.prod(sizes.values()) == 8 for sizes in spans.values())


def test_a_model_that_fits_nowhere_is_refused():
  config = load_config("configs/llama4_maverick.yml", ["training.batch_size=4"])
  with pytest.raises(ConfigError, match=r"training.batch_size=4 .* fit 4 devices of v5p:2x2x1"):
    search(config, parse_topology("v5p:2x2x1"), lambda config: Outcome(1.0))


def test_the_compiler_has_the_last_word(run, ranked, capsys):
  outcomes = iter([Outcome(2.0, fits=False), Outcome(3.0), None, Outcome(1.0), Outcome(0.5)])
  compiled = []

  def compile_best(config):
    compiled.append(config)
    outcome = next(outcomes)
    if outcome is None:
      raise CompilerError("the TPU compiler failed: INTERNAL")
    return outcome

  found = search(run, V5P, compile_best, best=2)
  assert compiled == [candidate.config for candidate in ranked[:4]]
  assert [f.compiled.seconds for f in found] == [1.0, 3.0, 2.0]  # what does not fit comes last
  assert f"left out: {ranked[2].description}: the TPU compiler failed" in capsys.readouterr().err


def test_a_search_whose_candidates_do_not_fit_has_no_winner(run):
  with pytest.raises(
    ConfigError, match=r"of the 4 candidates .* the compiler fits none into 103 GB"
  ):
    search(run, V5P, lambda config: Outcome(1.0, fits=False), best=2)


def test_the_winner_is_written_as_a_complete_run(run, tmp_path):
  found = search(run, V5P, lambda config: Outcome(0.5), best=1)[0]
  path = tmp_path / "winner.yml"
  write_config(path, found, V5P)
  assert load_config(path) == dataclasses.replace(found.candidate.config, run_dir="runs/winner")
  head = [line for line in path.read_text().splitlines() if line.startswith("#")]
  assert any(line.startswith("#   command:    python train.py") for line in head)
