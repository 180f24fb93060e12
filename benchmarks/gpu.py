"""Training speed of a Llama 4 with 1.0B active of 4.1B parameters on one GPU: maxllama4 beside transformers.

  python benchmarks/gpu.py [--rounds 2] [--minutes 9] [--only NAME ...] [--set key=value ...]
  python benchmarks/gpu.py --sizes       what the model and its state need; no GPU is asked
  python benchmarks/gpu.py --tiny        a smoke test of this script on a CPU; its figures mean nothing and are not kept

Maverick's pattern of layers, 16 experts, one a token, rows of 8,192 tokens; random tokens, a document a row, and
Python's standard library, packed. Both sides read the same batches, and take whole steps: gradients, clipping, AdamW.
They compute in bfloat16, with float32 weights and moments: bfloat16 weights would lose most of an update. maxllama4
takes the step of train.py. transformers takes a bfloat16 model under torch.compile, float32 weights beside it, a row
at a time: its experts compute every row for every expert, and more rows' worth of that would not fit without
checkpoints.

State, for 4.1B parameters: 12 bytes each (weights, two moments), 50 GB. In a step maxllama4 adds bfloat16 weights and
gradients, 4 bytes each; transformers a bfloat16 model, and gradients in bfloat16, then float32, 6 or so. That is
about 66 and 75 GB of an H200's 141; activations come on top.

Each measurement is a process of its own, and the processes take turns, so that a machine that grows slower does so
for all. A side whose package or GPU is missing is left out, with a line that says so. maxllama4 must be importable in
any case (JAX without a GPU will do): it makes the batches and counts FLOPs. Figures go to
benchmarks/results/gpu.json.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
TINY = HERE.parent / "configs" / "models" / "tiny.yml"
SEED, BATCHES = 0, 4  # batches that the steps take in turn
WARMUP = 2
LIMIT = 600  # seconds of a measuring process
# What differs from configs/models/tiny.yml, which has Maverick's pattern of layers and is the model of --tiny.
MODEL = {
  "vocab_size": 32768,
  "hidden_size": 2048,
  "intermediate_size": 4096,
  "intermediate_size_mlp": 8192,
  "num_hidden_layers": 16,
  "num_attention_heads": 16,
  "num_key_value_heads": 4,
  "head_dim": 128,
  "num_local_experts": 16,
  "attention_chunk_size": 8192,
  "rope_theta": 500000,
}
SIZES = {  # rows of a step, tokens of a row, side of the matrices that say how fast the machine can be
  False: {"batch_size": 4, "sequence_length": 8192, "matrix": 8192},
  True: {"batch_size": 2, "sequence_length": 128, "matrix": 256},
}
TEXT = {
  "source": "text",
  "paths": ["stdlib:**/*.py"],  # as configs/quickstart.yml
  "exclude": [
    f"**/{name}/**" for name in ("test", "tests", "idle_test", "encodings", "site-packages")
  ],
}
DATA = {"random": {"source": "synthetic"}, "text": TEXT}


class NotHereError(Exception):
  """A side cannot be measured on this machine; the message says what is missing."""


def settings_of(data: str, options: argparse.Namespace) -> dict:
  """The run, as a YAML file of configs/ would say it."""
  from maxllama4.config import read_yaml

  sizes = SIZES[options.tiny]
  return {
    "model": read_yaml(TINY) | ({} if options.tiny else MODEL),
    "dtype": "bfloat16",
    "param_dtype": "float32",
    "data": DATA[data]
    | ({"paths": ["stdlib:json/*.py"]} if options.tiny and data == "text" else {}),
    "training": {
      "steps": 1000,
      "batch_size": sizes["batch_size"],
      "sequence_length": sizes["sequence_length"],
      "remat": "attention",
      "seed": SEED,
    },
    "optimizer": {"name": "adamw", "learning_rate": 3e-4, "schedule": "constant"},
    "run_dir": str(options.folder),
  }


def config_of(data: str, options: argparse.Namespace, changes=()):
  import ml_collections

  from maxllama4.config import config_from_dict, parse_override
  from maxllama4.settings import set_dotted

  tree = ml_collections.ConfigDict(settings_of(data, options), type_safe=False, convert_dict=True)
  for change in (*changes, *options.set):
    set_dotted(tree, *parse_override(change))
  return config_from_dict(tree.to_dict())


def prepare(options: argparse.Namespace) -> dict:
  """Writes the batches of both kinds of data; returns sizes, FLOPs, and the model in transformers' names."""
  import numpy as np

  from maxllama4.checkpoint.hf import config_to_hf
  from maxllama4.chips import GPU_PEAK_FLOPS
  from maxllama4.data.loader import make_loader, prepare_tokenizer
  from maxllama4.model.llama4 import count_parameters, train_flops_per_token
  from maxllama4.planning.estimate import peak_hbm_bytes
  from maxllama4.training.footprint import bytes_per_device

  config = config_of("random", options)
  total, active = count_parameters(config.model)
  length = config.training.sequence_length
  if not options.sizes:
    for data in DATA:
      one = config_of(data, options)
      loader = make_loader(one, prepare_tokenizer(one, options.folder))
      batches = [next(loader) for _ in range(BATCHES)]
      loader.close()
      stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
      np.savez(options.folder / f"{data}.npz", **stacked)
  peaks = {}
  for remat in ("attention", "full"):
    one = config_of("random", options, [f"training.remat={remat}"])
    peaks[remat] = peak_hbm_bytes(one, one.mesh.known_sizes)
  return {
    "parameters": total,
    "active_parameters": active,
    "train_flops_per_token": train_flops_per_token(config.model, length),
    "tokens_per_step": config.training.batch_size * length,
    "state_bytes": bytes_per_device(config),
    "planned_peak_bytes": peaks,  # of planning/estimate.py, whose arithmetic was checked on TPUs only
    "data_sheet_flops_per_second": GPU_PEAK_FLOPS,
    "hf": config_to_hf(config.model, "float32"),
  }


