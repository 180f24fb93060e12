"""Folders that hold no model, or a broken one, are named with the file that is wrong; so are requests that make no sense."""

import json
import pathlib
import shutil

import pytest
from PIL import Image
from refusals import assert_names

from maxllama4 import cli

DECODE = ("decode", "prompt=to be", "max_new_tokens=2")


@pytest.fixture
def hf(desk, good):
  """A copy of a good Hugging Face folder, to break."""
  return pathlib.Path(shutil.copytree(good / "hf", desk.folder / "hf"))


@pytest.fixture
def saved(desk, good):
  """A copy of a good run directory, to break."""
  return pathlib.Path(shutil.copytree(good / "run", desk.folder / "run"))


def change_json(path: pathlib.Path, **values) -> None:
  """Sets values at the top of the object in a file; `...` takes one out."""
  content = json.loads(path.read_text()) | values
  path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


# Folders of other things


@pytest.mark.parametrize("words", [DECODE, ("evaluate",), ("convert",)], ids=lambda words: words[0])
@pytest.mark.parametrize("path", ["none", "empty", "pictures", "a file", "long" * 100])
def test_a_folder_without_a_model_is_named(desk, words, path):
  (desk.folder / "empty").mkdir()
  desk.write("pictures/cat.png", b"x")
  desk.write("a file", b"x")
  if words[0] == "decode":
    words = (*words, f"checkpoint={path}")
  elif words[0] == "convert":
    words = ("convert", path, "out", "to=hf")
  else:
    words = (*words, path)
  assert_names(desk.mistake(*words), f"checkpoint={path}", "holds no model")


# config.json

CONFIGS = [
  (b"", "is not valid JSON"),
  (b"{", "is not valid JSON"),
  (b"\xff", "is not valid JSON"),
  (b"[]", "holds a JSON list where an object was expected"),
  (b"3", "holds a JSON int where an object was expected"),
  (b"[" * 100_000, "is not valid JSON"),
  (b"{}", "is missing"),
  (b'{"model_type": "llama"}', "model.safetensors is missing"),
]

FIELDS = [
  ("model_type", "gpt2", "model_type=gpt2 is not supported; it must be llama4_text"),
  ("hidden_act", "gelu", "hidden_act=gelu is not supported"),
  ("text_config", [], "text_config=[] must be a JSON object"),
  ("text_config", {}, "vision_config is missing"),
  ("dtype", "float64", "param_dtype=float64 is not one of"),
  ("dtype", 3, "param_dtype=3 must be text"),
  ("vocab_size", "many", "vocab_size='many' must be a whole number"),
  ("vocab_size", -1, "model.vocab_size=-1 must be greater than 0"),
  ("hidden_size", ..., "hidden_size is missing"),
  ("hidden_size", 1.5, "hidden_size=1.5 must be a whole number"),
  ("num_hidden_layers", ..., "num_hidden_layers is missing"),
  ("num_hidden_layers", "2", "num_hidden_layers='2' must be a JSON whole number"),
  ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000 must be at most 1000"),
  ("num_hidden_layers", [], "num_hidden_layers=[] must be a JSON whole number"),
  ("num_attention_heads", 0, "model.num_attention_heads=0 must be greater than 0"),
  ("num_attention_heads", True, "num_attention_heads=True must be a whole number"),
  ("rope_parameters", "yarn", "rope_parameters='yarn' must be a JSON object"),
  ("rope_parameters", {"rope_type": []}, "rope_type=[] must be a JSON string"),
  ("rope_parameters", {"rope_type": "ntk"}, "rope_type=ntk is not supported"),
  ("rope_parameters", {"rope_theta": None}, "rope_theta=None must be a number"),
  ("no_rope_layers", 4, "no_rope_layers=4 must be a JSON array"),
  ("layer_types", {"a": 1}, "layer_types={'a': 1} must be a JSON array"),
  ("moe_layers", [9], "model.moe_layers=[9] names layers [9]"),
  ("pad_token_id", 400, "model.pad_token_id=400 is outside 0..399"),
  ("attention_chunk_size", 0, "model.attention_chunk_size=0 must be greater than 0"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "told"), CONFIGS, ids=lambda value: str(value)[:30])
def test_a_config_json_that_is_none_is_named(desk, hf, content, told):
  (hf / "config.json").write_bytes(content)
  (hf / "model.safetensors").unlink()
  assert_names(desk.mistake(*DECODE, "checkpoint=hf"), "hf/", told)


