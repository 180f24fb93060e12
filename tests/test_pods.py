"""Who says which process this is, and that the manifests and their page say what the program reads."""

import dataclasses
import http.server
import json
import math
import os
import pathlib
import re
import subprocess
import threading

import pytest
import yaml

from maxllama4.config import ConfigError, DistributedConfig, load_config
from maxllama4.host_links import SILENCE_SECONDS
from maxllama4.hosts import CLUSTERS, PORT, SLURM_PORTS, Place, find_place

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pods.md").read_text()
SLURM_SCRIPT = ROOT / "docker" / "train.slurm"
SLURM = {
  "SLURM_JOB_ID": "1234567",
  "SLURM_STEP_NODELIST": "gpu[007-010]",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_NUM_NODES": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
}
SLURM_PLACE = Place("gpu007", 24567, 4, 2)
GKE = {"TPU_WORKER_HOSTNAMES": "m-slice-0-0.m,m-slice-0-1.m", "TPU_WORKER_ID": "1"}
ALL = {"coordinator_address": "host0:8476", "num_processes": 3, "process_id": 1}


def place(variables=(), **settings):
  return find_place(DistributedConfig(**settings), dict(variables))


def test_a_process_that_nobody_gave_others_is_alone():
  assert place() is None
  assert place(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
  assert place({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
  assert place(num_processes=1, process_id=0, coordinator_address="host0:8476") is None
  # In a batch script or an interactive shell: an allocation, but no step of several tasks.
  assert place({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None
  assert place(SLURM, enabled=False) is None


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_cluster_counts_only_with_all_its_variables(cluster):
  variables = {"Slurm": SLURM, "GKE": GKE}[cluster]
  assert set(variables) == set(CLUSTERS[cluster][0])
  assert place(variables) is not None
  for name in variables:
    assert place({key: value for key, value in variables.items() if key != name}) is None


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("node1", "node1"),
    ("node1,other[3-4]", "node1"),
    ("node[001-003,007],other", "node001"),
    ("node[5,7-8]-ib", "node5-ib"),
    ("rack[0-1]n[2-3],x", "rack0n2"),
  ],
)
def test_slurms_first_node_coordinates(nodes, first):
  found = place(SLURM | {"SLURM_STEP_NODELIST": nodes})
  assert found == dataclasses.replace(SLURM_PLACE, host=first)
  assert found.port in SLURM_PORTS


def test_several_tasks_on_a_node_take_one_device_each():
  variables = SLURM | {"SLURM_STEP_NUM_TASKS": "32", "SLURM_PROCID": "13", "SLURM_LOCALID": "5"}
  assert place(variables) == Place("gpu007", 24567, 32, 13, (5,))


def test_hosts_of_several_slices_are_numbered_slice_by_slice():
  assert place(GKE) == Place("m-slice-0-0.m", PORT, 2, 1)
  slices = {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "m-slice-0-0.m:8080",
  }
  assert place(GKE | slices) == Place("m-slice-0-0.m", PORT, 6, 5)


@pytest.fixture
def metadata_server():
  """A server that answers as that of a TPU VM does; yields its address and what it knows."""
  known = {"agent-worker-number": "1", "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
      found = name in known and self.headers["Metadata-Flavor"] == "Google"
      self.send_response(200 if found else 404)
      self.end_headers()
      self.wfile.write(known.get(name, "").encode())

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}, known
  server.shutdown()
  server.server_close()


def test_a_tpu_vm_is_told_by_its_metadata_server(metadata_server):
  variables, known = metadata_server
  known["tpu-env"] = "ACCELERATOR_TYPE: 'v5p-16'\nWORKER_ID: '1'\n"
  assert place(variables) == Place("10.0.0.1", PORT, 2, 1)
  known["worker-network-endpoints"] = "10.0.0.8,10.0.0.9"
  known["tpu-env"] += "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
  known["tpu-env"] += "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\n"
  assert place(variables) == Place("10.0.0.1", PORT, 4, 3)
  known.clear()
  assert place(variables) is None


def test_settings_go_before_what_the_cluster_says():
  assert place(**ALL) == Place("host0", 8476, 3, 1)
  assert place(SLURM, **ALL) == Place("host0", 8476, 3, 1)
  moved = place(SLURM, coordinator_address="[::1]:99")
  assert moved == dataclasses.replace(SLURM_PLACE, host="::1", port=99)


@pytest.mark.parametrize(
  ("settings", "missing"),
  [
    ({"enabled": True}, "coordinator_address, distributed.num_processes, distributed.process_id"),
    ({"num_processes": 3}, "coordinator_address, distributed.process_id"),
    ({"coordinator_address": "a:1", "process_id": 0}, "num_processes"),
  ],
)
def test_a_request_that_cannot_be_met_names_what_is_missing(settings, missing):
  with pytest.raises(ConfigError, match=f"nor a TPU pod says .*; set distributed.{missing}\\.$"):
    place(**settings)


def test_a_setting_that_contradicts_the_cluster_is_a_mistake():
  with pytest.raises(ConfigError, match="this is process 2 of 2"):
    place(SLURM, num_processes=2)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (ALL | {"process_id": 3}, "process_id=3 must be from 0 to distributed.num_processes=3 less 1"),
    (ALL | {"process_id": -1}, "process_id=-1 must be from 0"),
    (ALL | {"num_processes": 0}, "num_processes=0 must be greater than 0"),
    (ALL | {"coordinator_address": "host0"}, "coordinator_address=host0 is not host:port"),
    (ALL | {"coordinator_address": "host0:99999"}, "coordinator_address=host0:99999 is not"),
    (ALL | {"enabled": False}, "enabled=false, but distributed also says"),
    ({"start_timeout_seconds": 0}, "start_timeout_seconds=0 must be greater than 0"),
  ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    DistributedConfig(**settings)


# The manifests


def pod_template():
  jobset = yaml.safe_load((ROOT / "docker" / "jobset.yml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (replicated,) = jobset["spec"]["replicatedJobs"]
  return jobset, replicated["template"]["spec"]


def test_the_jobset_runs_a_configuration_that_loads_with_the_images_command():
  _, job = pod_template()
  (container,) = job["template"]["spec"]["containers"]
  image = (ROOT / "docker" / "Dockerfile.tpu").read_text()
  assert 'ENTRYPOINT ["python"]' in image and "command" not in container
  script, config_file, *overrides = container["args"]
  assert (ROOT / script).exists()
  config = load_config(ROOT / config_file, overrides)
  assert config.distributed == DistributedConfig()  # GKE says it
  (mount,) = container["volumeMounts"]
  assert config.run_dir.startswith(f"{mount['mountPath']}/")
  assert f"WORKDIR {pathlib.Path(mount['mountPath']).parent}\n" in image
  assert [port["containerPort"] for port in container["ports"]] == [PORT]
  (volume,) = job["template"]["spec"]["volumes"]
  assert volume["name"] == mount["name"]


def test_the_jobset_starts_a_pod_a_host_and_all_of_them_again_when_one_fails():
  jobset, job = pod_template()
  pod = job["template"]["spec"]
  chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
  chips_a_host = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
  assert job["parallelism"] == job["completions"] == chips // chips_a_host
  assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_the_slurm_script_asks_for_one_task_a_node_and_a_signal_before_the_end():
  options = dict(
    re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SLURM_SCRIPT.read_text(), re.MULTILINE)
  )
  assert int(options["nodes"]) > 1 and options["ntasks-per-node"] == "1"
  signal, _, seconds = options["signal"].partition("@")
  assert signal == "TERM" and int(seconds) >= 60  # of the tasks; "B:" would be of the script
  assert "requeue" in options and options["open-mode"] == "append"


def run_slurm_script(folder, reason, *words):
  """What the script has `srun` and `scontrol` do, both of them stand-ins that write down their words."""
  (folder / "bin").mkdir(exist_ok=True)
  for name in ("srun", "scontrol"):
    stand_in = folder / "bin" / name
    stand_in.write_text(f'#!/bin/bash\nprintf "%s\\n" "${{0##*/}}" "$@" >> {folder}/calls\n')
    stand_in.chmod(0o755)
  (folder / "events.jsonl").write_text(json.dumps({"event": "stopped", "reason": reason}) + "\n")
  (folder / "calls").write_text("")
  path = f"{folder / 'bin'}:{os.environ['PATH']}"
  environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "77"}
  run = subprocess.run(
    [SLURM_SCRIPT, *words], env=environment, capture_output=True, text=True, check=False
  )
  return run, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("reason", "requeued"), [("done", []), ("signal", ["requeue", "77"])])
def test_the_slurm_script_trains_and_goes_back_into_the_queue_until_it_is_done(
  tmp_path, reason, requeued
):
  words = ("configs/llama4_scout.yml", f"run_dir={tmp_path}", "training.steps=3")
  run, calls = run_slurm_script(tmp_path, reason, *words)
  assert run.returncode == 0, run.stderr
  at = calls.index("scontrol") if requeued else len(calls)
  assert calls[0] == "srun" and calls[at + 1 :] == requeued
  *_, python, script = calls[1 : at - len(words)]
  assert (python, script) == (".venv/bin/python", "train.py")
  path, *overrides = calls[at - len(words) : at]
  assert load_config(ROOT / path, overrides).training.steps == 3


def test_the_slurm_script_without_a_run_dir_says_how_to_use_it(tmp_path):
  run, calls = run_slurm_script(tmp_path, "done", "configs/llama4_scout.yml")
  assert run.returncode == 2 and "usage: sbatch docker/train.slurm" in run.stderr and not calls


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_manifest_and_page_name_every_variable_that_decides(cluster):
  manifest = {"Slurm": SLURM_SCRIPT, "GKE": ROOT / "docker" / "jobset.yml"}[cluster].read_text()
  for name in CLUSTERS[cluster][0]:
    assert name in manifest and f"`{name}`" in PAGE
  prefixes = {"Slurm": "SLURM_", "GKE": "TPU_WORKER_"}
  named = set(re.findall(rf"\b{prefixes[cluster]}\w+", manifest))
  assert named == set(CLUSTERS[cluster][0])


def test_the_page_states_the_times_and_ports_that_are_so():
  assert f"within {SILENCE_SECONDS} seconds" in PAGE
  assert f"port {PORT}" in PAGE
  assert f"{SLURM_PORTS.start} + the job's number modulo {len(SLURM_PORTS)}" in PAGE
  assert f"{DistributedConfig().start_timeout_seconds} seconds" in PAGE
