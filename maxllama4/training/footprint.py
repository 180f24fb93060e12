"""Bytes that a training state needs on each device, by arithmetic: no device is asked."""

import math

import jax

from maxllama4.config import Config
from maxllama4.model.weights import ModelTemplate
from maxllama4.training.optimizer import make_optimizer
from maxllama4.training.state import array_of


def bytes_per_device(config: Config) -> dict[str, int]:
  """Devices of the configured mesh, and bytes of parameters, optimizer state and gradients on each.

  An axis of -1 counts as 1 in each slice here: how many devices there will be is not known.
  """
  template = ModelTemplate(config.model, config.training.frozen)
  sizes = config.mesh.known_sizes
  params = {path: leaf for path, leaf in template.shapes.items() if path in template.trainable}
  optimizer = make_optimizer(config.optimizer, config.training.steps, template)

  axes, shapes = template.axes, template.shapes

  def parts(array: str | None) -> int:
    names = [name for name in axes[array] if name] if array else []
    return math.prod(sizes[axis] for name in names for axis in config.mesh.axes_of(name))

  def size(path, leaf) -> int:
    return leaf.size * leaf.dtype.itemsize // parts(array_of(path, leaf, shapes))

  def total(tree) -> int:
    return sum(size(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))

  return {
    "devices": math.prod(sizes.values()),
    "parameters_bytes": total(shapes),
    "optimizer_bytes": total(jax.eval_shape(optimizer.init, params)),
    "gradients_bytes": total(params),
  }
