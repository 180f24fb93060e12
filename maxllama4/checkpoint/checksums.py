"""A checkpoint's own record of its files, by which damage is found before anything is restored.

The database that Orbax writes checks its index, but not the numbers: of bits flipped in array data, nearly all come back as
other weights and no error (docs/decisions/0006). So once a checkpoint is committed, each process writes the size and the
CRC-32 of the files it owns to `checksums.process_N.json` beside them.
"""

import json
import pathlib
import re
import zlib
from collections.abc import Iterator

from maxllama4.files import write_whole

RECORD = "checksums.process_{}.json"
BLOCK_BYTES = 2**22


def write_record(checkpoint: pathlib.Path, process_index: int) -> None:
  """Records the files of one process: those named after it, and for process 0 all that are named after none."""
  names = (path.relative_to(checkpoint).as_posix() for path in _files(checkpoint))
  files = {
    name: list(_size_and_crc(checkpoint / name))
    for name in sorted(names)
    if _owner(name) == process_index
  }
  record = {"crc32": _crc_of(files), "files": files}
  write_whole(checkpoint / RECORD.format(process_index), json.dumps(record, indent=1).encode())


def find_damage(
  checkpoint: pathlib.Path, *, item: str | None = None, share: int = 0, shares: int = 1
) -> str | None:
  """The first file that is not as it was recorded, and how; None when there is none.

  A checkpoint without a record passes: an older one, or one whose writer was killed right after the commit. `item`: looks
  only at what restoring that item reads. Of `shares` processes, each looks at the files of its `share`.
  """
  recorded: list[tuple[str, list[int]]] = []
  for path in sorted(checkpoint.glob(RECORD.format("*"))):
    try:
      record = json.loads(path.read_bytes())
      files = record["files"]
      whole = record["crc32"] == _crc_of(files)
    except (OSError, ValueError, KeyError, TypeError):
      whole = False
    if not whole:
      return f"{path.name} is damaged"
    recorded += files.items()
  for name, expected in recorded[share::shares]:
    if item is None or name.split("/")[0] in (item, name):
      damage = _compare(checkpoint / name, *expected)
      if damage:
        return f"{name} {damage}"
  return None


def remove_records(checkpoint: pathlib.Path) -> None:
  """Makes it a checkpoint that nobody vouches for, as its files are about to change."""
  for path in checkpoint.glob(RECORD.format("*")):
    path.unlink()


def _compare(path: pathlib.Path, size: int, crc: int) -> str | None:
  try:
    found = path.stat().st_size
    if found != size:
      return f"holds {found} bytes of {size}"
    return None if _size_and_crc(path) == (size, crc) else "holds other bytes than were written"
  except FileNotFoundError:
    return "is missing"
  except OSError as error:
    return f"cannot be read ({error.strerror})"


def _files(checkpoint: pathlib.Path) -> Iterator[pathlib.Path]:
  """All files but records, also those that other processes are writing right now, under another name first."""
  for path in checkpoint.rglob("*"):
    is_record = path.parent == checkpoint and path.name.lstrip(".").startswith("checksums.")
    if not is_record and path.is_file():
      yield path


def _owner(name: str) -> int:
  """The process that wrote a file: Orbax names its folder (`ocdbt.process_3/`) or the file (`process_3`) after it."""
  process = re.search(r"(?:^|[./])process_(\d+)(?:/|$)", name)
  return int(process[1]) if process else 0


def _size_and_crc(path: pathlib.Path) -> tuple[int, int]:
  size = crc = 0
  block = bytearray(BLOCK_BYTES)
  view = memoryview(block)
  with path.open("rb", buffering=0) as file:
    while count := file.readinto(block):
      size, crc = size + count, zlib.crc32(view[:count], crc)
  return size, crc


def _crc_of(files: dict[str, list[int]]) -> int:
  return zlib.crc32(json.dumps(files, sort_keys=True).encode())