def load_batches(data: str, options: argparse.Namespace) -> list[dict]:
  import numpy as np

  stacked = dict(np.load(options.folder / f"{data}.npz"))
  return [{name: values[i] for name, values in stacked.items()} for i in range(BATCHES)]


def mean_seconds(run, wait, steps: int) -> float:
  """Of one `run()`; `wait()` comes back when all that was started is done, and is called once, at the end."""
  for _ in range(WARMUP):
    run()
  wait()
  start = time.perf_counter()
  for _ in range(steps):
    run()
  wait()
  return (time.perf_counter() - start) / steps


def jax_device(options: argparse.Namespace) -> str:
  """The GPU's name. Raises: NotHereError."""
  import jax

  device = jax.devices()[0]
  if device.platform != "gpu" and not options.tiny:
    raise NotHereError(f"JAX {jax.__version__} sees no GPU, but {device.device_kind}")
  return device.device_kind


def torch_device(options: argparse.Namespace) -> str:
  """The GPU's name. Raises: NotHereError."""
  import torch

  if options.tiny:
    return "cpu"
  if not torch.cuda.is_available():
    raise NotHereError(f"torch {torch.__version__} sees no GPU")
  return torch.cuda.get_device_name()


def torch_place(options: argparse.Namespace):
  """Where torch puts things, and a function that waits for what runs there."""
  import torch

  return ("cpu", lambda: None) if options.tiny else ("cuda", torch.cuda.synchronize)


def matmul_jax(options: argparse.Namespace) -> dict:
  import jax
  import jax.numpy as jnp

  device, size = jax_device(options), SIZES[options.tiny]["matrix"]
  a = b = jax.random.normal(jax.random.key(SEED), (size, size), jnp.bfloat16)
  product, last = jax.jit(lambda a, b: a @ b), []

  def run():
    last[:] = [product(a, b)]

  seconds = mean_seconds(run, lambda: jax.block_until_ready(last), 5 * options.steps)
  return {"rate": 2 * size**3 / seconds, "device": device}


