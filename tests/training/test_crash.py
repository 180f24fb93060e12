"""Runs killed by SIGKILL at any moment, damaged checkpoints, full and read-only disks: real processes of train.py."""

import json
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from tiny import tiny_config, tiny_run

from maxllama4 import load_model
from maxllama4.config import CheckpointConfig, DataConfig, config_to_dict
from maxllama4.model.weights import arrays_of

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EVAL_EVERY = 50, 5
# What the clock and the machine decide.
UNSTEADY = re.compile(r"step_seconds|tokens_per_second|mfu|seconds/.*|memory/.*")
# Processes are forked from one that has imported everything: a start is then half as long.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["maxllama4.cli", "maxllama4.training.loop"])


def run_train(words, log):
  """train.py in this process, on two devices, into `log` and `log`.err."""
  jax.config.update("jax_num_cpu_devices", 2)
  for descriptor, path in ((1, log), (2, f"{log}.err")):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
  sys.argv = ["train.py", *words]
  runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Run:
  """A run directory, and the process that works on it."""

  def __init__(self, config, folder):
    self.config, self.folder = config, folder
    self.log = folder.with_name(f"{folder.name}.log")

  def start(self, *overrides):
    self.log.unlink(missing_ok=True)
    self.started = time.time()
    words = [str(self.config), f"run_dir={self.folder}", *overrides]
    self.process = FORKS.Process(target=run_train, args=(words, str(self.log)))
    self.process.start()

  def finish(self, *overrides):
    """The exit code, standard output and standard error."""
    self.start(*overrides)
    self.process.join(300)
    return self.process.exitcode, self.said(), pathlib.Path(f"{self.log}.err").read_text()

  def said(self):
    return self.log.read_text() if self.log.exists() else ""

  def steps_said(self):
    return [int(step) for step in re.findall(r"^step +(\d+)/", self.said(), re.MULTILINE)]

  def checkpoints(self):
    folder = self.folder / "checkpoints"
    return {path.name for path in folder.iterdir()} if folder.exists() else set()

  def is_saving(self):
    """Whether this process, not one before it, has a checkpoint half written."""
    for path in (self.folder / "checkpoints").glob("*.orbax-checkpoint-tmp"):
      try:
        return path.stat().st_mtime > self.started
      except FileNotFoundError:
        return False
    return False

  def is_evaluating(self):
    lines = self.said().splitlines()
    step = re.match(r"step +(\d+)/", lines[-1]) if lines else None
    return step is not None and int(step[1]) % EVAL_EVERY == 0

  def metrics(self):
    """Lines of metrics.jsonl, byte for byte but for what the clock decides."""
    lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
    return [
      json.dumps({k: v for k, v in line.items() if not UNSTEADY.fullmatch(k)}) for line in lines
    ]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """The configuration file of a run that saves at every second step, and the documents it reads."""
  folder, rng = tmp_path_factory.mktemp("crash"), random.Random(0)
  words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
  (folder / "texts").mkdir()
  for i in range(12):
    text = ". ".join(" ".join(rng.choices(words, k=7)) for _ in range(9))
    (folder / "texts" / f"{i}.txt").write_text(text)
  run = tiny_run(
    tiny_config(vocab_size=320, initializer_range=0.1),
    data=DataConfig(paths=(str(folder / "texts"),), held_out_fraction=0.2),
    checkpoint=CheckpointConfig(every=2, keep=2),
    steps=STEPS,
    log_every=1,
    eval_every=EVAL_EVERY,
  )
  tree = config_to_dict(run) | {"compilation_cache": str(folder / "compiled")}
  tree["reporting"]["report_every_seconds"] = 0
  (folder / "run.yml").write_text(yaml.safe_dump(tree))
  return folder / "run.yml"


@pytest.fixture(scope="module")
def whole(config):
  """A run that was never killed."""
  run = Run(config, config.with_name("whole"))
  code, _, error = run.finish()
  assert code == 0, error
  assert len(run.metrics()) == STEPS
  return run


# What a run must be seen doing, and within how many seconds after that it is killed.
MOMENTS = {
  "start-up": (lambda run, before: True, 1.0),
  "first batch": (lambda run, before: "compiled in" in run.said(), 0.2),
  "step": (lambda run, before: len(run.steps_said()) >= 6, 0.1),
  "saving": (lambda run, before: len(run.steps_said()) > 3 and run.is_saving(), 0.02),
  "saved": (lambda run, before: bool({c for c in run.checkpoints() if c.isdigit()} - before), 0.02),
  "evaluation": (lambda run, before: run.is_evaluating(), 0.05),
}
KILLS = {"start-up": 4, "first batch": 3, "step": 3, "saving": 5, "saved": 2, "evaluation": 3}


