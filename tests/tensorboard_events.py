"""What TensorBoard would show of a run, read from its event files."""

import collections
import pathlib
import struct
from typing import Any

from tensorboardX.proto.event_pb2 import Event


def events_of(
  run_dir: pathlib.Path,
) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, Any]]]:
  """Scalars and histograms by step and name."""
  scalars, histograms = collections.defaultdict(dict), collections.defaultdict(dict)
  for path in sorted(run_dir.glob("events.out.tfevents.*")):
    content, place = path.read_bytes(), 0
    while place < len(content):  # a record: length, its checksum, event, its checksum
      (length,) = struct.unpack_from("<Q", content, place)
      event = Event.FromString(content[place + 12 : place + 12 + length])
      place += 16 + length
      for value in event.summary.value:
        if value.HasField("histo"):
          histograms[event.step][value.tag] = value.histo
        else:
          scalars[event.step][value.tag] = value.simple_value
  return scalars, histograms