def matmul_torch(options: argparse.Namespace) -> dict:
  import torch

  device, size = torch_device(options), SIZES[options.tiny]["matrix"]
  place, wait = torch_place(options)
  a, b = (torch.randn(size, size, device=place, dtype=torch.bfloat16) for _ in range(2))
  seconds = mean_seconds(lambda: a @ b, wait, 5 * options.steps)
  return {"rate": 2 * size**3 / seconds, "device": device}


def train_ours(options: argparse.Namespace, data: str, changes: tuple[str, ...]) -> dict:
  """The step that train.py compiles (training/loop.py), over batches that lie on the device."""
  import jax

  from maxllama4.mesh import build_mesh
  from maxllama4.model.attention import attention_kernel
  from maxllama4.model.weights import ModelTemplate
  from maxllama4.sharding import use_mesh
  from maxllama4.training.evaluate import place_batch
  from maxllama4.training.metrics import memory_peaks
  from maxllama4.training.optimizer import learning_rate_schedule, make_optimizer
  from maxllama4.training.state import init_state
  from maxllama4.training.step import lower_train_step
  from maxllama4.xla_flags import compiler_options

  device, config = jax_device(options), config_of(data, options, changes)
  training = config.training
  with use_mesh(build_mesh(config), config.mesh) as context:
    template = ModelTemplate(config.model)
    optimizer = make_optimizer(config.optimizer, training.steps, template)
    schedule = learning_rate_schedule(config.optimizer, training.steps)
    state = init_state(template, optimizer, training.seed, context)
    start = time.perf_counter()
    lowered = lower_train_step(config, template, optimizer, schedule, state, context)
    step = lowered.compile(compiler_options=compiler_options(device, config.compiler_options))
    compile_seconds = time.perf_counter() - start
    batches = [place_batch(batch, config, context) for batch in load_batches(data, options)]
  losses = []

  def run():
    nonlocal state
    state, metrics = step(state, batches[len(losses) % BATCHES])
    losses.append(metrics["loss"])

  seconds = mean_seconds(run, lambda: jax.block_until_ready((state, losses)), options.steps)
  platform = jax.devices()[0].platform
  return {
    "rate": training.batch_size * training.sequence_length / seconds,
    "device": device,
    "attention": attention_kernel(
      training.attention, config.model, platform, training.sequence_length
    ),
    "peak_bytes": memory_peaks()["memory/device_peak_bytes"],
    "parameters": sum(state.model[path].size for path in template.trainable),
    "compile_seconds": compile_seconds,
    "losses": [float(losses[0]), float(losses[-1])],
  }


def train_transformers(
  options: argparse.Namespace, data: str, attention: str, checkpoints: bool
) -> dict:
  import torch

  device = torch_device(options)
  place, wait = torch_place(options)
  model, experts = transformers_model(options, place, attention)
  model.train()
  if checkpoints:
    model.gradient_checkpointing_enable({"use_reentrant": False})
  forward = torch.compile(model, dynamic=False)
  step = TorchStep(model, forward, fused=not options.tiny)
  batches = [torch_batch(batch, data, attention, place) for batch in load_batches(data, options)]
  losses = []

  def run():
    losses.append(step(batches[len(losses) % BATCHES]))

  start = time.perf_counter()
  run()
  wait()
  first_seconds = time.perf_counter() - start
  seconds = mean_seconds(run, wait, options.steps)
  sizes = SIZES[options.tiny]
  return {
    "rate": sizes["batch_size"] * sizes["sequence_length"] / seconds,
    "device": device,
    "experts": experts,
    "peak_bytes": None if options.tiny else torch.cuda.max_memory_allocated(),
    "parameters": sum(p.numel() for p in model.parameters()),
    "compile_seconds": first_seconds - seconds,
    "losses": [losses[0].item(), losses[-1].item()],
  }


