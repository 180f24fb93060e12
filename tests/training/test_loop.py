"""A run from its configuration: what it leaves behind, and that stopping and going on changes nothing."""

import dataclasses
import json
import pathlib
import random
import shutil
import signal

import pytest
from tiny import tiny_config, tiny_run

from maxllama4 import ConfigError, load_config, load_model, load_tokenizer
from maxllama4.config import (
  CheckpointConfig,
  DataConfig,
  KernelsConfig,
  MeshConfig,
  OptimizerConfig,
  ReportingConfig,
)
from maxllama4.data.sources import DataError, Document
from maxllama4.data.tokenizer import check_kept_tokenizer, train_tokenizer
from maxllama4.decoding.request import continuations
from maxllama4.training.loop import Extras, is_due, train
from maxllama4.training.run_dir import check_run_dir, keep_config
from maxllama4.training.signals import StopRequest

MODEL = tiny_config(vocab_size=320, initializer_range=0.1)
TIMINGS = ("step_seconds", "tokens_per_second", "mfu", "seconds/", "memory/")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """Files of random sentences."""
  folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
  words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
  for i in range(12):
    (folder / f"{i}.txt").write_text(". ".join(" ".join(rng.choices(words, k=7)) for _ in range(9)))
  return folder


@pytest.fixture(scope="module")
def config(texts, tmp_path_factory):
  """Six steps of two microbatches on a mesh of three axes, all losses on."""
  config = tiny_run(
    MODEL,
    run_dir=tmp_path_factory.mktemp("run") / "whole",
    data=DataConfig(paths=(str(texts),), held_out_fraction=0.2),
    checkpoint=CheckpointConfig(every=2, keep=1, keep_every=2),
    mesh=MeshConfig(data=2, fsdp=2, expert=2),
    optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=2),
    steps=6,
    batch_size=16,
    gradient_accumulation=2,
    log_every=1,
    eval_every=3,
    reporting=ReportingConfig(sample_prompts=("ab",), sample_tokens=8),
    load_balance_loss=0.01,
    router_bias_update_rate=0.01,
  )
  cache = tmp_path_factory.mktemp("compiled")  # the same programs again and again
  return dataclasses.replace(config, compilation_cache=str(cache))


@pytest.fixture(scope="module")
def whole(config):
  """The run directory of a run that was never stopped."""
  train(config, Extras(sample=continuations))
  return pathlib.Path(config.run_dir)


def lines_of(run_dir):
  lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line for line in lines}


def test_a_run_directory_holds_all_that_a_run_was(config, whole):
  assert load_config(whole / "config.yml") == config
  assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["2", "4", "6"]
  assert list(whole.glob("events.out.tfevents.*")) and (whole / "tokenizer.model").exists()
  assert load_model(whole).config == MODEL


def test_a_run_on_a_mesh_writes_what_its_model_goes_on_with(config, whole):
  lines = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
  assert [(line["step"], line["prompt"]) for line in lines] == [(3, "ab"), (6, "ab")]
  model, tokenizer = load_model(whole), load_tokenizer(whole)
  assert lines[1]["completion"] == continuations(model, tokenizer, ["ab"], 8)[0]


def test_a_run_computes_by_the_kernels_that_it_is_given_and_says_so(tmp_path):
  chosen = {
    "attention": "reference",
    "grouped_matmul": "ragged_dot",
    "experts_dispatch": "ragged_all_to_all",
  }
  config = tiny_run(
    tiny_config(num_hidden_layers=1, interleave_moe_layer_step=1),
    run_dir=tmp_path,
    mesh=MeshConfig(fsdp=4, expert=2),
    kernels=KernelsConfig(**chosen, expert_capacity_factor=1.0),
    optimizer=OptimizerConfig(state_memory="host"),
    checkpoint=CheckpointConfig(every=0),
    steps=2,
    log_every=1,
  )
  train(config)
  assert events_of_run(tmp_path)[0]["kernels"] == chosen
  lines = lines_of(tmp_path)
  assert list(lines) == [1, 2]
  # Of 8 rows of 10 tokens; an expert takes at most 3 of each row.
  assert all(0 < line["moe/dropped_tokens"] < 80 for line in lines.values())


