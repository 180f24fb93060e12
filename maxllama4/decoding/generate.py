"""Prefill, then one token at a time: the reference that every faster engine must equal. The loop stays on the device."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from maxllama4.config import ConfigError, ModelConfig
from maxllama4.decoding.sampling import Sampling, sample
from maxllama4.model.attention import Sequences
from maxllama4.model.decoder import init_caches
from maxllama4.model.embeddings import logits_of
from maxllama4.model.llama4 import Llama4ForCausalLM, check_images, sequences_of
from maxllama4.model.weights import Arrays, ModelTemplate, arrays_of

NO_TOKEN = -1  # what a row that has stopped emits


@dataclasses.dataclass(frozen=True)
class Completion:
  """New tokens only, without the stop token; `logprobs` (nats, of the unfiltered distribution) where asked for."""

  tokens: list[int]
  logprobs: list[float] | None
  finish_reason: str  # "stop": a stop token came; "length": max_new_tokens were made


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """What one decoding step hands to the next."""

  caches: Any
  token: Int[Array, " B"]  # emitted last, not yet in the caches; NO_TOKEN once the row has stopped
  logprob: Float[Array, " B"]
  position: Int[Array, " B"]  # of `token`
  keys: jax.Array  # one random key a row


def generate(
  model: Llama4ForCausalLM,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int = 32,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  stop_tokens: Sequence[int] = (),
  pixel_values: jax.typing.ArrayLike | None = None,
  logprobs: bool = False,
) -> list[Completion]:
  """A completion of each prompt (lists of ids, of any lengths), all in one batch.

  `pixel_values` [tiles, 3, S, S] are the tiles of all prompts in order, as many as their patch tokens need.
  A row's samples depend on `seed` and its place in the batch alone.
  Raises: ConfigError for an empty prompt, one that leaves no positions for the new tokens, an id outside the vocabulary,
  or sampling settings out of range.
  """
  try:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
  except ValueError as error:
    raise ConfigError(str(error)) from None
  pieces = list(
    stream(
      model, prompts, max_new_tokens, sampling, seed, stop_tokens, max_new_tokens, pixel_values
    )
  )
  tokens, token_logprobs = (np.concatenate(parts, axis=1) for parts in zip(*pieces))
  completions = []
  for row, values in zip(tokens, token_logprobs):
    length = int((row != NO_TOKEN).sum())
    completions.append(
      Completion(
        row[:length].tolist(),
        values[:length].tolist() if logprobs else None,
        "length" if length == max_new_tokens else "stop",
      )
    )
  return completions


def stream(
  model: Llama4ForCausalLM,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling,
  seed: int,
  stop_tokens: Sequence[int],
  piece: int,
  pixel_values: jax.typing.ArrayLike | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Pieces of up to `piece` new tokens and their logprobs, [B, n] each, as they come; NO_TOKEN after a row's end."""
  _check(prompts, max_new_tokens, model.config)
  tokens, segment_ids = pad_prompts(prompts, model.config.pad_token_id or 0)
  check_images(model.config, np.concatenate([np.asarray(p) for p in prompts]), pixel_values)
  images = None if pixel_values is None else _encode(model, jnp.asarray(pixel_values))
  fold_in = functools.partial(jax.random.fold_in, jax.random.key(seed))
  keys = jax.vmap(fold_in)(jnp.arange(len(prompts)))
  # As NumPy, which every process may hand to a model that lies on the devices of all.
  keys = np.asarray(jax.random.key_data(keys))
  stops = tuple(sorted(set(stop_tokens)))
  start, advance = decoding_functions(model.config, sampling, stops)
  arrays = arrays_of(model)
  max_length = tokens.shape[1] + max_new_tokens
  state = start(arrays, tokens, segment_ids, keys, images, max_length=max_length)
  done = 0
  while done < max_new_tokens:
    count = min(piece, max_new_tokens - done)
    state, new, logprobs = advance(arrays, state, count=count)
    done += count
    yield _to_host(new), _to_host(logprobs)
    if np.all(_to_host(state.token) == NO_TOKEN):
      return