@pytest.mark.parametrize(("name", "value", "told"), FIELDS)
def test_a_wrong_value_in_a_config_json_is_named(desk, hf, name, value, told):
  change_json(hf / "config.json", **{name: value})
  assert_names(desk.mistake(*DECODE, "checkpoint=hf"), "hf/config.json: ", told)


@pytest.mark.parametrize(
  ("name", "value"), [("hidden_size", 32), ("vocab_size", 500), ("num_hidden_layers", 3)]
)
def test_a_config_json_of_another_model_is_noticed(desk, hf, name, value):
  change_json(
    hf / "config.json", **{name: value}, layer_types=..., no_rope_layers=..., moe_layers=...
  )
  assert_names(desk.mistake(*DECODE, "checkpoint=hf")[:1400], "hf does not hold the model")


# Safetensors


def header_of(content: bytes) -> tuple[dict, bytes]:
  size = int.from_bytes(content[:8], "little")
  return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: object, rest: bytes) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + rest


NORM = "model.norm.weight"  # [16] of float32
LIES = [
  ("another dtype", {"dtype": "F16"}, "64 bytes where 32 were expected"),
  ("an unknown dtype", {"dtype": "F3"}, "dtype F3 is unknown"),
  ("a dtype that is none", {"dtype": []}, "no safetensors header"),
  ("a larger shape", {"shape": [17]}, "64 bytes where 68 were expected"),
  ("a negative shape", {"shape": [-16]}, "is no shape and place"),
  ("a shape of text", {"shape": ["16"]}, "is no shape and place"),
  ("a shape that is none", {"shape": 16}, "no safetensors header"),
  ("another shape of that size", {"shape": [4, 4]}, f"{NORM} is [4, 4] where [16] was expected"),
  ("a place before the file", {"data_offsets": [-64, 0]}, "is no shape and place"),
  ("a place behind the file", {"data_offsets": [10**9, 10**9 + 64]}, "is cut short"),
  ("a place that ends early", {"data_offsets": [64, 0]}, "bytes where 64 were expected"),
  ("one offset", {"data_offsets": [0]}, "no safetensors header"),
  ("no place", {"data_offsets": ...}, "no safetensors header"),
]


@pytest.mark.parametrize(("change", "told"), [r[1:] for r in LIES], ids=[r[0] for r in LIES])
def test_a_header_that_lies_is_noticed(desk, hf, change, told):
  path = hf / "model.safetensors"
  header, rest = header_of(path.read_bytes())
  header[NORM] = {k: v for k, v in (header[NORM] | change).items() if v is not ...}
  path.write_bytes(with_header(header, rest))
  assert_names(desk.mistake(*DECODE, "checkpoint=hf"), "hf", told)


HEADERS = [
  b"",
  b"{",
  b"[]",
  b"3",
  b"\xff",
  b"[" * 100_000,
  b'{"a": 3}',
  b'{"a": {}}',
  b'{"a": null}',
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: str(header)[:20])
def test_a_header_that_is_none_is_noticed(desk, hf, header):
  (hf / "model.safetensors").write_bytes(with_header(header, b""))
  assert_names(
    desk.mistake(*DECODE, "checkpoint=hf"), "hf/model.safetensors has no safetensors header"
  )


def test_a_file_cut_anywhere_is_noticed(desk, hf):
  content = (hf / "model.safetensors").read_bytes()
  for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
    (hf / "model.safetensors").write_bytes(content[:size])
    assert_names(desk.mistake(*DECODE, "checkpoint=hf"), "hf/model.safetensors")


def test_tensors_that_are_missing_or_of_another_model_are_named(desk, hf):
  header, rest = header_of((hf / "model.safetensors").read_bytes())
  header["surprise"] = header.pop(NORM)
  (hf / "model.safetensors").write_bytes(with_header(header, rest))
  message = desk.mistake(*DECODE, "checkpoint=hf")
  assert_names(message, f"{NORM} [16] is missing", "surprise is not part of the model")


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
  ("index", "told"),
  [
    ("{", "is not valid JSON"),
    ("[]", "holds a JSON list"),
    ("{}", "has no weight_map"),
    ('{"weight_map": []}', "has no weight_map"),
    ('{"weight_map": {"a": 3}}', "has no weight_map"),
    ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors is missing"),
  ],
)
def test_a_broken_index_is_named(desk, hf, index, told):
  (hf / INDEX).write_text(index)
  assert_names(desk.mistake(*DECODE, "checkpoint=hf"), "hf/", told)


