"""Learning-rate schedule, clipping, decay mask: one optax chain."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maxllama4.config import EMBED_AXES, OptimizerConfig, require
from maxllama4.model.weights import ModelTemplate
from maxllama4.training.state import array_of


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate by step (from 0): linear warm-up from 0, then `config.schedule` down to its last value at `steps`."""
  peak, warmup = config.learning_rate, config.warmup_steps
  last, rest = peak * config.final_fraction, max(1, steps - config.warmup_steps)
  decay_steps = min(rest, max(1, round(config.decay_fraction * steps)))
  after = {
    "constant": lambda: optax.constant_schedule(peak),
    "linear": lambda: optax.linear_schedule(peak, last, rest),
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
    "wsd": lambda: optax.linear_schedule(peak, last, decay_steps, rest - decay_steps),
  }[config.schedule]()
  if warmup == 0:
    return after
  # Step 0 already moves: a warm-up over n steps passes 1/n, 2/n, ..., 1.
  return optax.join_schedules(
    [optax.linear_schedule(peak / warmup, peak, warmup - 1), after], [warmup]
  )


def is_decayed(path: str) -> bool:
  """Whether weight decay applies to the array at `path`: matrices yes; norms, biases and embeddings no.

  Nor to the vision tower: the data are texts, so no gradient reaches it, and decay alone would wear it down.
  """
  if path.startswith(("embed/", "vision/", "projector/")):
    return False
  return not path.endswith(("norm/weight", "bias"))


def make_optimizer(
  config: OptimizerConfig, steps: int, template: ModelTemplate
) -> optax.GradientTransformation:
  """The chain that turns gradients of the trainable arrays into updates.

  Raises: ConfigError when the model computes in float16, or `config.eps` is 0 in the dtype of weights and optimizer
  state: updates would be NaN.
  """
  require(
    template.config.dtype != "float16",
    "dtype=float16 is for inference: no loss is scaled, so in training gradients below 6e-8 would become 0; set dtype to"
    " bfloat16 or float32.",
  )
  dtype = "float32" if config.state_dtype else template.config.param_dtype  # of the update
  require(
    np.array(config.eps).astype(jnp.dtype(dtype)) > 0,
    f"optimizer.eps={config.eps} is 0 in param_dtype={dtype}; raise it, or set param_dtype to float32 or bfloat16, or"
    " optimizer.state_dtype.",
  )
  decayed = {path: is_decayed(path) for path in template.trainable}
  schedule = learning_rate_schedule(config, steps)
  clip = optax.identity()
  if config.max_gradient_norm:
    clip = optax.clip_by_global_norm(config.max_gradient_norm)
  if config.name == "adamw":
    update = _adamw(config, schedule, decayed)
  else:
    ratio = (config.embedding_learning_rate or config.learning_rate) / config.learning_rate
    dims = {path: matrix_of(template.axes[path]) for path in template.trainable}
    muon = optax.contrib.muon(
      schedule,
      weight_decay=config.weight_decay,
      weight_decay_mask=decayed,
      muon_weight_dimension_numbers=dims,
      consistent_rms=0.2,  # updates as large as AdamW's, so that one learning rate serves both
    )
    # Optax's Muon brings an AdamW for the rest, but one that decays all of it.
    adamw = _adamw(config, lambda step: ratio * schedule(step), decayed, nesterov=True)
    update = optax.partition(
      {"muon": muon, "adamw": adamw},
      {path: "adamw" if matrix is None else "muon" for path, matrix in dims.items()},
    )
  chain = optax.chain(clip, update)
  return chain if config.state_dtype is None else _kept_in(chain, config.state_dtype, template)


def _kept_in(
  optimizer: optax.GradientTransformation, dtype: str, template: ModelTemplate
) -> optax.GradientTransformation:
  """`optimizer` with moments that are `dtype` between updates and float32 during one."""
  shapes = template.shapes

  def cast(state: Any, to: str) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf if array_of(path, leaf, shapes) is None else leaf.astype(to), state
    )

  def update(gradients, state, params=None):
    updates, state = optimizer.update(gradients, cast(state, "float32"), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)


def _adamw(
  config: OptimizerConfig,
  schedule: optax.Schedule,
  decayed: dict[str, bool],
  nesterov: bool = False,
) -> optax.GradientTransformation:
  betas, decay = (config.b1, config.b2), config.weight_decay
  return optax.adamw(
    schedule, *betas, config.eps, weight_decay=decay, mask=decayed, nesterov=nesterov
  )


def matrix_of(axes: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
  """Which dims of an array are a matrix's inputs and outputs, for Muon; None for what AdamW updates.

  Every dim other than `embed`, and stacks of layers or experts, is the other side of the matrix. Gate and up of an
  expert, along a dim without a name, are matrices of their own. AdamW's are vectors, and whatever leads into the
  network or out of it: embedding, head, router, patches, projector.
  """
  others = tuple(i for i, name in enumerate(axes) if name in ("heads", "kv_heads", "ffn"))
  embeds = [i for i, name in enumerate(axes) if name in EMBED_AXES]
  if not embeds or not others:
    return None
  embed = embeds[0]
  if "heads" in axes or "kv_heads" in axes:
    others += (others[0] + 1,)  # head_dim
  forward = embed < others[0]
  return optax.contrib.MuonDimensionNumbers(
    reduction_axis=(embed,) if forward else others, output_axis=others if forward else (embed,)
  )
