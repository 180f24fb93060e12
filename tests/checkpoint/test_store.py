"""Checkpoints by step: which stay, where they can be restored to, and what becomes of damaged ones."""

import json
import random
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_arrays, tiny_config, tiny_run

import maxllama4
from maxllama4.checkpoint.checksums import RECORD, find_damage, write_record
from maxllama4.checkpoint.store import CheckpointError, CheckpointStore
from maxllama4.config import CheckpointConfig, MeshConfig
from maxllama4.mesh import build_mesh
from maxllama4.model.weights import ModelTemplate, arrays_of
from maxllama4.sharding import MeshContext


def state(step):
  return {"a/b": jnp.full((8, 4), step, jnp.float32)}, {"count": jnp.int32(step)}


def shapes():
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state(0)
  )


def saved(run_dir, *steps, **config):
  """A store that holds these steps."""
  store = CheckpointStore(run_dir, CheckpointConfig(**config))
  for step in steps:
    store.save(step, *state(step), {"tokens": step})
  store.wait()
  return store


def is_state_of(step, restored):
  model, rest, position = restored
  same = np.all(np.asarray(model["a/b"]) == step) and rest["count"] == step
  return bool(same) and position == {"tokens": step}


@pytest.mark.parametrize(
  ("keep", "keep_every", "left"), [(2, 0, [6, 7]), (1, 3, [0, 3, 6, 7]), (9, 0, list(range(8)))]
)
def test_the_newest_stay_and_multiples_of_keep_every_for_ever(tmp_path, keep, keep_every, left):
  store = saved(tmp_path, *range(8), every=1, keep=keep, keep_every=keep_every)
  assert store.steps == left
  store.close()
  again = CheckpointStore(tmp_path)
  assert again.steps == left
  assert is_state_of(left[0], again.restore(left[0], *shapes()))
  again.close()