def test_every_logged_step_has_the_metrics_that_users_rely_on(config, whole):
  lines = lines_of(whole)
  assert list(lines) == [1, 2, 3, 4, 5, 6]
  for step, line in lines.items():
    assert {
      "step", "loss", "tokens", "learning_rate", "gradient_norm", "step_seconds", "tokens_per_second", "mfu",
      "moe/load_balance_loss", "moe/max_load", "moe/min_load", "moe/dropped_tokens",
    } <= set(line)  # fmt: skip
    assert ({"eval/loss", "eval/bits_per_byte"} <= set(line)) == (step in (3, 6))
    assert line["moe/dropped_tokens"] == 0 and line["mfu"] is None
    assert 0 < line["tokens"] <= step * 16 * 10
  assert lines[1]["learning_rate"] == pytest.approx(0.015)
  assert lines[6]["loss"] < lines[1]["loss"] and lines[6]["eval/loss"] < lines[3]["eval/loss"]
  assert 0 < lines[6]["eval/bits_per_byte"] < 8


def events_of_run(run_dir):
  return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def stopped_after(step, whole, folder):
  """A copy of the run as it was when its checkpoint of `step` was the newest, with later lines still there."""
  shutil.copytree(whole, folder)
  for path in (folder / "checkpoints").iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return folder


def without_timings(line):
  return {name: value for name, value in line.items() if not name.startswith(TIMINGS)}


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(config, whole, tmp_path):
  folder = stopped_after(2, whole, tmp_path / "resumed")
  train(dataclasses.replace(config, run_dir=str(folder)))
  expected, found = lines_of(whole), lines_of(folder)
  assert list(found) == [1, 2, 3, 4, 5, 6]
  for step, line in expected.items():
    assert without_timings(found[step]) == without_timings(line), step


def test_a_run_goes_on_on_another_mesh(config, whole, tmp_path):
  folder = stopped_after(4, whole, tmp_path / "moved")
  training = dataclasses.replace(config.training, eval_every=0, gradient_accumulation=1)
  mesh = MeshConfig(fsdp=4, tensor=2)
  train(dataclasses.replace(config, run_dir=str(folder), mesh=mesh, training=training))
  expected, found = lines_of(whole), lines_of(folder)
  for step in (5, 6):
    assert found[step]["loss"] == pytest.approx(expected[step]["loss"], abs=1e-5)
    assert found[step]["tokens"] == expected[step]["tokens"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_with_a_checkpoint_and_the_next_start_goes_on_exactly(
  config, whole, tmp_path, number
):
  shutil.copytree(whole, tmp_path / "run", ignore=lambda *_: ["checkpoints", "metrics.jsonl"])
  config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))

  def sample(*_):  # during the evaluation after step 3
    signal.raise_signal(number)
    return ["cd"]

  before = signal.getsignal(number)
  train(config, Extras(sample=sample))
  folder = tmp_path / "run"
  assert signal.getsignal(number) == before
  assert list(lines_of(folder)) == [1, 2, 3]
  assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "3"]
  assert events_of_run(folder)[-1]["reason"] == "signal"
  train(config, Extras())
  expected, found = lines_of(whole), lines_of(folder)
  assert {s: without_timings(v) for s, v in found.items()} == {
    s: without_timings(v) for s, v in expected.items()
  }
  assert [e["event"] for e in events_of_run(folder)[-2:]] == ["started", "stopped"]


def test_a_signal_before_the_first_step_ends_the_process_with_exit_code_0(capfd):
  with StopRequest(), pytest.raises(SystemExit) as stopped:
    signal.raise_signal(signal.SIGTERM)
  assert stopped.value.code == 0 and "before the first step" in capfd.readouterr().out


def test_a_second_signal_from_the_keyboard_stops_at_once():
  with StopRequest() as stop:
    stop.defer()
    signal.raise_signal(signal.SIGINT)
    assert stop.after_this_step()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_the_same_command_on_a_finished_run_changes_nothing(config, whole, capsys):
  before = (whole / "metrics.jsonl").read_bytes()
  train(config)
  assert "nothing to do" in capsys.readouterr().out
  assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_run_directory_of_another_model_is_refused(config, whole):
  other = dataclasses.replace(config, model=dataclasses.replace(MODEL, num_hidden_layers=3))
  with pytest.raises(ConfigError, match=r"model.num_hidden_layers=3.* trained with 2"):
    train(other)
  assert load_config(whole / "config.yml") == config


