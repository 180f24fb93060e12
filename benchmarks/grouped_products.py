"""The experts' products of Scout as XLA compiles them for a TPU v5p: no TPU needed, but the package libtpu.

  JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/grouped_products.py

8,192 rows x 5,120 x 16 experts x 16,384, bfloat16, each kind of product forward and with respect to rows and matrices.
For each: FLOPs (a kernel's as it declares them) over the useful ones, cycles that the compiler estimates outside kernels
(it gives none for kernels), and scratch memory. The library tokamax is not there: it looks at the devices of the process
and refuses to be compiled for others. Appends to benchmarks/results/grouped_products.json.
"""

import re

import jax
import jax.numpy as jnp
import record
from jax.experimental import topologies

from maxllama4.kernels.megablox import megablox

ROWS, DIM, EXPERTS, WIDTH = 8192, 5120, 16, 16384
USEFUL = 2 * ROWS * DIM * WIDTH


KINDS = {
  "ragged_dot": jax.lax.ragged_dot,
  "megablox": lambda rows, matrices, sizes: megablox(rows, matrices, sizes),
}


def passes(product) -> dict:
  """The product, and its gradients one at a time."""

  def pull(rows, matrices, sizes, gradient):
    return jax.vjp(lambda r, m: product(r, m, sizes), rows, matrices)[1](gradient)

  return {
    "forward": lambda rows, matrices, sizes, gradient: product(rows, matrices, sizes),
    "gradient by rows": lambda *arguments: pull(*arguments)[0],
    "gradient by matrices": lambda *arguments: pull(*arguments)[1],
  }


def figures_of(function, arguments) -> dict[str, float]:
  compiled = jax.jit(function).lower(*arguments).compile()
  cycles = re.findall(r'"estimated_cycles":"(\d{1,15})"', compiled.as_text())
  return {
    "flops_over_useful": round(compiled.cost_analysis()["flops"] / USEFUL, 3),
    "estimated_cycles_outside_kernels": sum(map(int, cycles)),
    "scratch_bytes": compiled.memory_analysis().temp_size_in_bytes,
  }


def main() -> None:
  device = topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  shapes = ((ROWS, DIM), (EXPERTS, DIM, WIDTH), (EXPERTS,), (ROWS, WIDTH))
  dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bfloat16)
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in zip(shapes, dtypes)
  ]
  found = {
    f"{kind}, {name}": figures_of(function, arguments)
    for kind, product in KINDS.items()
    for name, function in passes(product).items()
  }
  record.keep("grouped_products", ("jax", "libtpu"), {"target": "TPU v5p", "products": found})


if __name__ == "__main__":
  main()