def test_arrays_saved_from_one_mesh_are_restored_to_another_in_the_parts_asked_for(tmp_path):
  def context(**sizes):
    mesh = MeshConfig(**{"fsdp": 1} | sizes)
    return MeshContext(build_mesh(tiny_run(mesh=mesh)), mesh)

  value = jnp.arange(128.0, dtype=jnp.bfloat16).reshape(16, 8)
  store = CheckpointStore(tmp_path)
  saved = jax.device_put(value, context(fsdp=8).sharding(("embed", None)))
  store.save(3, {"w": saved}, {"step": jnp.int32(3)}, {"loader": {"streams": {"0": [1, 2]}}})
  sharding = context(tensor=2, fsdp=4).sharding((None, "heads"))
  shape = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
  store.wait()
  model = store.restore_model(3, {"w": shape})
  assert model["w"].sharding == sharding and model["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(model["w"], value)
  store.close()


# Damage: every file of a checkpoint, in every way that a disk has.


def flipped(data, rng):
  place = rng.randrange(len(data))
  return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


DAMAGES = {
  "flipped": flipped,
  "cut": lambda data, rng: data[: rng.randrange(len(data))],
  "longer": lambda data, rng: data + b"\0",
  "gone": lambda data, rng: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_the_checkpoint_before_is_restored_and_the_file_named(
  tmp_path, damage
):
  rng = random.Random(damage)
  store = saved(tmp_path, 1, 2)
  folder, broken = tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / "2.broken"
  names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
  assert len(names) > 10
  for name in names:
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    changed = DAMAGES[damage](whole, rng)
    if changed is not None:
      (folder / name).write_bytes(changed)
    said = []
    step, *restored = store.restore_newest(*shapes(), said.append)
    if RECORD.split(".")[0] in str(name) and damage == "gone":
      assert step == 2 and is_state_of(2, restored)  # as older ones, that have none
    else:
      assert step == 1 and is_state_of(1, restored), name
      assert len(said) == 1 and f"{folder} is damaged: {name} " in said[0] and "2.broken" in said[0]
      assert not folder.exists()
      broken.rename(folder)
    (folder / name).write_bytes(whole)
  assert store.restore_newest(*shapes(), said.append)[0] == 2
  store.close()


def test_every_bit_of_a_record_matters_or_does_nothing(tmp_path):
  store = saved(tmp_path, 1)
  folder, rng = tmp_path / "checkpoints" / "1", random.Random(0)
  (folder / "model" / "_METADATA").write_bytes(b"damaged")
  record = folder / RECORD.format(0)
  whole = record.read_bytes()
  for _ in range(300):
    record.write_bytes(flipped(whole, rng))
    assert find_damage(folder) is not None
  store.close()


def test_without_a_record_a_checkpoint_is_restored_and_passed_over_when_it_cannot_be(tmp_path):
  store = saved(tmp_path, 1, 2)
  for record in tmp_path.rglob(RECORD.format("*")):
    record.unlink()
  said = []
  assert store.restore_newest(*shapes(), said.append)[0] == 2 and not said
  (tmp_path / "checkpoints" / "2" / "model" / "manifest.ocdbt").write_bytes(b"damaged")
  step, *restored = store.restore_newest(*shapes(), said.append)
  assert step == 1 and is_state_of(1, restored) and "2.broken" in said[0]
  store.close()


def damage_data(run_dir, step):
  """Changes one byte of a checkpoint's numbers."""
  folder = run_dir / "checkpoints" / str(step) / "model" / "ocdbt.process_0" / "d"
  path = max(folder.iterdir(), key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_damaged_checkpoint_is_kept_does_not_count_and_is_saved_again(tmp_path):
  store = saved(tmp_path, 1, 2, 3)  # two stay
  for _ in range(2):
    damage_data(tmp_path, 3)
    assert store.restore_newest(*shapes(), print)[0] == 2
    store.save(3, *state(3), {"tokens": 3})
    store.wait()
    assert store.steps == [2, 3]
  store.save(4, *state(4), {"tokens": 4})
  store.wait()
  assert store.steps == [3, 4]
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"3", "4", "3.broken", "3.broken-2"}
  store.close()


def test_where_none_is_whole_one_sentence_says_why_and_nothing_is_touched(tmp_path):
  store = saved(tmp_path, 1, 2)
  damage_data(tmp_path, 1)
  damage_data(tmp_path, 2)
  with pytest.raises(
    CheckpointError, match=r"^no checkpoint of .*2 is damaged: .*1 is damaged: "
  ) as e:
    store.restore_newest(*shapes(), print)
  assert "\n" not in str(e.value) and str(e.value).count(". ") == 0
  assert store.steps == [1, 2]
  for restore in (lambda: store.restore(2, *shapes()), lambda: store.restore_model(2, shapes()[0])):
    with pytest.raises(CheckpointError, match=r"2 is damaged: model/ocdbt\.process_0/d/"):
      restore()
  store.close()


def test_a_whole_checkpoint_that_does_not_fit_is_no_damage(tmp_path):
  store = saved(tmp_path, 1, 2)
  model, rest = shapes()
  with pytest.raises(CheckpointError, match="2 cannot be restored: "):
    store.restore_newest(model, rest | {"another": rest["count"]}, print)
  assert store.steps == [1, 2]
  store.close()


def test_what_was_left_unfinished_is_no_checkpoint_and_goes_with_the_next_save(tmp_path):
  store = saved(tmp_path, 1)
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
  shutil.copytree(folder / "1" / "model", folder / "3.orbax-checkpoint-tmp-99" / "model")
  store.close()
  store = CheckpointStore(tmp_path)
  assert store.steps == [1] and store.restore_newest(*shapes(), print)[0] == 1
  store.save(2, *state(2), {})
  store.wait()
  assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
  store.close()


def test_a_new_run_has_nothing_to_restore_and_nothing_is_written(tmp_path):
  store = CheckpointStore(tmp_path / "run")
  assert store.steps == [] and store.restore_newest(*shapes(), print) is None
  store.close()
  assert not list(tmp_path.iterdir())


# Disks that take no more.


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 1 MiB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("file systems can only be mounted by root")
  yield folder
  subprocess.run(["umount", str(folder)], check=True)


def fails_with_one_sentence(store, step, reason, capfd, rows=8):
  model = {"a/b": jax.random.normal(jax.random.key(0), (rows, 1000))}
  with pytest.raises(CheckpointError, match=rf"/{step} cannot be written: {reason}\.$") as error:
    store.save(step, model, {"count": jnp.int32(step)}, {})
    store.wait()
  output = capfd.readouterr()
  return "\n" not in str(error.value) and output.out == output.err == ""


def test_a_full_disk_is_named_and_the_checkpoints_before_stay(small_disk, capfd):
  store = saved(small_disk / "run", 1, 2)
  assert fails_with_one_sentence(store, 3, "No space left on device", capfd, rows=500)
  store.close()
  store = CheckpointStore(small_disk / "run")
  assert store.steps == [1, 2] and store.restore_newest(*shapes(), print)[0] == 2
  store.save(3, *state(3), {"tokens": 3})  # there is room again: what was unfinished goes first
  store.wait()
  assert store.steps == [2, 3]
  store.close()


def test_a_read_only_folder_is_named(small_disk, capfd):
  store = saved(small_disk / "run", 1, 2)
  subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
  assert fails_with_one_sentence(store, 3, "Read-only file system", capfd)
  assert store.restore_newest(*shapes(), print)[0] == 2
  store.close()


def test_a_failed_save_shows_before_the_next_one(small_disk):
  store = CheckpointStore(small_disk / "run")
  store.save(1, {"a/b": jax.random.normal(jax.random.key(0), (500, 1000))}, {"c": jnp.int32(0)}, {})
  with pytest.raises(CheckpointError, match="No space left"):
    while True:
      store.check()
  store.check()
  store.close()


# A run as a source of weights.


def test_decoding_and_conversion_read_the_newest_whole_checkpoint(tmp_path):
  config = tiny_config()
  model = ModelTemplate(config).model(tiny_arrays(config))
  maxllama4.save_model(model, tmp_path, format="maxllama4")
  store = CheckpointStore(tmp_path)
  store.save(1, tiny_arrays(config, seed=1), {"step": jnp.int32(1)}, {})
  store.close()
  damage_data(tmp_path, 1)
  with pytest.warns(UserWarning, match=r"checkpoints/1 is damaged: .*; step 0 is read instead"):
    loaded = maxllama4.load_model(tmp_path)
  for path, array in arrays_of(loaded).items():
    np.testing.assert_array_equal(array, arrays_of(model)[path])
  with pytest.raises(CheckpointError, match="checkpoints/1 is damaged"):
    maxllama4.load_model(tmp_path / "checkpoints" / "1")


def test_what_other_processes_record_meanwhile_is_not_recorded_as_theirs(tmp_path):
  (tmp_path / "data").write_bytes(b"numbers")
  for name in (RECORD.format(1), f".{RECORD.format(2)}.tmp"):
    (tmp_path / name).write_bytes(b"{")
  write_record(tmp_path, 0)
  record = json.loads((tmp_path / RECORD.format(0)).read_bytes())
  assert list(record["files"]) == ["data"]
