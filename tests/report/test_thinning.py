import itertools
import math

import pytest

from maxllama4.report.thinning import BUCKETS, Series, Spread


def series_of(values, every=1):
  series = Series()
  for i, value in enumerate(values):
    series.add(i * every, value)
  return series


def points(series):
  return [point for piece in series.extremes() for point in piece]


def test_a_short_curve_is_kept_as_it_is():
  values = [math.sin(i) for i in range(BUCKETS)]
  assert points(series_of(values, every=1)) == list(enumerate(values))


@pytest.mark.parametrize("every", [1, 7, 25])
def test_a_long_curve_keeps_its_extremes_its_ends_and_their_places(every):
  values = [math.sin(i / 300) for i in range(20_000)]
  values[7_123], values[13_777] = 9.0, -9.0
  kept = points(series_of(values, every))
  assert BUCKETS / 2 <= len(kept) <= 2 * BUCKETS + 2
  assert kept == sorted(kept, key=lambda point: point[0])
  assert (7_123 * every, 9.0) in kept and (13_777 * every, -9.0) in kept
  assert kept[0][0] == 0 and kept[-1] == (19_999 * every, values[-1])
  assert all(values[step // every] == value for step, value in kept)


def test_sums_and_means_of_a_thinned_curve_lose_nothing():
  series = series_of([2.0] * 5_000)
  assert sum(amount for _, _, amount in series.sums()) == 10_000
  assert {value for piece in series.means() for _, value in piece} == {2.0}


def test_values_that_are_not_finite_break_the_curve_and_are_counted():
  series = series_of([1.0, 2.0, math.nan, 3.0, math.inf, -math.inf, 4.0])
  assert [[value for _, value in piece] for piece in series.extremes()] == [[1, 2], [3], [4]]
  assert series.unusable == 3 and series.last == (6, 4.0)
  assert list(series_of([math.nan]).extremes()) == []


def test_a_step_that_comes_again_takes_back_what_came_after_it():
  series = series_of([5.0, 4.0, 3.0, 2.0])
  series.add(2, 7.0)
  assert points(series) == [(0, 5.0), (1, 4.0), (2, 7.0)]


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 8, 9, 10, 11, 64, 999])
def test_of_many_items_evenly_spread_ones_stay_with_the_first_and_the_newest(count):
  spread = Spread(8)
  for i in range(count):
    spread.add(i)
  items = spread.items
  assert len(items) <= 9 and items == sorted(set(items))
  if count:
    assert items[0] == 0 and items[-1] == count - 1
    assert len(items) >= min(count, 4)
  gaps = [b - a for a, b in itertools.pairwise(items[:-1])]
  assert len(set(gaps)) <= 1
