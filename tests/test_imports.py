"""Who may import whom, and that importing does nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "maxllama4"
# What the modules of each part may import besides their own; parts are folders and top-level modules.
FOUNDATION = {"settings", "files", "rope_scaling", "model_config", "config"}
MODEL = FOUNDATION | {"chips", "xla_flags", "mesh", "sharding", "kernels", "model"}
MAY_IMPORT = {
  "settings": set(),
  "files": set(),
  "rope_scaling": {"settings"},
  "model_config": {"settings", "rope_scaling"},
  "config": {"settings", "rope_scaling", "model_config"},
  "chips": set(),
  "xla_flags": {"chips"},
  "host_links": {"settings"},
  "hosts": FOUNDATION | {"host_links"},
  "mesh": FOUNDATION,
  "sharding": FOUNDATION,
  "kernels": set(),
  "model": FOUNDATION | {"sharding", "kernels"},
  "adapters": MODEL,
  "checkpoint": MODEL,
  "data": FOUNDATION | {"sharding"},
  "training": MODEL | {"hosts", "checkpoint", "adapters", "data"},
  "decoding": MODEL | {"checkpoint", "adapters", "data"},
  "planning": MODEL | {"checkpoint", "adapters", "data", "training", "decoding"},
  "report": set(),
}
TOP = {"cli", "__init__"}  # above all of them


def part_of(path: pathlib.Path) -> str:
  relative = path.relative_to(PACKAGE)
  return relative.parts[0] if len(relative.parts) > 1 else relative.stem


MODULES = sorted(PACKAGE.rglob("*.py"))
PARTS = {part_of(path) for path in MODULES}


def imported_by(path: pathlib.Path) -> set[str]:
  """Full names of all modules that the file imports, wherever in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def test_every_part_has_a_place_in_the_table():
  assert set(MAY_IMPORT) | TOP >= PARTS


@pytest.mark.parametrize("part", sorted(PARTS - TOP))
def test_a_part_imports_only_what_lies_below_it(part):
  for path in MODULES:
    if part_of(path) == part:
      ours = {name.split(".")[1] for name in imported_by(path) if name.startswith("maxllama4.")}
      assert ours & (PARTS | TOP) <= MAY_IMPORT[part] | {part}, path


def test_training_and_decoding_do_not_know_each_other():
  assert "decoding" not in MAY_IMPORT["training"] and "training" not in MAY_IMPORT["decoding"]


def test_kernels_import_jax_and_each_other_alone():
  for path in (PACKAGE / "kernels").glob("*.py"):
    names = {n for n in imported_by(path) if not n.startswith("maxllama4.kernels")}
    roots = {name.split(".")[0] for name in names}
    # tokamax where it is installed: inside a function.
    assert roots <= sys.stdlib_module_names | {"jax", "jaxtyping", "tokamax"}, path


def test_reports_need_nothing_but_python_and_yaml():
  for path in (PACKAGE / "report").glob("*.py"):
    roots = {name.split(".")[0] for name in imported_by(path)}
    assert roots <= sys.stdlib_module_names | {"yaml", "maxllama4"}, path


def test_no_module_is_a_drawer():
  drawers = {"utils", "util", "common", "helpers", "misc"}
  assert not drawers & {path.stem for path in PACKAGE.rglob("*")}


def test_files_and_functions_stay_readable():
  """At most 600 lines a file and 80 a function; the two scripts at most 60."""
  for path in MODULES:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"
  for name in ("train.py", "decode.py"):
    assert len((PACKAGE.parent / name).read_text().splitlines()) < 60, name


def test_importing_everything_starts_no_backend_and_changes_none_of_its_settings():
  paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in MODULES]
  names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
  program = f"""
import importlib, os
import jax
before = dict(os.environ)
for name in {names}:
  importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a JAX backend was started"
changed = [name for name, value in os.environ.items() if before.get(name) != value]
assert not [name for name in changed if name.startswith(("JAX", "XLA", "TPU", "TF", "CUDA"))], changed
"""
  command = [sys.executable, "-c", program]
  run = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
  assert run.returncode == 0, run.stderr
