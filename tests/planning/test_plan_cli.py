"""The command `maxllama4 plan`, with a compiler that answers at once."""

import json

import pytest

from maxllama4 import cli
from maxllama4.config import load_config
from maxllama4.planning import plan
from maxllama4.planning.compile import Compiled
from maxllama4.planning.hlo import Collective, Summary

RUN = """
model: {model}
dtype: bfloat16
param_dtype: float32
data: {{source: synthetic}}
training: {{steps: 10, batch_size: 64, sequence_length: 8192, remat: full}}
"""
KEYS = (  # of the interface
  *("topology", "chips", "mesh", "fits", "peak_hbm_bytes", "hbm_bytes", "hbm_limit_bytes", "useful_flops"),
  *("executed_flops", "collectives", "estimated_cycles", "step_seconds", "bound_by", "mfu", "tokens_per_second"),
  *("cost_per_billion_tokens", "compile_seconds"),
)  # fmt: skip


def compiled(fits: bool = True, temporary: int = 20 * 10**9, **state: int) -> Compiled:
  """What the compiler might say of Scout on 64 chips."""
  state = state or {"parameters": 6_700_000_000, "optimizer": 13_400_000_000}
  gather = Collective("all-gather", ("fsdp",), 960, 440 * 10**9, "bf16", True)
  summary = Summary(
    (gather,), 8e14, 1e14, 1e14, 4 * 10**9, {"matmul": 4 * 10**9}, 10**12, 0, (), ()
  )
  size = sum(state.values())
  return Compiled(fits, size + temporary, size, 0, state, summary if fits else None, 100.0)


@pytest.fixture
def desk(monkeypatch, tmp_path, capsys):
  """A folder with a run, a compiler that notes its calls and gives `desk.result`, and the command."""

  class Desk:
    calls = 0
    result = compiled()

    def plan(self, *words: str, code: int = 0) -> str:
      assert cli.main(["plan", "run.yml", *words]) == code
      captured = capsys.readouterr()
      assert "Traceback" not in captured.err
      return captured.out if code == 0 else captured.err

  desk = Desk()

  def compile_train_step(config, topology):
    desk.calls += 1
    return desk.result, "HloModule jit_train_step"

  def compile_decoding(config, topology, rows, prompt, length):
    desk.calls += 1
    program = compiled(parameters=10**9, caches=2 * 10**9)
    return {"prefill": program, "step": program}, "HloModule jit_advance"

  monkeypatch.setattr(plan, "compile_train_step", compile_train_step)
  monkeypatch.setattr(plan, "compile_decoding", compile_decoding)
  monkeypatch.setattr("maxllama4.planning.cache.libtpu_version", lambda: "0")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  scout = cli.__file__.replace("maxllama4/cli.py", "configs/models/llama4_scout.yml")
  (tmp_path / "run.yml").write_text(RUN.format(model=scout))
  monkeypatch.chdir(tmp_path)
  return desk


V5P = "topology=v5p:4x4x4"


def test_json_holds_what_the_interface_promises(desk):
  found = json.loads(desk.plan(V5P, "output=json"))
  assert set(KEYS) <= set(found)
  assert found["fits"] and found["chips"] == 64 and found["mesh"]["fsdp"] == 64
  assert found["peak_hbm_bytes"] == sum(found["hbm_bytes"].values()) == 40_100_000_000
  assert list(found["hbm_bytes"]) == [
    "parameters",
    "optimizer",
    "gradients",
    "activations",
    "scratch",
  ]
  assert found["hbm_bytes"]["parameters"] == 6_700_000_000
  assert found["executed_flops"] == 1e15 and found["estimated_cycles"] == 4 * 10**9
  assert found["collectives"][0]["axes"] == ["fsdp"] and found["compile_seconds"] == 100
  assert abs(found["useful_flops"] / 8.92e14 - 1) < 0.01
  tokens = 64 * 8192
  assert found["tokens_per_second"] == pytest.approx(tokens / found["step_seconds"])
  mfu = found["useful_flops"] / found["step_seconds"] / 459e12
  assert found["mfu"] == pytest.approx(mfu) and 0.1 < mfu < 1
  dollars = 1e9 / found["tokens_per_second"] / 3600 * 64 * 4.2
  assert found["cost_per_billion_tokens"] == pytest.approx(dollars)


def test_a_training_is_priced_at_ones_own_price(desk):
  words = (V5P, "tokens=1e12", "price_per_chip_hour=2", "output=json")
  found = json.loads(desk.plan(*words))
  days = 1e12 / found["tokens_per_second"] / 86400
  assert found["training_days"] == pytest.approx(days)
  assert found["training_dollars"] == pytest.approx(days * 24 * 64 * 2)
  assert f"{days:,.1f} days" in desk.plan(*words[:3])


def test_people_read_whether_it_fits_and_what_it_does(desk):
  text = desk.plan(V5P)
  for words in (
    "fits: 62.7 GB free",
    "40.10 of 102.8 GB",
    "mesh fsdp 64",
    "440 GB",
    "all-gather",
    "MFU",
  ):
    assert words in text, words


