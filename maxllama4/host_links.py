"""What holds the processes of a run together: a TCP connection from each of them to process 0.

An open connection says that the process at its other end lives. The system closes it the moment a process dies, however
it dies; where a machine or the network goes, TCP's keepalive does so after `SILENCE_SECONDS`. Whoever sees that tells the
others, and all of them stop with one sentence, even if their main threads hang in a collective that nobody will finish.
"""

import abc
import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from maxllama4.settings import ConfigError

SILENCE_SECONDS = 30  # until a machine that says nothing any more counts as lost
LEAVE_SECONDS = 5  # for the others to read why they are to stop
HELLO_SECONDS = 10  # for a process that has connected to say which one it is

Message = dict[str, Any]


class Connection:
  """JSON messages, one a line, over a socket."""

  def __init__(self, stream: socket.socket):
    self._socket = stream
    self._file = stream.makefile("rb")
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": (SILENCE_SECONDS - 10) // 5}
    for name, value in (settings | {"TCP_USER_TIMEOUT": 1000 * SILENCE_SECONDS}).items():
      if hasattr(socket, name):  # Linux has them all
        stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def send(self, message: Message) -> None:
    """To an end that is gone: nothing; whoever receives from it finds out."""
    with contextlib.suppress(OSError):
      self._socket.sendall(json.dumps(message).encode() + b"\n")

  def receive(self, timeout_seconds: float | None = None) -> Message | None:
    """The next message; None when the other end is gone, silent for too long, or speaks another language."""
    self._socket.settimeout(timeout_seconds)
    try:
      message = json.loads(self._file.readline())
    except (OSError, ValueError):
      return None
    return message if isinstance(message, dict) else None

  def is_open(self) -> bool:
    """Whether the other end, which has nothing to say, is still there."""
    self._socket.setblocking(False)
    try:
      return self._socket.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
      return True
    except OSError:
      return False

  def close(self) -> None:
    self._file.close()
    self._socket.close()


class Links(abc.ABC):
  """One process's view of the others."""

  def __init__(self, process_id: int, num_processes: int):
    self.process_id, self.num_processes = process_id, num_processes
    self._leaving = False
    self._lock = threading.Lock()

  def report(self, sentence: str, code: int) -> None:
    """Tells the others that this process stops, and why; they stop, too."""
    if self._leave():
      self._tell(f"process {self.process_id} of {self.num_processes} stopped: {sentence}", code)

  @abc.abstractmethod
  def _tell(self, sentence: str, code: int) -> None:
    """Sends the others what `report` is given."""

  def _leave(self) -> bool:
    """Whether the caller is the first to end this process's part in the run."""
    with self._lock:
      first, self._leaving = not self._leaving, True
    return first

  def _end(self, sentence: str, code: int) -> None:
    """Ends the process, unless its main thread is about to, which has a reason of its own."""
    if self._leave():
      self._tell(sentence, code)
      exit_at_once(sentence, code)

  def _lost(self, process_id: int) -> str:
    return (
      f"process {process_id} of {self.num_processes} is lost (killed, or its machine or network is gone); see its log,"
      " then start all processes again: the run goes on from its newest checkpoint."
    )


class Coordinator(Links):
  """Process 0: all others are connected to it."""

  def __init__(self, num_processes: int):
    super().__init__(0, num_processes)
    self._members: dict[int, Connection] = {}
    self._watchers: list[threading.Thread] = []
    self._unfinished = set(range(1, num_processes))
    self._all_finished = threading.Event()

  def meet(self, port: int, settings: Message, invitation: Message, seconds: float) -> None:
    """Returns when all others are there, and know `invitation`.

    Raises: ConfigError when one of them has other settings, or a place that is taken; RuntimeError when one has not
    come within `seconds`, or the port is taken.
    """
    deadline = time.monotonic() + seconds
    with _listen(port) as server:
      try:
        while len(self._members) < self.num_processes - 1:
          server.settimeout(max(0.001, deadline - time.monotonic()))
          self._admit(Connection(server.accept()[0]), settings)
      except TimeoutError:
        missing = sorted(self._unfinished - set(self._members))
        raise self._refusal(
          RuntimeError(
            f"processes {missing} of {self.num_processes} have not come to port {port} of process 0 within"
            f" {seconds:.0f} s (distributed.start_timeout_seconds); look at what they say."
          )
        ) from None
    for process_id, member in self._members.items():
      member.send(invitation)
      self._watchers.append(_in_background(self._watch, process_id, member))

  def part(self) -> None:
    """Returns when all others are at the end of the run, too."""
    self._all_finished.wait()
    if self._leave():
      for member in self._members.values():
        member.send({"part": True})

  def _admit(self, newcomer: Connection, settings: Message) -> None:
    hello = newcomer.receive(HELLO_SECONDS)
    if hello is None or not isinstance(hello.get("process_id"), int):
      newcomer.close()  # a stranger
      return
    place, problem = hello["process_id"], None
    earlier = self._members.get(place)
    if hello["num_processes"] != self.num_processes or place not in self._unfinished:
      problem = (
        f"a process came as number {place} of {hello['num_processes']}, but process 0 waits for 1 to"
        f" {self.num_processes - 1} of {self.num_processes}; give all the same distributed.num_processes."
      )
    elif earlier is not None and earlier.is_open():
      problem = f"two processes came with distributed.process_id={place}; give each its own."
    else:
      problem = _difference(settings, hello["settings"], place)
    if problem:
      newcomer.send({"stop": problem, "code": 2})
      raise self._refusal(ConfigError(problem))
    self._members[place] = newcomer

  def _refusal(self, error: Exception) -> Exception:
    """`error`, of which all that have come are told."""
    self.report(str(error), 2 if isinstance(error, ConfigError) else 1)
    return error

  def _tell(self, sentence: str, code: int) -> None:
    for member in self._members.values():
      member.send({"stop": sentence, "code": code})
    deadline = time.monotonic() + LEAVE_SECONDS
    # Each watcher ends as its process hangs up; to leave before that could cut the message off.
    for watcher in self._watchers:
      if watcher is not threading.current_thread():
        watcher.join(max(0, deadline - time.monotonic()))

  def _watch(self, process_id: int, member: Connection) -> None:
    while message := member.receive():
      if "stop" in message:
        return self._end(message["stop"], message["code"])
      self._unfinished.discard(process_id)
      if not self._unfinished:
        self._all_finished.set()
    if process_id in self._unfinished:
      self._end(self._lost(process_id), 1)


