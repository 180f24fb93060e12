"""Training speed of a Llama 4 with 1.0B active of 4.1B parameters on one GPU: maxllama4 beside transformers.

  python benchmarks/gpu.py [--minutes 9] [--only PART ...]
  python benchmarks/gpu.py --tiny        a test of this script on a CPU: both sides must have the same losses

The model is that of gpu.yml. Rows are random tokens, one document each, or Python's standard library, packed. Both sides
read the same batches, and take whole steps: gradients, clipping, AdamW. They compute in bfloat16, with float32 weights
and moments. maxllama4 takes the step of train.py. transformers takes a bfloat16 model under torch.compile, float32
weights beside it, a row at a time: its experts compute every row for every expert, some 4 GB a layer of experts for a
row of 8,192 tokens.

Weights and moments are 12 bytes a parameter, 50 GB. In a step maxllama4 adds bfloat16 weights and gradients, 4 bytes
each; transformers a bfloat16 model, and gradients in bfloat16, then float32, 6 or so. That is about 66 and 75 GB of an
H200's 141; activations come on top.

Useful FLOPs count causal attention over whole rows, also where packed documents are shorter, for both sides alike.

Each measurement is a process of its own (gpu_sides.py). What fails, for want of a package, a GPU or memory, says so in a
line. Figures go to benchmarks/results/gpu.json.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
from record import keep

HERE = pathlib.Path(__file__).parent
BATCHES = 4  # that the steps take in turn
LIMIT = 600  # seconds of a measuring process
DATA = {"random": ["data.source=synthetic"], "text": []}
TINY = [  # float32, so that both sides must agree; short documents, so that rows hold several
  f"model={HERE.parent / 'configs' / 'models' / 'tiny.yml'}",
  "dtype=float32",
  "data.paths=[stdlib:json/*.py]",
  "data.excerpt_length=200",
  "training.batch_size=2",
  "training.sequence_length=128",
]
OURS = {  # what layers keep for the backward pass, and the experts' products
  "matmuls kept, tokamax": ["kernels.grouped_matmul=tokamax"],
  "matmuls kept, blockwise": ["kernels.grouped_matmul=blockwise"],
  "matmuls kept, ragged_dot": [
    "kernels.grouped_matmul=ragged_dot",
    # By cuDNN, but for the gradient of the weights; else XLA multiplies every row by every expert.
    "compiler_options={xla_gpu_experimental_use_ragged_dot_fusion: true}",
  ],
  "attention kept": ["training.remat=attention"],
}
THEIRS = {
  "sdpa": {"attention": "sdpa", "checkpoints": False},
  "flex_attention": {"attention": "flex_attention", "checkpoints": False},
  "sdpa, checkpoints": {"attention": "sdpa", "checkpoints": True},
}
PACKAGES = ("jax", "jaxlib", "flax", "tokamax", "torch", "triton", "transformers")


def settings_of(data: str, tiny: bool) -> list[str]:
  """What a run changes in gpu.yml."""
  return [*DATA[data], *(TINY if tiny else ())]


def prepare(folder: pathlib.Path, tiny: bool) -> dict:
  """Writes what both sides read: batches, the model in transformers' names, a tiny one's first weights. Returns sizes."""
  import jax

  from maxllama4.checkpoint.convert import Conversion, save
  from maxllama4.checkpoint.hf import ModelTensors, config_to_hf
  from maxllama4.config import load_config
  from maxllama4.data.loader import make_loader, prepare_tokenizer
  from maxllama4.model.llama4 import count_parameters, train_flops_per_token
  from maxllama4.model.weights import ModelTemplate

  for data in DATA:
    config = load_config(HERE / "gpu.yml", settings_of(data, tiny))
    loader = make_loader(config, prepare_tokenizer(config, folder))
    batches = [next(loader) for _ in range(BATCHES)]
    loader.close()
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    np.savez(folder / f"{data}.npz", **stacked)
  model, training = config.model, config.training
  (folder / "hf.json").write_text(json.dumps(config_to_hf(model, model.dtype)))
  if tiny:
    weights = ModelTemplate(model).init(jax.random.key(training.seed))
    save(ModelTensors(model, weights), folder / "weights", Conversion(to="hf"))
  total, active = count_parameters(model)
  return {
    "parameters": total,
    "active_parameters": active,
    "train_flops_per_token": train_flops_per_token(model, training.sequence_length),
    "tokens_per_step": training.batch_size * training.sequence_length,
  }


def make_jobs(folder: pathlib.Path, tiny: bool) -> dict[str, dict]:
  """Measurements by name, as gpu_sides.py takes them."""
  size = 256 if tiny else 8192
  jobs = {
    f"matmul/{side}": {"measure": f"matmul_{side}", "size": size} for side in ("jax", "torch")
  }
  for data in DATA:
    job = {"folder": str(folder), "data": data}
    for way, changes in OURS.items():
      settings = [*settings_of(data, tiny), *changes]
      jobs[f"{data}/maxllama4 {way}"] = job | {"measure": "train_maxllama4", "settings": settings}
    for way, how in THEIRS.items():
      jobs[f"{data}/transformers {way}"] = job | {"measure": "train_transformers", **how}
  return {n: job | {"on_gpu": not tiny, "steps": 2 if tiny else 10} for n, job in jobs.items()}


def run_job(job: dict, environment: dict[str, str]) -> dict:
  """What the measuring process found; {"failed": why} if it did not get that far."""
  command = [sys.executable, str(HERE / "gpu_sides.py"), json.dumps(job)]
  try:
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT
    )
  except subprocess.TimeoutExpired:
    return {"failed": f"not done after {LIMIT} seconds"}
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1])
  lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}, no output"]
  errors = [line for line in lines if re.match(r"[\w.]+Error\b", line)]
  return {"failed": (errors or lines)[-1]}


def run_all(jobs: dict[str, dict], minutes: float, environment: dict[str, str]) -> dict[str, dict]:
  """What came of each; none is started when the time is up."""
  runs, start = {}, time.monotonic()
  for name, job in jobs.items():
    in_time = time.monotonic() - start < 60 * minutes
    run = run_job(job, environment) if in_time else {"failed": "time is up"}
    if not all(map(math.isfinite, run.get("losses", ()))):
      run = {"failed": f"its losses are {run['losses']}"}
    said = f"failed: {run['failed']}" if "failed" in run else f"{run['rate']:,.0f} a second"
    if "losses" in run:
      said += f", losses {run['losses'][0]:.5f} to {run['losses'][-1]:.5f}"
    print(f"{name}: {said}", flush=True)
    runs[name] = run
  return runs


def environment_of(tiny: bool) -> dict[str, str]:
  """What the measuring processes see: one GPU, and nearly all its memory."""
  return {
    "CUDA_VISIBLE_DEVICES": "0",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "HF_HUB_OFFLINE": "1",
    **os.environ,
    **({"JAX_PLATFORMS": "cpu"} if tiny else {}),
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
  }


def disagreements(runs: dict[str, dict], parameters: int, tiny: bool) -> list[str]:
  """Whose model is not as large as maxllama4 counts; and, from the same weights, whose losses are not the others'."""
  found, first = [], {}
  for name, run in runs.items():
    if "losses" not in run:
      continue
    if run["parameters"] != parameters:
      found.append(f"{name} has {run['parameters']:,} parameters, not {parameters:,}")
    other, losses = first.setdefault(name.split("/")[0], (name, run["losses"]))
    if tiny and not all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(run["losses"], losses)):
      found.append(f"{name} has the losses {run['losses']}, {other} {losses}")
  return found


