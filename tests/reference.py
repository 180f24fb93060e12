"""Llama 4's text model in NumPy, float64, written from the formulas alone: no masks by blocks, no sorting, no scan.

Slow and plain. Rotary embedding turns pairs of neighbouring elements, experts are applied to one token at a time.
"""

import numpy as np

from maxllama4.config import ModelConfig
from maxllama4.model.weights import Arrays, layer_place

Weights = dict[str, np.ndarray]  # of one layer, by the end of their path


def rms_norm(x, weight, eps):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def silu(x):
  return x / (1 + np.exp(-x))


def gated_mlp(x, gate, up, down):
  return (silu(x @ gate) * (x @ up)) @ down


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def frequencies(config: ModelConfig):
  """Radians a position, for each pair of elements of a head; stretched band by band where scaling is on."""
  result = []
  for pair in range(config.head_dim // 2):
    f = config.rope_theta ** (-2 * pair / config.head_dim)
    if (s := config.rope_scaling) is not None:
      wavelength = 2 * np.pi / f
      if wavelength > s.original_max_position_embeddings / s.low_freq_factor:
        f = f / s.factor
      elif wavelength >= s.original_max_position_embeddings / s.high_freq_factor:
        blend = s.original_max_position_embeddings / wavelength - s.low_freq_factor
        blend = blend / (s.high_freq_factor - s.low_freq_factor)
        f = (1 - blend) * f / s.factor + blend * f
    result.append(f)
  return np.array(result)


def rotate(x, positions, config: ModelConfig):
  """`x` [T, heads, H]: elements 2j and 2j + 1 are the real and imaginary part of one number."""
  turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(
    1j * positions[:, None, None] * frequencies(config)
  )
  return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def sees(i, j, positions, segments, chunk_size):
  """Whether the token at index `i` of a row may look at the one at `j`."""
  same = segments[i] == segments[j] and segments[j] > 0 and positions[j] <= positions[i]
  return same and (chunk_size is None or positions[i] // chunk_size == positions[j] // chunk_size)


def attention(x, w: Weights, positions, segments, config: ModelConfig, uses_rope: bool):
  """One row [T, D]; rows of `x` at padding give zeros."""
  q, k, v = (np.einsum("TD,DNH->TNH", x, w[name]) for name in ("query", "key", "value"))
  if uses_rope:
    q, k = rotate(q, positions, config), rotate(k, positions, config)
    if config.use_qk_norm:
      q, k = rms_norm(q, 1.0, config.rms_norm_eps), rms_norm(k, 1.0, config.rms_norm_eps)
  elif config.attn_temperature_tuning:
    steps = np.floor((positions + 1) / config.floor_scale)
    q = q * (1 + config.attn_scale * np.log(1 + steps))[:, None, None]
  group = config.num_attention_heads // config.num_key_value_heads
  chunk_size = config.attention_chunk_size if uses_rope else None
  out = np.zeros(x.shape)
  for i in range(len(x)):
    seen = [j for j in range(len(x)) if sees(i, j, positions, segments, chunk_size)]
    if not seen:
      continue
    for head in range(config.num_attention_heads):
      kv = head // group
      weights = softmax(k[seen, kv] @ q[i, head] / np.sqrt(config.head_dim))
      out[i] += weights @ v[seen, kv] @ w["out"][head]
  return out


def choose(logits, bias, count):
  """Indices of the largest of logits + bias, ties to the lowest."""
  return np.argsort(-(logits + bias), kind="stable")[:count]


def mixture(x, w: Weights, segments, config: ModelConfig):
  """One row [T, D] through its experts and the shared one; padding through the shared one alone."""
  out = gated_mlp(x, w["shared_expert/gate"], w["shared_expert/up"], w["shared_expert/down"])
  for t in np.flatnonzero(segments > 0):
    logits = x[t] @ w["router/weight"]
    for e in choose(logits, w["router/bias"], config.num_experts_per_tok):
      z = x[t] / (1 + np.exp(-logits[e]))
      gate, up = w["gate_up"][e]
      out[t] += gated_mlp(z, gate, up, w["down"][e])
  return out


def layer_weights(arrays: Arrays, config: ModelConfig, layer: int) -> Weights:
  prefix, index = layer_place(config, layer)
  weights = {}
  for path, value in arrays.items():
    if path.startswith(f"{prefix}/"):
      value = np.asarray(value, np.float64)
      weights[path.removeprefix(f"{prefix}/")] = value if index is None else value[index]
  return weights


def part(weights: Weights, name: str) -> Weights:
  """The weights below `name`, by the rest of their path."""
  return {
    path.removeprefix(f"{name}/"): w for path, w in weights.items() if path.startswith(f"{name}/")
  }


def logits(arrays: Arrays, config: ModelConfig, tokens, positions, segments):
  """[B, T, V] of integers [B, T]."""
  rows = zip(*(np.asarray(a) for a in (tokens, positions, segments)))
  return np.stack([_row_logits(arrays, config, *row) for row in rows])


def _row_logits(arrays, config, tokens, positions, segments):
  embedding = np.asarray(arrays["embed/weight"], np.float64)
  x, eps = embedding[tokens], config.rms_norm_eps
  for i, kind in enumerate(config.layer_kinds):
    w = layer_weights(arrays, config, i)
    y = rms_norm(x, w["input_norm/weight"], eps)
    x = x + attention(y, part(w, "attention"), positions, segments, config, kind.uses_rope)
    y = rms_norm(x, w["post_attention_norm/weight"], eps)
    w = part(w, "feed_forward")
    if kind.is_moe:
      x = x + mixture(y, w, segments, config)
    else:
      x = x + gated_mlp(y, w["gate"], w["up"], w["down"])
  x = rms_norm(x, np.asarray(arrays["norm/weight"], np.float64), eps)
  tied = config.tie_word_embeddings
  return x @ (embedding.T if tied else np.asarray(arrays["head/weight"], np.float64))
