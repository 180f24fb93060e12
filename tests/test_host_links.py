"""How processes meet and part; what happens when one is lost is in training/test_hosts.py, for it ends the process."""

import concurrent.futures
import socket
import time

import pytest

from maxllama4.config import ConfigError
from maxllama4.host_links import SILENCE_SECONDS, Connection, Coordinator, Member, relay

SETTINGS = {"training.steps": 5, "data.paths": ["a", "b"]}


@pytest.fixture
def port():
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


@pytest.fixture
def background():
  with concurrent.futures.ThreadPoolExecutor() as pool:
    yield pool.submit


def come(port, process_id, num_processes, settings=SETTINGS, seconds=20):
  member = Member(process_id, num_processes)
  return member, member.meet("localhost", port, settings, seconds)


def hello(port, process_id, num_processes):
  """The socket of a process that came and may go."""
  while True:
    try:
      stream = socket.create_connection(("localhost", port))
      break
    except ConnectionRefusedError:
      time.sleep(0.01)
  message = {"process_id": process_id, "num_processes": num_processes, "settings": SETTINGS}
  Connection(stream).send(message)
  return stream


def failure(future):
  error = future.exception(timeout=30)
  return type(error), str(error)


def test_all_get_the_invitation_once_all_are_there_and_part_together(port, background):
  first = background(come, port, 1, 3)
  coordinator = Coordinator(3)
  meeting = background(coordinator.meet, port, SETTINGS, {"port": 7}, 20)
  for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"process_id": [1]}\n', b"[]\n", b""):
    while True:  # until the coordinator listens
      try:
        stranger = socket.create_connection(("localhost", port))
        break
      except ConnectionRefusedError:
        time.sleep(0.01)
    stranger.sendall(words)
    stranger.close()
  assert not first.done() and not meeting.done()
  second = background(come, port, 2, 3)
  meeting.result(timeout=30)
  members = [future.result(timeout=30) for future in (first, second)]
  assert [invitation for _, invitation in members] == [{"port": 7}] * 2

  parting = [background(members[0][0].part), background(coordinator.part)]
  assert not concurrent.futures.wait(parting, timeout=0.2).done
  members[1][0].part()
  for future in parting:
    future.result(timeout=30)


def test_who_does_not_come_is_named_to_those_who_have(port, background):
  member = background(come, port, 1, 4)
  with pytest.raises(RuntimeError, match=r"processes \[2, 3\] of 4 have not come .* within 1 s"):
    Coordinator(4).meet(port, SETTINGS, {}, 1)
  kind, message = failure(member)
  assert kind is RuntimeError and "process 0 of 4 stopped: processes [2, 3] of 4" in message


def test_a_coordinator_that_does_not_come_is_named_with_its_address(port):
  with pytest.raises(
    RuntimeError, match=rf"process 0 was not found at localhost:{port} within 0 s"
  ):
    Member(1, 2).meet("localhost", port, SETTINGS, 0)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((1, 2, SETTINGS | {"training.steps": 6}), "training.steps=5 in process 0, but 6 in process 1"),
    ((1, 2, SETTINGS | {"run_dir": "x"}), "run_dir=None in process 0, but x in process 1"),
    ((1, 3), "came as number 1 of 3, but process 0 waits for 1 to 1 of 2"),
    ((2, 2), "came as number 2 of 2"),
  ],
)
def test_processes_that_do_not_belong_together_are_a_mistake_that_both_name(
  port, background, arguments, message
):
  member = background(come, port, *arguments)
  with pytest.raises(ConfigError, match=message):
    Coordinator(2).meet(port, SETTINGS, {}, 20)
  kind, words = failure(member)
  assert kind is ConfigError and message in words


def test_a_place_belongs_to_one_process_unless_that_is_gone(port, background):
  gone = background(hello, port, 1, 3)
  coordinator = Coordinator(3)
  meeting = background(coordinator.meet, port, SETTINGS, {}, 20)
  while not coordinator._members:
    time.sleep(0.01)
  gone.result(timeout=30).close()
  again = background(come, port, 1, 3)
  while not coordinator._members[1].is_open():
    time.sleep(0.01)
  twice = background(come, port, 1, 3)
  for future in (meeting, again, twice):
    kind, message = failure(future)
    assert kind is ConfigError and "two processes came with distributed.process_id=1" in message


def test_a_port_in_use_is_named(port):
  with socket.create_server(("", port)), pytest.raises(RuntimeError, match=f"port {port} of this"):
    Coordinator(2).meet(port, SETTINGS, {}, 1)


def test_a_relay_waits_for_the_far_end_and_hides_that_it_is_gone(port):
  near = socket.create_connection(("127.0.0.1", relay("127.0.0.1", port, 20)))
  near.sendall(b"early")
  with socket.create_server(("127.0.0.1", port)) as server:
    far, _ = server.accept()
    assert far.recv(5) == b"early"
    far.sendall(b"answer")
    assert near.recv(6) == b"answer"
    far.close()
  near.settimeout(0.3)
  with pytest.raises(TimeoutError):
    near.recv(1)


def test_the_system_gives_a_silent_machine_the_stated_time():
  with socket.create_server(("localhost", 0)) as server:
    stream = socket.create_connection(server.getsockname())
    connection = Connection(stream)
    idle, interval, count = (
      stream.getsockopt(socket.IPPROTO_TCP, name)
      for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert idle + interval * count == SILENCE_SECONDS
    connection.close()
