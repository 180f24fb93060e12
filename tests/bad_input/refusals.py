"""Commands that must be refused: run here, through the real command line, in a folder whose every byte is compared."""

import dataclasses
import os
import pathlib
import stat

import pytest

from maxllama4 import cli

MISTAKE, FAILURE = 2, 1  # exit codes: the user's, and the disk's or the data's


@dataclasses.dataclass(frozen=True)
class Refusal:
  code: int
  message: str  # the only line on standard error, without "error: "


class Desk:
  """A folder to stand in, where commands are given; everything in it is watched."""

  def __init__(self, folder: pathlib.Path, captured: pytest.CaptureFixture):
    self.folder, self._captured = folder, captured

  def write(self, name: str, content: bytes | str) -> pathlib.Path:
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path

  def refused(self, *words: object) -> Refusal:
    """What `maxllama4 WORDS` says as it refuses: one line, no output, and nothing on disk is new or changed."""
    before = content_of(self.folder)
    self._captured.readouterr()
    code = cli.main([str(word) for word in words])
    out, err = self._captured.readouterr()
    assert "Traceback" not in out + err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), (code, out, err)
    assert out == ""
    assert content_of(self.folder) == before
    return Refusal(code, lines[0].removeprefix("error: "))

  def mistake(self, *words: object) -> str:
    refusal = self.refused(*words)
    assert refusal.code == MISTAKE, refusal
    return refusal.message

  def failure(self, *words: object) -> str:
    refusal = self.refused(*words)
    assert refusal.code == FAILURE, refusal
    return refusal.message


def content_of(folder: pathlib.Path) -> dict[str, object]:
  """Every file, folder and link below `folder`, with the bytes of files."""
  found: dict[str, object] = {}
  for root, folders, files in os.walk(folder):
    for name in (*folders, *files):
      path = pathlib.Path(root, name)
      mode = path.lstat().st_mode
      found[str(path.relative_to(folder))] = path.read_bytes() if stat.S_ISREG(mode) else mode
  return found


def assert_names(message: str, *parts: str) -> None:
  """That the message is one sentence of a readable length with each of `parts` in it."""
  for part in parts:
    assert part in message, f"{part!r} is not in: {message}"
  assert len(message) < 1500, f"{len(message)} characters"
