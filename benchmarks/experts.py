"""Cost of sparse expert products beside one dense matmul of the same useful FLOPs, on this CPU.

  python benchmarks/experts.py [--rounds 15]

4,096 rows, 256 -> 512, float32; rows are spread over the experts at random, or skewed (half of them to one expert).
Each round times every case once, so that a machine that grows slower does so for all; ratios are medians over the
rounds of sparse over dense. Prints a table and writes benchmarks/results/experts.json.
"""

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from maxllama4.kernels.grouped_matmul import grouped_matmul

ROWS, DIM, FEATURES = 4096, 256, 512
EXPERTS = (8, 16, 32, 64)
RESULT = pathlib.Path(__file__).parent / "results" / "experts.json"


def seconds_of(function, arguments) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start


def with_gradient(product):
  """`product(rows, weights, *rest)` and its gradients, for a cotangent given as the first argument."""

  def run(cotangent, rows, weights, *rest):
    out, pull_back = jax.vjp(lambda rows, weights: product(rows, weights, *rest), rows, weights)
    return out, pull_back(cotangent)

  return run


def cases() -> dict[str, tuple]:
  """Jitted function and arguments by name."""
  keys = jax.random.split(jax.random.key(0), 4)
  rows = jax.random.normal(keys[0], (ROWS, DIM))
  cotangent = jax.random.normal(keys[1], (ROWS, FEATURES))
  weight = jax.random.normal(keys[2], (DIM, FEATURES))
  dense, sparse = jax.jit(jnp.matmul), jax.jit(grouped_matmul)
  dense_gradient = jax.jit(with_gradient(jnp.matmul))
  sparse_gradient = jax.jit(with_gradient(grouped_matmul))
  found = {
    "dense forward": (dense, (rows, weight)),
    "dense gradient": (dense_gradient, (cotangent, rows, weight)),
  }
  for experts in EXPERTS:
    weights = jax.random.normal(keys[2], (experts, DIM, FEATURES))
    chosen = jax.random.randint(keys[3], (ROWS,), 0, experts)
    skewed = jnp.where(jnp.arange(ROWS) < ROWS // 2, 0, chosen)
    for name, choice in (("random", chosen), ("skewed", skewed)):
      sizes = jnp.bincount(choice, length=experts)
      found[f"{experts} {name} forward"] = (sparse, (rows, weights, sizes))
      found[f"{experts} {name} gradient"] = (sparse_gradient, (cotangent, rows, weights, sizes))
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=15)
  rounds = parser.parse_args().rounds
  runs = cases()
  for function, arguments in runs.values():
    seconds_of(function, arguments)  # compiles
  seconds = {name: [] for name in runs}
  for _ in range(rounds):
    for name, (function, arguments) in runs.items():
      seconds[name].append(seconds_of(function, arguments))

  def ratio(name: str) -> float:
    twin = seconds["dense " + name.rsplit(" ", 1)[1]]
    return statistics.median(a / b for a, b in zip(seconds[name], twin))

  ratios = {name: round(ratio(name), 2) for name in runs if not name.startswith("dense")}
  dense = statistics.median(seconds["dense forward"])
  report = {
    "date": datetime.date.today().isoformat(),
    "command": f"python benchmarks/experts.py --rounds {rounds}",
    "hardware": f"{platform.machine()}, {jax.devices()[0].device_kind}",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "dense_gflops_per_second": round(2 * ROWS * DIM * FEATURES / dense / 1e9, 1),
    "seconds_over_dense": ratios,
    "forward_64_over_8": round(ratios["64 random forward"] / ratios["8 random forward"], 2),
    "gradient_64_over_8": round(ratios["64 random gradient"] / ratios["8 random gradient"], 2),
  }
  print(f"dense: {dense * 1e3:.2f} ms, {report['dense_gflops_per_second']} GFLOP/s")
  print(
    f"{'experts':>8} {'rows':>8} {'forward':>9} {'forward + gradient':>19}   (times the dense twin's seconds)"
  )
  for experts in EXPERTS:
    for name in ("random", "skewed"):
      forward, gradient = (ratios[f"{experts} {name} {kind}"] for kind in ("forward", "gradient"))
      print(f"{experts:>8} {name:>8} {forward:>9.2f} {gradient:>19.2f}")
  print(
    f"64 over 8 experts: forward {report['forward_64_over_8']}, with gradient {report['gradient_64_over_8']}"
  )
  RESULT.parent.mkdir(exist_ok=True)
  RESULT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  main()
