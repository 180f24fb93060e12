"""The text of an optimised HLO module as computations of instructions."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (?=[a-z(])")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_KERNEL = re.compile(r'"body":"[^"]*"')  # a kernel's own program, megabytes of it
_PARENTHESIS = re.compile(r"[()]")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`name` = `shape` `op`(`operands`)`rest`; `argument` is what stands in the parentheses."""

  name: str
  shape: str
  op: str
  argument: str
  rest: str

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r"%([^\s,)]+)", self.argument)

  def shapes(self) -> list[str]:
    """The arrays of the result: one, or those of a tuple, nested ones too."""
    return [array[0] for array in _ARRAY.finditer(self.shape)]

  def called(self, attribute: str) -> str | None:
    """The computation that `attribute` names, the first of several."""
    found = re.search(rf"\b{attribute}=\{{?%?([^\s,)}}]+)", self.rest)
    return found[1] if found else None

  def branches(self) -> list[str]:
    """The computations of a conditional."""
    found = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
    if found:
      return re.findall(r"%?([^\s,]+)", found[1])
    return [self.called("true_computation"), self.called("false_computation")]


@dataclasses.dataclass
class Computation:
  name: str
  instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
  root: str = ""

  def operand_shapes(self, instruction: Instruction) -> list[str]:
    """Arrays that an instruction is given; those of a tuple one by one."""
    found = [self.instructions[name] for name in instruction.operands if name in self.instructions]
    return [shape for operand in found for shape in operand.shapes()]

  def parameters(self) -> dict[int, str]:
    """Names of the parameters by position."""
    return {int(i.argument): i.name for i in self.instructions.values() if i.op == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict[str, Computation]
  entry: str


def parse_module(text: str) -> Module:
  """The computations of a module. An instruction may run over several lines, where an attribute of it does."""
  computations: dict[str, Computation] = {}
  entry, current, pending = "", None, []

  def finish() -> None:
    if pending:
      _add_instruction(current, "\n".join(pending))
      pending.clear()

  for line in text.split("\n"):
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = computations[header[2]] = Computation(header[2])
        entry = header[2] if header[1] else entry
    elif line == "}" or line.startswith("}, execution_thread="):
      finish()
      current = None
    else:
      if _INSTRUCTION.match(line):
        finish()
      pending.append(line)
  return Module(computations, entry)


def _add_instruction(computation: Computation, line: str) -> None:
  if '"body":"' in line:
    line = _KERNEL.sub("", line)
  head = _INSTRUCTION.match(line)
  if head is None:
    return
  rest = line[head.end() :]
  end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  op, _, rest = rest.partition("(")
  end = _closing(rest, 1)
  computation.instructions[head[2]] = Instruction(head[2], shape, op, rest[:end], rest[end + 1 :])
  if head[1]:
    computation.root = head[2]


def _closing(text: str, depth: int) -> int:
  """Where the parenthesis is closed that `text` begins with (`depth` 0), or that stands before it (1)."""
  for found in _PARENTHESIS.finditer(text):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.start()
  return len(text)


def dims_of(shape: str) -> list[int]:
  """Sizes of an array's dimensions; of a dynamic one the largest."""
  found = _ARRAY.search(shape)
  return [int(size.lstrip("<=")) for size in found[2].split(",") if size]


@functools.lru_cache(maxsize=65536)
def bytes_of(shape: str) -> int:
  """Bytes of an array without padding; tokens take none."""
  found = _ARRAY.search(shape)
  if found is None or found[1] in ("token", "opaque"):
    return 0
  bits = 8 if found[1] == "pred" else int(re.search(r"\d+", found[1])[0])
  return math.prod(dims_of(shape)) * bits // 8
