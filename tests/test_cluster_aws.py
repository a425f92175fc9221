"""`ray up` on an imitation of AWS: the stack of roles, Ray's own preparation of the cluster, and its instances."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

CLUSTER = Path(__file__).resolve().parents[1] / "cluster"
REGION = "us-west-2"


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An account of its own with the stack of roles; HOME is where Ray puts the key of the nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        with mock_aws():
            boto3.client("cloudformation").create_stack(
                StackName="ttmray-roles",
                TemplateBody=(CLUSTER / "aws-roles.yaml").read_text(),
                Capabilities=["CAPABILITY_NAMED_IAM"],
                Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "my-bucket"}],
            )
            yield


@pytest.fixture(scope="module")
def prepared(account: None) -> dict[str, Any]:
    """The cluster as `ray up` has it before it starts the head."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((CLUSTER / "ray-up-aws.yaml").read_text()))
    validate_config(config)
    return bootstrap_aws(config)


def statements(role: str) -> list[dict[str, Any]]:
    """What a role of the template may do, of its own policies and of those that the template makes."""
    text = (CLUSTER / "aws-roles.yaml").read_text()
    plain = yaml.safe_load(re.sub(r"!(Sub|Ref|GetAtt) ", "", text))["Resources"]
    properties = plain[role]["Properties"]
    documents = [policy["PolicyDocument"] for policy in properties.get("Policies", ())]
    documents += [
        plain[name]["Properties"]["PolicyDocument"] for name in properties["ManagedPolicyArns"] if name in plain
    ]
    return [statement for document in documents for statement in document["Statement"]]


def test_ray_starts_an_instance_of_every_kind_with_a_role_that_exists(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    provider = AWSNodeProvider(prepared["provider"], prepared["cluster_name"])
    for name, kind in prepared["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: name}
        provider.create_node(kind["node_config"], tags, 1)
    reservations = boto3.client("ec2").describe_instances()["Reservations"]
    roles = {}
    for instance in (instance for reservation in reservations for instance in reservation["Instances"]):
        tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        roles[tags[TAG_RAY_USER_NODE_TYPE]] = instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]
    assert roles == {"head": "ttmray-head", "gpu": "ttmray-worker", "cpu": "ttmray-worker"}
    existing = {
        profile["InstanceProfileName"] for profile in boto3.client("iam").list_instance_profiles()["InstanceProfiles"]
    }
    assert set(roles.values()) <= existing


def test_the_head_may_hand_its_workers_their_role(account: None) -> None:
    """Without iam:PassRole no worker starts; Ray's own role does not have it."""
    iam = boto3.client("iam")
    worker = iam.get_instance_profile(InstanceProfileName="ttmray-worker")["InstanceProfile"]["Roles"][0]["Arn"]
    document = iam.get_role_policy(RoleName="ttmray-head", PolicyName="start-workers")["PolicyDocument"]
    document = yaml.safe_load(str(document))  # as the imitation answers: a mapping, or the print of one
    passed = [s["Resource"] for s in document["Statement"] if s["Action"] == "iam:PassRole"]
    assert passed == [worker]
    assert not [s for s in statements("Worker") if "iam:" in str(s["Action"])], "a worker starts nothing"


def test_every_kind_of_node_has_an_image_of_its_own_choice(prepared: dict[str, Any]) -> None:
    """Without one Ray takes an image of 2022. A name of the parameter store is read with the head's rights."""
    from ray.autoscaler._private.aws.config import DEFAULT_AMI

    images = {kind["node_config"]["ImageId"] for kind in prepared["available_node_types"].values()}
    assert not images & set(DEFAULT_AMI.values())
    (image,) = images
    name = image.removeprefix("resolve:ssm:")
    (allowed,) = [s["Resource"] for s in statements("Head") if s["Action"] == "ssm:GetParameters"]
    assert re.fullmatch(r"/aws/service/deeplearning/ami/x86_64/[a-z0-9-]*gpu[a-z0-9.-]*/latest/ami-id", name)
    assert name.startswith(allowed.partition("parameter")[2].removesuffix("*"))


@pytest.mark.parametrize("role", ["Head", "Worker"])
def test_nodes_read_and_write_in_the_one_bucket(role: str) -> None:
    ours = [s for s in statements(role) if "s3:" in str(s["Action"])]
    assert {a for s in ours for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])} >= {
        "s3:ListBucket",
        "s3:GetObject",
        "s3:PutObject",
        "s3:DeleteObject",
    }
    assert all(":s3:::${Bucket}" in s["Resource"] for s in ours)


def test_metrics_have_a_port_that_a_firewall_can_name() -> None:
    config = yaml.safe_load((CLUSTER / "ray-up-aws.yaml").read_text())
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("--metrics-export-port=8080" in command for command in starts)
