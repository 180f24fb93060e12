"""Bytes that a training state needs on each device, by arithmetic: no device is asked."""

import math

import jax

from maxllama4.config import MESH_AXES, Config
from maxllama4.model.weights import ModelTemplate
from maxllama4.training.optimizer import make_optimizer


def bytes_per_device(config: Config) -> dict[str, int]:
  """Devices of the configured mesh, and bytes of parameters, optimizer state and gradients on each.

  An axis of -1 counts as 1 here: how many devices there will be is not known.
  """
  template = ModelTemplate(config.model)
  sizes = {axis: max(1, getattr(config.mesh, axis)) for axis in MESH_AXES}
  params = {path: leaf for path, leaf in template.shapes.items() if path in template.trainable}
  optimizer = make_optimizer(config.optimizer, config.training.steps, template)

  def parts(path: str) -> int:
    axes = [axis for name in template.axes[path] if name for axis in config.mesh.axes_of(name)]
    return math.prod(sizes[axis] for axis in axes)

  def size(path, leaf) -> int:
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return leaf.size * leaf.dtype.itemsize // (parts(names[-1]) if names else 1)

  def total(tree) -> int:
    return sum(size(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))

  return {
    "devices": math.prod(sizes.values()),
    "parameters_bytes": total(template.shapes),
    "optimizer_bytes": total(jax.eval_shape(optimizer.init, params)),
    "gradients_bytes": total(params),
  }
