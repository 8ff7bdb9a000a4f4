"""The planner in a browser: what it shows is the command line's, and it answers nobody but this machine's own pages."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from shallowflow import planning, webapp
from shallowflow.planner.serialize import from_json
from shallowflow.runtime.plan_page import answers
from shallowflow.webapp import Served, make_app
from tests.front.browser import in_a_browser, opened
from tests.front.shell import AS_PROGRAM, sfplan

ASKED = {"gpu": "cpu", "sequence_length": "32", "rank": "8", "quantization": "fp16", "tokens": "5000"}


@pytest.fixture
def client() -> FlaskClient:
    """Somebody on this machine."""
    made = make_app("known").test_client()
    assert made.get("/?token=known").status_code == 302
    return made


def ask(client: FlaskClient, **given: object) -> Any:
    """Begin to plan."""
    answer = client.post("/plans", data=given)
    assert answer.status_code == 200
    return answer.json


def ended(client: FlaskClient, job: Any) -> Any:
    """What came of it."""
    until = time.monotonic() + 300
    while job["state"] == "planning" and time.monotonic() < until:
        time.sleep(0.05)
        job = client.get(f"/plans/{job['number']}").json
    return job


def test_a_plan_is_the_command_lines(client: FlaskClient, tiny_folder: Path) -> None:
    """The shown command makes the very plan, whose page and file can be had; the answers are its numbers."""
    done = ended(client, ask(client, model=tiny_folder, **ASKED))

    assert done["state"] == "done", done
    words = shlex.split(done["command"])
    assert words[:2] == ["sfplan", "plan"]
    saved = client.get(f"/plans/{done['number']}/plan.json")
    assert saved.text == sfplan("plan", "--json", *words[2:]).output
    assert saved.headers["Content-Disposition"] == "attachment; filename=tiny.json"
    plan = from_json(saved.data)
    shown = client.get(f"/plans/{done['number']}/page").text
    assert "<h1>tiny on 1 CPU" in shown
    for figure, what in done["answers"]:
        assert figure in shown and what
    assert done["answers"] == [list(one) for one in answers(plan)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "no-such-model"}, "unknown model 'no-such-model'"),
        ({"gpu": "t5"}, "unknown GPU 't5'"),
        ({"sequence_length": "1"}, "1 is not in the range"),
        ({"data": "nowhere.jsonl", "tokens": ""}, "nowhere.jsonl"),
        ({"data": "nowhere.jsonl"}, "the size is given twice"),
        ({"max_process_gib": "0.001"}, "no plan fits in"),
        ({"model": "--help"}, "--help"),
        ({"gpus": "9" * 23}, "not in the range"),
        ({"budget_usd": "nan"}, "nan is no number"),
    ],
)
def test_what_cannot_be_is_told(client: FlaskClient, tiny_folder: Path, given: dict[str, str], said: str) -> None:
    """As the command line tells it; the next plan can be asked for."""
    refused = ended(client, ask(client, **{"model": tiny_folder, **ASKED, **given}))

    assert refused["state"] == "refused" and said in refused["told"], refused
    assert refused["answers"] == []
    for what in ("page", "plan.json"):
        assert client.get(f"/plans/{refused['number']}/{what}").status_code == 404


def test_only_the_latest_is_planned(client: FlaskClient, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for meanwhile takes the place of what is planned."""
    begun, let_go = threading.Event(), threading.Event()
    planned = planning.make_plan

    def waiting(*args: Any, **options: Any) -> Any:
        begun.set()
        let_go.wait(60)
        options["progress"]("going on")
        return planned(*args, **options)

    monkeypatch.setattr(webapp, "make_plan", waiting)
    first = ask(client, model=tiny_folder, **ASKED)
    assert begun.wait(60)
    second = ask(client, model=tiny_folder, **{**ASKED, "rank": "16"})
    let_go.set()

    assert ended(client, first)["state"] == "superseded"
    assert ended(client, second)["state"] == "done"


