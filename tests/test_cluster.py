"""The cluster files: valid for Ray, safe by default, and their jobs make a plan with the arguments they give."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import kubernetes_validate
import numpy as np
import pytest
import soundfile
import yaml
from packaging.version import Version
from pydantic import ValidationError

from ttmray import cluster
from ttmray.cli import _parser, main
from ttmray.errors import UserError
from ttmray.models.weights import released
from ttmray.plugins import named

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
def manifests() -> dict[str, dict[str, Any]]:
    """What `kubectl apply` makes of the file, by kind."""
    documents = list(yaml.safe_load_all((CLUSTER / "kuberay-rayjob.yaml").read_text()))
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def rayjob(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return manifests["RayJob"]


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


RAYJOB_FIELDS = {
    "spec": {"backoffLimit", "submitterConfig", "submissionMode", "shutdownAfterJobFinishes"}
    | {"ttlSecondsAfterFinished", "entrypoint", "rayClusterSpec"},
    "rayClusterSpec": {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions"}
    | {"headGroupSpec", "workerGroupSpecs"},
    "headGroupSpec": {"rayStartParams", "template"},
    "workerGroupSpec": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}
"""Of what KubeRay's types have (`ray-operator/apis/ray/v1` of KubeRay), the fields in use: another spelling is dropped
by the API server or refused."""


def test_the_rayjob_has_fields_that_kuberay_knows(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert rayjob["spec"].keys() == RAYJOB_FIELDS["spec"]
    assert rayjob["spec"]["submitterConfig"].keys() == {"backoffLimit"}
    assert cluster.keys() == RAYJOB_FIELDS["rayClusterSpec"]
    assert cluster["headGroupSpec"].keys() == RAYJOB_FIELDS["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() == RAYJOB_FIELDS["workerGroupSpec"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_pods_and_account_pass_the_schema_of_kubernetes(manifests: dict[str, dict[str, Any]]) -> None:
    """Strictly: a field that Kubernetes does not know is an error, too."""
    kubernetes_validate.validate(manifests["ServiceAccount"], "1.32", strict=True)
    for name, spec in pods(manifests["RayJob"]).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(pod, "1.32", strict=True)
        assert spec["serviceAccountName"] == manifests["ServiceAccount"]["metadata"]["name"]
        misspelt = pod | {"spec": spec | {"serviceAcountName": "x"}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(misspelt, "1.32", strict=True)


def test_an_exit_code_of_the_job_boots_no_further_gpu_cluster(rayjob: dict[str, Any]) -> None:
    """Codes 2 and 3 would be the same the next time. The submitter's own tries are for a head that was lost."""
    assert rayjob["spec"]["backoffLimit"] == 0
    assert rayjob["spec"]["submitterConfig"]["backoffLimit"] > 0


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
    assert "ENV TTMRAY_WEIGHTS=/opt/ttmray/weights" in text, "where `ttmray` then looks, on every node"
    assert {"jobs", "configs", "ttmray", "pyproject.toml", "constraints.txt"} <= set(copied)
    assert all((REPO / name).exists() for name in copied)
    allowed = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert sorted(allowed) == sorted(copied)
    assert text.rstrip().split("\n")[-2] == "USER ray", "nothing runs as root"


