"""Chips, and the machines that users describe."""

import pytest

from maxllama4.chips import CHIPS, chip_of
from maxllama4.config import ConfigError
from maxllama4.planning.chips import is_ring, parse_topology
from maxllama4.xla_flags import PRESETS, compiler_options


def test_a_topology_is_a_chip_a_shape_and_slices():
  topology = parse_topology("v5p:4x4x8", slices=2)
  assert topology.name == "v5p:4x4x8" and topology.shape == (4, 4, 8)
  assert (topology.chips_per_slice, topology.chips, topology.devices) == (128, 256, 256)


def test_tpu7x_lists_two_devices_a_chip_and_v4_one():
  assert parse_topology("tpu7x:2x2x1").devices == 8
  assert parse_topology("v4:2x2x1").devices == 4


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("h100:8", "names no known chip"),
    ("v5p", "must give the chips along each of 3 dimensions, such as v5p:4x4x4"),
    ("v5p:4x4", "3 dimensions"),
    ("v6e:4x4x4", "2 dimensions, such as v6e:4x4"),
    ("v5p:4x0x4", "3 dimensions"),
    ("v5p:4x4x4x", "3 dimensions"),
    ("", "names no known chip"),
  ],
)
def test_a_malformed_topology_is_said_in_one_sentence(text, words):
  with pytest.raises(ConfigError, match=words):
    parse_topology(text)


def test_a_machine_has_at_least_one_slice():
  with pytest.raises(ConfigError, match="slices=0"):
    parse_topology("v5p:2x2x1", slices=0)


def test_only_whole_cubes_and_whole_sides_of_a_pod_are_rings():
  assert is_ring(parse_topology("v5p:4x4x8"), 8)
  assert not is_ring(parse_topology("v5p:2x4x4"), 4)
  assert is_ring(parse_topology("v6e:16x16"), 16)
  assert not is_ring(parse_topology("v6e:8x16"), 8)


@pytest.mark.parametrize(
  ("kind", "name"),
  [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")],
)  # fmt: skip
def test_a_device_kind_names_its_chip(kind, name):
  assert chip_of(kind).name == name and compiler_options(kind, {}) == PRESETS[name]


def test_other_devices_are_no_chip_and_take_no_options():
  assert chip_of("NVIDIA H200") is None and compiler_options(
    "cpu", {"xla_tpu_x": 1, "xla_y": 2}
  ) == {"xla_y": 2}


def test_every_chip_has_its_options_and_plausible_rates():
  assert set(PRESETS) == set(CHIPS)
  for chip in CHIPS.values():
    assert 100e12 < chip.peak_flops < 1e16 and chip.dcn_bytes_per_second > 1e9
    assert chip.dcn_bytes_per_second < chip.link_bytes_per_second < chip.hbm_bytes_per_second
