"""What is in the store is whole, verified, and written by one at a time; over HTTP, to moto's S3."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from shallowflow.runtime import folder, keeping, storage
from shallowflow.runtime.aws import s3
from shallowflow.runtime.aws.s3 import Place, S3Objects
from shallowflow.runtime.request import RunError, RunRequest
from shallowflow.runtime.storage import StoreError, Superseded, Taken, Vault

REQUEST = {"plan": "a", "data": "b"}


def checkpoint(place: Path, number: int, num_bytes: int = 1000) -> Path:
    """A folder like a checkpoint's."""
    made = place / f"made-{number}"
    made.mkdir(parents=True)
    (made / "adapter.safetensors").write_bytes(bytes([number % 256]) * num_bytes)
    (made / "state.json").write_text(str(number))
    return made


def content(place: Path) -> dict[str, bytes]:
    """All files below, by name."""
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def claimed(objects: S3Objects) -> Vault:
    """A vault whose store is this session's."""
    vault = Vault.look(objects)
    vault.claim(REQUEST)
    return vault


def fetched(objects: S3Objects, place: Path) -> tuple[int | None, list[str]]:
    """What a machine with an empty disk goes on from, and what it does not believe."""
    doubts = claimed(objects).fetch(place, 0, lambda _path: None)
    numbers = [int(path.name.removeprefix("step-")) for path in place.iterdir()] if place.is_dir() else []
    assert len(numbers) <= 1
    return (numbers[0] if numbers else None), doubts