def summarize(runs: dict[str, dict], flops_per_token: float) -> dict:
  """Shares of the measured matmul rate, which are printed, and our best over their best."""
  rates = {name: run["rate"] for name, run in runs.items() if "rate" in run}

  def best(start):
    return max((rate for name, rate in rates.items() if name.startswith(start)), default=None)

  matmul, shares, ratios = best("matmul/"), {}, {}
  if not matmul or all(name.startswith("matmul/") for name in rates):
    sys.exit("nothing could be measured here; nothing is kept")
  print(f"\n{'':<42}{'tokens/s':>10}{'of matmul rate':>16}{'peak memory':>13}")
  for name, rate in rates.items():
    if not name.startswith("matmul/"):
      shares[name] = rate * flops_per_token / matmul
      peak = runs[name]["peak_bytes"]
      memory = f"{peak / 1e9:.1f} GB" if peak else "-"
      print(f"{name:<42}{rate:>10,.0f}{shares[name]:>16.1%}{memory:>13}")
  for data in DATA:
    ours, theirs = best(f"{data}/maxllama4"), best(f"{data}/transformers")
    if ours and theirs:
      ratios[data] = ours / theirs
      print(f"{data}: the best of maxllama4 over the best of transformers: {ratios[data]:.2f} x")
  return {"share_of_matmul_rate": shares, "maxllama4_over_transformers": ratios}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--minutes", type=float, default=60, help="after which none is started")
  parser.add_argument(
    "--only", nargs="+", default=[""], help="what has one of these in its name, and matmuls"
  )
  parser.add_argument("--tiny", action="store_true", help="a test on a CPU; keeps no figures")
  options = parser.parse_args()
  sys.path.insert(0, str(HERE.parent))
  environment = environment_of(options.tiny)
  os.environ["JAX_PLATFORMS"] = "cpu"  # this process leaves the GPU to those
  with tempfile.TemporaryDirectory() as name:
    folder, wanted = pathlib.Path(name), ("matmul/", *options.only)
    sizes = prepare(folder, options.tiny)
    print(sizes, flush=True)
    jobs = make_jobs(folder, options.tiny)
    jobs = {name: job for name, job in jobs.items() if any(part in name for part in wanted)}
    runs = run_all(jobs, options.minutes, environment)
  summary = summarize(runs, sizes["train_flops_per_token"])
  wrong = disagreements(runs, sizes["parameters"], options.tiny)
  if wrong:
    sys.exit("\n".join(wrong))
  if not options.tiny:
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    keep("gpu", installed, {"model": sizes, **summary, "runs": runs})


if __name__ == "__main__":
  main()
