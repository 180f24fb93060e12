"""A line on standard error that shows that something long goes on."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def waiting(what: str, expected_seconds: float | None) -> Iterator[None]:
  """Shows `what` and the seconds while the body runs: on a terminal all the while, as a bar if some are expected."""
  start, out, done = time.monotonic(), sys.stderr, threading.Event()

  def show() -> None:
    while not done.wait(0.5):
      seconds = time.monotonic() - start
      shown = f"{seconds:.0f} s"
      if expected_seconds:
        bar = "#" * round(24 * min(1.0, seconds / expected_seconds))
        shown = f"[{bar:<24}] {shown}; the last took {expected_seconds:.0f} s"
      out.write(f"\r\x1b[2K{what} {shown}")
      out.flush()

  thread = threading.Thread(target=show, daemon=True) if out.isatty() else None
  if thread:
    thread.start()
  try:
    yield
  finally:
    done.set()
    if thread:
      thread.join()
      out.write("\r\x1b[2K")
      out.flush()
  if not thread:
    out.write(f"{what}: {time.monotonic() - start:.0f} s\n")
