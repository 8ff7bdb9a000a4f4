"""Instances of EC2 that run plans: one is started, all are found by their tag, and ended by it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shallowflow.planner.outlook import Market

from .bills import TAG
from .clients import Aws, AwsError, Live

STORE_TAG = "shallowflow-store"
"""The key of the tag that says where a run's checkpoints are."""
GROUP = "shallowflow-no-ingress"
"""The security group that lets nobody in."""
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
"""The public parameter that names the newest Deep Learning AMI with NVIDIA's driver, for Ubuntu 24.04 (Python 3.12)."""
ALIVE = ("pending", "running", "stopping", "stopped", "shutting-down")
"""States of an instance that may still cost something, or write."""
MOST_TAG = 256
"""Characters in a tag's value."""
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
STAND_INS: dict[str, Any] = {
    "get_parameter": {"Parameter": {"Value": "ami-newest"}},
    "describe_images": {"Images": [{"RootDeviceName": "/dev/sda1", "BlockDeviceMappings": []}]},
    "describe_vpcs": {"Vpcs": [{"VpcId": "vpc-default"}]},
    "describe_subnets": {"Subnets": [{"VpcId": "vpc-of-the-subnet"}]},
    "describe_security_groups": {"SecurityGroups": []},
    "create_security_group": {"GroupId": "sg-new"},
    "run_instances": {"Instances": [{"InstanceId": "i-new"}]},
}
"""Answers for a rehearsal."""
_ENDED = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")
_INTERRUPTED = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """An instance to start.

    Attributes:
        run: whose it is.
        store: where the run's checkpoints are.
        profile: the name of its instance profile, whose role it has.
        image, subnet: None for the newest Deep Learning AMI, and for a subnet of the default VPC.
        disk_gb: at least; an image may need more.
        script: what it runs when it starts.
    """

    run: str
    store: str
    instance: str
    market: Market
    profile: str
    disk_gb: int
    script: str
    image: str | None = None
    subnet: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rented:
    """An instance that there is, or was within the last hour.

    Attributes:
        state: EC2's word, or ``interrupted`` where AWS took it.
        hours: since it was launched, until now or until it ended; None where nobody says when that was.
    """

    run: str
    instance_id: str
    instance: str
    region: str
    market: Market
    state: str
    launched: datetime.datetime
    hours: float | None
    store: str | None

    @property
    def is_alive(self) -> bool:
        """Whether it may still cost something, or write."""
        return self.state in ALIVE


