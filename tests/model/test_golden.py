"""The whole model against the golden cases: every sub-block, logits, loss, gradients, generation."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import (
  ACTIVATIONS,
  GRADIENT_NORM_RELATIVE,
  LOGITS,
  LOSS,
  TEXT_CASES,
  VISION_CASES,
  golden_case,
)

import maxllama4
from maxllama4.checkpoint.hf import tensor_table
from maxllama4.decoding.generate import decode_step, pad_prompts, prefill
from maxllama4.model.attention import attention_mask
from maxllama4.model.decoder import init_caches
from maxllama4.model.embeddings import logits_of
from maxllama4.model.llama4 import merge_images, sequences_of
from maxllama4.model.rope import rope_frequencies
from maxllama4.model.weights import ModelTemplate, arrays_of
from maxllama4.training.loss import cross_entropy_sums


@pytest.fixture(scope="module", params=TEXT_CASES + VISION_CASES)
def golden(request):
  """A case and what we compute on it: per batch everything inside the model, and the gradients of the loss."""
  case = golden_case(request.param)
  model = maxllama4.load_model(case.folder)
  arrays = {path: array.astype(jnp.float32) for path, array in arrays_of(model).items()}
  template = ModelTemplate(model.config)
  inside = jax.jit(jax.value_and_grad(_loss_and_insides, has_aux=True), static_argnums=1)
  batches = {}
  for prefix in case.batches:
    names = [f"{prefix}{name}" for name in ("input_ids", "attention_mask")]
    tokens, segment_ids = (jnp.asarray(case.arrays[name], jnp.int32) for name in names)
    labels = jnp.asarray(case.arrays["labels"], jnp.int32)
    (loss, insides), gradients = inside(
      arrays, template, tokens, segment_ids, labels, case.arrays.get("pixel_values")
    )
    batches[prefix] = types.SimpleNamespace(loss=loss, insides=insides, gradients=gradients)
  return types.SimpleNamespace(
    case=case, model=model, arrays=arrays, template=template, batches=batches
  )


def _loss_and_insides(arrays, template, tokens, segment_ids, labels, pixel_values):
  """The mean loss, chunked as in training, of layers that are called one by one; and what they computed."""
  model = template.model(arrays)
  sequences = sequences_of(tokens, None, segment_ids, model.config)
  x = model.embed(tokens)
  images = model.image_features(pixel_values)
  if images is not None:
    x = merge_images(x, tokens == model.config.image_token_index, images)
  insides = {"embeds": x, "attn_out": [], "ffn_out": [], "layer_out": [], "router_logits": []}
  for i, kind in enumerate(model.config.layer_kinds):
    layer = model.decoder.layer(i)
    attended, _ = layer.attention(layer.input_norm(x), sequences)
    x = x + attended
    normed = layer.post_attention_norm(x)
    if kind.is_moe:
      insides["router_logits"].append(layer.feed_forward.router.logits(normed))
      fed, _ = layer.feed_forward(normed, sequences.valid)
    else:
      fed = layer.feed_forward(normed)
    x = x + fed
    for name, value in (("attn_out", attended), ("ffn_out", fed), ("layer_out", x)):
      insides[name].append(value)
  x = insides["final_norm"] = model.norm(x)
  insides["logits"] = logits_of(x, model.head_weight())
  targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
  weights = (targets >= 0).astype(jnp.float32)
  nats, _ = cross_entropy_sums(
    x, model.head_weight(), jnp.maximum(targets, 0), weights, 0.0, chunk_tokens=8
  )
  return nats / weights.sum(), insides


def _largest_difference(ours, theirs, valid):
  """Over the places of [..., B, T, d] that are no padding."""
  return np.abs(np.asarray(ours) - theirs)[..., valid, :].max()


def test_every_sub_block_computes_what_the_reference_does(golden):
  names = ("embeds", "attn_out", "ffn_out", "layer_out", "final_norm", "router_logits")
  for prefix, batch in golden.batches.items():
    valid = golden.case.arrays[f"{prefix}attention_mask"] > 0
    for name in names:
      theirs = golden.case.arrays.get(f"{prefix}{name}", np.zeros((0,)))
      assert len(batch.insides[name]) == len(theirs)  # a dense model has no router logits
      if len(theirs):
        assert _largest_difference(batch.insides[name], theirs, valid) <= ACTIVATIONS, name
    theirs = golden.case.arrays[f"{prefix}logits"]
    assert _largest_difference(batch.insides["logits"], theirs, valid) <= LOGITS


def test_a_loaded_model_gives_the_references_logits(golden):
  forward = jax.jit(
    lambda arrays, tokens, segments, pixels: golden.template.model(arrays)(
      tokens, None, segments, pixels
    )
  )
  pixel_values = golden.case.arrays.get("pixel_values")
  for prefix in golden.batches:
    names = [f"{prefix}{name}" for name in ("input_ids", "attention_mask")]
    tokens, mask = (jnp.asarray(golden.case.arrays[name], jnp.int32) for name in names)
    logits = forward(arrays_of(golden.model), tokens, mask, pixel_values)
    assert logits.dtype == jnp.float32
    theirs = golden.case.arrays[f"{prefix}logits"]
    assert _largest_difference(logits, theirs, np.asarray(mask) > 0) <= LOGITS
    if "meta.logits" in golden.case.arrays:
      assert np.abs(logits - golden.case.arrays["meta.logits"]).max() <= LOGITS


def test_loss_and_gradient_norms_of_every_tensor_are_the_references(golden):
  batch = golden.batches[golden.case.batches[-1]]  # padded cases: on the right
  assert abs(batch.loss - golden.case.facts["loss"]) <= LOSS
  norms = {}
  for tensor in tensor_table(golden.model.config):
    gradient = batch.gradients[tensor.path]
    gradient = gradient if tensor.stack_index is None else gradient[tensor.stack_index]
    norms[tensor.name] = np.linalg.norm(np.asarray(gradient, np.float64))
  theirs = golden.case.facts["grad_norm"]
  assert set(norms) == set(theirs)
  for name, norm in theirs.items():
    assert abs(norms[name] - norm) <= GRADIENT_NORM_RELATIVE * max(norm, 1e-4), name


def test_the_mask_rule_and_the_frequencies_are_the_references(golden):
  config, arrays = golden.model.config, golden.case.arrays
  np.testing.assert_allclose(rope_frequencies(config), arrays["inv_freq"], rtol=1e-6)
  for prefix in golden.batches:
    segments = jnp.asarray(arrays[f"{prefix}attention_mask"], jnp.int32)
    sequences = sequences_of(segments, None, segments, config)
    valid = np.asarray(segments) > 0
    np.testing.assert_array_equal(
      np.asarray(sequences.positions)[valid], arrays[f"{prefix}position_ids"][valid]
    )
    pairs = valid[:, :, None] & valid[:, None, :]
    for name, chunk_size in (("local", config.attention_chunk_size), ("global", None)):
      if f"{prefix}mask.{name}" not in arrays:
        continue
      positions = sequences.positions
      mask = attention_mask(positions, positions, segments, segments, chunk_size)
      theirs = arrays[f"{prefix}mask.{name}"] > 0
      np.testing.assert_array_equal(np.asarray(mask) & pairs, theirs & pairs)


def test_prefill_and_steps_give_the_references_logits_for_prompts_of_unequal_lengths_at_once(
  golden,
):
  case, config = golden.case, golden.model.config
  prompts = [case.arrays[f"gen{i}.prompt"][0].tolist() for i in case.generations]
  tokens, segment_ids = pad_prompts(prompts, 0)
  new = np.concatenate([case.arrays[f"gen{i}.tokens"] for i in case.generations])

  @jax.jit
  def run(arrays, tokens, segment_ids, new, pixel_values):
    model = golden.template.model(arrays)
    caches = init_caches(config, tokens.shape[0], tokens.shape[1] + new.shape[1])
    images = model.image_features(pixel_values)
    logits, caches = prefill(model, tokens, segment_ids, caches, images)

    def step(carry, token):
      position, caches = carry
      logits, caches = decode_step(model, token, position, caches)
      return (position + 1, caches), logits

    start = (segment_ids.sum(1), caches)
    _, steps = jax.lax.scan(step, start, new.T[:-1])
    return jnp.concatenate([logits[None], steps]).swapaxes(0, 1)

  new = jnp.asarray(new, jnp.int32)
  pixel_values = case.arrays.get("pixel_values")
  logits = run(arrays_of(golden.model), tokens, segment_ids, new, pixel_values)
  theirs = np.concatenate([case.arrays[f"gen{i}.step_logits"] for i in case.generations])
  assert np.abs(logits - theirs).max() <= LOGITS
  np.testing.assert_array_equal(jnp.argmax(logits, -1), new)  # the greedy tokens
  if "gen_left.step_logits" in case.arrays:
    assert np.abs(logits - case.arrays["gen_left.step_logits"]).max() <= LOGITS


@pytest.mark.parametrize("golden", ["p02_maverick", "p06_vlm", "p07_padded"], indirect=True)
def test_generate_finds_the_references_greedy_tokens_and_their_logprobs(golden):
  """On one case of a kind; that steps give the references' logits is tested on all."""
  case = golden.case
  prompts = [case.arrays[f"gen{i}.prompt"][0].tolist() for i in case.generations]
  count = case.arrays["gen0.tokens"].shape[1]
  completions = maxllama4.generate(
    golden.model,
    prompts,
    max_new_tokens=count,
    logprobs=True,
    pixel_values=case.arrays.get("pixel_values"),
  )
  for i, completion in zip(case.generations, completions):
    assert completion.tokens == case.arrays[f"gen{i}.tokens"][0].tolist()
    assert completion.finish_reason == "length"
    logprobs = jax.nn.log_softmax(case.arrays[f"gen{i}.step_logits"][0])
    expected = logprobs[np.arange(count), np.asarray(completion.tokens)]
    np.testing.assert_allclose(completion.logprobs, expected, atol=2 * LOGITS)
  if "gen_left.tokens" in case.arrays:
    assert [c.tokens for c in completions] == case.arrays["gen_left.tokens"].tolist()
