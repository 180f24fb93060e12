"""Several hosts as one run, with real processes on this machine: gloo carries their collectives."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from tiny import tiny_config, tiny_run

from maxllama4 import load_config
from maxllama4.config import (
  CheckpointConfig,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  config_to_dict,
)

DRIVER = pathlib.Path(__file__).with_name("hosts_driver.py")
ROOT = DRIVER.parents[2]
STEPS, DEVICES = 24, 8
LIMIT = 300  # seconds that no process of these tests needs
# Gloo adds the processes' sums in another order than one process adds its devices'.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  """A run of a dense layer whose mesh splits rows and weights."""
  folder, rng = tmp_path_factory.mktemp("several"), random.Random(0)
  (folder / "texts").mkdir()
  words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
  for i in range(24):
    text = ". ".join(" ".join(rng.choices(words, k=7)) for _ in range(9))
    (folder / "texts" / f"{i}.txt").write_text(text)
  model = tiny_config(
    vocab_size=320,
    initializer_range=0.1,
    num_hidden_layers=1,
    num_local_experts=0,
    interleave_moe_layer_step=0,
  )
  config = tiny_run(
    model,
    run_dir=folder / "run",
    data=DataConfig(paths=(str(folder / "texts"),), held_out_fraction=0.2),
    checkpoint=CheckpointConfig(every=6, keep=1, keep_every=6),
    mesh=MeshConfig(data=2, fsdp=DEVICES // 2),
    optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant"),  # whatever the steps
    steps=STEPS,
    batch_size=16,
    log_every=1,
    eval_every=4,
  )
  config = dataclasses.replace(config, compilation_cache=None)
  path = folder / "config.yml"
  path.write_text(yaml.safe_dump(config_to_dict(config)))
  return path


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


@contextlib.contextmanager
def processes(count, command, config_file, folder, *words, only=None, **variables):
  """`count` processes of one run, on `DEVICES` devices in all; `only=(ID, {...})` are variables of one of them."""
  folder.mkdir(parents=True, exist_ok=True)
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
    "PYTHONPATH": str(ROOT),
  }
  settings = [f"distributed.coordinator_address=127.0.0.1:{free_port()}"]
  settings += [f"distributed.num_processes={count}"]
  started = []
  try:
    for i in range(count):
      own = variables | (only[1] if only and only[0] == i else {})
      started.append(
        subprocess.Popen(
          [sys.executable, DRIVER, folder, command, config_file, *words]
          + ([*settings, f"distributed.process_id={i}"] if count > 1 else []),
          env=environment | own,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    yield started
  finally:
    for process in started:
      process.kill()
      process.wait()
      process.stdout.close()
      process.stderr.close()


def ends(started):
  """(exit code, standard output, error lines of ours) of each process."""
  found = []
  for process in started:
    out, err = process.communicate(timeout=LIMIT)
    found.append(
      (process.returncode, out, [x for x in err.splitlines() if x.startswith("error: ")])
    )
    assert "Traceback" not in err and "stack trace" not in err, err
  return found


def wait_for(condition, started):
  deadline = time.monotonic() + LIMIT
  while not condition():
    assert time.monotonic() < deadline, "it took too long"
    for process in started:
      assert process.poll() is None, process.communicate()
    time.sleep(0.05)


def lines_of(run_dir):
  path = run_dir / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  assert len({line["step"] for line in lines}) == len(lines)
  return {line["step"]: line for line in lines}


def data_of(folder, count):
  """For each batch, the pieces of documents that all processes together read; no row is read by two."""
  parts = []
  for i in range(count):
    lines = (folder / f"data-{i}.jsonl").read_text().splitlines()
    parts.append([json.loads(line) for line in lines])
  rows = [{piece["row"] for batch in part for piece in batch} for part in parts]
  assert sum(map(len, rows)) == len(set().union(*rows)) == 16
  batches = [[piece for part in batch for piece in part] for batch in zip(*parts)]
  return [sorted(batch, key=lambda piece: (piece["row"], piece["columns"])) for batch in batches]


def assert_equal_runs(found, expected, steps=range(1, STEPS + 1)):
  assert list(found) == list(steps)
  for step in steps:
    for name in ("tokens", "learning_rate"):
      assert found[step][name] == expected[step][name], (step, name)
    names = ["loss", "gradient_norm"] + ["eval/loss", "eval/bits_per_byte"] * (step % 4 == 0)
    for name in names:
      assert found[step][name] == pytest.approx(expected[step][name], rel=TOLERANCE), (step, name)


@pytest.fixture(scope="module")
def whole(config_file):
  """The run in one process: its lines, and the data of each of its batches."""
  folder = config_file.parent / "whole"
  with processes(1, "train", config_file, folder, f"run_dir={folder}") as started:
    assert [code for code, *_ in ends(started)] == [0]
  return lines_of(folder), data_of(folder, 1)


@pytest.fixture(scope="module")
def killed(config_file):
  """What two processes leave behind when one of them is killed in step 9, and what the other one says."""
  folder = config_file.parent / "killed"
  words = (f"run_dir={folder}",)
  only = (1, {"HOLD_AT": "8"})
  with processes(2, "train", config_file, folder / "two", *words, only=only) as started:
    wait_for((folder / "two" / "held-1").exists, started)
    wait_for((folder / "checkpoints" / "6").exists, started)
    started[1].kill()
    return folder, *ends(started)


def test_two_processes_train_as_one_until_one_is_killed(killed, whole):
  folder, survivor, victim = killed
  expected, data = whole
  assert victim[0] == -signal.SIGKILL and survivor[0] == 1
  (sentence,) = survivor[2]
  assert "process 1 of 2 is lost" in sentence and "start all processes again" in sentence
  assert_equal_runs(lines_of(folder), expected, range(1, len(lines_of(folder)) + 1))
  assert len(lines_of(folder)) >= 7
  read = data_of(folder / "two", 2)
  assert len(read) == 8 and read == data[:8]


def test_one_process_goes_on_with_what_two_left(killed, whole, config_file, tmp_path):
  folder = shutil.copytree(killed[0], tmp_path / "run")
  words = (f"run_dir={folder}",)
  with processes(1, "train", config_file, folder / "one", *words) as started:
    ((code, out, errors),) = ends(started)
  assert code == 0 and not errors and "resumed from step 6" in out
  assert_equal_runs(lines_of(folder), whole[0])
  assert data_of(folder / "one", 1) == whole[1][6:]


def test_four_processes_go_on_and_stop_when_one_is_asked_to_then_two_finish(
  killed, whole, config_file, tmp_path
):
  folder = shutil.copytree(killed[0], tmp_path / "run")
  words = (f"run_dir={folder}",)
  endless = "training.steps=1000"
  with processes(4, "train", config_file, folder / "four", *words, endless, PACE="1") as started:
    wait_for((folder / "four" / "data-0.jsonl").exists, started)
    started[2].terminate()
    found = ends(started)
  assert [(code, errors) for code, _, errors in found] == [(0, [])] * 4
  assert "resumed from step 6" in found[0][1]
  assert not any("step" in line for _, out, _ in found[1:] for line in out.splitlines())
  stopped = max(int(path.name) for path in (folder / "checkpoints").iterdir())
  assert 6 < stopped < STEPS and list(lines_of(folder)) == list(range(1, stopped + 1))
  assert data_of(folder / "four", 4) == whole[1][6:stopped]

  with processes(2, "train", config_file, folder / "two again", *words) as started:
    found = ends(started)
  assert [(code, errors) for code, _, errors in found] == [(0, [])] * 2
  assert f"resumed from step {stopped}" in found[0][1]
  assert_equal_runs(lines_of(folder), whole[0])
  assert data_of(folder / "two again", 2) == whole[1][stopped:]
  assert len(list(folder.glob("events.out.tfevents.*"))) == 3  # one writer a start
  assert load_config(folder / "config.yml").distributed.num_processes is None


def test_all_processes_know_the_lost_one_even_if_it_coordinated_them(config_file, tmp_path):
  only = (0, {"HOLD_AT": "3"})
  with processes(2, "collectives", config_file, tmp_path, only=only) as started:
    wait_for((tmp_path / "held-0").exists, started)
    started[0].kill()
    _, survivor = ends(started)
  assert survivor[0] == 1
  assert len(survivor[2]) == 1 and "process 0 of 2 is lost" in survivor[2][0]


def test_a_mistake_in_one_process_stops_the_others_with_its_words(config_file, tmp_path):
  with processes(3, "collectives", config_file, tmp_path, only=(2, {"FAIL_AT": "3"})) as started:
    found = ends(started)
  sentence = "data.paths=[here] is not what it should be."
  others = f"error: process 2 of 3 stopped: {sentence}"
  assert [(code, errors) for code, _, errors in found] == [
    (2, [others]),
    (2, [others]),
    (2, [f"error: {sentence}"]),
  ]


def test_every_mesh_gets_its_batch_from_the_rows_that_each_process_reads(config_file, tmp_path):
  words = ("data.source=synthetic", "training.eval_every=0", "training.sequence_length=16")
  words += ("model.num_attention_heads=8", "model.num_key_value_heads=8", "mesh.data=1")
  with processes(2, "batches", config_file, tmp_path, *words, "mesh.fsdp=1") as started:
    found = ends(started)
  assert [(code, errors) for code, _, errors in found] == [(0, [])] * 2, found
  shared = ["0 15 16"] * 2  # the mesh splits no rows between the two
  for (_, out, _), own in zip(found, ("0 7 8", "8 15 8")):
    assert [line for line in out.splitlines() if line[0] != "["] == [own, own, *shared]
