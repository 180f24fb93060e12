"""Files that are whole or not there, whenever their writer is killed; and failures of the disk that name their place."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a kill, or a machine that stops, leaves what was there before or all of `content`."""
  unfinished = path.with_name(f".{path.name}.tmp")
  try:
    with unfinished.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync(path.parent)
  except OSError as error:
    with contextlib.suppress(OSError):
      unfinished.unlink()
    raise OSError(error.errno, error.strerror, str(path)) from None


def sync(path: pathlib.Path) -> None:
  """Returns when a file, or a folder's names (new, changed, gone), is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
  """Failures of the disk with the path: those of a write name none."""
  try:
    yield
  except OSError as error:
    if error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error
