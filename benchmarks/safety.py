"""What safety costs: saving in the background, restoring, and starting again; on the quickstart's model.

  python benchmarks/safety.py [--steps 1000] [--starts 3] [--gigabytes 2] [--folder DIR]

- Saving: one quickstart run saves at every 100th step, so that of each 100 steps the first 50 begin with a save and the
  other 50 have none. Their times are compared pair by pair; the share is what one save in 50 steps costs.
- Restoring: a state of so many gigabytes, from a cold page cache, in a process of its own: seconds to check every byte,
  then to restore, and the peak of the resident set above what it was before.
- Starting: seconds from the command to the first step's line, with an empty folder (which trains a tokenizer and
  compiles) and again in the same folder (which does neither). Each run is killed after that line.

Results go to benchmarks/results/safety.json. Leave the machine alone meanwhile.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from record import keep

from maxllama4.checkpoint.checksums import find_damage
from maxllama4.checkpoint.store import CHECKPOINTS, CheckpointStore

ROOT = pathlib.Path(__file__).parent.parent
TRAIN = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "quickstart.yml")]
EVERY, SEGMENT, LOG_EVERY = 100, 50, 5
ARRAY_BYTES = 2**26


def measure_saving(folder: pathlib.Path, steps: int) -> dict:
  """Seconds of 50 steps with and without a save, from the step times that the run itself reports."""
  settings = [f"run_dir={folder}", f"training.steps={steps}", f"checkpoint.every={EVERY}"]
  settings += ["training.eval_every=0", f"training.log_every={LOG_EVERY}"]
  subprocess.run([*TRAIN, *settings], check=True, stdout=subprocess.DEVNULL)
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  seconds = {line["step"]: LOG_EVERY * line["step_seconds"] for line in lines}

  def segment(start: int) -> float:
    return sum(seconds[step] for step in range(start + LOG_EVERY, start + SEGMENT + 1, LOG_EVERY))

  saves = range(EVERY, steps - EVERY + 1, EVERY)
  pairs = [(segment(save), segment(save + SEGMENT)) for save in saves]
  shares = [saving / alone - 1 for saving, alone in pairs]
  size = sum(
    f.stat().st_size for f in (folder / CHECKPOINTS / str(steps)).rglob("*") if f.is_file()
  )
  return {
    "checkpoint_bytes": size,
    "seconds_with_a_save": [pair[0] for pair in pairs],
    "seconds_without": [pair[1] for pair in pairs],
    "share_of_step_time": statistics.mean(shares),
    "standard_error": statistics.stdev(shares) / len(shares) ** 0.5,
  }


def seconds_to_first_step(folder: pathlib.Path) -> float:
  """From the command to the line of its first step; the run is killed then."""
  start = time.perf_counter()
  words = [f"run_dir={folder}", "training.log_every=1", "training.eval_every=0"]
  with subprocess.Popen([*TRAIN, *words], stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      if line.startswith("step"):
        seconds = time.perf_counter() - start
        process.kill()
        return seconds
  raise SystemExit(f"{' '.join(process.args)} ended before its first step")


def measure_starts(folder: pathlib.Path, starts: int) -> dict:
  first, second = [], []
  for number in range(starts):
    run_dir = folder / f"start-{number}"
    first.append(seconds_to_first_step(run_dir))
    second.append(seconds_to_first_step(run_dir))
  ratio = statistics.median(first) / statistics.median(second)
  return {"first_seconds": first, "second_seconds": second, "times_faster": ratio}


def make_state(gigabytes: float) -> tuple[dict, dict]:
  """A model's arrays and as many again twice, as AdamW keeps them; no two pieces are alike."""
  count = max(1, round(gigabytes * 1e9 / ARRAY_BYTES / 3))
  bits = np.random.default_rng(0).standard_normal(ARRAY_BYTES // 4 + count, np.float32)
  model = {f"w{i}": jnp.asarray(bits[i : i + ARRAY_BYTES // 4]) for i in range(count)}
  return model, {
    "m": {k: v + 1 for k, v in model.items()},
    "v": {k: v * 2 for k, v in model.items()},
  }


def measure_restoring(folder: pathlib.Path, gigabytes: float) -> dict:
  model, rest = make_state(gigabytes)
  store = CheckpointStore(folder)
  start = time.perf_counter()
  store.save(1, model, rest, {})
  blocking = time.perf_counter() - start
  store.close()
  saving = time.perf_counter() - start
  size = sum(leaf.nbytes for leaf in jax.tree.leaves((model, rest)))
  del model, rest
  for path in folder.rglob("*"):
    if path.is_file():
      with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  command = [sys.executable, __file__, "--restore", str(folder), "--gigabytes", str(gigabytes)]
  restored = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
  restored["bytes_per_second"] = size / restored["restore_seconds"]
  restored["bytes_per_second_checked_first"] = size / (
    restored["check_seconds"] + restored["restore_seconds"]
  )
  restored["peak_above_start_over_state"] = restored.pop("peak_above_start") / size
  return {
    "state_bytes": size,
    "save_blocks_seconds": blocking,
    "save_in_all_seconds": saving,
    **restored,
  }


def restore(folder: pathlib.Path, gigabytes: float) -> dict:
  """Runs in a process of its own."""
  count = max(1, round(gigabytes * 1e9 / ARRAY_BYTES / 3))
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = jax.ShapeDtypeStruct((ARRAY_BYTES // 4,), jnp.float32, sharding=sharding)
  model = {f"w{i}": shape for i in range(count)}
  before = peak_bytes()
  start = time.perf_counter()
  if find_damage(folder / CHECKPOINTS / "1") is not None:
    raise SystemExit("the checkpoint is damaged")
  checked = time.perf_counter()
  store = CheckpointStore(folder)
  again = time.perf_counter()
  state = store.restore_newest(model, {"m": model, "v": model}, print)
  jax.block_until_ready(state[1:3])
  ended = time.perf_counter()
  store.close()
  peak = peak_bytes()
  # `restore_newest` checks, too, from a warm cache now; that is timed once more and left out.
  find_damage(folder / CHECKPOINTS / "1")
  warm = time.perf_counter() - ended
  return {
    "check_seconds": checked - start,
    "check_again_seconds": warm,
    "restore_seconds": ended - again - warm,
    "peak_above_start": peak - before,
  }


def peak_bytes() -> int:
  """Of this program's resident set. (`getrusage` would also count the process that started it.)"""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument("--starts", type=int, default=3)
  parser.add_argument("--gigabytes", type=float, default=2.0)
  parser.add_argument("--folder", type=pathlib.Path, help="default: a temporary one")
  parser.add_argument("--restore", type=pathlib.Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.restore:
    print(json.dumps(restore(arguments.restore, arguments.gigabytes)))
    return
  with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
    folder = pathlib.Path(name)
    starting = measure_starts(folder, arguments.starts)
    saving = measure_saving(folder / "saving", arguments.steps)
    shutil.rmtree(folder / "saving")
    restoring = measure_restoring(folder / "restoring", arguments.gigabytes)
  keep(
    "safety",
    ("jax", "orbax-checkpoint", "tensorstore", "numpy"),
    {"saving": saving, "restoring": restoring, "starting": starting},
  )


if __name__ == "__main__":
  main()
