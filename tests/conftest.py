"""Eight virtual CPU devices, and array shapes checked at run time, for every test."""

import gc
import os

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jaxtyping

WITH_SHAPES = ("kernels", "model", "checkpoint", "training", "decoding", "sharding", "mesh")
jaxtyping.install_import_hook([f"maxllama4.{name}" for name in WITH_SHAPES], "shapes.checked")


def pytest_collection_finish():
  gc.freeze()  # what is imported by now stays: nothing in it to look for again and again
