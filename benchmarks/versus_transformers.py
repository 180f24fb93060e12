"""Training and decoding speed of one small Llama 4 on this CPU: maxllama4 beside Hugging Face transformers.

  python benchmarks/versus_transformers.py [--repeats 3] [--torch-python OTHER/bin/python]

Each measurement is a process of its own with --threads threads, and the processes take turns (A B A B ...), so that a
machine that grows slower does so for all of them. Needs the extra `parity` (torch and transformers), in this Python or
in the one that --torch-python names. Writes benchmarks/results/versus_transformers.json and prints a table.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
CONFIG = HERE / "small.yml"
RESULT = HERE / "results" / "versus_transformers.json"
PROMPT_TOKENS, NEW_TOKENS = 128, 128
MATRIX = 2048  # rows and columns of the product that says how fast this machine can be
SEED = 0


def median_seconds(run, repeats: int, warmup: int) -> float:
  """Median seconds of `run()`, which returns when its result is there; the first `warmup` calls do not count."""
  seconds = []
  for _ in range(warmup + repeats):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[warmup:])


# What a process measures: each returns its rate and what else is worth keeping.


def matmul_jax(steps: int) -> dict:
  import jax

  a, b = (jax.random.normal(key, (MATRIX, MATRIX)) for key in jax.random.split(jax.random.key(0)))
  product = jax.jit(lambda a, b: a @ b)
  seconds = median_seconds(lambda: product(a, b).block_until_ready(), 2 * steps, 3)
  return {"rate": 2 * MATRIX**3 / seconds}


def matmul_torch(steps: int) -> dict:
  import torch

  a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
  return {"rate": 2 * MATRIX**3 / median_seconds(lambda: a @ b, 2 * steps, 3)}


def train_ours(steps: int) -> dict:
  import jax

  from maxllama4.config import load_config
  from maxllama4.data.loader import make_loader
  from maxllama4.mesh import build_mesh
  from maxllama4.model.weights import ModelTemplate
  from maxllama4.sharding import use_mesh
  from maxllama4.training.optimizer import learning_rate_schedule, make_optimizer
  from maxllama4.training.state import init_state
  from maxllama4.training.step import make_train_step

  config = load_config(CONFIG)
  with use_mesh(build_mesh(config), config.mesh) as context:
    template = ModelTemplate(config.model)
    optimizer = make_optimizer(config.optimizer, config.training.steps, template)
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    state = init_state(template, optimizer, config.training.seed, context)
    loader = make_loader(config, None)
    batches = [jax.device_put(next(loader)) for _ in range(4)]
    loader.close()
    step = jax.jit(make_train_step(config, template, optimizer, schedule), donate_argnums=0)
    start = time.perf_counter()
    step = step.lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - start

  losses = []

  def run():
    nonlocal state
    state, metrics = step(state, batches[len(losses) % len(batches)])
    losses.append(float(metrics["loss"]))  # waits for the step
    jax.block_until_ready(state)

  seconds = median_seconds(run, steps, 3)
  tokens = config.training.batch_size * config.training.sequence_length
  parameters = sum(state.model[path].size for path in template.trainable)
  return {
    "rate": tokens / seconds,
    "parameters": parameters,
    "compile_seconds": compile_seconds,
    "losses": [losses[0], losses[-1]],
  }


def transformers_model():
  """The same architecture, random weights, as transformers builds it; and our configuration."""
  import torch
  from transformers import Llama4ForCausalLM, Llama4TextConfig

  torch.manual_seed(SEED)
  settings = json.loads(os.environ["LLAMA4_CONFIG"])
  config = Llama4TextConfig(**settings["hf"], attn_implementation="sdpa")
  return Llama4ForCausalLM(config).float(), settings["training"]


def train_transformers(steps: int, *, compiled: bool) -> dict:
  import torch

  model, training = transformers_model()
  forward = torch.compile(model) if compiled else model
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
  )
  shape = (training["batch_size"], training["sequence_length"])
  batches = [torch.randint(model.config.vocab_size, shape) for _ in range(4)]
  losses = []

  def run():
    tokens = batches[len(losses) % len(batches)]
    loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

  start = time.perf_counter()
  run()
  first_seconds = time.perf_counter() - start
  seconds = median_seconds(run, steps, 2)
  parameters = sum(p.numel() for p in model.parameters())
  return {
    "rate": shape[0] * shape[1] / seconds,
    "parameters": parameters,
    "compile_seconds": first_seconds - seconds,
    "losses": [losses[0], losses[-1]],
  }


def decode_ours(steps: int) -> dict:
  import numpy as np
  from flax import nnx

  from maxllama4 import generate, load_config
  from maxllama4.model.llama4 import Llama4ForCausalLM

  config = load_config(CONFIG)
  model = Llama4ForCausalLM(config.model, rngs=nnx.Rngs(SEED))
  rows = config.training.batch_size
  prompts = np.random.default_rng(SEED).integers(3, config.model.vocab_size, (rows, PROMPT_TOKENS))
  prompts = prompts.tolist()

  def run():
    completions = generate(model, prompts, max_new_tokens=NEW_TOKENS)
    assert all(len(completion.tokens) == NEW_TOKENS for completion in completions)

  return {"rate": rows * NEW_TOKENS / median_seconds(run, steps, 1)}


def decode_transformers(steps: int, *, compiled: bool, cache: str) -> dict:
  import torch

  model, training = transformers_model()
  model.eval()
  if compiled:
    model.forward = torch.compile(model.forward)
  rows = training["batch_size"]
  prompts = torch.randint(3, model.config.vocab_size, (rows, PROMPT_TOKENS))
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 0

  def run():
    tokens = model.generate(
      prompts,
      attention_mask=torch.ones_like(prompts),
      max_new_tokens=NEW_TOKENS,
      do_sample=False,
      cache_implementation=cache,
    )
    assert tokens.shape == (rows, PROMPT_TOKENS + NEW_TOKENS)

  with torch.inference_mode():
    return {"rate": rows * NEW_TOKENS / median_seconds(run, steps, 2)}


OURS, THEIRS = "maxllama4", "transformers"
# name -> (what it is, whose Python runs it, the measurement, timed runs as a share of --steps)
VARIANTS = {
  "matmul/jax": (OURS, matmul_jax, {}, 1),
  "matmul/torch": (THEIRS, matmul_torch, {}, 1),
  "train/maxllama4": (OURS, train_ours, {}, 1),
  "train/transformers eager": (THEIRS, train_transformers, {"compiled": False}, 1),
  "train/transformers compiled": (THEIRS, train_transformers, {"compiled": True}, 1),
  "decode/maxllama4": (OURS, decode_ours, {}, 0.5),
  **{
    f"decode/transformers {how}, {cache} cache": (
      THEIRS,
      decode_transformers,
      {"compiled": how == "compiled", "cache": cache},
      0.5,
    )
    # As transformers' own documentation pairs them: a cache that grows would be compiled again and again.
    for how, cache in (("eager", "dynamic"), ("compiled", "static"))
  },
}


def measure(name: str, steps: int, threads: int) -> None:
  """The body of a measuring process: prints one JSON object."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  owner, function, arguments, share = VARIANTS[name]
  if owner == THEIRS or name == "matmul/torch":
    import torch

    torch.set_num_threads(threads)
  result = function(max(2, round(share * steps)), **arguments)
  result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  packages = ("jax", "jaxlib", "flax", "torch", "transformers")
  result["versions"] = {"python": platform.python_version()} | {
    package: importlib.metadata.version(package) for package in packages if package in sys.modules
  }
  print(json.dumps(result))