# Run directories


@pytest.mark.parametrize(
  ("old", "new", "told"),
  [
    ("model:", "modl:", "model must be a section of settings"),
    ("\ndtype: float32\n", "\n", "dtype=None must be text"),
    ("hidden_size: 16", "hidden_size: big", "hidden_size='big' must be a whole number"),
    ("hidden_size: 16", "hidden_size: -1", "model.hidden_size=-1 must be greater than 0"),
    ("hidden_size: 16", "hidden_size: 32", "does not hold the model of its config.yml"),
    ("hidden_size: 16", "hidden_size: [", "is not valid YAML"),
  ],
)
def test_a_broken_configuration_of_a_run_is_named(desk, saved, old, new, told):
  path = saved / "config.yml"
  path.write_text(path.read_text().replace(old, new))
  assert_names(desk.mistake(*DECODE, "checkpoint=run")[:1400], "run", told)


def test_a_run_without_checkpoints_is_named(desk, saved):
  shutil.rmtree(saved / "checkpoints" / "0")
  assert_names(desk.mistake(*DECODE, "checkpoint=run"), "checkpoint=run")
  shutil.rmtree(saved / "checkpoints")
  assert_names(desk.mistake(*DECODE, "checkpoint=run"), "checkpoint=run holds no model")


def test_a_step_that_is_not_there_is_named_with_those_that_are(desk, saved):
  assert_names(desk.mistake(*DECODE, "checkpoint=run/checkpoints/7"), "run/checkpoints/7", "[0]")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"garbled" * 99])
def test_garbled_metadata_of_a_checkpoint_are_named(desk, saved, content):
  (saved / "checkpoints" / "0" / "model" / "_METADATA").write_bytes(content)
  assert_names(desk.failure(*DECODE, "checkpoint=run"), "run/checkpoints/0 is damaged", "_METADATA")


def test_files_of_weights_that_are_cut_or_garbled_are_noticed(desk, saved):
  model = saved / "checkpoints" / "0" / "model"
  weights = max(model.glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
  for path in (model / "manifest.ocdbt", *model.glob("d/*"), weights):
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], bytes(255 - byte for byte in content)):
      path.write_bytes(damaged)
      message = desk.failure(*DECODE, "checkpoint=run")
      assert_names(message, "run/checkpoints/0 is damaged", path.name)
    path.write_bytes(content)


# Requests

REQUESTS = [
  (["prompt=" + 60 * "to be "], 2, "prompt 1 holds 122 tokens"),
  (["prompt=caf\udce9"], 2, "prompt='caf\\udce9' must be Unicode text"),
  (["prompts_file=none"], 2, "prompts_file=none cannot be read"),
  (["prompts_file=hf"], 2, "prompts_file=hf cannot be read (Is a directory)"),
  (["prompts_file=empty"], 2, "prompts_file=empty is empty"),
  (["prompts_file=latin"], 2, "prompts_file=latin cannot be read"),
  (["prompts_file=halves"], 2, "prompts_file=halves, line 1: neither"),
  (["prompts_file=deep"], 2, "prompts_file=deep, line 1: neither"),
  (["prompts_file=king"], 2, "messages[0].role='king' is not one of"),
  (["prompts_file=chat"], 2, "the tokenizer has no token <|header_start|>"),
  (["prompt=a", "images=[none.png]"], 2, "images[0]=none.png cannot be read"),
  (["prompt=a", "images=[cat.png]"], 2, "the tokenizer has no token <|image"),
  (["prompt=a", "stop=['']"], 2, "stop=[''] holds an empty text"),
  (["prompt=a", "temperature=-1"], 2, "temperature=-1.0 must be 0"),
  (["prompt=a", "temperature=1e-300"], 2, "temperature=1e-300 overflows"),
  (["prompt=a", "temperature=.nan"], 2, "temperature=nan must be finite"),
  (["prompt=a", "top_p=0"], 2, "top_p=0.0 must be greater than 0"),
  (["prompt=a", "top_k=-1"], 2, "top_k=-1 must be 0"),
  (["prompt=a", "seed=99999999999999999999"], 2, "seed=99999999999999999999"),
  (["prompt=a", "num_samples=0"], 2, "num_samples=0 must be at least 1"),
  (["prompt=a", "stream=true", "num_samples=2"], 2, "stream=true"),
  (["prompt=a", "chat=true"], 2, "give one of prompt=TEXT, prompts_file=PATH and chat=true"),
  (["promt=a"], 2, "give one of prompt=TEXT"),
  (["prompt=a", "training.steps=3"], 2, "training.steps=3 is a setting of a configuration file"),
  (["prompt=a", "output=xml"], 2, "output=xml is not one of text, json"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "tokens", "told"), REQUESTS, ids=lambda value: str(value)[:40])
