"""What gpu.py measures, each in a process of its own: `python benchmarks/gpu_sides.py JOB`.

JOB is JSON: which function of `MEASUREMENTS`, and its arguments. `folder` holds what gpu.py has prepared. Figures go to
standard output as JSON.
"""

import json
import pathlib
import sys
import time

import numpy as np

WARMUP = 2  # runs that are not timed


def runs_a_second(run, wait, steps: int) -> float:
  """`wait()` comes back when all that was started is done; it is called once at the end."""
  for _ in range(WARMUP):
    run()
  wait()
  start = time.perf_counter()
  for _ in range(steps):
    run()
  wait()
  return steps / (time.perf_counter() - start)


def load_batches(folder: str, data: str) -> list[dict[str, np.ndarray]]:
  """As maxllama4's loader made them, one for each step in turn."""
  stacked = dict(np.load(pathlib.Path(folder, f"{data}.npz")))
  count = len(stacked["tokens"])
  return [{name: values[i] for name, values in stacked.items()} for i in range(count)]


def jax_device(on_gpu: bool):
  import jax

  device = jax.devices()[0]
  if on_gpu and device.platform != "gpu":
    sys.exit(f"JAX {jax.__version__} sees no GPU, but {device.device_kind}")
  return device


def matmul_jax(on_gpu: bool, steps: int, size: int) -> dict:
  import jax
  import jax.numpy as jnp

  device, keys = jax_device(on_gpu), jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
  product, last = jax.jit(jnp.matmul), [None]

  def run():
    last[0] = product(a, b)

  rate = runs_a_second(run, lambda: jax.block_until_ready(last), steps)
  return {"rate": 2 * size**3 * rate, "device": device.device_kind}


def train_maxllama4(on_gpu: bool, steps: int, folder: str, data: str, settings: list[str]) -> dict:
  """The step that train.py compiles (training/loop.py), over batches that lie on the device."""
  import jax

  from maxllama4.config import load_config
  from maxllama4.mesh import build_mesh
  from maxllama4.model.attention import attention_kernel
  from maxllama4.model.moe import expert_kernels
  from maxllama4.model.weights import ModelTemplate
  from maxllama4.sharding import use_mesh
  from maxllama4.training.evaluate import place_batch
  from maxllama4.training.metrics import memory_peaks
  from maxllama4.training.optimizer import learning_rate_schedule, make_optimizer
  from maxllama4.training.state import init_state
  from maxllama4.training.step import kernel_choice, lower_train_step
  from maxllama4.xla_flags import compiler_options

  device = jax_device(on_gpu)
  config = load_config(pathlib.Path(__file__).with_name("gpu.yml"), settings)
  training, length = config.training, config.training.sequence_length
  with use_mesh(build_mesh(config), config.mesh) as context:
    template = ModelTemplate(config.model)
    optimizer = make_optimizer(config.optimizer, training.steps, template)
    schedule = learning_rate_schedule(config.optimizer, training.steps)
    state = init_state(template, optimizer, training.seed, context)
    experts = expert_kernels(config.model, kernel_choice(config))
    lowered = lower_train_step(config, template, optimizer, schedule, state, context)
    options = compiler_options(device.device_kind, config.compiler_options)
    step = lowered.compile(compiler_options=options)
    batches = [place_batch(batch, config, context) for batch in load_batches(folder, data)]
  losses = []

  def run():
    nonlocal state
    state, metrics = step(state, batches[len(losses) % len(batches)])
    losses.append(metrics["loss"])

  rate = runs_a_second(run, lambda: jax.block_until_ready((state, losses)), steps)
  choice = config.kernels.attention
  return {
    "rate": training.batch_size * length * rate,
    "device": device.device_kind,
    "attention": attention_kernel(choice, config.model, device.platform, length),
    **experts,
    "peak_bytes": memory_peaks()["memory/device_peak_bytes"],
    "parameters": sum(state.model[path].size for path in template.trainable),
    "losses": [float(loss) for loss in losses],
  }


def torch_device(on_gpu: bool):
  """Its name for torch, what it is, and a function that waits for what runs there."""
  import torch

  if not on_gpu:
    return "cpu", "cpu", lambda: None
  if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU")
  return "cuda", torch.cuda.get_device_name(), torch.cuda.synchronize


def matmul_torch(on_gpu: bool, steps: int, size: int) -> dict:
  import torch

  place, device, wait = torch_device(on_gpu)
  a, b = (torch.randn(size, size, device=place, dtype=torch.bfloat16) for _ in range(2))
  out = torch.empty_like(a)
  rate = runs_a_second(lambda: torch.mm(a, b, out=out), wait, steps)
  return {"rate": 2 * size**3 * rate, "device": device}


