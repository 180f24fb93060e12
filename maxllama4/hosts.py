"""Several processes as one run: which of them this one is, and how they start and stop together.

On a TPU pod, on GKE and under Slurm the machines say who they are (`CLUSTERS`); elsewhere `distributed.*` does. A process
that nobody gave others never waits for any.
"""

import atexit
import contextlib
import dataclasses
import glob
import os
import pathlib
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping

import jax

from maxllama4.config import Config, ConfigError, DistributedConfig, config_to_dict
from maxllama4.host_links import LEAVE_SECONDS, Coordinator, Links, Member, relay
from maxllama4.settings import flatten

PORT = 8476  # where process 0 waits for the others on TPU pods and GKE
SLURM_PORTS = range(20000, 30000)  # by job, for jobs may share a machine
METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"
# JAX's own watch, in case ours fails. Longer than any pause of Python's threads, through which its heartbeats go (`relay`).
HEARTBEAT_SECONDS = 600
NOTICE_SECONDS = 5  # for the news of a lost process to overtake the collective that fails for it

Variables = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Place:
  """Which process of a run this one is."""

  host: str  # of process 0
  port: int
  num_processes: int
  process_id: int
  local_device_ids: tuple[int, ...] | None = None  # None: all of this machine


def _slurm(variables: Variables) -> Place:
  """A task of a job step (`srun`). Several tasks on a node take one device each."""
  # node[007-011,020]-x,other -> node007-x
  first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", variables["SLURM_STEP_NODELIST"]).split(",")[0]
  tasks, nodes = (int(variables[f"SLURM_STEP_NUM_{name}"]) for name in ("TASKS", "NODES"))
  port = SLURM_PORTS[int(variables["SLURM_JOB_ID"]) % len(SLURM_PORTS)]
  devices = (int(variables["SLURM_LOCALID"]),) if tasks > nodes else None
  return Place(first, port, tasks, int(variables["SLURM_PROCID"]), devices)


def _tpu(variables: Variables) -> Place:
  """A host of a TPU slice, or of several slices (`MEGASCALE_*`), in the order of slices."""
  workers = variables["TPU_WORKER_HOSTNAMES"].split(",")
  slices = int(variables.get("MEGASCALE_NUM_SLICES") or 1)
  first = int(variables.get("MEGASCALE_SLICE_ID") or 0) * len(workers)
  host = variables.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
  place = first + int(variables["TPU_WORKER_ID"])
  return Place(host.split(":")[0], PORT, slices * len(workers), place)


# Who says where a process stands: the variables that all must be set, and what they mean. The first one decides.
CLUSTERS: dict[str, tuple[tuple[str, ...], Callable[[Variables], Place]]] = {
  "Slurm": (
    (
      "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_PROCID",
      "SLURM_LOCALID",
    ),
    _slurm,
  ),
  "GKE": (("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"), _tpu),
}  # fmt: skip


def find_place(config: DistributedConfig, variables: Variables | None = None) -> Place | None:
  """Where this process stands; None when it is the only one.

  What `config` leaves open, the cluster says (`variables`: the environment). Raises: ConfigError when several processes
  are asked for and somebody must still say who they are.
  """
  variables = os.environ if variables is None else variables
  if config.enabled is False:
    return None
  asked = {
    "coordinator_address": config.coordinator_address,
    "num_processes": config.num_processes,
    "process_id": config.process_id,
  }
  given = {name: value for name, value in asked.items() if value is not None}
  missing = [name for name in asked if name not in given]
  place = _place_in_cluster(variables) if missing else None
  if place is None:
    if missing and (given or config.enabled):
      raise ConfigError(
        f"distributed.{missing[0]} is not set, and neither {' nor '.join(CLUSTERS)} nor a TPU pod says what it is; set"
        f" {', '.join(f'distributed.{name}' for name in missing)}."
      )
    if missing:
      return None
    place = Place("", 0, 1, 0)
  address = given.pop("coordinator_address", f"{place.host}:{place.port}")
  host, _, port = address.rpartition(":")
  place = dataclasses.replace(place, host=host.strip("[]"), port=int(port), **given)
  if place.process_id >= place.num_processes:
    raise ConfigError(
      f"this is process {place.process_id} of {place.num_processes} (distributed, or what the cluster says); they are"
      " numbered from 0."
    )
  return place if place.num_processes > 1 else None


