"""What is written where, and what a resumed run takes back."""

import io
import json
import time

import jax.numpy as jnp
import pytest

from maxllama4.training.metrics import MetricsWriter, Progress, Stopwatch, peak_flops, to_plain

VALUES = {"loss": 2.0, "step_seconds": 1.5, "tokens_per_second": 1234.0, "mfu": None}


def lines_of(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_writer_appends_one_object_a_step_and_tensorboard_events(tmp_path):
  writer = MetricsWriter(tmp_path, first_step=0)
  writer.write(1, VALUES | {"by_layer": [1.0, 2.0]})
  writer.write(2, VALUES)
  assert lines_of(tmp_path)[0] == {
    "step": 1,
    **VALUES,
    "by_layer": [1.0, 2.0],
  }  # before it is closed
  writer.close()
  assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
  assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_resumed_run_takes_back_lines_after_its_checkpoint_and_one_that_was_cut_off(tmp_path):
  lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "lo')
  writer = MetricsWriter(tmp_path, first_step=4)
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


def test_a_stopwatch_reads_the_mean_since_the_last_reading_and_leaves_pauses_out():
  watch = Stopwatch(10)
  time.sleep(0.04)
  with watch.pause():
    time.sleep(0.5)
  assert 0.02 <= watch.read(12) < 0.2
  assert watch.read(13) < 0.2


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