def test_a_plan_of_an_odd_folder_can_be_had(client: FlaskClient, tiny_folder: Path, tmp_path: Path) -> None:
    """Its name goes into a header, which is one line."""
    odd = tmp_path / "odd\nname \u2603"
    shutil.copytree(tiny_folder, odd)

    done = ended(client, ask(client, model=odd, **ASKED))

    saved = client.get(f"/plans/{done['number']}/plan.json")
    assert saved.status_code == 200 and from_json(saved.data).model_name == "odd\nname \u2603"


def test_other_sites_get_nothing(client: FlaskClient, tiny_folder: Path) -> None:
    """No other name of this machine is answered, nothing without the token, and no page is framed."""
    assert client.get("/", headers={"Host": "evil.example:8650"}).status_code == 403
    assert client.get("/plans/1").status_code == 404
    for address in ("/", "/?token=guessed", "/?token=\u00e9", "/plans/1"):
        assert make_app("known").test_client().get(address).status_code == 403
    assert make_app("known").test_client().post("/plans", data={"model": tiny_folder}).status_code == 403
    cookie = make_app("known").test_client().get("/?token=known").headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    policy = client.get("/").headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'self'" in policy


class _Fields(HTMLParser):
    """Finds the form's fields, and whether each stands in a label."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.found: dict[str | None, bool] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes a field."""
        told = dict(attrs)
        self.inside += tag == "label"
        if tag in ("input", "select") and told.get("type") != "hidden":
            self.found[told["name"]] = self.inside > 0

    def handle_endtag(self, tag: str) -> None:
        """Leaves a label."""
        self.inside -= tag == "label"


def test_every_field_is_an_option_with_a_label(client: FlaskClient) -> None:
    """Whoever hears the page hears what each is."""
    fields = _Fields()
    fields.feed(client.get("/").text)

    assert fields.found.keys() == {"model", *webapp.FIELDS}
    assert all(fields.found.values())


def test_the_command_serves_until_interrupted() -> None:
    """On this machine alone, and Ctrl-C ends it without a word."""
    with subprocess.Popen(
        [*AS_PROGRAM, "ui", "--port", "0", "--no-browser"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as served:
        assert served.stdout is not None and served.stderr is not None
        try:
            address = served.stdout.readline().split()[0]
            asked = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            with asked.open(address, timeout=60) as answer:
                assert b"<h1>Plan a fine-tuning</h1>" in answer.read()
            served.send_signal(signal.SIGINT)
            assert served.wait(60) == 0
            assert served.stderr.read() == ""
        finally:
            served.kill()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]+", address)


def test_a_port_that_is_taken_is_told() -> None:
    """In one line, with what would work."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        done = sfplan("ui", "--port", port, "--no-browser")

    assert done.code == 2
    assert done.error() == f"port {port} cannot be served: Address already in use; give another, such as --port 0"


def test_without_flask_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra that brings it is named."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    done = sfplan("ui")

    assert done.code == 2 and "pip install 'shallowflow[ui]'" in done.error()


@pytest.fixture
def served() -> Iterator[Served]:
    """The application on a port."""
    made = Served.on(0)
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@in_a_browser
def test_in_a_browser(served: Served, tiny_folder: Path, width: int, scheme: Any) -> None:
    """A changed field makes another plan, nothing is wider than the window, and no error is told."""
    with opened(width, scheme) as shown:
        shown.goto(served.address)
        for name, value in {**ASKED, "model": str(tiny_folder)}.items():
            field = shown.locator(f"[name={name}]")
            if name in ("gpu", "quantization"):
                field.select_option(value)
            else:
                field.fill(value)
        shown.keyboard.press("Enter")
        shown.wait_for_selector("#more:not([hidden])", timeout=300_000)
        before = shown.locator("#answers").inner_text()
        shown.frame_locator("#page").locator(".main-svg").first.wait_for()
        shown.fill("[name=sequence_length]", "64")
        shown.keyboard.press("Enter")
        shown.wait_for_function("text => document.getElementById('answers').innerText !== text", arg=before)
        shown.wait_for_selector("#more:not([hidden])", timeout=300_000)
        assert "--sequence-length 64" in shown.inner_text("#command")
        assert shown.inner_text("#told").startswith("done: ")
