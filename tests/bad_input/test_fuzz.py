"""Random damage, the same at every run: whatever a file holds, a command says one sentence and never stumbles."""

import contextlib
import io
import json
import pathlib
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import GOOD
from tiny_tokenizers import write_hugging_face, write_tiktoken

from maxllama4 import cli, load_tokenizer
from maxllama4.checkpoint.folders import open_source
from maxllama4.checkpoint.safetensors_files import read_header
from maxllama4.config import ConfigError, DataConfig
from maxllama4.data.sources import DataError, open_documents

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TEXTS = [GOOD, (CONFIGS / "quickstart.yml").read_text(), (CONFIGS / "llama4_scout.yml").read_text()]
KEYS = sorted({line.partition(":")[0].strip() for text in TEXTS for line in text.splitlines()})
PATHS = [f"{section}.{key}" for section in ("training", "model", "optimizer", "data", "mesh") for key in KEYS]  # fmt: skip
ODD = [
  *("", "~", "true", "-1", "0", "1e999", "-.inf", ".nan", "[]", "{}", "[1, [2]]", "{a: 1}", "'", '"', "*a", "&a b", "<<"),
  *("2024-99-99", "1:2:3", "0x" + "f" * 5000, "9" * 5000, "\0", "\t", "é", "\ud800", "!!int x", "!!binary =", "!!set {a}"),
  *("!!python/name:os.system", "? a", "- a", "a: b: c", "%TAG", "---", "...", "# a", "|", ">", "@", "`", "\u2028", "\x85"),
]  # fmt: skip


def fuzzed(examples: int):
  """A property for so many examples, drawn alike each time."""
  return settings(
    max_examples=examples,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("fuzz")
  shutil.copytree(CONFIGS / "models", folder / "models")
  return folder


values = st.sampled_from(ODD) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=9)


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
  """`content` with up to four pieces taken out, put in, or replaced."""
  for _ in range(draw(st.integers(1, 4))):
    start = draw(st.integers(0, len(content)))
    stop = min(len(content), start + draw(st.sampled_from([0, 1, 1, 2, 8, 200])))
    content = content[:start] + draw(st.binary(max_size=4)) + content[stop:]
  return content


@st.composite
def damaged_lines(draw, text: str) -> bytes:
  """`text` with up to three lines gone, doubled, swapped, indented otherwise, or given another value."""
  lines = text.splitlines()
  for _ in range(draw(st.integers(1, 3))):
    i, j = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    key, colon, value = lines[i].partition(":")
    changed = {
      "gone": [],
      "doubled": [lines[i], lines[i]],
      "indented": [f" {lines[i]}"],
      "other": [lines[j]],
      "its value elsewhere": [f"{lines[j].partition(':')[0]}:{value}"],
      "an odd value": [f"{key}{colon} {draw(values)}"],
      "an odd key": [f"{draw(values)}{colon}{value}"],
    }
    lines[i : i + 1] = changed[draw(st.sampled_from(sorted(changed)))]
    lines = lines or [""]
  return "\n".join(lines).encode("utf-8", "surrogatepass")


def check_show(path: pathlib.Path, words: list[str]) -> None:
  """That `show` describes the configuration, or refuses it with one sentence."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = cli.main(["show", str(path), *words])
  if code == 0:
    assert err.getvalue() == "" and "parameters" in out.getvalue()
    return
  assert code == 2, err.getvalue()
  assert out.getvalue() == "" and "Traceback" not in err.getvalue()
  assert err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1


@fuzzed(150)
@given(st.sampled_from(TEXTS).flatmap(lambda t: damaged_lines(t) | damaged_bytes(t.encode())))
def test_a_damaged_configuration_is_described_or_refused(folder, content):
  (folder / "run.yml").write_bytes(content)
  check_show(folder / "run.yml", [])


@fuzzed(150)
@given(st.text(alphabet=st.sampled_from("ab:{}[]-?!&*#|>'\"%@`,. \n\t\r\u20280~"), max_size=60))
def test_any_text_is_described_or_refused(folder, text):
  (folder / "run.yml").write_text(text)
  check_show(folder / "run.yml", [])


@fuzzed(250)
@given(
  st.lists(
    st.tuples(st.sampled_from(PATHS) | st.text(max_size=9), values).map("=".join) | values,
    min_size=1,
    max_size=3,
  )
)
def test_any_words_are_obeyed_or_refused(folder, words):
  (folder / "run.yml").write_text(GOOD)
  check_show(folder / "run.yml", words)


LINES = b'{"text": "to be"}\n\n{"text": "or \\u00e9", "id": [1, {"a": null}]}\n{"text": "not"}'


@fuzzed(300)
@given(damaged_bytes(LINES) | st.binary(max_size=40))
def test_damaged_json_lines_are_read_or_named(folder, content):
  (folder / "a.jsonl").write_bytes(content)
  data = DataConfig(paths=(str(folder / "a.jsonl"),), held_out_fraction=0)
  try:
    documents = open_documents(data, "all")
  except DataError as error:
    assert "hold no document" in str(error)
    return
  for i in range(len(documents)):
    try:
      assert isinstance(documents[i].text, str)
    except DataError as error:
      assert f"a.jsonl:{documents.name(i).rpartition(':')[2]}: " in str(error)


@pytest.fixture(scope="module")
def tokenizers(good, folder):
  """Good files of every kind, by name."""
  write_tiktoken(folder / "tiktoken.model")
  write_hugging_face(folder / "tokenizer.json")
  files = (good / "tokenizer.model", folder / "tiktoken.model", folder / "tokenizer.json")
  return {path.name: path.read_bytes() for path in files}


@fuzzed(60)
@given(data=st.data(), name=st.sampled_from(["tokenizer.model", "tiktoken.model", "tokenizer.json"]))  # fmt: skip
def test_a_damaged_tokenizer_is_read_or_named(folder, tokenizers, data, name):
  (folder / name).write_bytes(data.draw(damaged_bytes(tokenizers[name])))
  try:
    assert load_tokenizer(folder / name).vocab_size > 0
  except ConfigError as error:
    assert name in str(error)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=5,
)


@fuzzed(200)
@given(data=st.data())
def test_a_damaged_config_json_is_read_or_named(folder, good, data):
  if not (folder / "hf").exists():
    shutil.copytree(good / "hf", folder / "hf")
  content = json.loads((good / "hf" / "config.json").read_text())
  for name in data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=3)):
    content[name] = data.draw(JSON)
  content["model_type"] = data.draw(st.sampled_from(["llama4_text", "llama"]))
  (folder / "hf" / "config.json").write_text(json.dumps(content))
  try:
    open_source(folder / "hf")
  except ConfigError as error:
    assert "hf" in str(error)


@fuzzed(200)
@given(data=st.data())
def test_a_damaged_safetensors_header_is_read_or_named(folder, good, data):
  content = (good / "hf" / "model.safetensors").read_bytes()
  end = 8 + int.from_bytes(content[:8], "little")
  (folder / "x.safetensors").write_bytes(data.draw(damaged_bytes(content[:end])) + content[end:])
  try:
    for entry in read_header(folder / "x.safetensors").values():
      entry.open()
  except ConfigError as error:
    assert "x.safetensors" in str(error)
