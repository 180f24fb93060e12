"""From YAML and `key=value` to plain values, and from those to frozen dataclasses; knows nothing of models.

Every mistake is a `ConfigError` of one sentence that names the setting by its dotted path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import yaml

LARGEST_INT32, LARGEST_INT64 = 2**31 - 1, 2**63 - 1
LONGEST_SHOWN = 200  # characters of a value in a message


class ConfigError(ValueError):
  """A user's mistake in the configuration, already said in one sentence."""


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def positive(section: str, config: Any, names: str) -> None:
  """Checks the fields `names`, parted by spaces, of a section."""
  for name in names.split():
    value = getattr(config, name)
    require(value > 0, f"{section}.{name}={value} must be greater than 0.")
    if isinstance(value, int):
      at_most(f"{section}.{name}", value, LARGEST_INT32)  # as sizes and counters on a device


def not_negative(section: str, config: Any, names: str) -> None:
  """Checks the fields `names`, parted by spaces, of a section."""
  for name in names.split():
    value = getattr(config, name)
    require(value >= 0, f"{section}.{name}={value} must be 0 or greater.")
    if isinstance(value, int):
      at_most(f"{section}.{name}", value, LARGEST_INT32)  # as sizes and counters on a device


def at_most(path: str, value: int, limit: int) -> None:
  require(value <= limit, f"{path}={value} must be at most {limit}; lower it.")


def not_empty(path: str, text: str | None) -> None:
  """Checks a path or a name; an empty path would mean the working directory."""
  require(text != "", f"{path}='' is empty; name something.")


def one_of(path: str, value: str, choices: Sequence[str]) -> None:
  require(value in choices, f"{path}={value} is not one of {', '.join(choices)}; take one of them.")


# YAML and key=value to plain values


class _Loader(yaml.SafeLoader):
  """YAML in which a key is text as it is spelt, stands once, and names one level; and in which nothing is repeated by
  reference, so that a small file is a small tree."""

  def compose_node(self, parent, index):
    if self.check_event(yaml.AliasEvent):
      event = self.peek_event()
      reason = f"*{event.anchor} repeats a value by reference; write it out"
      raise yaml.composer.ComposerError(None, None, reason, event.start_mark)
    return super().compose_node(parent, index)

  def construct_mapping(self, node, deep=False):
    mapping = {}
    for key, value in node.value:
      name, reason = key.value, None
      if not isinstance(name, str):
        name, reason = "a key", "is not text"
      elif name in mapping:
        reason = "stands twice"
      elif "." in name:
        reason = "holds a dot; nest it under its section"
      if reason:
        raise yaml.constructor.ConstructorError(None, None, f"{name} {reason}", key.start_mark)
      mapping[name] = self.construct_object(value, deep=deep)
    return mapping


# What the reader raises on text that is no YAML, or whose values are not what their tags or their looks say: a date
# in a 13th month, a number of 5,000 digits.
_NOT_YAML = (
  yaml.YAMLError,
  ValueError,
  TypeError,
  AttributeError,
  LookupError,
  ArithmeticError,
  RecursionError,
)


def read_yaml(path: pathlib.Path) -> dict[str, Any]:
  """The mapping in the YAML file at `path`. Raises: ConfigError when there is none."""
  try:
    with path.open(encoding="utf-8-sig") as file:
      tree = yaml.load(file, _Loader)
  except OSError as error:
    raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path.") from None
  except _NOT_YAML as error:
    raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}.") from None
  require(isinstance(tree, dict), f"{path} holds no settings; it must be a YAML mapping.")
  return tree


def parse_override(text: str) -> tuple[str, Any]:
  """`key=value` as a dotted key and a YAML value."""
  key, separator, value = text.partition("=")
  require(
    bool(separator and key), f"{text!r} is not key=value; write a setting's path, =, and its value."
  )
  require(
    all(key.split(".")), f"{key!r} is no setting's path; write its names with one dot between them."
  )
  try:
    return key, yaml.load(value, _Loader)
  except _NOT_YAML as error:
    reason = _one_line(error)
    raise ConfigError(f"{key}={_shown(value)} is not YAML ({reason}); quote the value.") from None


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split()).rstrip(".")


def _shown(value: Any) -> str:
  """`value` as Python writes it, cut where it is long."""
  try:
    text = repr(value)
  except ValueError:  # Python refuses to write numbers of more than 4,300 digits
    return "a number of thousands of digits"
  return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def set_dotted(settings: ml_collections.ConfigDict, key: str, value: Any) -> None:
  """Sets `a.b.c` in nested sections, making those that are missing or null."""
  *parents, name = key.split(".")
  for depth, parent in enumerate(parents):
    if settings.get(parent) is None:
      settings[parent] = {}
    settings = settings[parent]
    require(
      isinstance(settings, ml_collections.ConfigDict),
      f"{key}: {'.'.join(parents[: depth + 1])} is a single value, not a section; set it as a whole.",
    )
  settings[name] = value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """The values of nested sections by their dotted keys."""
  flat = {}
  for name, value in tree.items():
    nested = isinstance(value, dict) and value
    flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
  return flat