def train_transformers(
  on_gpu: bool, steps: int, folder: str, data: str, attention: str, checkpoints: bool
) -> dict:
  import torch
  from torch.nn.attention import SDPBackend, sdpa_kernel

  place, device, wait = torch_device(on_gpu)
  if not on_gpu and attention == "flex_attention":
    sys.exit("flex_attention has no backward pass on a CPU")
  model, experts = transformers_model(pathlib.Path(folder), place, attention)
  model.train()
  if checkpoints:
    model.gradient_checkpointing_enable({"use_reentrant": False})
  step = TorchStep(model)
  batches = load_batches(folder, data)
  rows = [torch_rows(batch, data, attention, place) for batch in batches]
  losses = []
  # cuDNN's kernels first: on Hopper they are the fastest (github.com/huggingface/transformers/pull/48163).
  names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
  order = [getattr(SDPBackend, name) for name in names]

  def run():
    losses.append(step(rows[len(losses) % len(rows)]))

  with sdpa_kernel(order, set_priority=True):
    rate = runs_a_second(run, wait, steps)
  return {
    "rate": batches[0]["tokens"].size * rate,
    "device": device,
    "experts": experts,
    "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    "parameters": sum(p.numel() for p in model.parameters()),
    "losses": [loss.item() for loss in losses],
  }


def transformers_model(folder: pathlib.Path, place: str, attention: str):
  """The same architecture, and how its experts are computed: gpu.py's weights, where it kept some; else random bfloat16.

  transformers 5.23 lets other models choose the experts' products (`grouped_mm`), but not Llama 4, which multiplies
  every row by every expert. Where a version offers it, it is taken.
  """
  import torch
  from transformers import AutoModelForCausalLM, Llama4TextConfig

  torch.manual_seed(0)
  how = {"attn_implementation": attention}
  with torch.device(place):
    if (folder / "weights").exists():
      model = AutoModelForCausalLM.from_pretrained(folder / "weights", dtype=torch.float32, **how)
    else:
      config = Llama4TextConfig(**json.loads((folder / "hf.json").read_text()))
      model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **how)
  if model._can_set_experts_implementation():
    model.set_experts_implementation("grouped_mm")
    return model, "grouped_mm"
  return model, "every row by every expert: this version offers nothing else"


def torch_rows(batch: dict[str, np.ndarray], data: str, attention: str, place: str) -> list[dict]:
  """A batch as arguments of transformers' model, row by row."""
  import torch

  tokens, targets, positions = (
    torch.tensor(batch[name], dtype=torch.long, device=place)
    for name in ("tokens", "targets", "positions")
  )
  targets[torch.tensor(batch["weights"], device=place) == 0] = -100
  same = {"num_items_in_batch": (targets != -100).sum(), "use_cache": False}
  rows = []
  for i in range(len(tokens)):
    row = same | {"input_ids": tokens[i : i + 1], "labels": targets[i : i + 1]}
    row["shift_labels"] = row["labels"]  # they are shifted already
    if data == "random" and attention == "sdpa":
      # Rows of one document, no longer than a chunk: all layers are causal, and without a mask PyTorch takes its flash
      # kernels. transformers would make one for the chunked layers, and then it cannot.
      row["attention_mask"] = {"full_attention": None, "chunked_attention": None}
    else:
      row["position_ids"] = positions[i : i + 1]  # which start anew with each document
    rows.append(row)
  return rows


class TorchStep:
  """A step of mixed precision as maxllama4's: a narrow model, float32 weights that AdamW moves, clipping at 1."""

  def __init__(self, model):
    import torch

    self.forward = torch.compile(model, dynamic=False)
    self.narrow = list(model.parameters())
    self.wide = [p.detach().float() for p in self.narrow]
    decayed, others = [], []
    for (name, _), wide in zip(model.named_parameters(), self.wide):
      (decayed if wide.ndim > 1 and "embed_tokens" not in name else others).append(wide)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    self.optimizer = torch.optim.AdamW(
      groups, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
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


MEASUREMENTS = {
  function.__name__: function
  for function in (matmul_jax, matmul_torch, train_maxllama4, train_transformers)
}

if __name__ == "__main__":
  job = json.loads(sys.argv[1])
  print(json.dumps(MEASUREMENTS[job.pop("measure")](**job)))