@pytest.mark.parametrize(("bundle", "pulled"), [("debug", []), ("paper", ["weights pull --bundle paper"])])
def test_the_image_is_built_with_the_weights_that_are_asked_for(bundle: str, pulled: list[str], tmp_path: Path) -> None:
    """The line of the Dockerfile runs, with a `ttmray` that notes its arguments; the command itself is a real one."""
    (line,) = re.findall(r"^RUN (.*weights pull.*)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    tool = tmp_path / "ttmray"
    tool.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "BUNDLE": bundle}
    subprocess.run(["sh", "-c", line], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines() if pulled else []
    assert calls == pulled
    for call in calls:
        typed = vars(_parser().parse_args(shlex.split(call)))
        assert [entry for entry in released().entries if typed["bundle"] in entry.bundles]


def test_the_slurm_script_is_a_valid_script() -> None:
    """By the shell's own parser, and by shellcheck's rules."""
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sbatch")], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, str(CLUSTER / "slurm.sbatch")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_starts_ray_on_every_node_and_then_the_job(songs: Path, tmp_path: Path) -> None:
    """Slurm and `ray start` are scripts that note their arguments; the job is the real one, up to its plan."""
    submit = tmp_path / "repository"
    tools = tmp_path / "tools"
    (submit / ".venv/bin").mkdir(parents=True)
    tools.mkdir()
    for name in ("jobs", "configs"):
        (submit / name).symlink_to(REPO / name)
    note = f'echo "$RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}} $RAY_enable_metrics_collection $*" >> {tmp_path}/ray.txt'
    scripts = {
        submit / ".venv/bin/ray": note,
        submit / ".venv/bin/python": f"""
            [ "$1" = -c ] && exec {sys.executable} "$@"
            until [ "$(grep -c " start " {tmp_path}/ray.txt)" = 2 ]; do sleep 0.05; done  # nodes join when they can
            exec {sys.executable} "$@" --plan-only""",
        tools / "scontrol": "printf 'node1\\nnode2\\n'",
        # like srun: a step has one CPU per task unless the script asks for more, whatever sbatch was told
        tools / "srun": f"""
            echo "${{SRUN_CPUS_PER_TASK:-1}}" >> {tmp_path}/cpus.txt
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
        ["bash", str(CLUSTER / "slurm.sbatch"), str(songs), str(tmp_path / "run"), "configs/debug/corpus.yaml"],
        env=os.environ | slurm,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/plan.parquet").exists()
    started = [line.split() for line in (tmp_path / "ray.txt").read_text().splitlines() if " start " in line]
    assert {words[4] for words in started} == {"--head", "--block"}
    for words in started:
        assert words[:3] == ["token", "64", "0"]
    assert set((tmp_path / "cpus.txt").read_text().split()) == {"16"}
    head = next(words for words in started if "--head" in words)
    worker = next(words for words in started if "--head" not in words)
    assert "--dashboard-host=127.0.0.1" in head
    port = next(word.removeprefix("--port=") for word in head if word.startswith("--port="))
    assert f"--address=10.0.0.1:{port}" in worker


def test_no_ray_without_tokens_of_local_instances_is_allowed() -> None:
    """Before 2.60 an instance that `ray.init` starts here asks nobody for a token."""
    (bound,) = re.findall(r'"ray\[[^]]*\]>=([\d.]+)', (REPO / "pyproject.toml").read_text())
    assert Version(bound) >= Version("2.60")


def test_the_installed_ray_is_the_locked_one() -> None:
    """The schema and parsers above speak for the version that the image gets."""
    assert f"\nray=={version('ray')}\n" in (REPO / "constraints.txt").read_text()


@pytest.mark.parametrize(
    ("config", "field", "good", "bad", "why"),
    [
        ("ttmray.cluster:ActorsConfig", "gpus", (0, 0.5, 1, 2), (1.5, 2.25), "whole number"),
        ("ttmray.cluster:ActorsConfig", "gpus", (0.3333,), (1 / 3, 1e-5), "four decimals"),
        ("ttmray.cluster:ActorsConfig", "cpus", (0.1, 1.5, 2.0001), (1 / 3,), "four decimals"),
        ("ttmray.corpus.config:StageResources", "gpus", (None, 0, 0.33, 4), (1.5,), "whole number"),
        ("ttmray.corpus.config:StageResources", "cpus", (0, 0.5, 1.5), (0.33333,), "four decimals"),
        ("ttmray.training.config:TrainRuntime", "cpus", (0.5, 7), (0.33333,), "four decimals"),
    ],
)
def test_shares_that_ray_cannot_give_are_refused_before_anything_starts(
    config: str, field: str, good: tuple[float | None, ...], bad: tuple[float, ...], why: str
) -> None:
    kind = named(config)
    for value in good:
        assert getattr(kind.model_validate({field: value}), field) == value
    for value in bad:
        with pytest.raises(ValidationError, match=why):
            kind.model_validate({field: value})


def test_an_actor_that_was_given_a_gpu_does_not_work_on_the_cpu_without_a_word(monkeypatch) -> None:
    import torch

    def make():
        return lambda item: item

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gpus, device in ((1.0, "auto"), (0.5, "cuda")):
        with pytest.raises(UserError, match=f"Ray gave {gpus:g} GPUs to a worker, but torch finds none") as caught:
            cluster._Actor(make, gpus, device).work(1)
        assert "device=cpu" in caught.value.hint
    assert cluster._Actor(make, 0.0, "auto").work(1) == cluster._Actor(make, 1.0, "cpu").work(1) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cluster._Actor(make, 1.0, "auto").work(1) == 1


@pytest.mark.parametrize(("url", "said"), [("127.0.0.1:8265", "http://127.0.0.1:8265\n"), ("", "")])
def test_whoever_joins_a_cluster_is_told_where_its_dashboard_is(monkeypatch, capsys, url, said):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: SimpleNamespace(dashboard_url=url))
    cluster.connect(1)
    text = capsys.readouterr().out
    assert text.endswith(said)
    assert ("dashboard" in text) == bool(url)