# Plain values to dataclasses, and back


def to_plain(value: Any) -> Any:
  """Dictionaries, lists and scalars, as YAML writes them."""
  if isinstance(value, dict):
    return {name: to_plain(item) for name, item in value.items()}
  return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def config_from_section(
  kind: type, section: Any, path: str, known: Sequence[str] | None = None
) -> Any:
  """The dataclass `kind` from plain values, which are checked against its annotations.

  `known` are the settings to choose from where a key is none; `kind`'s unless given. Raises: ConfigError naming the
  first key that is unknown, missing or ill-typed; messages say `path` before a key.
  """
  return _build(kind, section, path, list(known or setting_names(kind, path)))


def config_from_file(kind: type, section: Any, source: str | pathlib.Path, path: str = "") -> Any:
  """`config_from_section` of what the file `source` holds, which messages name first."""
  try:
    return config_from_section(kind, section, path)
  except ConfigError as error:
    raise ConfigError(f"{source}: {error}") from None


def setting_names(kind: type, path: str) -> Iterator[str]:
  """Dotted paths of all settings and sections of the dataclass `kind`, which stands at `path`."""
  for name, hint in typing.get_type_hints(kind).items():
    yield f"{path}{name}"
    for option in (hint, *typing.get_args(hint)):
      if dataclasses.is_dataclass(option):
        yield from setting_names(option, f"{path}{name}.")


def _build(kind: type, section: Any, path: str, known: Sequence[str]) -> Any:
  require(
    isinstance(section, dict),
    f"{path.rstrip('.')}={_shown(section)} must be a section of settings.",
  )
  hints = typing.get_type_hints(kind)
  for name in section:
    if name not in hints:
      near = _nearest(str(name), path, known)
      raise ConfigError(f"{path}{name} is not a setting; did you mean {near}?")
  for field in dataclasses.fields(kind):
    default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
    has_value = field.name in section or default
    require(has_value, f"{path}{field.name} is missing; set it, for it has no default.")
  values = {
    name: _convert(hints[name], value, f"{path}{name}", known) for name, value in section.items()
  }
  return kind(**values)


def _nearest(name: str, path: str, known: Sequence[str]) -> str:
  """What `path` + `name` was meant to be: a setting of that name elsewhere, or the one spelt most alike beside it."""
  elsewhere = [setting for setting in known if setting.rpartition(".")[2] == name]
  beside = [s for s in known if s.startswith(path) and "." not in s.removeprefix(path)]
  alike = difflib.get_close_matches(f"{path}{name}", beside, n=1, cutoff=0.0)
  return [*elsewhere, *alike][0]


_SURROGATE = re.compile("[\ud800-\udfff]")  # what Python makes of a word that is not UTF-8
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text; quote it"}


def _convert(hint: Any, value: Any, path: str, known: Sequence[str]) -> Any:
  """`value` as the type `hint`. Raises: ConfigError naming `path`."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in arguments:
      return None
    options = [option for option in arguments if option is not type(None)]
    if len(options) > 1 and set(options) <= set(_NAMES):
      names = [name.partition(";")[0] for name in _NAMES.values()]
      require(
        isinstance(value, tuple(options)), f"{path}={_shown(value)} must be {', '.join(names)}."
      )
      return value
    is_list = isinstance(value, (list, tuple))
    options.sort(key=lambda option: (typing.get_origin(option) is tuple) != is_list)
    return _convert(options[0], value, path, known)
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, f"{path}.", known)
  if origin is tuple:
    value = [value] if isinstance(value, (str, int)) and not isinstance(value, bool) else value
    require(isinstance(value, (list, tuple)), f"{path}={_shown(value)} must be a list.")
    items = enumerate(value)
    return tuple(_convert(arguments[0], item, f"{path}[{i}]", known) for i, item in items)
  if origin is dict:
    require(isinstance(value, dict), f"{path}={_shown(value)} must be a section of settings.")
    return {str(k): _convert(arguments[1], v, f"{path}.{k}", known) for k, v in value.items()}
  return _scalar(hint, value, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
  number = value
  if hint in (int, float) and isinstance(value, str):  # YAML 1.1 reads 3e-4 and 1e5 as text
    with contextlib.suppress(ValueError):
      number = float(value)
  if hint is float and isinstance(number, int) and not isinstance(number, bool):
    number = float(number) if abs(number) < 2**1023 else math.inf
  if hint is int and isinstance(number, float) and number.is_integer():
    number = int(number)
  right = isinstance(number, hint) and (hint is bool or not isinstance(number, bool))
  require(right, f"{path}={_shown(value)} must be {_NAMES[hint]}.")
  require(hint is not float or math.isfinite(number), f"{path}={_shown(number)} must be finite.")
  require(
    hint is not int or abs(number) <= LARGEST_INT64,
    f"{path}={_shown(value)} must be a number of at most 64 bits.",
  )
  if hint is str:
    require(
      "\0" not in number and not _SURROGATE.search(number),
      f"{path}={_shown(value)} must be Unicode text without null characters.",
    )
  return number
