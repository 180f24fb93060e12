"""What is written where, and what a resumed run takes back."""

import dataclasses
import io
import json
import time

import jax.numpy as jnp
import pytest
from tensorboard_events import events_of
from tiny import tiny_run

from maxllama4.chips import peak_flops
from maxllama4.config import ConfigError, ReportingConfig
from maxllama4.training.metrics import (
  Clock,
  Progress,
  RunWriter,
  check_wandb,
  to_plain,
)

VALUES = {"loss": 2.0, "step_seconds": 1.5, "tokens_per_second": 1234.0, "mfu": None}


def lines_of(folder, name="metrics.jsonl"):
  return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_writer_appends_one_object_a_step_and_tensorboard_events(tmp_path):
  writer = RunWriter(tiny_run(run_dir=tmp_path), first_step=0)
  writer.write(1, VALUES | {"by_layer": [1.0, 2.0], "load": [[1.0, 1.0], [0.0, 4.0]]})
  writer.write(2, VALUES)
  assert lines_of(tmp_path)[0] == {
    "step": 1,
    **VALUES,
    "by_layer": [1.0, 2.0],
    "load": [[1.0, 1.0], [0.0, 4.0]],
  }  # before it is closed
  writer.close()
  assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
  scalars, histograms = events_of(tmp_path)
  assert scalars[2] == {"loss": 2.0, "step_seconds": 1.5, "tokens_per_second": 1234.0}
  assert scalars[1] == scalars[2] | {"by_layer/0": 1.0, "by_layer/1": 2.0}
  assert set(histograms[1]) == {"load/0", "load/1"} and histograms[1]["load/1"].max == 4


def test_a_resumed_run_takes_back_lines_after_its_checkpoint_and_one_that_was_cut_off(tmp_path):
  lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "lo')
  writer = RunWriter(tiny_run(run_dir=tmp_path), first_step=4)
  writer.write(6, {"loss": 0.5})
  writer.close()
  assert lines_of(tmp_path) == [
    {"step": 2, "loss": 1.0},
    {"step": 4, "loss": 1.0},
    {"step": 6, "loss": 0.5},
  ]


def test_a_pipe_gets_plain_lines_and_a_terminal_one_that_is_redrawn():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  outs = io.StringIO(), Terminal()
  for out in outs:
    progress = Progress(100, out)
    progress.show(40, VALUES | {"mfu": 0.25})
    progress.say("done")
  plain, live = (out.getvalue() for out in outs)
  first, second = plain.splitlines()
  for words in (" 40/100", "loss 2.0000", "1,234 tokens/s", "mfu 25.0%", "left 1:30"):
    assert words in first
  assert second == "done" and "\x1b" not in plain
  assert live.startswith("\r") and live.count("\n") == 1


def test_a_clock_tells_what_the_time_was_spent_on_and_leaves_pauses_out_of_a_step():
  clock = Clock()
  time.sleep(0.1)
  clock.start(10)
  time.sleep(0.04)
  with clock.spent_on("evaluation"):
    time.sleep(0.5)
  with clock.spent_on("checkpoint"):
    time.sleep(0.02)
  assert 0.03 <= clock.seconds_a_step(12) < 0.2
  spent = clock.read()
  assert spent["seconds/evaluation"] >= 0.5 and spent["seconds/checkpoint"] >= 0.02
  assert 0.04 <= spent["seconds/step"] < 0.4 and spent["seconds/data"] == 0
  assert clock.seconds_a_step(13) < 0.2 and clock.read()["seconds/evaluation"] == 0


def test_reports_are_rewritten_when_they_are_old_and_at_the_end(tmp_path):
  for seconds, first in ((1e-9, 1), (0.0, 3), (3600.0, 3)):
    folder, written = tmp_path / str(seconds), []
    folder.mkdir()
    config = tiny_run(run_dir=folder, reporting=ReportingConfig(report_every_seconds=seconds))

    def report(run_dir, written=written):
      written.append(len(lines_of(run_dir)))

    writer = RunWriter(config, first_step=0, report=report)
    for step in (1, 2, 3):
      writer.write(step, VALUES)
    writer.close()
    assert written[0] == first and written[-1] == 3


def test_events_and_samples_have_lines_of_their_own_and_samples_are_taken_back(tmp_path):
  writer = RunWriter(tiny_run(run_dir=tmp_path), first_step=0)
  writer.event("started", 1, devices=8)
  for step in (2, 4):
    writer.sample(step, "a", "\u00e9\n")
  writer.close()
  RunWriter(tiny_run(run_dir=tmp_path), first_step=3).close()
  (event,) = lines_of(tmp_path, "events.jsonl")
  assert event["event"] == "started" and event["devices"] == 8 and event["time"].endswith("+00:00")
  assert lines_of(tmp_path, "samples.jsonl") == [
    {"step": 2, "prompt": "a", "completion": "\u00e9\n"}
  ]


def test_weights_and_biases_must_be_installed_where_it_is_asked_for(monkeypatch):
  config = tiny_run(reporting=ReportingConfig(wandb_project="llamas"))
  monkeypatch.setattr("sys.path", [])
  monkeypatch.setattr("sys.meta_path", [])
  with pytest.raises(ConfigError, match=r"reporting.wandb_project=llamas.*pip install"):
    check_wandb(config)
  check_wandb(dataclasses.replace(config, reporting=ReportingConfig()))


@pytest.mark.parametrize(
  ("kind", "flops"),
  [
    ("TPU v5p chip", 459e12),
    ("TPU v5 lite", 197e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("cpu", None),
  ],
)
def test_the_peak_of_a_chip_is_known_or_null(kind, flops):
  assert peak_flops(kind) == flops


def test_metrics_become_plain_numbers():
  plain = to_plain({"a": jnp.float32(1.5), "b": jnp.arange(2)})
  assert plain == {"a": 1.5, "b": [0.0, 1.0]} and json.dumps(plain)
