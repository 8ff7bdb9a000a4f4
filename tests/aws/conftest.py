"""What the tests of AWS share: S3 on this machine, over HTTP, and credentials that must not be seen anywhere."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

os.environ["S3_UPLOAD_PART_MIN_SIZE"] = "256"  # moto's own way to let parts of a test be small
os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"  # thousands, in every region

from moto.moto_api._internal.models import moto_api_backend
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from shallowflow.runtime.aws.s3 import Place, S3Objects
from tests.aws import planted, rented
from tests.front.shell import Done, sfplan


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Where AWS is, for as long as the tests run."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def _aws(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have boto3 find the server, an account in which nothing is, planted credentials, and no metadata service."""
    moto_api_backend.reset()
    for name, value in planted.environment(endpoint).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(endpoint: str, _aws: None) -> str:
    """A new bucket."""
    name = f"runs-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture
def objects(bucket: str) -> S3Objects:
    """A prefix of the bucket, as the runtime sees it."""
    return S3Objects(Place(bucket, "some/run/"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk: nobody may write into it."""
    from tests.runtime import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def t4_plan(small_model: Path) -> str:
    """A plan for it on a T4, in JSON, as if it were a model of the Hub."""
    words = ("--sequence-length", 32, "--quantization", "nf4", "--fix", "activations=save", "--optimizer", "adamw")
    done = sfplan(small_model, "--gpu", "t4", *words, "--json")
    assert done.code == 0, done.errors
    return json.dumps({**json.loads(done.output), "model_name": "org/Tiny-1.1"})


@pytest.fixture
def image(endpoint: str, _aws: None) -> Iterator[str]:
    """An account with all that is needed, in which nothing ran before, nor does afterwards."""
    rented.clear()
    yield rented.prepare()
    rented.clear()


@pytest.fixture
def run() -> str:
    """A run of its own name."""
    return f"run-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def launch(
    image: str, bucket: str, run: str, t4_plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """The command with what it needs, in a folder with the plan and data."""
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(t4_plan, encoding="utf-8")
    Path("train.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 4, encoding="utf-8")

    def started(*words: object) -> Done:
        store = ("--store", f"s3://{bucket}/runs/{run}", "--instance-profile", rented.PROFILE)
        return sfplan("launch", "plan.json", "--data", "train.jsonl", *store, *words)

    return started
