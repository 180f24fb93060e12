"""The models before Llama 4, and RoPE's types, against transformers; torch's files against torch. Needs `parity`."""

import dataclasses
import json
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: the folders are made here

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllama4 import generate, load_model, save_model
from maxllama4.checkpoint.pth import read_pth
from maxllama4.config import ConfigError
from maxllama4.model.rope import attention_factor, frequencies_of_rows, rope_tables
from maxllama4.model.weights import ModelTemplate, arrays_of

reason = "needs torch and transformers: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)
modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason=reason)
LlamaRotaryEmbedding = modeling_llama.LlamaRotaryEmbedding
ROPE_INIT_FUNCTIONS = modeling_llama.ROPE_INIT_FUNCTIONS

LOGIT_TOLERANCE = 5e-5
LENGTH = 40  # beyond both the 32 positions of the model and the 16 that it was first trained on
TOKENS = np.random.default_rng(1).integers(3, 96, (2, LENGTH)).astype(np.int32)
ORIGINAL = {"original_max_position_embeddings": 16}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
  "default": {},
  "linear": {"factor": 2.5},
  "dynamic": {"factor": 3.0},
  "llama3": {"factor": 8.0, **BANDS, **ORIGINAL},
  "yarn": {"factor": 4.0, "beta_fast": 4.0, **ORIGINAL},
  "yarn untruncated": {"factor": 4.0, "truncate": False, "mscale": 1.5, "mscale_all_dim": 0.5} | ORIGINAL,
  "yarn with a factor": {"factor": 4.0, "attention_factor": 1.2, "beta_slow": 0.5, **ORIGINAL},
  "longrope": {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 9.0]} | ORIGINAL,
  "longrope with a factor": {"short_factor": [1.1] * 4, "long_factor": [3.0] * 4, "factor": 3.0}
  | ORIGINAL,
}  # fmt: skip


def llama_config(rope: str, **changes):
  settings = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": rope.split()[0], "rope_theta": 500.0, **ROPES[rope]},
  }
  return transformers.LlamaConfig(**settings | changes)


def llama(config):
  """A model whose weights are large enough for attention and its positions to matter."""
  model = transformers.LlamaForCausalLM(config).eval()
  noise = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      values = torch.randn(parameter.shape, generator=noise)
      parameter.copy_(1 + 0.2 * values if "norm" in name else 1.3 * values / 32**0.5)
  return model


def logits_of(model) -> np.ndarray:
  template = ModelTemplate(model.config)
  return np.asarray(jax.jit(lambda a: template.model(a)(jnp.asarray(TOKENS)))(arrays_of(model)))


