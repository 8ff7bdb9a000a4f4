"""An account with what a launch needs: an image that the public parameter names, an instance profile, and a VPC."""

from __future__ import annotations

import base64
import datetime
import json
from dataclasses import dataclass
from typing import Any

import boto3
from moto.ssm.models import Parameter, ssm_backends

from shallowflow.runtime.aws.bills import TAG
from shallowflow.runtime.aws.instances import IMAGE
from tests.aws import planted

PROFILE = "trainer"
ON = ("--region", "us-east-1")


def prepare(region: str = "us-east-1") -> str:
    """Let the region have all of it; returns the image's id."""
    client = boto3.client("ec2", region_name=region)
    known = client.describe_images(Owners=["self"])["Images"]
    if not known:
        client.register_image(Name="a Deep Learning AMI", RootDeviceName="/dev/sda1", Architecture="x86_64")
        known = client.describe_images(Owners=["self"])["Images"]
    image = str(known[0]["ImageId"])
    backend = ssm_backends[planted.ACCOUNT][region]
    parameter: Any = Parameter  # moto's own put_parameter refuses AWS's names
    backend._parameters[IMAGE] = [
        parameter(
            account_id=planted.ACCOUNT,
            name=IMAGE,
            value=image,
            parameter_type="String",
            description="",
            allowed_pattern=None,
            keyid=None,
            last_modified_date=datetime.datetime.now(datetime.UTC),
            version=1,
            data_type="text",
        )
    ]
    iam = boto3.client("iam")
    if PROFILE not in [one["InstanceProfileName"] for one in iam.list_instance_profiles()["InstanceProfiles"]]:
        iam.create_instance_profile(InstanceProfileName=PROFILE)
    return image


def clear() -> None:
    """End all instances, and let none be anybody's: moto keeps those that ended for ever."""
    for region in ("us-east-1", "eu-west-1"):
        client = boto3.client("ec2", region_name=region)
        for many in client.describe_instances()["Reservations"]:
            for one in many["Instances"]:
                client.terminate_instances(InstanceIds=[one["InstanceId"]])
                client.delete_tags(Resources=[one["InstanceId"]], Tags=[{"Key": TAG}])


@dataclass(frozen=True)
class Asked:
    """A call as boto3 made it."""

    service: str
    operation: str
    parameters: dict[str, Any]


def instance(instance_id: str, region: str = "us-east-1") -> Any:
    """What EC2 says of one."""
    client = boto3.client("ec2", region_name=region)
    return client.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"][0]


def tags(told: Any) -> dict[str, str]:
    """What it is tagged with."""
    return {tag["Key"]: tag["Value"] for tag in told["Tags"]}


def plain(value: Any) -> Any:
    """*value* as JSON has it."""
    return json.loads(json.dumps(value))


def script_of(instance_id: str) -> str:
    """What the instance runs."""
    told = boto3.client("ec2").describe_instance_attribute(InstanceId=instance_id, Attribute="userData")
    return base64.b64decode(told["UserData"]["Value"]).decode()
