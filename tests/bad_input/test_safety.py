"""What docs/safety.md promises: nothing that a file holds is run, no path leaves its folder, no secret is written down."""

import ast
import os
import pathlib
import shutil

import pytest
from mutations import GOOD
from refusals import assert_names, content_of

import maxllama4
from maxllama4 import cli

PACKAGE = pathlib.Path(maxllama4.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Modules that run what they read, start programs, unpack archives or open connections; and who may use one, and how.
FORBIDDEN = {
  *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "code", "runpy", "ctypes", "cffi"),
  *("subprocess", "pty", "multiprocessing", "tarfile", "socket", "http", "urllib", "requests", "ftplib", "smtplib"),
}  # fmt: skip
ALLOWED = {
  (
    "checkpoint/pth.py",
    "pickle",
  ),  # an unpickler that knows no function; tests/checkpoint/test_pth.py
  ("hosts.py", "os.environ"),  # what a cluster says of the process's place
  ("hosts.py", "urllib"),  # the same, from the metadata server of a TPU VM
  ("hosts.py", "socket"),  # the processes of a run, which say JSON to each other
  ("host_links.py", "socket"),
  ("planning/compile.py", "os.environ"),  # libtpu shall not look for a TPU where there is none
  ("planning/cache.py", "os.environ"),  # XDG_CACHE_HOME, where compilations are kept
}
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
PROGRAMS = {
  "system",
  "popen",
  "startfile",
  "fork",
  "extractall",
  "extract",
  "unsafe_load",
  "full_load",
  "load_all",
}


def dangers(tree: ast.AST) -> list[str]:
  """What in a module could run something that a file or the environment says."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [alias.name.split(".")[0] for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      found.append((node.module or "").split(".")[0])
    elif isinstance(node, ast.Call):
      found += _dangers_of_call(node)
    elif isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
      found.append(f"os.{node.attr}")
  return [name for name in found if name in FORBIDDEN or "." in name or "(" in name]


def _dangers_of_call(node: ast.Call) -> list[str]:
  call, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
  name = call.rpartition(".")[2]
  if call in BUILTINS or ("." in call and (name in PROGRAMS or name.startswith(("exec", "spawn")))):
    return [f"{call}()"]
  if call in ("np.load", "numpy.load", "jnp.load") and keywords.get("allow_pickle") != "False":
    return [f"{call}() without allow_pickle=False"]
  if call == "yaml.load" and [ast.unparse(a) for a in node.args[1:]] != ["_Loader"]:
    return ["yaml.load() without the safe loader"]
  return []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_what_it_reads_or_looks_into_the_environment(path):
  name = path.relative_to(PACKAGE).as_posix()
  found = dangers(ast.parse(path.read_text(encoding="utf-8")))
  assert [danger for danger in found if (name, danger) not in ALLOWED] == []


@pytest.mark.parametrize(
  "code",
  [
    *("import pickle", "from torch import load", "import os.path, subprocess", "eval(x)", "exec(x)"),
    *("os.system(x)", "os.execv(x, y)", "os.environ['A']", "os.getenv('A')", "archive.extractall(x)"),
    *("np.load(x)", "np.load(x, allow_pickle=True)", "yaml.load(x)", "yaml.load(x, yaml.Loader)"),
    *("yaml.unsafe_load(x)", "__import__(x)"),
  ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code):
  assert dangers(ast.parse(code))


def test_yaml_is_read_by_the_safe_loader():
  import yaml

  from maxllama4.settings import _Loader

  assert issubclass(_Loader, yaml.SafeLoader)
  assert _Loader.yaml_constructors == yaml.SafeLoader.yaml_constructors


# Paths

OUTSIDE = [
  "../secret.safetensors",
  "/etc/passwd",
  "a/../../secret.safetensors",
  "..",
  "sub/x.safetensors",
  "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_cannot_name_a_file_outside_its_folder(desk, good, name):
  shutil.copytree(good / "hf", "hf")
  desk.write("secret.safetensors", (good / "hf" / "model.safetensors").read_bytes())
  desk.write("hf/model.safetensors.index.json", f'{{"weight_map": {{"a": "{name}"}}}}')
  message = desk.mistake("decode", "checkpoint=hf", "prompt=a", "max_new_tokens=1")
  assert_names(message, "model.safetensors.index.json", "outside its folder")


def test_links_of_a_download_cache_are_followed(good, tmp_path, capfd):
  """Hugging Face's cache is a folder of links to files elsewhere: whoever may make links may as well copy files."""
  (tmp_path / "blobs").mkdir()
  (tmp_path / "snapshot").mkdir()
  for path in (good / "hf").iterdir():
    shutil.copy(path, tmp_path / "blobs" / path.name)
    (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
  code = cli.main(["convert", str(tmp_path / "snapshot"), "anywhere", "to=hf", "dry_run=true"])
  assert (code, capfd.readouterr().err) == (0, "")


# Secrets

SECRETS = {
  "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
  "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
  "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLE",
  "GOOGLE_APPLICATION_CREDENTIALS": "/home/somebody/very-secret-key.json",
  "MAXLLAMA4_PASSWORD": "correct horse battery staple",
}


def test_no_value_of_the_environment_reaches_a_run_or_its_output(desk, good, monkeypatch, capfd):
  for name, value in SECRETS.items():
    monkeypatch.setenv(name, value)
  desk.write("run.yml", GOOD)
  words = (f"data.paths=[{good}/texts]", "run_dir=out", "data.held_out_fraction=0.5")
  words = (
    *words,
    "training.steps=1",
    "model.num_hidden_layers=1",
    "model.interleave_moe_layer_step=0",
  )
  assert cli.main(["train", "run.yml", *words]) == 0
  for refused in (
    ["train", "run.yml", "--debug", "trainin=1"],
    ["decode", "checkpoint=x", "prompt=x"],
  ):
    assert cli.main(refused) == 2
  assert cli.main(["show", "run.yml", *words]) == 0
  captured = capfd.readouterr()
  written = {"output": captured.out, "messages": captured.err} | content_of(desk.folder)
  assert {"out/config.yml", "out/metrics.jsonl"} <= set(written)
  texts = [
    v.encode() if isinstance(v, str) else v for v in written.values() if isinstance(v, str | bytes)
  ]
  assert any(b"model.num_hidden_layers" in text for text in texts)  # the search finds what is there
  for name, value in SECRETS.items():
    assert not [text for text in texts if value.encode() in text], name
    assert os.environ[name] == value