def transformers_model(options: argparse.Namespace, place: str, attention: str):
  """The same architecture, random weights, in bfloat16; and how its experts are computed.

  transformers 5.23 lets other models choose the experts' products (`grouped_mm`), but not Llama 4:
  `Llama4TextExperts` has no such choice, and multiplies every row by every expert. Where a version offers it, it is
  taken.
  """
  import torch
  from transformers import Llama4ForCausalLM, Llama4TextConfig

  torch.manual_seed(SEED)
  hf = json.loads(options.facts)["hf"]
  with torch.device(place):
    model = Llama4ForCausalLM(Llama4TextConfig(**hf, attn_implementation=attention))
  model = model.to(place, torch.bfloat16)
  can_choose = getattr(model, "_can_set_experts_implementation", lambda: False)
  if can_choose():
    model.set_experts_implementation("grouped_mm")
    return model, "grouped_mm"
  return model, "every row by every expert: this version offers nothing else"


def torch_batch(batch: dict, data: str, attention: str, place: str) -> list[dict]:
  """A batch as arguments of transformers' model, row by row."""
  import torch

  tokens, targets, positions = (
    torch.tensor(batch[name], dtype=torch.long, device=place)
    for name in ("tokens", "targets", "positions")
  )
  targets[torch.tensor(batch["weights"], device=place) == 0] = -100
  items = (targets != -100).sum()
  rows = []
  for i in range(len(tokens)):
    row = {"input_ids": tokens[i : i + 1], "labels": targets[i : i + 1]}
    row |= {"shift_labels": row["labels"], "num_items_in_batch": items, "use_cache": False}
    if data == "random" and attention == "sdpa":
      # Rows of one document, no longer than a chunk: all layers are causal, and without a mask PyTorch takes its flash
      # kernels. transformers would make one for the chunked layers, and then it cannot.
      row["attention_mask"] = {"full_attention": None, "chunked_attention": None}
    else:
      row["position_ids"] = positions[i : i + 1]  # which start anew with each document
    rows.append(row)
  return rows


