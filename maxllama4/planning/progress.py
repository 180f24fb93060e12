"""A line on standard error that shows that something long goes on."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def waiting(what: str, expected_seconds: float = 120.0) -> Iterator[None]:
  """Shows `what` and the seconds so far while the body runs, on a terminal as a bar; a bar is full at the seconds expected."""
  start, out, done = time.monotonic(), sys.stderr, threading.Event()

  def show() -> None:
    while not done.wait(0.5):
      seconds = time.monotonic() - start
      share = min(1.0, seconds / expected_seconds)
      bar = "#" * round(24 * share)
      out.write(f"\r\x1b[2K{what} [{bar:<24}] {seconds:.0f} s of about {expected_seconds:.0f}")
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