def test_what_does_not_fit_is_said_with_how_much_too_much_it_is(desk):
  desk.result = compiled(fits=False, temporary=100 * 10**9)
  assert "DOES NOT FIT: 17.3 GB too much" in desk.plan(V5P)
  found = json.loads(desk.plan(V5P, "output=json"))
  assert (
    found["fits"] is False and found["missing_bytes"] == 120_100_000_000 - found["hbm_limit_bytes"]
  )
  assert found["estimated_cycles"] is None and found["step_seconds"] > 0  # by arithmetic


def test_a_compilation_is_done_once(desk):
  first = desk.plan(V5P, "hlo=a.hlo")
  assert desk.plan(V5P, "run_dir=elsewhere", "hlo=b.hlo") == first and desk.calls == 1
  with open("b.hlo") as file:
    assert file.read() == "HloModule jit_train_step"
  desk.plan(V5P, "training.remat=none")
  desk.plan("topology=v5p:4x4x8", "training.batch_size=128")
  assert desk.calls == 3


def test_rows_that_are_not_whole_are_another_program(desk):
  desk.plan(V5P)
  desk.plan(V5P, "data.source=text", "data.paths=[x]")
  assert desk.calls == 2  # a chunk of keys more travels along a context axis


def test_a_cache_that_is_damaged_counts_for_nothing(desk, tmp_path):
  first = desk.plan(V5P)
  (program,) = (tmp_path / "cache").rglob("*.gz")
  (values,) = (tmp_path / "cache").rglob("*.json")
  whole = program.read_bytes()
  damages = [(program, whole[:-9]), (program, whole[:12] + b"\xff" * 9), (program, b"no gzip")]
  damages += [(values, content) for content in (b"[]", b'{"step": {}}', b"")]
  for path, content in damages:
    path.write_bytes(content)
    calls = desk.calls
    assert desk.plan(V5P) == first and desk.calls == calls + 1


def test_decoding_is_planned_with_its_caches_for_rows_of_its_own(desk):
  words = ("topology=v5p:4x4x8", "target=decode", "batch=128")  # which 64 rows do not divide
  found = json.loads(desk.plan(*words, "output=json"))
  assert found["target"] == "decode" and found["cache_bytes"] == 2 * 10**9
  assert found["hbm_bytes"]["parameters"] == 10**9 and found["prefill_seconds"] > 0
  assert found["tokens_per_second"] == pytest.approx(128 / found["step_seconds"])
  assert "caches 2.00" in desk.plan(*words)


@pytest.mark.parametrize(
  ("words", "says"),
  [
    ((), "name the machine: topology=CHIP:SHAPE"),
    (("topology=h100:8",), "topology=h100:8 names no known chip"),
    (("topology=v5p:4x4",), "3 dimensions"),
    ((V5P, "slices=0"), "slices=0 must be greater than 0"),
    ((V5P, "target=serve"), "target=serve is not one of train, decode"),
    ((V5P, "output=yaml"), "output=yaml is not one of text, json"),
    ((V5P, "tokens=-1"), "tokens=-1.0 must be greater than 0"),
    ((V5P, "search=maybe"), "search='maybe' must be true or false"),
    ((V5P, "search=true", "target=decode"), "search=true finds meshes to train with"),
    ((V5P, "save=best.yml"), "save=best.yml means something with search=true alone"),
    ((V5P, "best=2"), "best=2 means something with search=true alone"),
    ((V5P, "batch=16"), "batch=16 means something with target=decode alone"),
    ((V5P, "target=decode", "batch=64", "tokens=1e9"), "tokens=1e9 means something with target=train alone"),
    ((V5P, "cache=run.yml"), "cache=run.yml is no folder"),
    ((V5P, "hlo=nowhere/a.txt"), "hlo=nowhere/a.txt is no place for a file"),
    ((V5P, "mesh.fsdp=32"), "cannot be laid over 64 devices"),
    ((V5P, "training.batch_size=60"), "=60 cannot be split evenly into 64 parts"),
    ((V5P, "slices=2"), "slices=2, but the mesh spans 1"),
    ((V5P, "trainin.steps=1"), "trainin"),
    ((V5P, "target=decode", "batch=64", "mesh.context=4"), "mesh.context splits rows"),
    ((V5P, "target=decode", "batch=5"), "batch=5 rows cannot be dealt out over 64 devices"),
    ((V5P, "target=decode", "batch=64", "prompt_length=9", "max_length=9"), "prompt_length=9 must be below"),
  ],
)  # fmt: skip
def test_a_mistake_is_said_in_one_sentence(desk, words, says):
  message = desk.plan(*words, code=2)
  assert says in message and len(message.splitlines()) == 1 and desk.calls == 0


def test_a_search_compiles_the_best_few_and_writes_the_winner(desk):
  words = (V5P, "search=true", "best=2", "save=best.yml")
  found = json.loads(desk.plan(*words, "output=json"))
  assert desk.calls == 2 and len(found["candidates"]) == 2
  seconds = [candidate["step_seconds"] for candidate in found["candidates"]]
  assert seconds == sorted(seconds) and found["step_seconds"] == seconds[0]
  winner = load_config("best.yml", [])
  assert winner.mesh.resolve(64) == found["mesh"] and winner.run_dir == "runs/best"
  assert found["candidates"][0]["description"] in desk.plan(*words)