def start(aws: Aws, machine: Machine) -> str:
    """Start *machine* and return the instance's id.

    It has its own disk, encrypted; asks for its metadata only with a token; lets nobody in; and when it shuts down it
    is terminated.

    Raises:
        AwsError: it cannot be started.
    """
    image = machine.image
    if image is None:
        answer = aws.ask("ssm", "get_parameter", "find the newest Deep Learning AMI", Name=IMAGE)
        image = str(answer["Parameter"]["Value"])
    disk = _disk(aws, image, machine.disk_gb)
    group = _group(aws, machine.subnet)
    tags = [{"Key": "Name", "Value": f"shallowflow {machine.run}"}, {"Key": TAG, "Value": machine.run}]
    tags.append({"Key": STORE_TAG, "Value": machine.store})
    wanted: dict[str, Any] = {
        "ImageId": image,
        "InstanceType": machine.instance,
        "MinCount": 1,
        "MaxCount": 1,
        "IamInstanceProfile": {"Name": machine.profile},
        "SecurityGroupIds": [group],
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "BlockDeviceMappings": [disk],
        "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")],
        "UserData": machine.script,
    }
    if machine.subnet is not None:
        wanted["SubnetId"] = machine.subnet
    if machine.market == "spot":
        wanted["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
    answer = aws.ask("ec2", "run_instances", f"start one {machine.instance}, {machine.market}", **wanted)
    return str(answer["Instances"][0]["InstanceId"])


def _disk(aws: Aws, image: str, disk_gb: int) -> dict[str, Any]:
    """The root disk: encrypted, gone with the instance, and no smaller than the image's."""
    answer = aws.ask("ec2", "describe_images", "see how large the image's disk is", ImageIds=[image])
    if not answer["Images"]:
        raise AwsError(f"there is no image {image} in {aws.region}; give another one with --image")
    found = answer["Images"][0]
    sizes = [mapping.get("Ebs", {}).get("VolumeSize", 0) for mapping in found.get("BlockDeviceMappings", ())]
    return {
        "DeviceName": found["RootDeviceName"],
        "Ebs": {
            "VolumeSize": max([disk_gb, *sizes]),
            "VolumeType": "gp3",
            "Encrypted": True,
            "DeleteOnTermination": True,
        },
    }


def _group(aws: Aws, subnet: str | None) -> str:
    """The security group without a rule for what comes in, in the subnet's VPC or the default one; made if need be."""
    if subnet is None:
        default = [{"Name": "is-default", "Values": ["true"]}]
        vpcs = aws.ask("ec2", "describe_vpcs", "find the default VPC", Filters=default)["Vpcs"]
    else:
        vpcs = aws.ask("ec2", "describe_subnets", "find the subnet's VPC", SubnetIds=[subnet])["Subnets"]
    if not vpcs:
        raise AwsError(f"there is no default VPC in {aws.region}; name a subnet with --subnet")
    vpc = str(vpcs[0]["VpcId"])
    named = [{"Name": "group-name", "Values": [GROUP]}, {"Name": "vpc-id", "Values": [vpc]}]
    found = aws.ask("ec2", "describe_security_groups", "see whether it has a group without ingress", Filters=named)
    for group in found["SecurityGroups"]:
        if group.get("IpPermissions"):
            raise AwsError(f"security group {GROUP} lets somebody in; remove its inbound rules, or the group")
        return str(group["GroupId"])
    made = aws.ask(
        "ec2",
        "create_security_group",
        "make one, where there is none",
        GroupName=GROUP,
        Description="Nothing comes in: machines that ShallowFlow starts",
        VpcId=vpc,
    )
    return str(made["GroupId"])


def alive(aws: Aws, run: str) -> tuple[tuple[str, str], ...]:
    """Id and state of every instance of *run* that may still write.

    Raises:
        AwsError: nobody says.
    """
    filters = [{"Name": f"tag:{TAG}", "Values": [run]}, {"Name": "instance-state-name", "Values": list(ALIVE)}]
    answer = aws.ask("ec2", "describe_instances", "see whether the run has an instance already", Filters=filters)
    found = [one for reservation in answer.get("Reservations", ()) for one in reservation["Instances"]]
    return tuple((one["InstanceId"], one["State"]["Name"]) for one in found)


def rented(aws: Live, now: datetime.datetime) -> list[Rented]:
    """Every instance in the region that carries the tag, oldest first.

    Raises:
        AwsError: nobody says.
    """
    filters = [{"Name": "tag-key", "Values": [TAG]}]
    pages = aws.pages("ec2", "describe_instances", "list the instances", Filters=filters)
    found = [one for page in pages for reservation in page["Reservations"] for one in reservation["Instances"]]
    return sorted((_rented(one, aws.region, now) for one in found), key=lambda one: (one.launched, one.instance_id))


def _rented(told: Any, region: str, now: datetime.datetime) -> Rented:
    tags = {tag["Key"]: tag["Value"] for tag in told.get("Tags", ())}
    state, code = str(told["State"]["Name"]), told.get("StateReason", {}).get("Code", "")
    ended: datetime.datetime | None = now
    if state == "terminated":
        when = _ENDED.search(told.get("StateTransitionReason", ""))
        ended = when and datetime.datetime.fromisoformat(when[1]).replace(tzinfo=datetime.UTC)
    launched = told["LaunchTime"]
    return Rented(
        run=tags[TAG],
        instance_id=told["InstanceId"],
        instance=told["InstanceType"],
        region=region,
        market="spot" if told.get("InstanceLifecycle") == "spot" else "on demand",
        state="interrupted" if state == "terminated" and code in _INTERRUPTED else state,
        launched=launched,
        hours=None if ended is None else max(0.0, (ended - launched).total_seconds() / 3600),
        store=tags.get(STORE_TAG),
    )


def terminate(aws: Aws, instance_ids: Sequence[str]) -> None:
    """End the instances: each shuts down in order first.

    Raises:
        AwsError: they cannot be ended.
    """
    aws.ask("ec2", "terminate_instances", "end the run's instances", InstanceIds=list(instance_ids))