def kill_at(run, moment, rng):
  """Starts the run and kills it; what it was doing then."""
  seen, seconds = MOMENTS[moment]
  before = run.checkpoints()
  run.start()
  deadline = time.monotonic() + 120
  while not seen(run, before):
    assert run.process.is_alive() and time.monotonic() < deadline, (moment, run.said())
    time.sleep(0.001)
  time.sleep(rng.uniform(0, seconds))
  run.process.kill()
  run.process.join()
  assert run.process.exitcode == -9, run.said()
  doing = {"before the first step": not run.steps_said(), "mid-save": run.is_saving()}
  return {name for name, was in (doing | {"evaluating": run.is_evaluating()}).items() if was}


def test_a_run_killed_twenty_times_at_any_moment_is_the_uninterrupted_one_to_the_bit(config, whole):
  rng = random.Random(4)
  moments = [moment for moment, count in KILLS.items() for _ in range(count)]
  rng.shuffle(moments)
  run, landed = Run(config, config.with_name("killed")), []
  for moment in moments:
    landed += kill_at(run, moment, rng)
  assert len(moments) == 20
  for place, least in {"before the first step": 3, "mid-save": 2, "evaluating": 1}.items():
    assert landed.count(place) >= least, landed
  code, said, error = run.finish()
  assert code == 0 and "resumed from step" in said, error
  assert run.metrics() == whole.metrics()
  assert run.checkpoints() == whole.checkpoints() == {str(STEPS - 2), str(STEPS)}
  assert (run.folder / "tokenizer.model").read_bytes() == (
    whole.folder / "tokenizer.model"
  ).read_bytes()
  for line in (run.folder / "events.jsonl").read_text().splitlines():
    assert json.loads(line)["event"] in ("started", "stopped")
  ours, theirs = (arrays_of(load_model(r.folder)) for r in (run, whole))
  for path, array in theirs.items():
    np.testing.assert_array_equal(ours[path], array)


def damage(run, step):
  """Turns one bit of the largest file of a checkpoint."""
  files = (run.folder / "checkpoints" / str(step)).rglob("*")
  path = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)
  return path.name


def copy_of(whole, name):
  run = Run(whole.config, whole.folder.with_name(name))
  shutil.copytree(whole.folder, run.folder)
  return run


def tree_of(folder):
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_named_kept_and_trained_again(whole):
  run = copy_of(whole, "damaged")
  name = damage(run, STEPS)
  code, said, error = run.finish()
  assert code == 0, error
  assert re.search(rf"/{STEPS} is damaged: .*{name} .*kept as {STEPS}\.broken", said)
  assert f"resumed from step {STEPS - 2}" in said
  assert run.metrics() == whole.metrics()
  assert run.checkpoints() == {str(STEPS - 2), str(STEPS), f"{STEPS}.broken"}


def test_without_a_whole_checkpoint_a_run_stops_with_one_sentence_and_changes_nothing(whole):
  run = copy_of(whole, "hopeless")
  damage(run, STEPS)
  damage(run, STEPS - 2)
  before = tree_of(run.folder)
  code, _, error = run.finish(f"training.steps={STEPS + 10}")
  assert code == 1
  assert re.fullmatch(r"error: no checkpoint of .* can be restored \(.*\); put back .*\n", error)
  assert tree_of(run.folder) == before


@pytest.fixture
def small_disk(tmp_path):
  """A function that gives a file system so many MiB, or makes it read-only."""
  folder = tmp_path / "disk"
  folder.mkdir()

  def mount(*options):
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder

  try:
    mount("size=2m")
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("file systems can only be mounted by root")
  yield mount
  subprocess.run(["umount", str(folder)], check=True)


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(whole, small_disk):
  run = Run(whole.config, small_disk("remount", "size=2m") / "run")
  run.log = whole.folder.with_name("full.log")
  code, _, error = run.finish("checkpoint.keep=100")
  assert code == 1
  assert re.fullmatch(rf"error: .*{run.folder}.*No space left on device.*\n", error), error
  assert len([name for name in run.checkpoints() if name.isdigit()]) > 1
  small_disk("remount", "size=40m")
  code, said, error = run.finish()
  assert code == 0 and "resumed from step" in said, error
  assert run.metrics() == whole.metrics()


def test_a_run_in_a_read_only_folder_says_so(whole, small_disk):
  run = Run(whole.config, small_disk("remount", "size=40m") / "run")
  run.log = whole.folder.with_name("read-only.log")
  shutil.copytree(whole.folder, run.folder)
  before = tree_of(run.folder)
  small_disk("remount", "ro")
  code, _, error = run.finish(f"training.steps={STEPS + 10}")
  assert code == 1
  assert re.fullmatch(rf"error: {run.folder}.*: Read-only file system\n", error), error
  assert tree_of(run.folder) == before
