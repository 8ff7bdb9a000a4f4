"""The script that a rented machine runs when it starts: install, fetch, train, and be gone, whatever happens."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

FOLDER = "/opt/shallowflow"
SAVING_SECONDS = 110
"""From being asked to end to being killed: what a machine that is taken leaves, nearly."""
ENDING_SECONDS = 600
"""For a run whose time is up, to save and to store."""
SPARE_MINUTES = 30
"""After the most that a run may take: then the machine goes even if nothing else works."""
MOST_BYTES = 16_384
"""Of such a script, as EC2 takes it."""

_OUTER = """\
#!/bin/bash
# Made by sfplan launch: runs one plan on this machine, and ends the machine, whatever comes of it.
PLACE=${SHALLOWFLOW_PLACE:-@folder@}
shutdown -P +@most_minutes@
mkdir -p "$PLACE" && cd "$PLACE" || shutdown -P now
cat >objects.py <<'END-OF-FILE'
@objects@END-OF-FILE
cat >work.sh <<'END-OF-FILE'
@work@END-OF-FILE
systemd-run --unit=shallowflow --property=After=network-online.target --property=KillMode=mixed \\
  --property=TimeoutStopSec=@saving_seconds@ /bin/bash "$PLACE/work.sh" || shutdown -P now
"""

_OBJECTS = '''\
"""Files from the store, verified; the log into it; and a token that the user keeps in Parameter Store."""
import hashlib
import sys

import boto3

BUCKET, PREFIX = @bucket@, @prefix@
FILES = @files@


def fetch(names):
    client = boto3.client("s3")
    for name in names:
        key, sha256 = FILES[name]
        client.download_file(BUCKET, PREFIX + key, name)
        with open(name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                sys.exit(f"{name} is not what was uploaded")


if sys.argv[1] == "get":
    fetch(sys.argv[2:])
elif sys.argv[1] == "log":
    boto3.client("s3").upload_file("log.txt", BUCKET, f"{PREFIX}logs/{sys.argv[2]}.txt")
else:
    print(boto3.client("ssm").get_parameter(Name=sys.argv[2], WithDecryption=True)["Parameter"]["Value"])
'''

_WORK = """\
cd "$(dirname "$0")" || exit 1
exec >>log.txt 2>&1
export HOME=/root HF_HOME="$PWD/hub" AWS_DEFAULT_REGION=@region@ PYTHONUNBUFFERED=1
log=$(date -u +%Y-%m-%dT%H-%M-%SZ) code=1 minute=${SHALLOWFLOW_MINUTE:-60}
finish() {
  echo "exit code $code after $SECONDS seconds; the machine ends now"
  timeout 60 venv/bin/python objects.py log "$log"
  shutdown -P now
}
trap finish EXIT
trap 'echo "asked to end"; exit' TERM
watch() {
  local idle=0 passed=0 busy
  while sleep "$minute"; do
    passed=$((passed + 1))
    busy=$(nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits | sort -n | tail -n 1)
    if [ "${busy:-0}" -gt 0 ]; then idle=0; else idle=$((idle + 1)); fi
    if [ $((passed % 10)) = 0 ]; then venv/bin/python objects.py log "$log"; fi
    if [ "$passed" -ge @run_minutes@ ]; then
      echo "@run_minutes@ minutes have passed: the run is asked to save and end"
    elif [ "$idle" -ge @idle_minutes@ ]; then
      echo "no GPU has worked for @idle_minutes@ minutes: the run is asked to save and end"
    else
      continue
    fi
    kill -TERM "$1"
    sleep @ending_seconds@
    kill -KILL "$1"
    return
  done
}
python3 -m venv venv || { apt-get update && apt-get install -y python3-venv && python3 -m venv venv; } || exit
venv/bin/pip install --quiet boto3 || exit
venv/bin/python objects.py get @names@ || exit
venv/bin/pip install --quiet @package@ || exit
@token@venv/bin/sfplan @train@ &
pid=$!
watch "$pid" &
trap 'echo "asked to end"; kill -TERM "$pid"' TERM
while :; do
  wait "$pid"
  code=$?
  kill -0 "$pid" || break
done 2>/dev/null
exit "$code"
"""


class ScriptError(ValueError):
    """A script that no machine takes: one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What a machine is to do.

    Attributes:
        bucket, prefix: where the run's store is; the prefix is empty or ends with a slash.
        files: to fetch: by the name that each gets, its key below the prefix, and its SHA-256.
        package: what pip installs; a file's name means one of *files*.
        train: words of the command line after ``sfplan``.
        max_hours: that the run may take, with what comes before it.
        idle_minutes: without work of a GPU, after which the run is ended.
        token_parameter: a parameter of SSM that holds a token of the Hub, which no script may hold.
    """

    region: str
    bucket: str
    prefix: str
    files: dict[str, tuple[str, str]]
    package: str
    train: tuple[str, ...]
    max_hours: float
    idle_minutes: int
    token_parameter: str | None = None


def script(errand: Errand) -> str:
    """The script.

    Raises:
        ScriptError: it is too long.
    """
    minutes = max(1, math.ceil(errand.max_hours * 60))
    token = "" if errand.token_parameter is None else shlex.quote(errand.token_parameter)
    work = _filled(
        _WORK,
        region=shlex.quote(errand.region),
        run_minutes=minutes,
        idle_minutes=errand.idle_minutes,
        ending_seconds=ENDING_SECONDS,
        names=shlex.join(errand.files),
        package=shlex.quote(errand.package),
        token=f"HF_TOKEN=$(venv/bin/python objects.py token {token}) || exit\nexport HF_TOKEN\n" if token else "",
        train=shlex.join(errand.train),
    )
    objects = _filled(_OBJECTS, bucket=repr(errand.bucket), prefix=repr(errand.prefix), files=repr(errand.files))
    made = _filled(
        _OUTER,
        folder=FOLDER,
        most_minutes=minutes + math.ceil(ENDING_SECONDS / 60) + SPARE_MINUTES,
        saving_seconds=SAVING_SECONDS,
        objects=objects,
        work=work,
    )
    if len(made.encode()) > MOST_BYTES:
        raise ScriptError(
            f"the machine's script has {len(made.encode()):,} bytes, EC2 takes {MOST_BYTES:,}; give shorter options"
        )
    return made


def _filled(template: str, **values: object) -> str:
    """*template* with each ``@name@`` replaced, once: what is filled in is never read as a template."""
    parts = template.split("@")
    return "".join(str(values[part]) if number % 2 else part for number, part in enumerate(parts))