def their_logits(model) -> np.ndarray:
  with torch.no_grad():
    return model(torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.numpy()


def assert_same_logits(ours, theirs):
  expected = their_logits(theirs)
  assert expected.std() > 0.5  # not all alike, or a comparison says little
  np.testing.assert_allclose(logits_of(ours), expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.fixture(scope="module", params=ROPES)
def pair(request, tmp_path_factory):
  """Transformers' model, and ours of the folder that it wrote."""
  theirs = llama(llama_config(request.param))
  folder = tmp_path_factory.mktemp("llama")
  theirs.save_pretrained(folder)
  return theirs, load_model(folder)


def test_logits_of_a_llama_are_the_same_in_transformers(pair):
  theirs, ours = pair
  assert all(kind.uses_rope and not kind.is_moe for kind in ours.config.layer_kinds)
  assert_same_logits(ours, theirs)


@pytest.mark.parametrize("pair", ["default", "llama3"], indirect=True)
def test_a_llama_exported_as_a_llama4_has_the_same_logits_in_transformers(pair, tmp_path):
  """Also beyond the model's last position: no layer is chunked."""
  theirs, ours = pair
  save_model(ours, tmp_path, format="hf")
  exported = transformers.Llama4ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
  np.testing.assert_allclose(
    their_logits(exported.eval()), their_logits(theirs), atol=LOGIT_TOLERANCE, rtol=0
  )


@pytest.mark.parametrize("pair", ["dynamic", "yarn", "longrope"], indirect=True)
def test_greedy_completions_that_outgrow_the_limits_are_the_same_in_transformers(pair):
  theirs, ours = pair
  prompt = TOKENS[0, :13].tolist()
  (completion,) = generate(ours, [prompt], max_new_tokens=26)
  theirs.generation_config.eos_token_id = None
  tokens = theirs.generate(
    torch.tensor([prompt]),
    attention_mask=torch.ones(1, 13, dtype=torch.long),
    max_new_tokens=26,
    do_sample=False,
    pad_token_id=0,
  )
  assert completion.tokens == tokens[0, 13:].tolist()


@pytest.mark.parametrize("length", [10, 16, 17, 32, 33, 100])
def test_frequencies_and_tables_are_the_same_in_transformers(pair, length):
  theirs, ours = pair
  rope = theirs.config.rope_parameters["rope_type"]
  positions = np.arange(length)[None]
  found = np.asarray(frequencies_of_rows(jnp.asarray(positions), ours.config))[0]
  if rope == "default":
    expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs.config)
  else:
    expected, factor = ROPE_INIT_FUNCTIONS[rope](theirs.config, seq_len=length)
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
  assert attention_factor(ours.config) == pytest.approx(factor, rel=1e-12)
  rotary = LlamaRotaryEmbedding(theirs.config)  # afresh: it remembers the longest row it has seen
  tables = rotary(torch.zeros(1), torch.tensor(positions))
  for ours_, theirs_ in zip(rope_tables(jnp.asarray(positions), ours.config), tables):
    np.testing.assert_allclose(ours_, theirs_[..., :4].numpy(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("rope", ["linear", "llama3"])
def test_the_old_spelling_of_a_config_means_the_same(tmp_path, rope):
  theirs = llama(llama_config(rope))
  theirs.save_pretrained(tmp_path)
  raw = json.loads((tmp_path / "config.json").read_text())
  parameters = raw.pop("rope_parameters")
  raw |= {"rope_theta": parameters.pop("rope_theta"), "torch_dtype": raw.pop("dtype")}
  parameters["type"] = parameters.pop("rope_type")
  (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": parameters}))
  assert_same_logits(load_model(tmp_path), theirs)


@pytest.mark.parametrize(
  "changes",
  [{"tie_word_embeddings": True}, {"head_dim": 12}, {"num_key_value_heads": 4}],
  ids=["tied", "wide heads", "no groups"],
)
def test_other_shapes_of_llama_are_the_same_in_transformers(tmp_path, changes):
  theirs = llama(llama_config("default", **changes))
  theirs.save_pretrained(tmp_path)
  assert_same_logits(load_model(tmp_path), theirs)


# Meta's own files


def metas_tensors(theirs, shard: int, of: int) -> dict:
  """Meta's original tensors of a transformers' model: rows of queries and keys back in pairs; cut as Llama 2's."""
  state = theirs.state_dict()

  def pairs(weight):
    return weight.view(-1, 2, 4, 32).transpose(1, 2).reshape(weight.shape)

  def cut(weight, dim):
    return weight.chunk(of, dim)[shard].clone()

  out = {
    "tok_embeddings.weight": cut(state["model.embed_tokens.weight"], 1),
    "norm.weight": state["model.norm.weight"],
    "output.weight": cut(state["lm_head.weight"], 0),
    "rope.freqs": torch.ones(4),
  }
  for i in range(3):
    theirs, ours = f"model.layers.{i}.", f"layers.{i}."
    attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
    out |= {
      f"{ours}attention.wq.weight": cut(pairs(state[f"{attention}q_proj.weight"]), 0),
      f"{ours}attention.wk.weight": cut(pairs(state[f"{attention}k_proj.weight"]), 0),
      f"{ours}attention.wv.weight": cut(state[f"{attention}v_proj.weight"], 0),
      f"{ours}attention.wo.weight": cut(state[f"{attention}o_proj.weight"], 1),
      f"{ours}feed_forward.w1.weight": cut(state[f"{mlp}gate_proj.weight"], 0),
      f"{ours}feed_forward.w2.weight": cut(state[f"{mlp}down_proj.weight"], 1),
      f"{ours}feed_forward.w3.weight": cut(state[f"{mlp}up_proj.weight"], 0),
      f"{ours}attention_norm.weight": state[f"{theirs}input_layernorm.weight"],
      f"{ours}ffn_norm.weight": state[f"{theirs}post_attention_layernorm.weight"],
    }
  return out


@pytest.mark.parametrize("num_shards", [1, 2])
def test_metas_original_files_give_the_logits_of_transformers(tmp_path, num_shards):
  theirs = llama(llama_config("default"))
  params = {"dim": 32, "multiple_of": 256, "n_heads": 4, "n_kv_heads": 2, "n_layers": 3}
  params |= {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "vocab_size": -1, "rope_theta": 500.0}
  (tmp_path / "params.json").write_text(json.dumps(params))
  for shard in range(num_shards):
    tensors = metas_tensors(theirs, shard, num_shards)
    torch.save(tensors, tmp_path / f"consolidated.{shard:02}.pth")
  with pytest.warns(UserWarning, match=r"rope\.freqs"):
    ours = load_model(tmp_path)
  assert_same_logits(ours, theirs)


# Torch's files


@dataclasses.dataclass
class Bad:
  path: pathlib.Path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_every_kind_of_tensor_that_torch_writes_is_read(tmp_path):
  base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
  tensors = {
    "float32": base,
    "bfloat16": base.to(torch.bfloat16) / 7,
    "float16": base.to(torch.float16) / 7,
    "int64": base.to(torch.int64),
    "bool": base > 3,
    "transposed": base.T,
    "view": base[1:3, ::2],
    "expanded": base[0, :1].expand(5, 3),
    "scalar": torch.tensor(2.5),
    "parameter": torch.nn.Parameter(base),
  }
  torch.save(tensors, tmp_path / "dict.pth")
  content = read_pth(tmp_path / "dict.pth")
  assert set(content) == set(tensors)
  for name, tensor in tensors.items():
    found, expected = content[name].read(), tensor.detach()
    is_brain = expected.dtype == torch.bfloat16
    assert str(found.dtype) == str(expected.dtype).removeprefix("torch.")
    expected = expected.float() if is_brain else expected
    found = found.astype(np.float32) if is_brain else found
    np.testing.assert_array_equal(found, expected.numpy(), err_msg=name)
  module = torch.nn.Linear(3, 2)
  torch.save(module.state_dict(), tmp_path / "state.pth")  # an OrderedDict with an attribute
  weight = read_pth(tmp_path / "state.pth")["weight"].read()
  np.testing.assert_array_equal(weight, module.weight.detach().numpy())


def test_what_torch_would_run_and_its_old_format_are_refused(tmp_path):
  marker = tmp_path / "marker"
  torch.save({"x": torch.ones(2), "y": Bad(marker)}, tmp_path / "bad.pth")
  with pytest.raises(ConfigError, match="in its pickle"):
    read_pth(tmp_path / "bad.pth")
  torch.save({"x": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
  with pytest.raises(ConfigError, match=r"before 1\.6"):
    read_pth(tmp_path / "old.pth")
  assert not marker.exists()