class Member(Links):
  """Any other process, connected to process 0."""

  def __init__(self, process_id: int, num_processes: int):
    super().__init__(process_id, num_processes)
    self._parted = threading.Event()

  def meet(self, host: str, port: int, settings: Message, seconds: float) -> Message:
    """Process 0's invitation, once all have come.

    Raises: RuntimeError when process 0 is not found within `seconds`, or says that the run cannot start; ConfigError
    when that is for a setting.
    """
    deadline = time.monotonic() + seconds
    self._link = Connection(_connect(host, port, seconds))
    hello = {"process_id": self.process_id, "num_processes": self.num_processes}
    self._link.send(hello | {"settings": settings})
    answer = self._link.receive(max(0, deadline - time.monotonic()) + HELLO_SECONDS)
    if answer is None:
      raise RuntimeError(
        f"process 0 left {host}:{port} before all processes had come; see its log."
      )
    if "stop" in answer:
      raise (ConfigError if answer["code"] == 2 else RuntimeError)(answer["stop"])
    _in_background(self._watch)
    return answer

  def part(self) -> None:
    """Returns when all others are at the end of the run, too."""
    self._link.send({"finished": True})
    self._parted.wait()
    self._leave()

  def _tell(self, sentence: str, code: int) -> None:
    self._link.send({"stop": sentence, "code": code})

  def _watch(self) -> None:
    while message := self._link.receive():
      if "stop" in message:
        return self._end(message["stop"], message["code"])
      return self._parted.set()
    self._end(self._lost(0), 1)


def exit_at_once(sentence: str, code: int) -> NoReturn:
  """Ends the process from any thread, whatever the others do."""
  sys.stdout.flush()
  sys.stderr.write(f"error: {sentence}\n")
  sys.stderr.flush()
  os._exit(code)


def relay(host: str, port: int, seconds: float) -> int:
  """A port of this machine that leads to `host:port`, which may open later, and stays open when that end is gone.

  JAX's client ends its process with a stack trace the moment it sees the coordination service go. Behind a relay it does
  not see that, and the process ends in words (`Member._watch`).
  """
  server = socket.create_server(("127.0.0.1", 0))
  _in_background(_relay_connections, server, host, port, seconds)
  return server.getsockname()[1]


def _relay_connections(server: socket.socket, host: str, port: int, seconds: float) -> None:
  kept = []  # a socket that nobody holds would be closed
  while True:
    near, _ = server.accept()
    far = _connect(host, port, seconds)
    far.settimeout(None)
    kept += [near, far]
    _in_background(_pump, near, far)
    _in_background(_pump, far, near)


def _pump(source: socket.socket, sink: socket.socket) -> None:
  with contextlib.suppress(OSError):
    while data := source.recv(1 << 16):
      sink.sendall(data)


def _in_background(function, *arguments) -> threading.Thread:
  thread = threading.Thread(target=function, args=arguments, daemon=True)
  thread.start()
  return thread


def _listen(port: int) -> socket.socket:
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  try:
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
  except OSError as error:
    raise RuntimeError(
      f"port {port} of this machine cannot be used ({error.strerror}); end the run that holds it, or set another one in"
      " distributed.coordinator_address."
    ) from None


def _connect(host: str, port: int, seconds: float) -> socket.socket:
  """A socket to process 0, which may start later, or have no name yet."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      return socket.create_connection((host, port), timeout=HELLO_SECONDS)
    except OSError as error:
      if time.monotonic() > deadline:
        raise RuntimeError(
          f"process 0 was not found at {host}:{port} within {seconds:.0f} s (distributed.start_timeout_seconds):"
          f" {error}; start it, or correct distributed.coordinator_address."
        ) from None
      time.sleep(0.2)


def _difference(mine: Message, theirs: Message, process_id: int) -> str | None:
  """The first setting that two processes of a run do not share."""
  mine = json.loads(json.dumps(mine))
  for key in sorted({*mine, *theirs}):
    if mine.get(key) != theirs.get(key):
      return (
        f"{key}={mine.get(key)} in process 0, but {theirs.get(key)} in process {process_id}; start all processes with"
        " the same settings."
      )
  return None