def _place_in_cluster(variables: Variables) -> Place | None:
  for needed, place_of in CLUSTERS.values():
    if all(variables.get(name) for name in needed):
      return place_of(variables)
  metadata = _tpu_vm_metadata(variables)
  return _tpu(metadata) if metadata else None


def _tpu_vm_metadata(variables: Variables) -> dict[str, str] | None:
  """What the metadata server of a TPU VM says, under the names that GKE has for it; None elsewhere."""
  is_tpu_vm = any(
    pathlib.Path(vendor).read_text().strip() == "0x1ae0"  # Google
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor")
  )
  server = variables.get("GCE_METADATA_IP", "metadata.google.internal" if is_tpu_vm else None)
  if server is None or (is_tpu_vm and variables.get("TPU_SKIP_MDS_QUERY")):
    return None

  def attribute(name: str) -> str:
    request = urllib.request.Request(
      METADATA.format(server, name), headers={"Metadata-Flavor": "Google"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
      return answer.read().decode().strip()

  try:
    endpoints = attribute("worker-network-endpoints").split(",")
    number = attribute("agent-worker-number")
    slices = re.findall(r"^(MEGASCALE_\w+): *'?(.*?)'?$", attribute("tpu-env"), re.MULTILINE)
  except OSError:
    return None  # a machine of one TPU host, made without them
  names = ",".join(
    endpoint.split(":")[-1] for endpoint in endpoints
  )  # a name, or name:number:address
  return {"TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": number, **dict(slices)}


@contextlib.contextmanager
def start_hosts(config: Config) -> Iterator[None]:
  """Inside, JAX's devices are those of all processes of the run; they enter and leave together.

  When one of them fails inside, or dies, all stop with one sentence that names it. Raises: ConfigError when
  `config.distributed` cannot be met or the processes' settings differ; RuntimeError when one does not come.
  """
  place = find_place(config.distributed)
  if place is None:
    yield
    return
  links = _join(place, config)
  try:
    yield
  except BaseException as error:
    _report(links, error)
    raise
  links.part()
  jax.distributed.shutdown()


def _join(place: Place, config: Config) -> Links:
  """Meets the others, then starts JAX with them."""
  settings = flatten(config_to_dict(config))
  settings = {key: value for key, value in settings.items() if not key.startswith("distributed.")}
  seconds = config.distributed.start_timeout_seconds
  if place.process_id == 0:
    links = Coordinator(place.num_processes)
    with socket.create_server(("", 0)) as free:
      port = free.getsockname()[1]
    links.meet(place.port, settings, {"port": port}, seconds)
  else:
    links = Member(place.process_id, place.num_processes)
    invitation = links.meet(place.host, place.port, settings, seconds)
    port = relay(place.host, invitation["port"], seconds)
  jax.distributed.initialize(
    f"127.0.0.1:{port}",
    place.num_processes,
    place.process_id,
    local_device_ids=place.local_device_ids,
    cluster_detection_method="deactivate",  # `find_place` has done it
    heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
  )
  return links


def _report(links: Links, error: BaseException) -> None:
  """Tells the others, and sees to it that this process ends without waiting for them."""
  code = 2 if isinstance(error, ConfigError) else 1
  if isinstance(error, SystemExit):
    code = int(error.code or 0)
  if isinstance(error, RuntimeError):  # a collective of which a process was lost, perhaps
    time.sleep(NOTICE_SECONDS)
  reason = " ".join(str(error).split()) or type(error).__name__
  links.report("it was asked to" if isinstance(error, SystemExit) else reason, code)
  # JAX would wait for the others as Python exits, and so would a checkpoint that is being written.
  atexit.register(_exit, code)
  deadline = threading.Timer(LEAVE_SECONDS, _exit, (code,))
  deadline.daemon = True
  deadline.start()


def _exit(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