def _to_host(x: jax.Array) -> np.ndarray:
  """`x`, whole, on every process."""
  if not (x.is_fully_addressable or x.is_fully_replicated):
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ModelConfig) -> None:
  if max_new_tokens < 1:
    raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1.")
  if not prompts:
    raise ConfigError("prompts is empty; give at least one.")
  for i, prompt in enumerate(prompts):
    if len(prompt) == 0:
      raise ConfigError(
        f"prompts[{i}] is empty; give it at least one token, such as the document's first."
      )
    wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
    if wrong:
      raise ConfigError(
        f"prompts[{i}] holds token {wrong[0]}, outside 0..{config.vocab_size - 1} (model.vocab_size)."
      )


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as one int32 [B, T], padded on the right, and segments: 1 at tokens, 0 at padding."""
  length = max(map(len, prompts))
  tokens = np.full((len(prompts), length), pad, np.int32)
  segment_ids = np.zeros_like(tokens)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    segment_ids[row, : len(prompt)] = 1
  return tokens, segment_ids


@functools.lru_cache(maxsize=16)
def decoding_functions(config: ModelConfig, sampling: Sampling, stops: tuple[int, ...]):
  """The jitted functions `start` and `advance` of one model architecture and way of sampling."""
  template = ModelTemplate(config)

  def emit(logits, keys, alive):
    """The next token of every row that is alive (NO_TOKEN for the others, and where it is a stop), its logprob, keys."""
    keys, now = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    token = sample(now, logits, sampling)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    ended = ~alive
    for stop in stops:
      ended |= token == stop
    return jnp.where(ended, NO_TOKEN, token), logprob, keys

  @functools.partial(jax.jit, static_argnames="max_length")
  def start(arrays: Arrays, tokens, segment_ids, keys, images, *, max_length: int) -> DecodeState:
    keys = jax.random.wrap_key_data(keys)
    caches = init_caches(config, tokens.shape[0], max_length)
    logits, caches = prefill(template.model(arrays), tokens, segment_ids, caches, images)
    token, logprob, keys = emit(logits, keys, jnp.ones(tokens.shape[0], bool))
    return DecodeState(caches, token, logprob, segment_ids.sum(1).astype(jnp.int32), keys)

  @functools.partial(jax.jit, static_argnames="count", donate_argnums=1)
  def advance(arrays: Arrays, state: DecodeState, *, count: int):
    """`count` tokens of every row, the state's own first; stops early when all rows have."""
    model = template.model(arrays)
    rows = state.token.shape[0]

    def body(carry):
      i, state, tokens, logprobs = carry
      tokens, logprobs = tokens.at[:, i].set(state.token), logprobs.at[:, i].set(state.logprob)
      logits, caches = decode_step(model, state.token, state.position, state.caches)
      token, logprob, keys = emit(logits, state.keys, state.token != NO_TOKEN)
      return i + 1, DecodeState(caches, token, logprob, state.position + 1, keys), tokens, logprobs

    def unfinished(carry):
      return (carry[0] < count) & jnp.any(carry[1].token != NO_TOKEN)

    empty = (jnp.full((rows, count), NO_TOKEN, jnp.int32), jnp.zeros((rows, count), jnp.float32))
    _, state, tokens, logprobs = jax.lax.while_loop(unfinished, body, (0, state, *empty))
    return state, tokens, logprobs

  return start, advance


@nnx.jit
def _encode(model: Llama4ForCausalLM, pixel_values: jax.Array) -> jax.Array:
  return model.image_features(pixel_values)


def prefill(
  model: Llama4ForCausalLM,
  tokens: Int[Array, "B T"],
  segment_ids: Int[Array, "B T"],
  caches: Any,
  images: Float[Array, "tiles P D"] | None = None,
) -> tuple[Float[Array, "B V"], Any]:
  """Logits after each row's last token, and the caches filled with the prompts. Rows may be padded on either side.

  `images` take the places of the patch tokens.
  """
  sequences = sequences_of(tokens, None, segment_ids, model.config)
  if tokens.shape[1] == 1:  # a single token is a decoding step from position 0
    return decode_step(model, tokens[:, 0], jnp.zeros(tokens.shape[0], jnp.int32), caches)
  x, _, caches = model.hidden_states(tokens, sequences, caches, images=images)
  last = tokens.shape[1] - 1 - jnp.argmax(segment_ids[:, ::-1] > 0, axis=1)
  x = jnp.take_along_axis(x, last[:, None, None], axis=1)
  return logits_of(x, model.head_weight())[:, 0], caches


def decode_step(
  model: Llama4ForCausalLM, token: Int[Array, " B"], position: Int[Array, " B"], caches: Any
) -> tuple[Float[Array, "B V"], Any]:
  """Logits after one more token a row, and the caches with it. A row whose token is NO_TOKEN is padding."""
  alive = token != NO_TOKEN
  sequences = Sequences.of(position[:, None], alive[:, None].astype(jnp.int32), model.config)
  x, _, caches = model.hidden_states(jnp.maximum(token, 0)[:, None], sequences, caches)
  return logits_of(x, model.head_weight())[:, 0], caches
