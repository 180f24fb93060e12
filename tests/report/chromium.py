"""A headless Chromium, driven by the DevTools protocol over a pair of pipes: no port, no package, no network."""

import base64
import contextlib
import functools
import io
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
  *(
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
  ),
  *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"),
  *("--disable-component-update", "--disable-extensions", "--disable-default-apps"),
  "--remote-debugging-pipe",
)
PATIENCE_SECONDS = 60


@functools.cache
def find_browser() -> str | None:
  """The path of a Chromium or Chrome on PATH that starts; a distribution may ship a name without a browser."""
  for path in filter(None, map(shutil.which, NAMES)):
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
      if subprocess.run([path, "--version"], capture_output=True, timeout=30).returncode == 0:
        return path
  return None


class Browser:
  """One page at a time; `messages` holds what it logged, and every exception that it threw."""

  def __init__(self, requests: int, answers: int):
    self._requests, self._answers = requests, answers
    self._buffer, self._count, self._session = b"", 0, None
    self.messages: list[str] = []
    self.asked: list[str] = []  # addresses that the page asked for
    self._events: list[str] = []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **parameters: Any) -> dict[str, Any]:
    """The result of a command of the protocol."""
    self._count += 1
    message = {"id": self._count, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._requests, json.dumps(message).encode() + b"\0")
    while (answer := self._next()).get("id") != self._count:
      self._note(answer)
    assert "error" not in answer, answer
    return answer["result"]

  def open(
    self, path: pathlib.Path, *, width: int, height: int = 900, scheme: str = "light"
  ) -> None:
    """Shows a file in a window of that width, light or dark."""
    self.messages.clear()
    self.asked.clear()
    self._events.clear()
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    self.call("Emulation.setEmulatedMedia", features=features)
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    self.call("Emulation.setDeviceMetricsOverride", **size)
    self.call("Page.navigate", url=path.as_uri())
    while "Page.loadEventFired" not in self._events:
      self._note(self._next())

  def evaluate(self, expression: str) -> Any:
    """The value of a JavaScript expression in the page."""
    result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")

  def picture(self) -> np.ndarray:
    """The whole page as pixels, [height, width, 3]."""
    width, height = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    data = base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

  def _note(self, message: dict[str, Any]) -> None:
    method, parameters = message.get("method"), message.get("params", {})
    self._events.append(method)
    if method == "Runtime.consoleAPICalled":
      self.messages.append(f"{parameters['type']}: {parameters['args']}")
    elif method == "Runtime.exceptionThrown":
      self.messages.append(f"exception: {parameters['exceptionDetails']}")
    elif method == "Log.entryAdded":
      self.messages.append(f"log: {parameters['entry']}")
    elif method == "Network.requestWillBeSent":
      self.asked.append(parameters["request"]["url"])

  def _next(self) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while b"\0" not in self._buffer:
      ready, _, _ = select.select([self._answers], [], [], max(0, deadline - time.monotonic()))
      assert ready, "the browser does not answer"
      chunk = os.read(self._answers, 1 << 20)
      assert chunk, "the browser ended"
      self._buffer += chunk
    message, _, self._buffer = self._buffer.partition(b"\0")
    return json.loads(message)


@contextlib.contextmanager
def running_browser(path: str, profile: pathlib.Path) -> Iterator[Browser]:
  """A browser with a profile of its own, ended on leaving. It reads commands from its descriptor 3, answers on 4."""
  read_requests, requests = os.pipe()
  answers, write_answers = os.pipe()
  shell = f'exec "$@" 3<&{read_requests} 4>&{write_answers}'
  command = ["bash", "-c", shell, "bash", path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
  with (profile.parent / "browser.log").open("wb") as log:
    process = subprocess.Popen(
      command, pass_fds=(read_requests, write_answers), stdout=log, stderr=log
    )
  os.close(read_requests)
  os.close(write_answers)
  try:
    yield Browser(requests, answers)
  finally:
    os.close(requests)
    os.close(answers)
    process.terminate()
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