def test_what_is_kept_comes_back(objects: S3Objects, tmp_path: Path) -> None:
    """Small files, files of several parts and empty ones, byte for byte."""
    source = checkpoint(tmp_path, 7)
    (source / "large.bin").write_bytes(hashlib.sha256(b"x").digest() * (s3.PART_BYTES // 32 + 5))
    (source / "even.bin").write_bytes(bytes(2 * s3.PART_BYTES))
    (source / "empty.bin").write_bytes(b"")

    claimed(objects).save(source, 7)

    assert fetched(objects, tmp_path / "back") == (7, [])
    assert content(tmp_path / "back" / "step-00000007") == content(source)


def test_two_are_kept_and_nothing_else(objects: S3Objects, tmp_path: Path) -> None:
    """Older ones go, and LATEST always names what is there."""
    vault = claimed(objects)
    for number in (2, 4, 6):
        vault.save(checkpoint(tmp_path, number), number)

        assert vault.latest is not None
        named = [entry.prefix for entry in vault.latest.checkpoints]
        assert {key.rpartition("/")[0] + "/" for key in objects.keys("checkpoints/")} == set(named)

    assert vault.latest is not None
    assert [entry.num_steps for entry in vault.latest.checkpoints] == [6, 4]


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.json", "manifest"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_what_is_damaged_is_not_believed(
    name: str, damage: str, objects: S3Objects, bucket: str, tmp_path: Path
) -> None:
    """The one before comes back, and why is said; the next save forgets the damaged one."""
    vault = claimed(objects)
    for number in (2, 4):
        vault.save(checkpoint(tmp_path, number), number)
    assert vault.latest is not None
    key = f"some/run/{vault.latest.checkpoints[0].prefix}{name}"
    client = boto3.client("s3")
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    if damage == "remove":
        client.delete_object(Bucket=bucket, Key=key)
    else:
        changed = body[: len(body) // 2] if damage == "cut" else bytes([body[0] ^ 1]) + body[1:]
        client.put_object(Bucket=bucket, Key=key, Body=changed)

    following = claimed(objects)
    (doubt,) = following.fetch(tmp_path / "back", 0, lambda _path: None)
    following.save(checkpoint(tmp_path, 5), 5)

    assert doubt.startswith("stored checkpoint step-00000004 is passed over: ")
    assert content(tmp_path / "back" / "step-00000002") == content(tmp_path / "made-2")
    assert following.latest is not None
    assert [entry.num_steps for entry in following.latest.checkpoints] == [5, 2]


def test_a_zombie_cannot_overwrite_its_successor(objects: S3Objects, bucket: str, tmp_path: Path) -> None:
    """An older instance that still runs hears that it lost, and the successor's checkpoint stays the newest."""
    old = claimed(objects)
    old.save(checkpoint(tmp_path, 2), 2)
    new = claimed(S3Objects(Place(bucket, "some/run/")))
    with pytest.raises(Superseded, match="another instance has taken the run over"):
        old.save(checkpoint(tmp_path, 4), 4)
    new.save(checkpoint(tmp_path, 3), 3)
    with pytest.raises(Superseded):
        old.save(checkpoint(tmp_path, 6), 6)

    assert fetched(objects, tmp_path / "back") == (3, [])
    assert content(tmp_path / "back" / "step-00000003") == content(tmp_path / "made-3")


def test_two_who_begin_at_once_are_one(objects: S3Objects, tmp_path: Path) -> None:
    """Whoever claims last writes; the other hears of it."""
    first, second = Vault.look(objects), Vault.look(objects)
    first.claim(REQUEST)
    second.claim(REQUEST)

    with pytest.raises(Superseded):
        first.save(checkpoint(tmp_path, 2), 2)
    second.save(checkpoint(tmp_path, 3), 3)

    assert fetched(objects, tmp_path / "back")[0] == 3


def test_dead_uploads_are_removed(objects: S3Objects, bucket: str, tmp_path: Path) -> None:
    """Parts and files of who died in the middle are gone once the next begins; what LATEST names stays."""
    vault = claimed(objects)
    vault.save(checkpoint(tmp_path, 2), 2)
    objects.create("checkpoints/step-00000004-dead-1/adapter.safetensors", b"half")
    client = boto3.client("s3")
    client.create_multipart_upload(Bucket=bucket, Key="some/run/checkpoints/step-00000004-dead-1/large")
    client.create_multipart_upload(Bucket=bucket, Key="another/run/large")

    claimed(objects)

    left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [one["Key"] for one in left] == ["another/run/large"]
    assert not [key for key in objects.keys("checkpoints/") if "dead" in key]
    assert fetched(objects, tmp_path / "back") == (2, [])


class Deaf(S3Objects):
    """Replaces what it is told to, and does not hear so the first time after a claim."""

    deaf = False

    def replace(self, key: str, content: bytes, etag: str) -> str:
        """As S3Objects does."""
        found = super().replace(key, content, etag)
        if self.deaf:
            self.deaf = False
            raise StoreError("away")
        return found


def test_an_answer_that_never_came_is_no_other_writer(bucket: str, tmp_path: Path) -> None:
    """What was obeyed without a word is found out with the next checkpoint, and both are kept."""
    objects = Deaf(Place(bucket, "some/run/"))
    vault = claimed(objects)
    objects.deaf = True
    with pytest.raises(StoreError, match="away"):
        vault.save(checkpoint(tmp_path, 2), 2)

    vault.save(checkpoint(tmp_path, 4), 4)

    assert vault.latest is not None
    assert [entry.num_steps for entry in vault.latest.checkpoints] == [4, 2]
    assert fetched(objects, tmp_path / "back") == (4, [])


def test_a_store_where_nothing_was_learned_is_as_good_as_new(objects: S3Objects, tmp_path: Path) -> None:
    """A run that was refused after it had begun does not refuse the next, whatever that is."""
    claimed(objects)
    vault = Vault.look(objects)
    vault.claim({"plan": "another"})
    vault.save(checkpoint(tmp_path, 2), 2)
    assert vault.latest is not None and vault.latest.request == {"plan": "another"}

    assert claimed(objects).latest == Vault.look(objects).latest
    latest = Vault.look(objects).latest
    assert latest is not None and latest.request == {"plan": "another"}


def test_what_cannot_be_removed_is_no_failure(
    objects: S3Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role that may not list uploads can write all the same, and it is said."""

    def forbidden(_self: S3Objects) -> int:
        raise StoreError("S3 answers AccessDenied to list_multipart_uploads")

    monkeypatch.setattr(S3Objects, "abandon_uploads", forbidden)
    vault = Vault.look(objects)

    assert "stays in the store: S3 answers AccessDenied" in (vault.claim(REQUEST) or "")
    vault.save(checkpoint(tmp_path, 2), 2)


def test_results_take_the_place_of_results(objects: S3Objects, tmp_path: Path) -> None:
    """Those of an earlier session go, checkpoints stay."""
    vault = claimed(objects)
    vault.save(checkpoint(tmp_path, 2), 2)
    for number in (3, 4):
        vault.keep_results(checkpoint(tmp_path, number), number)

    assert vault.latest is not None and vault.latest.results is not None
    assert all(key.startswith(vault.latest.results.prefix) for key in objects.keys("results/"))
    assert objects.read(f"{vault.latest.results.prefix}state.json") is not None
    assert fetched(objects, tmp_path / "back") == (2, [])


def test_conditions_hold(objects: S3Objects) -> None:
    """A new object is new, a replaced one is the one that was seen; the same content again is no other."""
    etag = objects.create("x", b"1")
    assert objects.create("x", b"1") == etag
    with pytest.raises(Taken):
        objects.create("x", b"2")
    other = objects.replace("x", b"2", etag)
    assert objects.replace("x", b"2", etag) == other
    with pytest.raises(Taken):
        objects.replace("x", b"3", etag)
    with pytest.raises(Taken):
        objects.replace("none", b"3", etag)
    assert objects.read("x") == (b"2", other)
    assert objects.read("none") is None


def test_many_objects_are_seen_and_removed(objects: S3Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one answer holds, and one request to remove."""
    monkeypatch.setattr(s3, "MOST_KEYS", 5)
    for number in range(13):
        objects.write(f"many/{number}", b"")
    assert len(objects.keys("many/")) == 13
    objects.remove(objects.keys("many/"))
    assert objects.keys("many/") == []


@pytest.mark.parametrize("url", ["s3:/x", "bucket/prefix", "s3://", "s3://UPPER/x", "gs://bucket/x"])
def test_what_is_no_store_is_told(url: str) -> None:
    """With what would be one."""
    with pytest.raises(StoreError, match="is no store; give one such as s3://bucket/prefix"):
        s3.place(url)


def test_places() -> None:
    """Slashes at the ends do not count."""
    assert s3.place("s3://bucket") == s3.place("s3://bucket/") == Place("bucket", "")
    assert s3.place("s3://bucket/a/b/") == Place("bucket", "a/b/")
    assert s3.shown("s3://files-123456789012-x/run") == "s3://files-************-x/run"
    assert s3.shown("arn:aws:iam::123456789012:role/i-123456789012") == "arn:aws:iam::************:role/i-************"
    assert s3.shown("i-d507e123456789012 runs") == "i-d507e123456789012 runs"  # an instance, by its own name
    assert s3.shown("s3://KEY:SECRET@bucket/run") == "s3://***@bucket/run"


def test_a_store_that_is_not_there_is_told() -> None:
    """In one line that names neither account nor key."""
    with pytest.raises(StoreError, match="S3 has no such bucket; make it first"):
        Vault.look(S3Objects(Place("no-such-bucket-here", "")))


def test_something_else_in_its_place_is_told(objects: S3Objects) -> None:
    """A LATEST that no run wrote is not overwritten."""
    objects.create(storage.LATEST, b"hello")

    with pytest.raises(StoreError, match="not what a run writes; give another prefix"):
        Vault.look(objects)


# The store beside the folder


def request(place: Path, bucket: str, **changes: Any) -> RunRequest:
    """Some data to learn, and a store."""
    (place / "data.txt").write_text("some text")
    wanted: dict[str, Any] = {"data": place / "data.txt", "output": place / "run", "store": f"s3://{bucket}/some/run"}
    return RunRequest(**{**wanted, **changes})


def test_a_store_that_holds_a_run_is_gone_on_with_or_refused(objects: S3Objects, bucket: str, tmp_path: Path) -> None:
    """As a folder that holds one; before it does, any run may begin."""
    vault = claimed(objects)
    assert keeping.look(request(tmp_path, bucket)) is not None
    vault.save(checkpoint(tmp_path, 2), 2)

    with pytest.raises(RunError, match=rf"--store s3://{bucket}/some/run: it holds a run; go on with it by --resume"):
        keeping.look(request(tmp_path, bucket))
    found = keeping.look(request(tmp_path, bucket, resume=True))
    assert found is not None and found.latest == vault.latest
    assert keeping.look(request(tmp_path, bucket, store=None)) is None


def test_another_run_in_the_store_is_refused(
    objects: S3Objects, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would mix two runs: which part differs, and what to give; nothing is written."""
    vault = claimed(objects)
    vault.save(checkpoint(tmp_path, 2), 2)
    monkeypatch.setattr(folder, "fingerprint", lambda _plan, asked: {**REQUEST, "seed": str(asked.seed)})
    seeded = replace(vault.latest, request={**REQUEST, "seed": "0"}) if vault.latest else None
    plan: Any = None

    assert not keeping.same(plan, request(tmp_path, bucket), Vault(objects, latest=seeded))
    with pytest.raises(RunError, match=r"some/run holds a run whose seed differs; .*, or another prefix"):
        keeping.same(plan, request(tmp_path, bucket, seed=1), Vault(objects, latest=seeded))
    assert Vault.look(objects).latest == vault.latest
