"""A run directory such as a run leaves it, without the run: plausible curves, from a seed."""

import json
import math
import pathlib

import numpy as np

CONFIG = """\
model:
  num_hidden_layers: {layers}
  hidden_size: 2048
  num_local_experts: {experts}
  num_experts_per_tok: 1
  interleave_moe_layer_step: 2
  moe_layers: null
  rope_scaling: null
dtype: bfloat16
data:
  source: text
  paths: [gs://corpus/web/*.jsonl, gs://corpus/code/*.jsonl]
training:
  steps: {steps}
  batch_size: 512
  sequence_length: 4096
  log_every: {every}
  eval_every: {eval_every}
optimizer:
  name: adamw
  learning_rate: {learning_rate}
  warmup_steps: 200
  schedule: cosine
run_dir: {run_dir}
"""
STARTED = {
  "devices": 64,
  "device_kind": "TPU v5p",
  "hosts": 16,
  "mesh": {"data": 1, "fsdp": 16, "expert": 4, "tensor": 1, "context": 1},
  "parameters": 17_200_000_000,
  "active_parameters": 2_610_000_000,
  "jax": "0.10.2",
  "flax": "0.12.8",
  "python": "3.12.4",
  "maxllama4": "0.1.0",
  "compile_seconds": 61.3,
  "startup_seconds": 94.8,
}
SAMPLE = (
  "The river had been low all summer, and the boats lay on their sides in the mud like sleeping"
)
WORDS = " cattle. On the first night of rain the children ran down to the bank to hear them lift.\n\n  — Now, said the ferryman."


def write_plausible_run(
  run_dir: pathlib.Path,
  *,
  lines: int = 600,
  steps: int | None = None,
  every: int = 10,
  layers: int = 24,
  experts: int = 16,
  learning_rate: float = 6e-4,
  stopped: str | None = None,
  seed: int = 0,
) -> pathlib.Path:
  """Writes a run of `lines` logged steps of `steps` (all of them by default). Returns `run_dir`."""
  run_dir.mkdir(parents=True)
  steps = steps or lines * every
  eval_every = every * max(1, lines // 12)
  names = {"layers": layers, "experts": experts, "learning_rate": learning_rate}
  names |= {"steps": steps, "every": every, "eval_every": eval_every, "run_dir": run_dir}
  (run_dir / "config.yml").write_text(CONFIG.format(**names))
  rng = np.random.default_rng(seed)
  skew = rng.normal(0, 0.9, (layers // 2, experts))
  with (run_dir / "metrics.jsonl").open("w") as file:
    for i in range(1, lines + 1):
      line = _metrics(rng, i * every, steps, learning_rate, every)
      if i % max(1, lines // 40) == 0 and experts:
        line |= _loads(rng, skew, i * every / steps)
      if i * every % eval_every == 0:
        held_out = 2.05 + 1.3 * math.exp(-i * every / 2200)
        line |= {"eval/loss": held_out, "eval/bits_per_byte": held_out / 2.9}
        line["seconds/evaluation"] = 14.0 + rng.random()
      file.write(json.dumps(line) + "\n")
  _write_events(run_dir, lines * every, stopped)
  _write_samples(run_dir, range(eval_every, lines * every + 1, eval_every))
  return run_dir


def _metrics(rng, step: int, steps: int, peak: float, every: int) -> dict:
  done = step / steps
  warm = min(1.0, step / 200)
  seconds = 3.1 * (1 + 0.02 * abs(rng.normal())) * (1.6 if rng.random() < 0.01 else 1)
  loss = (
    1.95
    + 0.1 * math.log2(6e-4 / peak)
    + 9.0 * math.exp(-step / 160)
    + 1.1 * math.exp(-step / 2200)
    + rng.normal(0, 0.03)
  )
  tokens = step * 512 * 4096
  spike = 2.0 if 0.41 < done < 0.413 else 0.0
  return {
    "step": step,
    "loss": loss + spike,
    "tokens": tokens,
    "learning_rate": peak * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done))),
    "gradient_norm": float(np.exp(rng.normal(-0.9, 0.25))) * (1 + 4 * math.exp(-step / 100))
    + 6 * spike,
    "step_seconds": seconds,
    "tokens_per_second": 512 * 4096 / seconds,
    "mfu": 0.48 * 3.1 / seconds,
    "moe/load_balance_loss": 1.02 + 0.4 * math.exp(-step / 300),
    "moe/max_load": 1.3 + 2.5 * math.exp(-step / 700) + 0.1 * rng.random(),
    "moe/min_load": 0.75 - 0.6 * math.exp(-step / 700) - 0.1 * rng.random(),
    "moe/entropy": 0.99 - 0.1 * math.exp(-step / 400),
    "moe/dead_experts": float(step < 100),
    "moe/dropped_tokens": 0.0,
    "seconds/step": seconds * every,
    "seconds/data": 0.02 * every * (1 + rng.random()),
    "seconds/checkpoint": 6.0 + rng.random() if step % 500 < every else 0.0,
    "seconds/evaluation": 0.0,
    "seconds/other": 0.05 * every,
    "memory/device_peak_bytes": int(71.2e9 + 1e9 * min(1, step / 30)),
    "memory/host_peak_bytes": int(18e9 + 3e9 * done),
    "skipped_steps": int(done > 0.41) + int(done > 0.7),
  }


def _loads(rng, skew, done: float) -> dict:
  logits = skew * math.exp(-4 * done) + rng.normal(0, 0.12, skew.shape)
  load = np.exp(logits) / np.exp(logits).mean(-1, keepdims=True)
  layers = np.arange(2 * len(skew))
  return {
    "moe/load_by_layer": load.round(4).tolist(),
    "moe/max_load_by_layer": load.max(-1).round(4).tolist(),
    "debug/activations/deviation": (0.4 + 0.11 * layers).round(4).tolist(),
    "debug/gradients/deviation": (1e-5 * np.exp(-0.05 * layers)).tolist(),
    "debug/gradients/zeros": (0.01 * np.exp(-0.1 * layers)).tolist(),
  }


def _write_events(run_dir: pathlib.Path, last: int, stopped: str | None) -> None:
  events = [
    {"time": "2026-11-20T08:00:00Z", "event": "started", "step": 0, **STARTED, "resumed": False},
    {"time": "2026-11-20T11:20:00Z", "event": "skipped", "step": int(0.41 * last), "reason": "gradients are not finite", "loss": float("nan")},
    {"time": "2026-11-20T13:02:11Z", "event": "stopped", "step": last // 2, "reason": "signal"},
    {"time": "2026-11-20T13:30:00Z", "event": "started", "step": last // 2, **STARTED, "resumed": True, "compile_seconds": 4.4, "startup_seconds": 21.0},
    {"time": "2026-11-20T15:10:42Z", "event": "skipped", "step": int(0.7 * last), "reason": "loss 6.3 sigma above its mean", "loss": 3.91},
  ]  # fmt: skip
  if stopped:
    events.append(
      {"time": "2026-11-20T18:00:00Z", "event": "stopped", "step": last, "reason": stopped}
    )
  text = "".join(json.dumps(event) + "\n" for event in events)
  (run_dir / "events.jsonl").write_text(text)


def _write_samples(run_dir: pathlib.Path, steps) -> None:
  with (run_dir / "samples.jsonl").open("w") as file:
    for step in steps:
      for prompt in (SAMPLE, "def fibonacci(n: int) -> int:\n"):
        sample = {"step": step, "prompt": prompt, "completion": WORDS * 2}
        file.write(json.dumps(sample) + "\n")
