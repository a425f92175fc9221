"""The cluster files: valid for Ray, safe by default, and their jobs make a plan with the arguments they give."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import soundfile
import yaml

from ttmray.cli import main

REPO = Path(__file__).resolve().parents[1]
CLUSTER = REPO / "cluster"


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short files: what the debug config needs for its splits."""
    folder = tmp_path_factory.mktemp("songs")
    for i in range(8):
        soundfile.write(folder / f"song{i}.wav", np.full((44100 * 6, 2), 0.01 * (i + 1), np.float32), 44100)
    return folder


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "ray-up-aws.yaml").read_text())


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "kuberay-rayjob.yaml").read_text())


def pods(rayjob: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_the_aws_cluster_passes_rays_schema(aws: dict[str, Any]) -> None:
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(aws, schema)
    assert aws["head_node_type"] in aws["available_node_types"]


def test_the_aws_cluster_has_a_token_and_no_open_dashboard(aws: dict[str, Any]) -> None:
    starts = [c for c in aws["head_start_ray_commands"] + aws["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(remote.endswith("/.ray/auth_token") for remote in aws["file_mounts"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_ray_accepts_the_start_commands_of_the_aws_cluster(aws: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    for command in aws["head_start_ray_commands"] + aws["worker_start_ray_commands"]:
        words = [word for word in shlex.split(command) if "=" not in word or word.startswith("--")]
        if words[:2] == ["ray", "start"]:
            start.make_context("start", words[2:])  # raises for what it does not know


def test_nodes_of_the_aws_cluster_are_heads_without_work_cpu_and_gpu_workers(aws: dict[str, Any]) -> None:
    kinds = {name: kind["resources"] for name, kind in aws["available_node_types"].items()}
    assert kinds["head"] == {"CPU": 0}
    assert any(resources.get("GPU") for resources in kinds.values())
    assert any(resources.get("CPU") and not resources.get("GPU") for resources in kinds.values())
    for name, kind in aws["available_node_types"].items():
        on_demand = "InstanceMarketOptions" not in kind["node_config"]
        assert on_demand == (name == aws["head_node_type"])


def test_the_rayjob_has_token_auth_and_the_tested_ray(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    locked = re.search(r"^ray==(.+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    assert locked is not None
    assert cluster["rayVersion"] == locked[1]


def test_pods_of_the_rayjob_have_shared_memory_and_equal_requests_and_limits(rayjob: dict[str, Any]) -> None:
    specs = pods(rayjob)
    assert specs.keys() == {"head", "cpu", "gpu"}
    for name, spec in specs.items():
        (container,) = spec["containers"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert spec["restartPolicy"] == "Never"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")


def test_the_rayjobs_entrypoint_makes_a_plan(rayjob: dict[str, Any], songs: Path, tmp_path: Path) -> None:
    text = rayjob["spec"]["entrypoint"]
    assert set(re.findall(r"(?:input|output)=(\S+)", text)) == {"s3://my-bucket/songs", "s3://my-bucket/runs/corpus"}
    text = text.replace("s3://my-bucket/songs", str(songs)).replace("s3://my-bucket/runs/corpus", str(tmp_path / "run"))
    words = shlex.split(text.replace("/opt/ttmray/", f"{REPO}/"))
    assert words[:2] == ["python", str(REPO / "jobs/score_corpus.py")]
    assert main(["score-corpus", *words[2:], "--plan-only"]) == 0
    assert (tmp_path / "run/plan.parquet").exists()


def test_the_image_holds_what_the_commands_name() -> None:
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert "WORKDIR /opt/ttmray" in text
    assert {"jobs", "configs", "ttmray", "pyproject.toml", "constraints.txt"} <= set(copied)
    assert all((REPO / name).exists() for name in copied)
    allowed = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert sorted(allowed) == sorted(copied)
    assert text.rstrip().split("\n")[-2] == "USER ray", "nothing runs as root"


def test_the_slurm_script_is_a_valid_script() -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sbatch")], check=True)


def test_the_slurm_script_starts_ray_on_every_node_and_then_the_job(songs: Path, tmp_path: Path) -> None:
    """Slurm and `ray start` are scripts that note their arguments; the job is the real one, up to its plan."""
    submit = tmp_path / "repository"
    tools = tmp_path / "tools"
    (submit / ".venv/bin").mkdir(parents=True)
    tools.mkdir()
    for name in ("jobs", "configs"):
        (submit / name).symlink_to(REPO / name)
    note = f'echo "$RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}} $*" >> {tmp_path}/ray.txt'
    scripts = {
        submit / ".venv/bin/ray": note,
        submit / ".venv/bin/python": f"""
            [ "$1" = -c ] && exec {sys.executable} "$@"
            until [ "$(grep -c " start " {tmp_path}/ray.txt)" = 2 ]; do sleep 0.05; done  # nodes join when they can
            exec {sys.executable} "$@" --plan-only""",
        tools / "scontrol": "printf 'node1\\nnode2\\n'",
        tools / "srun": """
            while [[ $1 == --* ]]; do shift; done
            [[ $1 == hostname ]] && echo 10.0.0.1 && exit
            exec "$@\"""",
    }
    for path, body in scripts.items():
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    slurm = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(submit),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
    }
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sbatch"), str(songs), str(tmp_path / "run")],
        env=os.environ | slurm,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/plan.parquet").exists()
    started = [line.split() for line in (tmp_path / "ray.txt").read_text().splitlines() if " start " in line]
    assert {words[3] for words in started} == {"--head", "--block"}
    for words in started:
        assert words[:2] == ["token", "64"]
    head = next(words for words in started if "--head" in words)
    worker = next(words for words in started if "--head" not in words)
    assert "--dashboard-host=127.0.0.1" in head
    port = next(word.removeprefix("--port=") for word in head if word.startswith("--port="))
    assert f"--address=10.0.0.1:{port}" in worker


def test_the_installed_ray_is_the_locked_one() -> None:
    """The schema and parsers above speak for the version that the image gets."""
    assert f"\nray=={version('ray')}\n" in (REPO / "constraints.txt").read_text()