class TorchStep:
  """A step of mixed precision as maxllama4's: bfloat16 model, float32 weights that AdamW moves, clipping at 1."""

  def __init__(self, model, forward, *, fused: bool):
    import torch

    self.forward, self.narrow = forward, list(model.parameters())
    self.wide = [p.detach().float() for p in self.narrow]
    decayed = [w for w in self.wide if w.ndim > 1]
    others = [w for w in self.wide if w.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    self.optimizer = torch.optim.AdamW(
      groups, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
    )

  def __call__(self, rows: list[dict]):
    """The batch's loss, on the device."""
    import torch

    total = 0.0
    for row in rows:
      loss = self.forward(**row).loss
      loss.backward()
      total = total + loss.detach()
    for narrow, wide in zip(self.narrow, self.wide):
      wide.grad, narrow.grad = narrow.grad.float(), None
    torch.nn.utils.clip_grad_norm_(self.wide, 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad()
    with torch.no_grad():
      torch._foreach_copy_(self.narrow, self.wide)
    return total


OURS, THEIRS = "maxllama4", "transformers"
OUR_WAYS = {
  "attention kept": ("training.remat=attention",),
  "nothing kept": ("training.remat=full",),
  "attention kept, ragged_dot": ("training.remat=attention", "kernels.grouped_matmul=ragged_dot"),
}
THEIR_WAYS = {
  f"{attention}{', checkpoints' if checkpoints else ''}": (attention, checkpoints)
  for attention in ("sdpa", "flex_attention")
  for checkpoints in (False, True)
}
# name -> (packages besides maxllama4's own, the measurement, its arguments)
VARIANTS = {"matmul/jax": ("jax", matmul_jax, ()), "matmul/torch": ("torch", matmul_torch, ())}
for _data in DATA:
  for _way, _changes in OUR_WAYS.items():
    VARIANTS[f"{_data}/{OURS} {_way}"] = ("jax", train_ours, (_data, _changes))
  for _way, _how in THEIR_WAYS.items():
    VARIANTS[f"{_data}/{THEIRS} {_way}"] = (
      "torch transformers",
      train_transformers,
      (_data, *_how),
    )


def measure(name: str, options: argparse.Namespace) -> dict:
  """The body of a measuring process."""
  if name == "prepare":
    return prepare(options)
  packages, function, arguments = VARIANTS[name]
  for package in packages.split():
    if importlib.util.find_spec(package) is None:
      return {"skipped": f"the package {package} is not installed"}
  try:
    result = function(options, *arguments)
  except NotHereError as reason:
    return {"skipped": str(reason)}
  return result | {"versions": versions()}


def versions() -> dict[str, str]:
  """Of the packages that this process has loaded."""
  names = ("jax", "jaxlib", "flax", "tokamax", "torch", "triton", "transformers")
  found = {name: importlib.metadata.version(name) for name in names if name in sys.modules}
  return {"python": platform.python_version(), **found}


def start_measuring(name: str, options: argparse.Namespace) -> dict:
  """Runs one measurement in a process. A failure comes back as {"error": its last lines}."""
  command = [sys.executable, __file__, "--measure", name, "--steps", str(options.steps)]
  command += ["--folder", str(options.folder), "--facts", options.facts, "--set", *options.set]
  command += ["--tiny"] * options.tiny + ["--sizes"] * options.sizes
  environment = environment_of(options)
  if name == "prepare":
    environment["JAX_PLATFORMS"] = "cpu"
  try:
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT
    )
  except subprocess.TimeoutExpired:
    return {"error": f"not done after {LIMIT} seconds"}
  if done.returncode:
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return {"error": " | ".join(lines[-3:]) or f"exit status {done.returncode}, no output"}
  return json.loads(done.stdout.strip().splitlines()[-1])


def environment_of(options: argparse.Namespace) -> dict[str, str]:
  """What the processes see: one GPU, nearly all its memory, and caches of what earlier rounds compiled."""
  environment = {
    "CUDA_VISIBLE_DEVICES": "0",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    "JAX_COMPILATION_CACHE_DIR": str(options.folder / "jax"),
    "TORCHINDUCTOR_CACHE_DIR": str(options.folder / "inductor"),
    "HF_HUB_OFFLINE": "1",
  }
  return environment | ({"JAX_PLATFORMS": "cpu"} if options.tiny else {})


def take_turns(options: argparse.Namespace) -> dict[str, list[dict]]:
  """All rounds, until they are done or the time is up. What is skipped or fails is not tried again."""
  chosen = [n for n in VARIANTS if not options.only or n.startswith(("matmul", *options.only))]
  runs = {name: [] for name in chosen}
  start = time.monotonic()
  for number in range(options.rounds):
    for name in chosen:
      if any("rate" not in run for run in runs[name]):
        continue
      if time.monotonic() - start > 60 * options.minutes:
        print(f"{name}: not in round {number + 1}, time is up", file=sys.stderr, flush=True)
        continue
      runs[name].append(start_measuring(name, options))
      print(f"[{number + 1}/{options.rounds}] {name}: {told(runs[name][-1])}", flush=True)
  return runs


def told(run: dict) -> str:
  """One measurement in a line."""
  for kind in ("skipped", "error"):
    if kind in run:
      return f"{kind}: {run[kind]}"
  text = f"{run['rate']:,.0f} a second"
  peak = run.get("peak_bytes")
  text += f", {peak / 1e9:.1f} GB at the peak" if peak else ""
  return text + (f", loss {run['losses'][0]:.3f}" if "losses" in run else "")


def summarize(runs: dict[str, list[dict]], facts: dict) -> dict:
  """Medians over the rounds, shares of the matmul rate and of the data sheet, and ours over theirs."""
  good = {name: [r for r in results if "rate" in r] for name, results in runs.items()}
  rates = {name: statistics.median(r["rate"] for r in rs) for name, rs in good.items() if rs}
  device = next((r["device"] for results in good.values() for r in results), "none")
  flops, sheet = facts["train_flops_per_token"], facts["data_sheet_flops_per_second"]
  matmul = max((r for n, r in rates.items() if n.startswith("matmul/")), default=None)
  peak = next((f for name, f in sheet.items() if device.startswith(name)), None)
  training = {}
  for name, rate in rates.items():
    if not name.startswith("matmul/"):
      training[name] = {
        "tokens_per_second": rate,
        "share_of_matmul_rate": rate * flops / matmul if matmul else None,
        "share_of_data_sheet": rate * flops / peak if peak else None,
        "peak_bytes": max((r["peak_bytes"] for r in good[name] if r["peak_bytes"]), default=None),
        "compile_seconds": good[name][0]["compile_seconds"],
      }
  ratios = {}
  for data in DATA:
    best = {
      side: max((r for n, r in rates.items() if n.startswith(f"{data}/{side}")), default=None)
      for side in (OURS, THEIRS)
    }
    ratios[data] = best[OURS] / best[THEIRS] if all(best.values()) else None
  return {
    "device": device,
    "matmul_flops_per_second": matmul,
    "training": training,
    "maxllama4_over_best_transformers": ratios,
  }


def print_table(summary: dict) -> None:
  def share(value):
    return "      -" if value is None else f"{value:7.1%}"

  print(f"\n{'':<48}tokens/s  of matmul  of data sheet  peak memory")
  for name, row in summary["training"].items():
    memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else "-"
    shares = f"{share(row['share_of_matmul_rate']):>11}{share(row['share_of_data_sheet']):>15}"
    print(f"{name:<46}{row['tokens_per_second']:>10,.0f}{shares}{memory:>13}")
  for data, ratio in summary["maxllama4_over_best_transformers"].items():
    if ratio:
      print(f"{data}: maxllama4 over the best of transformers: {ratio:.2f} x")


def print_sizes(facts: dict) -> None:
  print(
    f"{facts['parameters'] / 1e9:.3f}B parameters, {facts['active_parameters'] / 1e9:.3f}B active;"
    f" {facts['train_flops_per_token'] / 1e9:.3f} useful GFLOP a token, {facts['tokens_per_step']:,} tokens a step"
  )
  state = {name: f"{n / 1e9:.1f} GB" for name, n in facts["state_bytes"].items() if n > 1}
  peaks = {name: f"{n / 1e9:.1f} GB" for name, n in facts["planned_peak_bytes"].items()}
  print(
    f"state on the device: {state}; peak by the planner's arithmetic, by what layers keep: {peaks}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rounds", type=int, default=2, help="processes a measurement")
  parser.add_argument("--steps", type=int, default=10, help="timed steps in a process")
  parser.add_argument("--minutes", type=float, default=60, help="after which none is started")
  parser.add_argument(
    "--only", nargs="*", default=[], help="those whose names start so, and matmuls"
  )
  parser.add_argument("--set", nargs="*", default=[], help="settings of maxllama4's run, key=value")
  parser.add_argument("--sizes", action="store_true", help="print what the model needs, and stop")
  parser.add_argument("--tiny", action="store_true", help="a smoke test on a CPU; keeps no figures")
  parser.add_argument("--measure", help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument("--facts", default="{}", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.measure:
    print(json.dumps(measure(options.measure, options)))
    return
  with tempfile.TemporaryDirectory() as folder:
    options.folder = pathlib.Path(folder)
    facts = start_measuring("prepare", options)
    if "error" in facts:
      sys.exit(f"maxllama4 cannot make the batches here: {facts['error']}")
    print_sizes(facts)
    if options.sizes:
      return
    options.facts = json.dumps(facts)
    runs = take_turns(options)
  summary = summarize(runs, facts)
  print_table(summary)
  if options.tiny:
    print("--tiny: a smoke test of this script; nothing is kept")
  elif not summary["training"]:
    sys.exit("nothing could be measured here; nothing is kept")
  else:
    keep_figures(facts, summary, runs)


def keep_figures(facts: dict, summary: dict, runs: dict[str, list[dict]]) -> None:
  from record import keep

  found = {}
  for run in (run for results in runs.values() for run in results):
    found |= run.pop("versions", {})
  keep("gpu", (), {"versions": found, "model": facts, **summary, "runs": runs})


if __name__ == "__main__":
  main()
