"""How often the loops of a program run."""

from __future__ import annotations

import dataclasses
import math
import re

from maxllama4.model.dispatch import SELDOM
from maxllama4.planning.hlo_text import Computation, Instruction

_PASSES = {
  "copy",
  "bitcast",
  "convert",
  "copy-start",
  "copy-done",
  "reshape",
  "optimization-barrier",
}


@dataclasses.dataclass(frozen=True)
class Linear:
  """`offset`, plus element `index` of the computation's tuple if there is one."""

  index: int | None
  offset: int


class Loops:
  """Counts loops, and remembers (`trips`, by body) what it found, and where it found nothing (`unknown`)."""

  def __init__(self, computations: dict[str, Computation]):
    self._computations = computations
    self._called: dict[
      str, tuple[Computation, Instruction]
    ] = {}  # a body, and where its loop stands
    self.trips: dict[str, int] = {}
    self.unknown: list[str] = []

  def count(self, computation: Computation, loop: Instruction) -> int:
    """Trips of a `while` in `computation`; where its text does not say, none if it is named `SELDOM`, else 1, and a note."""
    body, condition = loop.called("body"), loop.called("condition")
    self._called[body] = (computation, loop)
    known = re.search(r"known_trip_count\D*(\d+)", loop.rest)
    trips = int(known[1]) if known else self._derive(computation, loop, body, condition)
    if trips is None:
      is_seldom = re.search(rf'op_name="[^"]*/{SELDOM}/while"', loop.rest) is not None
      trips = 0 if is_seldom else 1
      if not is_seldom:
        self.unknown.append(body)
    self.trips[body] = trips
    return trips

  def _derive(
    self, computation: Computation, loop: Instruction, body: str, condition: str
  ) -> int | None:
    """From the counter's start, step and limit."""
    test = self._test(self._computations[condition])
    if test is None:
      return None
    counter, limit, direction = test
    start = self._initial(computation, loop, counter.index)
    step = self._returned(self._computations[body], counter.index)
    end = limit.offset
    if limit.index is not None:
      first = self._initial(computation, loop, limit.index)
      if first is None or self._returned(self._computations[body], limit.index) != Linear(
        limit.index, 0
      ):
        return None
      end += first
    if start is None or step is None or step.index != counter.index or step.offset == 0:
      return None
    start += counter.offset
    inclusive = direction in ("LE", "GE")
    rising = direction in ("LT", "LE", "NE") and step.offset > 0
    falling = direction in ("GT", "GE", "NE") and step.offset < 0
    if not (rising or falling):
      return None
    return max(0, math.ceil((abs(end - start) + inclusive) / abs(step.offset)))

  def _test(self, condition: Computation) -> tuple[Linear, Linear, str] | None:
    """What is compared with what, and how, in a loop's condition; the counter first."""
    return self._compared(condition, condition.root, {})

  def _compared(self, computation, name, given) -> tuple[Linear, Linear, str] | None:
    root = computation.instructions[name]
    if root.op == "fusion":
      inner = self._computations[root.called("calls")]
      values = {
        position: self._value(computation, operand, given)
        for position, operand in enumerate(root.operands)
      }
      return self._compared(inner, inner.root, values)
    if root.op in _PASSES:
      return self._compared(computation, root.operands[0], given)
    if root.op != "compare":
      return None
    left, right = (self._value(computation, operand, given) for operand in root.operands)
    direction = re.search(r"direction=(\w+)", root.rest)[1]
    if left is None or right is None:
      return None
    if left.index is None:
      swapped = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
      left, right, direction = right, left, swapped.get(direction, direction)
    return None if left.index is None else (left, right, direction)

  def _returned(self, body: Computation, index: int) -> Linear | None:
    """What element `index` of the tuple is after one trip."""
    root = body.instructions[body.root]
    return self._value(body, root.operands[index], {}) if root.op == "tuple" else None

  def _initial(self, computation: Computation, loop: Instruction, index: int) -> int | None:
    """What element `index` of the tuple is before the first trip, as far as it is a constant."""
    made = computation.instructions[loop.operands[0]]
    if made.op != "tuple":
      return None
    value = self._value(computation, made.operands[index], {})
    if value is None or value.index is None:
      return value and value.offset
    around = self._called.get(
      computation.name
    )  # it comes from the loop around this one, and stays there
    if around is None or self._returned(computation, value.index) != Linear(value.index, 0):
      return None
    outer = self._initial(*around, value.index)
    return None if outer is None else outer + value.offset

  def _value(self, computation: Computation, name: str, given: dict) -> Linear | None:
    """An integer of a computation; `given` are the values of a fusion's parameters."""
    found = computation.instructions.get(name)
    if found is None:
      return None
    if found.op == "constant":
      return Linear(None, int(found.argument)) if re.fullmatch(r"-?\d+", found.argument) else None
    if found.op == "parameter":
      return given.get(int(found.argument))
    if found.op == "get-tuple-element":
      source = computation.instructions[found.operands[0]]
      index = re.search(r"index=(\d+)", found.rest)
      return Linear(int(index[1]), 0) if source.op == "parameter" else None
    if found.op in _PASSES:
      return self._value(computation, found.operands[0], given)
    if found.op in ("add", "subtract"):
      left, right = (self._value(computation, operand, given) for operand in found.operands)
      return _sum(left, right, 1 if found.op == "add" else -1)
    if found.op == "fusion":
      inner = self._computations[found.called("calls")]
      values = {p: self._value(computation, o, given) for p, o in enumerate(found.operands)}
      return self._value(inner, inner.root, values)
    return None


def _sum(left: Linear | None, right: Linear | None, sign: int) -> Linear | None:
  if (
    left is None
    or right is None
    or (right.index is not None and (left.index is not None or sign < 0))
  ):
    return None
  index = left.index if left.index is not None else right.index
  return Linear(index, left.offset + sign * right.offset)