def test_an_impossible_request_is_refused(desk, hf, words, tokens, told):
  for name, content in {
    "empty": b"",
    "latin": b'{"prompt": "caf\xe9"}',
    "halves": rb'{"prompt": "\udce9"}',
    "deep": b"[" * 30_000,
    "king": b'{"messages": [{"role": "king", "content": "a"}]}',
    "chat": b'{"messages": [{"role": "user", "content": "a"}]}',
  }.items():
    desk.write(name, content)
  if "images=[cat.png]" in words:
    Image.new("RGB", (8, 8)).save("cat.png")
  message = desk.mistake("decode", "checkpoint=hf", f"max_new_tokens={tokens}", *words)
  assert_names(message, told)


def test_a_picture_that_is_none_is_the_disks_fault(desk, hf):
  desk.write("cat.png", b"no picture")
  message = desk.failure("decode", "checkpoint=hf", "prompt=a", "images=[cat.png]")
  assert_names(message, "cat.png is not an image")


OTHERS = [
  (["convert", "hf", "out"], "to is missing"),
  (["convert", "hf", "out", "to=pickle"], "to=pickle is not one of hf, maxllama4"),
  (["convert", "hf", "out", "to=hf", "dtype=int8"], "dtype=int8 is not one of"),
  (["convert", "hf", "out", "to=hf", "shard_bytes=0"], "shard_bytes=0 must be greater than 0"),
  (["convert", "hf", "hf", "to=maxllama4"], "hf already holds something"),
  (["convert", "hf", "to=hf"], "name SOURCE and DESTINATION first"),
  (["convert", "hf", "out", "too=hf"], "too is not a setting; did you mean to?"),
  (["evaluate", "hf"], "data.paths=[] names no files"),
  (["evaluate", "hf", "data.paths=[none]"], "data.paths[0]=none names no file"),
  (["evaluate", "hf", "data.tfds_name=c4"], "data.paths=[] names no files"),
  (["evaluate", "hf", "data.paths=[texts]", "data.tfds_name=c4"], "data.tfds_name=c4 is not read where data.source=text"),
  (["evaluate", "hf", "data.paths=[texts]", "model.vocab_size=9"], "model.vocab_size cannot be set here"),
  (["evaluate", "hf", "data.paths=[texts]", "trainin.steps=9"], "did you mean training?"),
  (["evaluate"], "name CHECKPOINT first"),
  (["compare", "hf", "run", "prompt=a", "tolerance=-1"], "tolerance=-1.0 must be 0 or greater"),
  (["compare", "hf", "run"], "give either prompt=TEXT or tokens=[IDS]"),
  (["compare", "hf", "run", "tokens=[999]"], "tokens=[999] must lie in 0..399"),
  (["compare", "hf", "run", "tokens=[one]"], "tokens[0]='one' must be a whole number"),
  (["compare", "hf"], "name A and B first"),
  (["show"], "name a configuration file first"),
  (["train", "training.steps=3"], "name a configuration file first"),
  (["decode", "run.yml", "prompt=a"], "run.yml cannot be read"),
  (["replay", "none"], "none holds no batch"),
  (["fly"], "'fly' is not a command"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "told"), OTHERS, ids=lambda value: str(value)[:50])
def test_other_commands_refuse_alike(desk, hf, saved, words, told):
  desk.write("texts/a.txt", "to be")
  assert_names(desk.mistake(*words), told)


def test_documents_without_text_cannot_be_evaluated_on(desk, hf):
  desk.write("empty.txt", "")
  assert_names(desk.failure("evaluate", "hf", "data.paths=[empty.txt]"), "hold no text")


def test_the_folders_that_were_broken_here_are_good(good, capfd):
  assert cli.main([*DECODE, f"checkpoint={good / 'hf'}"]) == 0
  assert cli.main(["convert", str(good / "run"), "anywhere", "to=hf", "dry_run=true"]) == 0
  assert capfd.readouterr().err == ""