def start_measuring(name: str, options: argparse.Namespace, environment: dict) -> dict:
  """Runs one measurement in a process. A failure comes back as {"error": its last line}."""
  python = options.torch_python if VARIANTS[name][0] == THEIRS else sys.executable
  command = [python, __file__, "--measure", name]
  command += ["--steps", str(options.steps), "--threads", str(options.threads)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if done.returncode:
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
  return json.loads(done.stdout.strip().splitlines()[-1])


def environment_of(options: argparse.Namespace) -> dict:
  """What the processes see: thread limits, no network, and the architecture in transformers' names."""
  from maxllama4.checkpoint.hf import config_to_hf
  from maxllama4.config import config_to_dict, load_config

  config = load_config(CONFIG)
  hf = config_to_hf(config.model, "float32")
  settings = {"hf": hf, "training": config_to_dict(config)["training"]}
  threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
  settings = {"LLAMA4_CONFIG": json.dumps(settings), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
  return {**os.environ, **threads, **settings}


def summarize(runs: dict[str, list[dict]]) -> dict:
  """Medians over the repeats, and the ratios that the comparison is about."""
  from maxllama4.config import load_config
  from maxllama4.model.llama4 import train_flops_per_token

  rates = {
    name: statistics.median(run["rate"] for run in results if "rate" in run)
    for name, results in runs.items()
    if any("rate" in run for run in results)
  }

  def best(prefix):
    return max((rate for name, rate in rates.items() if name.startswith(prefix)), default=None)

  def over(name, prefix):
    return rates[name] / best(prefix) if name in rates and best(prefix) else None

  config = load_config(CONFIG)
  flops = train_flops_per_token(config.model, config.training.sequence_length)
  train = rates.get("train/maxllama4")
  return {
    "rates": rates,
    "matmul_flops_per_second": best("matmul/"),
    "train_flops_per_token": flops,
    "train_share_of_matmul_rate": train * flops / best("matmul/")
    if train and best("matmul/")
    else None,
    "train_over_best_transformers": over("train/maxllama4", "train/transformers"),
    "decode_over_best_transformers": over("decode/maxllama4", "decode/transformers"),
  }


def hardware() -> dict:
  cpu = "unknown"
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(":")[2].strip() if names else cpu
  return {"cpu": cpu, "cores": os.cpu_count(), "load_average_at_start": os.getloadavg()}


def print_table(result: dict) -> None:
  for name, runs in result["runs"].items():
    rates = [run["rate"] for run in runs if "rate" in run]
    unit, scale = ("GFLOP/s", 1e9) if name.startswith("matmul") else ("tokens/s", 1)
    if rates:
      spread = f"{min(rates) / scale:,.0f} .. {max(rates) / scale:,.0f}"
      print(f"{name:<44}{statistics.median(rates) / scale:>9,.0f} {unit}   {spread}")
    for run in runs:
      if "error" in run:
        print(f"{name:<44}failed: {run['error'][:120]}")
        break
  for name in ("train_over_best_transformers", "decode_over_best_transformers"):
    if result[name]:
      print(f"{name.replace('_', ' '):<44}{result[name]:>9.2f} x")
  if result["train_share_of_matmul_rate"]:
    print(f"{'training, share of the matmul rate':<44}{result['train_share_of_matmul_rate']:>9.1%}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--repeats", type=int, default=3, help="processes a measurement")
  parser.add_argument("--steps", type=int, default=10, help="timed runs in a process")
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--torch-python", default=sys.executable, help="a Python with transformers")
  parser.add_argument("--only", default="", help="measurements whose name starts so")
  parser.add_argument("--output", type=pathlib.Path, default=RESULT)
  parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.measure:
    measure(options.measure, options.steps, options.threads)
    return
  details = {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": " ".join(["python", "benchmarks/versus_transformers.py", *sys.argv[1:]]),
    "hardware": hardware(),
    "threads": options.threads,
    "decode": {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS},
  }
  environment = environment_of(options)
  names = [name for name in VARIANTS if name.startswith(options.only)]
  runs = {name: [] for name in names}
  for repeat in range(options.repeats):
    for name in names:
      runs[name].append(start_measuring(name, options, environment))
      shown = runs[name][-1].get("error") or f"{runs[name][-1]['rate']:,.0f} a second"
      print(f"[{repeat + 1}/{options.repeats}] {name}: {shown}", file=sys.stderr, flush=True)
  versions = {}
  for results in runs.values():
    for run in results:
      versions |= run.pop("versions", {})
  result = details | {"versions": versions} | summarize(runs) | {"runs": runs}
  options.output.parent.mkdir(parents=True, exist_ok=True)
  options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  print_table(result)


if __name__ == "__main__":
  main()
