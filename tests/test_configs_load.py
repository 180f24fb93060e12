"""Every file in configs/ loads, and every setting of the schema is used and documented."""

import ast
import dataclasses
import json
import pathlib
import re
import typing

import pytest

from maxllama4.cli import describe
from maxllama4.config import (
  Config,
  ConfigError,
  ModelConfig,
  config_from_section,
  load_config,
  read_yaml,
  resolve_config,
)
from maxllama4.model.llama4 import count_parameters, train_flops_per_token

ROOT = pathlib.Path(__file__).parent.parent
RUNS = sorted(ROOT.glob("configs/*.yml")) + sorted(ROOT.glob("benchmarks/*.yml"))
MODELS = sorted(ROOT.glob("configs/models/*.yml"))


def name(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_every_run_loads_and_can_be_described(path):
  description = describe(*resolve_config(path))
  assert description["parameters"]["total"] > 0


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_every_run_says_in_its_header_how_to_run_it_and_what_to_expect(path):
  header = re.match(r"(#.*\n)+", path.read_text())
  assert header, "no header"
  for word in ("command:", "hardware:", "time:", "result:"):
    assert word in header[0]


@pytest.mark.parametrize("path", MODELS, ids=name)
def test_every_model_is_complete(path):
  section = read_yaml(path) | {"dtype": "float32", "param_dtype": "float32"}
  config_from_section(ModelConfig, section, "")


def test_all_yaml_files_are_runs_or_models():
  assert {*ROOT.glob("configs/**/*.y*ml")} <= {*RUNS, *MODELS}


@pytest.mark.parametrize(
  ("name", "billions"), [("llama4_scout", 107.77), ("llama4_maverick", 400.71)]
)
def test_the_released_models_have_their_size_and_cost(name, billions):
  config = load_config(ROOT / "configs" / f"{name}.yml")
  total, active = count_parameters(config.model)
  assert round(total / 1e9, 2) == billions
  assert round(active / 1e9, 2) == 16.13
  assert round(train_flops_per_token(config.model, 8192) / 1e9, 1) == 108.9


# Settings are read


def dataclass_fields(kind, path=""):
  """(dotted path, field name) of every setting below the dataclass `kind`."""
  for field_name, hint in typing.get_type_hints(kind).items():
    nested = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
    yield f"{path}{field_name}", field_name
    if nested:
      yield from dataclass_fields(nested[0], f"{path}{field_name}.")


SETTINGS = dict(dataclass_fields(Config))


def read_names(files):
  """Attribute names that the files read."""
  names = set()
  for file in files:
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        names.add(node.attr)
  return names


# What the schema itself decides or checks, and axes that are read in a loop over their names.
READ_OTHERWISE = {
  *("model.interleave_moe_layer_step", "model.moe_layers"),
  *("model.nope_layer_interval", "model.nope_layers"),
  "model.max_position_embeddings",  # the longest sequence_length
  *("model.boi_token_index", "model.eoi_token_index"),  # kept for exports
  *("mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor", "mesh.context"),
  *("mesh.dcn_data", "mesh.dcn_fsdp", "mesh.dcn_expert", "mesh.dcn_tensor", "mesh.dcn_context"),
}


def test_every_setting_is_read_outside_the_schema():
  files = [file for file in (ROOT / "maxllama4").rglob("*.py") if file.name != "config.py"]
  read = read_names(files)
  unread = {path for path, field in SETTINGS.items() if field not in read}
  assert unread - READ_OTHERWISE == set()


# Settings are documented


def documented():
  """Dotted paths of the first column of the tables of docs/configuration.md, with their rows."""
  text = (ROOT / "docs" / "configuration.md").read_text()
  return dict(re.findall(r"^\| `([a-z0-9_.]+)` \|(.*)\|$", text, re.MULTILINE))


def settings_by_user_path():
  """Settings by the path that a user writes: dtypes stand at the top; sections are none, unless they can be null."""
  sections = {path.rpartition(".")[0] for path in SETTINGS} - {
    "model.rope_scaling",
    "model.vision_config",
  }
  return {re.sub(r"^model\.(dtype|param_dtype)$", r"\1", path) for path in {*SETTINGS} - sections}


def test_the_page_on_configuration_has_every_setting_and_no_other():
  assert set(documented()) == settings_by_user_path()


def test_the_page_on_configuration_gives_every_default_as_it_is():
  for path, row in documented().items():
    default = row.split("|")[0].strip()
    *parents, field_name = path.split(".")
    kind = Config
    for parent in parents:
      hint = typing.get_type_hints(kind)[parent]
      kind = next(k for k in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(k))
    if path in ("dtype", "param_dtype"):
      kind = ModelConfig
    field = next(field for field in dataclasses.fields(kind) if field.name == field_name)
    if path in ("mesh.rules", "compiler_options", "run_dir"):
      continue  # described in words
    if field.default is dataclasses.MISSING:
      assert default == "required", path
    else:
      shown = field.default if isinstance(field.default, str) else json.dumps(field.default)
      assert default == f"`{shown}`", path


def test_a_page_that_shows_a_setting_shows_one_that_exists():
  """`section.name=value`, in every page and in the headers of the configurations; `$ ...` may show a mistake."""
  pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *RUNS]
  setting = re.compile(
    r"\b((?:model|data|training|mesh|optimizer|checkpoint|distributed)\.[a-z0-9_.]+)="
  )
  for page in pages:
    for path in setting.findall(re.sub(r"^\$ .*", "", page.read_text(), flags=re.MULTILINE)):
      assert path in SETTINGS or path.startswith("mesh.rules."), f"{page.name}: {path}"


def test_an_unreadable_file_is_a_configuration_error():
  with pytest.raises(ConfigError):
    read_yaml(ROOT / "configs" / "no_such_file.yml")
