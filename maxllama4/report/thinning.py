"""Curves and lists of any length in bounded memory, filled in one pass; extremes and the newest survive."""

import math
from collections.abc import Iterator
from typing import Any

BUCKETS = 256  # of a series at most; half of them at least, once there were as many points


class Bucket:
  """The points of one stretch of steps: lowest, highest, and what a mean needs."""

  __slots__ = ("count", "high", "high_step", "low", "low_step", "step_sum", "unusable", "value_sum")

  def __init__(self):
    self.low, self.high, self.low_step, self.high_step = math.inf, -math.inf, 0, 0
    self.count, self.step_sum, self.value_sum, self.unusable = 0, 0, 0.0, 0

  def add(self, step: int, value: float) -> None:
    if not math.isfinite(value):
      self.unusable += 1
      return
    if value < self.low:
      self.low, self.low_step = value, step
    if value > self.high:
      self.high, self.high_step = value, step
    self.count += 1
    self.step_sum += step
    self.value_sum += value

  def merge(self, later: "Bucket") -> None:
    if later.low < self.low:
      self.low, self.low_step = later.low, later.low_step
    if later.high > self.high:
      self.high, self.high_step = later.high, later.high_step
    self.count += later.count
    self.step_sum += later.step_sum
    self.value_sum += later.value_sum
    self.unusable += later.unusable


class Series:
  """A quantity by step, as at most `BUCKETS` buckets of equal width, which doubles when they are too many."""

  def __init__(self):
    self._buckets: dict[int, Bucket] = {}  # by step // width, ascending
    self._width = 1
    self._step = -1
    self._newest, self._newest_ends = (
      Bucket(),
      -1,
    )  # the bucket of the step before, and the first step after it
    self.last: tuple[int, float] | None = None  # the newest finite point

  def add(self, step: int, value: float) -> None:
    """Steps ascend; a step that was there before means that the run went back to it, and takes its future back."""
    if not self._step < step < self._newest_ends:
      self._open(step)
    self._step = step
    self._newest.add(step, value)
    if math.isfinite(value):
      self.last = (step, value)

  def _open(self, step: int) -> None:
    """Makes the bucket of `step` the newest."""
    index = step // self._width
    if step <= self._step:
      self._buckets = {i: bucket for i, bucket in self._buckets.items() if i < index}
    if index not in self._buckets:
      self._buckets[index] = Bucket()
    if len(self._buckets) > BUCKETS:
      self._halve()
      index = step // self._width
    self._newest, self._newest_ends = self._buckets[index], (index + 1) * self._width

  def _halve(self) -> None:
    while len(self._buckets) > BUCKETS:
      merged: dict[int, Bucket] = {}
      for index, bucket in self._buckets.items():
        if index // 2 in merged:
          merged[index // 2].merge(bucket)
        else:
          merged[index // 2] = bucket
      self._buckets = merged
      self._width *= 2

  @property
  def unusable(self) -> int:
    """How many values were NaN or infinite."""
    return sum(bucket.unusable for bucket in self._buckets.values())

  def extremes(self) -> Iterator[list[tuple[int, float]]]:
    """Unbroken pieces of the curve as points: the lowest and the highest of each bucket, in their order."""
    return self._pieces(_extremes_of)

  def means(self) -> Iterator[list[tuple[int, float]]]:
    """Unbroken pieces of the curve of the buckets' means."""
    return self._pieces(_mean_of)

  def sums(self) -> Iterator[tuple[int, int, float]]:
    """(first step, step after the last, sum of the values) of each bucket."""
    for index, bucket in self._buckets.items():
      yield index * self._width, (index + 1) * self._width, bucket.value_sum

  def _pieces(self, points_of) -> Iterator[list[tuple[int, float]]]:
    piece: list[tuple[int, float]] = []
    for bucket in self._buckets.values():
      if bucket.count:
        piece += points_of(bucket)
      if bucket.unusable and piece:
        yield piece
        piece = []
    if piece:
      if self.last is not None and self.last[0] > piece[-1][0]:
        piece.append(self.last)
      yield piece


def _extremes_of(bucket: Bucket) -> list[tuple[int, float]]:
  low, high = (bucket.low_step, bucket.low), (bucket.high_step, bucket.high)
  return [low] if low == high else sorted((low, high))


def _mean_of(bucket: Bucket) -> list[tuple[int, float]]:
  return [(round(bucket.step_sum / bucket.count), bucket.value_sum / bucket.count)]


class Spread:
  """At most `limit` + 1 of many items: evenly spread ones, the first and the newest among them."""

  def __init__(self, limit: int):
    self._limit, self._stride, self.count = limit, 1, 0
    self._kept: list[Any] = []
    self._newest: list[Any] = []  # the newest item where it is not among the kept

  def add(self, item: Any) -> None:
    kept = self.count % self._stride == 0
    self._newest = [] if kept else [item]
    if kept:
      self._kept.append(item)
    self.count += 1
    if len(self._kept) > self._limit:
      if len(self._kept) % 2 == 0:
        self._newest = self._kept[-1:]
      self._kept = self._kept[::2]
      self._stride *= 2

  @property
  def items(self) -> list[Any]:
    return self._kept + self._newest
