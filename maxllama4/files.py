"""Files that are whole or not there, whenever their writer is killed."""

import os
import pathlib


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a kill, or a machine that stops, leaves what was there before or all of `content`."""
  unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with unfinished.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(unfinished, path)
  sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
  """Returns when the folder's names (new, changed, gone) are on the disk."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
