"""Options of the compiler, by the kind of the devices."""

from maxllama4.xla_flags import PRESETS, compiler_options

OWN = {"xla_tpu_scheduler_percent_shared_memory_limit": 70, "xla_dump_to": "dump"}


def test_a_runs_options_for_tpus_count_on_every_kind_of_tpu_and_nowhere_else():
  assert compiler_options("TPU v5p", OWN) == PRESETS["v5p"] | OWN
  assert compiler_options("TPU v99", OWN) == OWN  # one that chips.py does not know
  for kind in ("cpu", "NVIDIA H200"):
    assert compiler_options(kind, OWN) == {"xla_dump_to": "dump"}
