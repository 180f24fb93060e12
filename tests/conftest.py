"""Eight virtual CPU devices, and array shapes checked at run time, for every test."""

import gc
import os

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most of the tests' time goes into compiling programs that run for milliseconds: without LLVM's optimisations
# all tests together take a fifth less. XLA_FLAGS=--xla_backend_optimization_level=3 tests with them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jaxtyping

WITH_SHAPES = ("kernels", "model", "checkpoint", "training", "decoding", "sharding", "mesh")
jaxtyping.install_import_hook([f"maxllama4.{name}" for name in WITH_SHAPES], "shapes.checked")


# Files that take minutes; one that begins last would leave all processes but one with nothing to do.
FIRST = ("crash", "golden", "hosts", "mesh", "loop", "step", "failure", "convert")


def pytest_collection_modifyitems(items):
  order = {f"test_{name}.py": place for place, name in enumerate(FIRST)}
  items.sort(key=lambda item: order.get(item.path.name, len(FIRST)))


def pytest_collection_finish():
  gc.freeze()  # what is imported by now stays: nothing in it to look for again and again