@pytest.mark.parametrize(
  ("section", "changes", "words"),
  [
    ("optimizer", {"name": "muon"}, r"optimizer\.name=muon.* trained with adamw"),
    ("training", {"frozen": ("embed",)}, r"training\.frozen=\['embed'\].* trained with \[\]"),
    ("training", {"seed": 1}, r"training\.seed=1, but the checkpoint's data position"),
    (
      "training",
      {"batch_size": 32},
      r"training\.batch_size=32, but the checkpoint's data position",
    ),
  ],
)
def test_what_is_refused_leaves_the_run_as_it_was(config, whole, section, changes, words):
  before = (whole / "config.yml").read_bytes(), sorted(map(str, whole.rglob("*")))
  changed = dataclasses.replace(getattr(config, section), **changes)
  with pytest.raises(ConfigError, match=words):
    train(dataclasses.replace(config, **{section: changed}))
  assert ((whole / "config.yml").read_bytes(), sorted(map(str, whole.rglob("*")))) == before


def test_another_tokenizer_is_refused_and_the_runs_own_stays(config, whole, tmp_path):
  other = tmp_path / "other.model"
  shutil.copy(whole / "tokenizer.model", other)
  data = dataclasses.replace(config.data, tokenizer=str(other))
  check_kept_tokenizer(other, whole)  # the same one, from elsewhere
  train_tokenizer([Document("a", "quite another text")], 280, other)
  before = (whole / "tokenizer.model").read_bytes()
  with pytest.raises(ConfigError, match=r"is not the tokenizer that .* was trained with"):
    train(dataclasses.replace(config, data=data))
  assert (whole / "tokenizer.model").read_bytes() == before


def test_a_run_that_is_broken_off_says_so_and_keeps_the_save_under_way(config, whole, tmp_path):
  folder = stopped_after(2, whole, tmp_path / "broken")

  def sample(*_):  # during the evaluation after step 3
    raise DataError("texts/3.txt: line 1 is not what it was.")

  config = dataclasses.replace(config, run_dir=str(folder))
  with pytest.raises(DataError):
    train(config, Extras(sample=sample))
  last = events_of_run(folder)[-1]
  assert last["reason"] == "failure: texts/3.txt: line 1 is not what it was." and last["step"] == 3


def test_a_run_whose_end_was_not_written_down_is_done_all_the_same(config, whole, tmp_path):
  folder = stopped_after(6, whole, tmp_path / "ended")
  events = (folder / "events.jsonl").read_text().splitlines()
  (folder / "events.jsonl").write_text("\n".join(events[:-1]) + '\n{"event": "stop')
  for _ in range(2):
    train(dataclasses.replace(config, run_dir=str(folder)))
    assert events_of_run(folder)[-1]["reason"] == "done"
    assert len(events_of_run(folder)) == len(events)


def test_a_tokenizer_from_elsewhere_is_copied_into_the_run(config, whole, tmp_path):
  data = dataclasses.replace(config.data, tokenizer=str(whole))
  keep_config(dataclasses.replace(config, run_dir=str(tmp_path), data=data))
  assert (tmp_path / "tokenizer.model").read_bytes() == (whole / "tokenizer.model").read_bytes()


def test_settings_of_training_may_change_in_a_run_directory(config, tmp_path):
  config = dataclasses.replace(config, run_dir=str(tmp_path))
  keep_config(config)
  longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=9))
  check_run_dir(longer)
  keep_config(longer)
  assert load_config(tmp_path / "config.yml") == longer


@pytest.mark.parametrize(("every", "due"), [(3, [3, 6]), (0, []), (1, [1, 2, 3, 4, 5, 6, 7])])
def test_what_is_done_every_few_steps_is_done_at_their_multiples(every, due):
  assert [step for step in range(1, 8) if is_due(step, every)] == due
