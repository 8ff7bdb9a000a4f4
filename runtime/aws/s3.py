"""Objects below a prefix of an S3 bucket, by boto3; what may pass is tried again, and no answer's text is repeated.

An error's own words can hold the account's number, a role or a key's name, so that only S3's code for it is told.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import botocore.exceptions
import botocore.parsers
import urllib3.exceptions

from shallowflow.runtime.storage import FileEntry, StoreError, Taken

from .errors import reason, status

PART_BYTES = 16 * 2**20
"""Of a larger file, in one request: what a cut costs; S3 takes 5 MiB or more, and 10,000 parts."""
NUM_ATTEMPTS = 8
"""Of one request, some half a minute apart at most, as S3's own clients wait for it to scale."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 10.0
MOST_KEYS = 1000
"""In one list, and in one request to remove, as S3 takes them."""
CONNECT_SECONDS, READ_SECONDS = 5.0, 30.0

_PASSES = {408, 409, 429, 500, 502, 503, 504}
"""Statuses that pass; 409 is another conditional write at the same time."""
_DAMAGED = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}
"""What S3 says of a request that did not arrive as it was sent."""
_ON_THE_WAY = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.FlexibleChecksumError,
    botocore.parsers.ResponseParserError,
    urllib3.exceptions.HTTPError,
    OSError,
)
_ACCOUNT = re.compile(r"(?P<resource>\b(?:i|ami|sg|vol|subnet|vpc|eni|sir|snap|lt)-[0-9a-f]{17}\b)|(?<!\d)\d{12}(?!\d)")
"""An account's number; a resource's identifier is none, though it may have as many digits in a row."""
_PASSWORD = re.compile(r"//[^/]*@")
_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>.*))?")


class _Missing(Exception):
    """There is no such object."""


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket, and a prefix in it that is empty or ends with a slash."""

    bucket: str
    prefix: str


def place(url: str) -> Place:
    """What the *url* ``s3://BUCKET/PREFIX`` names.

    Raises:
        StoreError: it is no such URL.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise StoreError(f"{shown(url)!r} is no store; give one such as s3://bucket/prefix")
    prefix = (found["prefix"] or "").strip("/")
    return Place(found["bucket"], f"{prefix}/" if prefix else "")


def shown(url: str) -> str:
    """*url* for people, without what may be an account's number, which names of buckets like to hold, or a password."""
    return _ACCOUNT.sub(lambda found: found["resource"] or "*" * 12, _PASSWORD.sub("//***@", url))


