"""The files in cluster/ are what Ray, KubeRay and Slurm take, and fit the project's own configurations and versions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CRDS = ROOT.parent / "shared" / "schemas" / "kuberay"
SBATCH = CLUSTER / "slurm" / "ppo.sbatch"


def documents() -> Iterator[dict[str, Any]]:
    for path in sorted((CLUSTER / "kuberay").glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


KINDS = ("RayCluster", "RayJob", "RayService")


def ray_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def by_kind(*kinds: str) -> pytest.MarkDecorator:
    found = [document for document in RAY_DOCUMENTS if document["kind"] in kinds]
    return pytest.mark.parametrize("document", found, ids=lambda document: document["kind"])


RAY_DOCUMENTS = [document for document in documents() if document["kind"] in KINDS]


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused: the API server drops them without a word."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: closed(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def test_kuberay_has_a_cluster_a_job_and_a_service():
    assert sorted(document["kind"] for document in RAY_DOCUMENTS) == sorted(KINDS)


@by_kind(*KINDS)
def test_manifest_is_valid_against_the_custom_resource_definition(document):
    path = CRDS / f"ray.io_{document['kind'].lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"the custom resource definition is not at {path}")
    versions = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]["versions"]
    [version] = [version for version in versions if document["apiVersion"] == f"ray.io/{version['name']}"]
    jsonschema.Draft7Validator(closed(version["schema"]["openAPIV3Schema"])).validate(document)


@by_kind("RayCluster", "RayJob")
def test_pods_share_storage_and_have_a_token_and_whole_nodes(document):
    claims = [each["metadata"]["name"] for each in documents() if each["kind"] == "PersistentVolumeClaim"]
    spec = ray_spec(document)
    assert spec["authOptions"] == {"mode": "token"}
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    for template in templates:
        pod = template["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] in claims
        [container] = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shared-memory": "/dev/shm"}
        assert container["image"] == "RLHF_RAY_IMAGE", "a placeholder, never somebody's registry"
    [workers] = spec["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    # The driver asks for all GPUs at once, so nothing may scale up only later.
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]


@by_kind(*KINDS)
def test_ray_version_is_the_one_that_the_package_depends_on(document):
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["judge"]
    [found] = [match for line in dependencies if (match := re.match(r"ray\[.*\]>=([\d.]+),<([\d.]+)$", line))]
    low, high = (tuple(map(int, bound.split("."))) for bound in found.groups())
    assert low <= tuple(map(int, ray_spec(document)["rayVersion"].split("."))) < high


def test_the_job_runs_a_configuration_that_exists_with_folders_on_the_shared_volume():
    [job] = [document for document in RAY_DOCUMENTS if document["kind"] == "RayJob"]
    program, command, config, *overrides = job["spec"]["entrypoint"].split()
    assert (program, command) == ("rlhf-ray", "ppo")
    assert (ROOT / config.removeprefix("/shared/")).is_file()
    assert overrides == ["paths.data=/shared/data", "paths.runs=/shared/runs", "--resume"]
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"], "two attempts never have a cluster each"


def test_only_known_pods_reach_the_ports_that_ray_and_the_service_have():
    [policy] = [document["spec"] for document in documents() if document["kind"] == "NetworkPolicy"]
    assert policy["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert policy["policyTypes"] == ["Ingress"]
    among_themselves, *from_outside = policy["ingress"]
    assert among_themselves == {"from": [{"podSelector": policy["podSelector"]}]}
    ports = {
        port["containerPort"]: port["name"]
        for document in RAY_DOCUMENTS
        for port in ray_spec(document)["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    open_to = {}
    for rule in from_outside:
        [who] = rule["from"]
        labels = {name: value for selector in who.values() for name, value in selector.get("matchLabels", {}).items()}
        assert len(labels) == 1, "nobody is let in without a name"
        # KubeRay opens 8080 for metrics in every container.
        open_to[next(iter(labels.values()))] = {ports.get(port["port"], port["port"]) for port in rule["ports"]}
    [job] = [document["metadata"]["name"] for document in RAY_DOCUMENTS if document["kind"] == "RayJob"]
    assert open_to == {
        "kuberay-operator": {"dashboard", "serve"},
        job: {"dashboard"},
        "monitoring": {8080, "serve"},
        "true": {"serve"},
    }


def test_cluster_launcher_takes_the_file_and_every_node_starts_with_the_token():
    config = prepare_config(yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text(encoding="utf-8")))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    for node in ("head", "worker"):
        start = config[f"{node}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert "ray start" in start


@pytest.fixture
def slurm(tmp_path):
    """A submit folder whose `activate` puts stand-ins for Slurm, Ray and Python on the PATH."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    stand_ins = {
        "scontrol": 'echo "scontrol $*" >>calls\n[[ $1 == requeue ]] || printf "node-1\\nnode-2\\n"',
        "srun": (
            'echo "srun $*" >>calls\nwhile [[ $1 == --* ]]; do shift; done\n'
            "[[ $1 == hostname ]] && echo 10.0.0.1 || exec sleep 60"
        ),
        "ray": (
            'echo "ray $*" >>calls\n[[ -s $RAY_AUTH_TOKEN_PATH ]] && stat -c %a "$RAY_AUTH_TOKEN_PATH" >>modes\n'
            "[[ $2 == stop ]] && { touch stopped; exit 0; }\necho submitted\n"
            'while [[ -n ${JOB_HANGS:-} && ! -e stopped ]]; do sleep 0.05; done\nexit "${JOB_STATUS:-0}"'
        ),
        "python": (
            "[[ $2 == *secrets* ]] && { printf 0123456789abcdef; exit 0; }\n"
            'until (($(grep -c "ray start" calls) == $4)); do sleep 0.05; done\necho joined >>calls'
        ),
    }
    for name, body in stand_ins.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')

    def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
        job = {
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_GPUS_ON_NODE": "8",
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RLHF_RAY")}
        return subprocess.Popen(
            ["bash", str(SBATCH), *arguments],
            env=environment | job | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return tmp_path, start


@pytest.mark.parametrize("script", [SBATCH, CLUSTER / "retry.sh"], ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_slurm_script_starts_all_nodes_then_the_job_and_takes_the_token_away(slurm):
    folder, start = slurm
    process = start("configs/x.yaml", "run.name=second", JOB_STATUS="2")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2, output
    calls = (folder / "calls").read_text().splitlines()
    started = sorted((call for call in calls if "ray start" in call), key=lambda call: "--head" not in call)
    assert len(started) == 2
    assert "--nodelist=node-1" in started[0]
    assert "--head" in started[0]
    assert "--nodelist=node-2" in started[1]
    assert "--address=10.0.0.1:6379" in started[1]
    assert all("--num-gpus=8" in call for call in started)
    # srun does not take it over from the job, in some versions: all of Ray would be on one core.
    starts = [call for call in calls if call.startswith("srun") and "ray start" in call]
    assert len(starts) == 2
    assert all("--cpus-per-task=64" in call for call in starts)
    assert calls[-2] == "joined", "the job is submitted once all nodes are there"
    expected = f"rlhf-ray ppo configs/x.yaml paths.data={folder}/data paths.runs={folder}/runs run.name=second --resume"
    assert calls[-1].startswith("ray job submit --address")
    assert calls[-1].endswith(f" -- bash cluster/retry.sh 5 {expected}")
    assert (folder / "modes").read_text().split() == ["600"], "only the owner may read the token"
    assert not list(folder.glob(".ray-token*"))


@pytest.mark.parametrize(
    ("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["time nearly up", "cancelled"]
)
def test_slurm_script_stops_the_job_and_requeues_it_where_time_was_up(slurm, sent, requeued):
    folder, start = slurm
    process = start("configs/x.yaml", JOB_HANGS="yes")  # `ray job submit` ends with 0 when its job was stopped
    assert process.stdout.readline() == "submitted\n"
    process.send_signal(sent)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    calls = (folder / "calls").read_text().splitlines()
    [stopped] = [index for index, call in enumerate(calls) if call.startswith("ray job stop")]
    assert calls[stopped].endswith("slurm-7")
    assert calls[stopped + 1 :] == (["scontrol requeue 7"] if requeued else [])
    assert not list(folder.glob(".ray-token*"))


def test_slurm_requeues_and_warns_the_script_of_the_end():
    options = re.findall(r"^#SBATCH (--\S+)", SBATCH.read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@1800"} <= set(options)
    # The head's environment says how long a stopped job has; Slurm kills after 1800 s.
    [wait_s] = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", SBATCH.read_text())
    assert int(wait_s) < 1800


def test_what_the_slurm_script_leaves_in_the_folder_is_not_uploaded_with_the_next_job():
    """Ray sends what git does not ignore; the hub's cache alone would be more than it takes."""
    ignored = (CLUSTER.parent / ".gitignore").read_text().splitlines()
    assert {"/huggingface/", "/.ray-token-*", "/slurm-*.log", "/data", "/runs"} <= set(ignored)


def test_slurm_script_without_a_configuration_says_how_it_is_used(slurm):
    _, start = slurm
    process = start()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert output.startswith("usage:")


DOCKERFILES = sorted((CLUSTER / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_made_of_the_lock_and_runs_as_nobody_in_particular(path):
    instructions = re.sub(r"\\\n", " ", path.read_text()).splitlines()
    by_kind = {kind: [line for line in instructions if line.startswith(f"{kind} ")] for kind in ("FROM", "COPY", "RUN")}
    [base] = by_kind["FROM"]
    assert re.fullmatch(r"FROM [a-z/]+:[a-z0-9.-]*\d[a-z0-9.-]*", base), "a base image with a version"
    for line in by_kind["COPY"]:
        for source in line.split()[1:-1]:
            assert (ROOT / source).exists()
    lock = f"requirements/{path.name.split('.')[0]}.lock"
    assert any(
        f"uv pip install --no-deps {flags} -r {lock}" in line
        for line in by_kind["RUN"]
        for flags in ("--require-hashes", "--torch-backend=cpu")
    )
    assert instructions.index("USER 1000") > max(instructions.index(line) for line in by_kind["RUN"])


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_package_is_locked_with_its_hashes_but_the_cpu_build_of_torch(name):
    entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements" / f"{name}.lock").read_text())
    without = [entry.split()[0] for entry in entries if "==" in entry and "--hash=sha256:" not in entry]
    assert [entry.partition("==")[0] for entry in without] == (["torch"] if name == "cpu" else [])
    assert all("+cpu" in entry for entry in without)