class S3Objects:
    """See ``storage.Objects``; credentials, region and endpoint are boto3's to find."""

    def __init__(
        self, where: Place, *, sleep: Callable[[float], None] = time.sleep, chance: Callable[[], float] = random.random
    ) -> None:
        config = botocore.config.Config(
            retries={"total_max_attempts": 1},  # retrying is done here, where the conditions are understood
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
        )
        try:
            self._client: Any = boto3.Session().client("s3", config=config)
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise StoreError(f"S3 cannot be used: {reason(error)}") from None
        self._where, self._sleep, self._chance = where, sleep, chance

    # Small objects

    def create(self, key: str, content: bytes) -> str:
        """Write a new object and return its ETag; Taken where there is one that is not *content*."""
        return self._conditional(key, content, IfNoneMatch="*")

    def replace(self, key: str, content: bytes, etag: str) -> str:
        """Write in the place of what has *etag*, and return the new ETag; Taken where something else is there."""
        return self._conditional(key, content, IfMatch=etag)

    def _conditional(self, key: str, content: bytes, **condition: str) -> str:
        try:
            return str(self._put(key, content, **condition)["ETag"])
        except (Taken, _Missing):
            found = self.read(key)
            if found is not None and found[0] == content:  # an answer was lost, and the request was not
                return found[1]
            raise Taken from None

    def write(self, key: str, content: bytes) -> None:
        """Write whatever is there."""
        self._put(key, content)

    def _put(self, key: str, content: bytes, **more: Any) -> Any:
        digest = hashlib.sha256(content)
        return self._ask(
            "put_object",
            Key=self._where.prefix + key,
            Body=content,
            ChecksumAlgorithm="SHA256",
            ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            Metadata={"sha256": digest.hexdigest()},
            **more,
        )

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Content and ETag; None where there is none."""
        try:
            found = self._ask(
                "get_object",
                lambda answer: (answer["Body"].read(), str(answer["ETag"])),
                Key=self._where.prefix + key,
            )
        except _Missing:
            return None
        content, etag = found
        return bytes(content), etag

    # Files

    def upload(self, key: str, path: Path) -> FileEntry:
        """Write the file *path* as a new object, and read back that it is there whole."""
        parts = [hashlib.md5(part, usedforsecurity=False).digest() for part in _parts(path)]
        with path.open("rb") as file:
            entry = FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        if len(parts) > 1:
            etag = f'"{hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"'
            self._in_parts(key, path, entry)
        else:
            etag = f'"{b"".join(parts).hex()}"'
            with contextlib.suppress(Taken):  # by this very request, whose answer was lost: seen below
                self._put(key, path.read_bytes(), IfNoneMatch="*")
        self._check(key, entry, etag)
        return entry

    def _in_parts(self, key: str, path: Path, entry: FileEntry) -> None:
        full = self._where.prefix + key
        number = self._ask(
            "create_multipart_upload", Key=full, ChecksumAlgorithm="SHA256", Metadata={"sha256": entry.sha256}
        )["UploadId"]
        try:
            made = []
            for index, part in enumerate(_parts(path), start=1):
                checksum = base64.b64encode(hashlib.sha256(part).digest()).decode()
                answer = self._ask(
                    "upload_part", Key=full, UploadId=number, PartNumber=index, Body=part, ChecksumSHA256=checksum
                )
                made.append({"PartNumber": index, "ETag": answer["ETag"], "ChecksumSHA256": checksum})
            with contextlib.suppress(Taken, _Missing):  # ended by a request whose answer was lost: seen by the caller
                self._ask(
                    "complete_multipart_upload",
                    Key=full,
                    UploadId=number,
                    MultipartUpload={"Parts": made},
                    IfNoneMatch="*",
                )
        except _Missing:
            raise StoreError("S3 knows nothing of an upload any more that had begun") from None
        except StoreError:
            with contextlib.suppress(StoreError, _Missing):
                self._ask("abort_multipart_upload", Key=full, UploadId=number)
            raise

    def _check(self, key: str, entry: FileEntry, etag: str) -> None:
        """See that the object is what was sent, as S3 has it now.

        Raises:
            StoreError: it is not.
        """
        try:
            found = self._ask("head_object", Key=self._where.prefix + key)
        except _Missing:
            raise StoreError(f"{key} is not there after it was written") from None
        hashed = not found.get("ServerSideEncryption", "").startswith("aws:kms")  # else the ETag is no MD5
        same = found["ContentLength"] == entry.num_bytes and found["Metadata"].get("sha256") == entry.sha256
        if not same or (hashed and found["ETag"] != etag):
            raise StoreError(f"{key} is not what was written")

    def download(self, key: str, path: Path) -> FileEntry | None:
        """Write the object into the file *path* and return what was written; None where there is none."""

        def take(answer: Any) -> FileEntry:
            digest, num_bytes = hashlib.sha256(), 0
            with path.open("wb") as file:
                for chunk in answer["Body"].iter_chunks(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    num_bytes += len(chunk)
            return FileEntry(num_bytes, digest.hexdigest())

        try:
            found: FileEntry = self._ask("get_object", take, Key=self._where.prefix + key)
        except _Missing:
            return None
        return found

    # Many

    def keys(self, prefix: str) -> list[str]:
        """All below *prefix*."""
        found: list[str] = []
        more: dict[str, Any] = {}
        while True:
            answer = self._ask("list_objects_v2", Prefix=self._where.prefix + prefix, MaxKeys=MOST_KEYS, **more)
            found += [one["Key"].removeprefix(self._where.prefix) for one in answer.get("Contents", ())]
            if not answer.get("IsTruncated"):
                return found
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def remove(self, keys: Sequence[str]) -> None:
        """Remove them; what is not there is no failure."""
        for first in range(0, len(keys), MOST_KEYS):
            named = [{"Key": self._where.prefix + key} for key in keys[first : first + MOST_KEYS]]
            self._ask("delete_objects", Delete={"Objects": named, "Quiet": True})

    def abandon_uploads(self) -> int:
        """Give up every upload in parts that nobody will finish; returns how many there were."""
        count = 0
        more: dict[str, Any] = {}
        while True:
            answer = self._ask("list_multipart_uploads", Prefix=self._where.prefix, **more)
            for one in answer.get("Uploads", ()):
                with contextlib.suppress(_Missing):
                    self._ask("abort_multipart_upload", Key=one["Key"], UploadId=one["UploadId"])
                count += 1
            if not answer.get("IsTruncated"):
                return count
            more = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    # Asking

    def _ask(self, name: str, take: Callable[[Any], Any] = lambda answer: answer, **arguments: Any) -> Any:
        """What *take* makes of S3's answer; asked again where that may help.

        Raises:
            Taken: a condition does not hold.
            _Missing: there is no such object.
            StoreError: all else.
        """
        trouble = ""
        for attempt in range(NUM_ATTEMPTS):
            if attempt:
                longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt)
                self._sleep(longest * (0.5 + 0.5 * self._chance()))  # apart from others who wait as well
            try:
                return take(getattr(self._client, name)(Bucket=self._where.bucket, **arguments))
            except botocore.exceptions.ClientError as error:
                trouble = reason(error)
                if not _passes(error):
                    raise _meaning(error, name) from None
            except _ON_THE_WAY as error:
                trouble = reason(error)
            except botocore.exceptions.BotoCoreError as error:
                raise StoreError(f"S3 cannot be used: {reason(error)}") from None
        raise StoreError(f"S3 did not do {name} in {NUM_ATTEMPTS} attempts: {trouble}")


def _passes(error: botocore.exceptions.ClientError) -> bool:
    return status(error) in _PASSES or reason(error) in _DAMAGED


def _meaning(error: botocore.exceptions.ClientError, name: str) -> Exception:
    """What is raised for an answer to the request *name* that will not pass."""
    code = reason(error)
    if status(error) == 412:
        return Taken()
    if code == "NoSuchBucket":
        return StoreError("S3 has no such bucket; make it first")
    if status(error) == 404:
        return _Missing()
    return StoreError(f"S3 answers {code} to {name}")


def _parts(path: Path) -> Iterator[bytes]:
    """The file's bytes, as many at a time as go in one request; an empty file is one part."""
    with path.open("rb") as file:
        part = file.read(PART_BYTES)
        yield part
        while part := file.read(PART_BYTES) if len(part) == PART_BYTES else b"":
            yield part
