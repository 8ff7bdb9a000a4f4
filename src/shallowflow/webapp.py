"""The planner as a small web application: a form, one plan at a time, and the plan's own page."""

from __future__ import annotations

import contextlib
import io
import itertools
import secrets
import shlex
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import flask
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from shallowflow.hub import find_model
from shallowflow.options import DEFAULT_MODEL, DEFAULTS, request
from shallowflow.planner.plan import Plan
from shallowflow.planner.remedies import Infeasible
from shallowflow.planner.serialize import to_json
from shallowflow.planning import beside_one, make_plan
from shallowflow.profiles.load import gpu_names, load_gpu, model_names
from shallowflow.reporting import page
from shallowflow.runtime.plan_page import answers
from shallowflow.runtime.report import template

HOST = "127.0.0.1"
COOKIE = "shallowflow"
MOST_KEPT = 16
"""Plans whose pages can still be asked for, the latest ones."""
FIELDS = {
    "gpu": "--gpu",
    "gpus": "--gpus",
    "sequence_length": "--sequence-length",
    "tokens": "--tokens",
    "data": "--data",
    "global_batch_size": "--global-batch-size",
    "quantization": "--quantization",
    "adapter": "--adapter",
    "rank": "--rank",
    "objective": "--objective",
    "max_process_gib": "--max-process-gib",
    "deadline_hours": "--deadline-hours",
    "budget_usd": "--budget-usd",
}
"""The form's fields, each an option of ``sfplan plan``."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'self'; form-action 'self'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Dropped(BaseException):
    """Raised inside of planning where something else was asked for meanwhile; no handler of errors may take it."""


@dataclass(slots=True)
class Job:
    """What was asked for, and what came of it.

    Attributes:
        state: ``planning``, ``done``, ``refused`` or ``superseded``.
        told: what is being worked on, or why nothing came of it.
        command: what asks for the same on the command line.
    """

    number: int
    command: str
    state: str = "planning"
    told: str = "looking at the model"
    plan: Plan | None = None
    page: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What the form shows of it."""
        state, plan = self.state, self.plan  # in this order: a plan is there before its state says so
        return {
            "number": self.number,
            "state": state,
            "told": self.told,
            "command": self.command,
            "answers": [] if plan is None else answers(plan),
        }


@dataclass(slots=True)
class Planner:
    """Plans one thing after another in a thread of its own: what was asked for last is all that is wanted."""

    jobs: dict[int, Job] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _wanted: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, model: str, options: Mapping[str, str]) -> Job:
        """Begin to plan, and let go of whatever was begun before."""
        line = [word for name, value in options.items() for word in (FIELDS[name], value)]
        with self._lock:
            job = Job(next(self._numbers), shlex.join(["sfplan", "plan", *line, "--", model]))
            self.jobs[job.number] = job
            self._wanted = job.number
            for old in sorted(self.jobs)[:-MOST_KEPT]:
                del self.jobs[old]
        threading.Thread(target=self._work, args=(job, model, line), daemon=True).start()
        return job

    def _work(self, job: Job, model: str, line: list[str]) -> None:
        """Plan *job*, which keeps whatever comes of it."""

        def tell(detail: str) -> None:
            if job.number != self._wanted:
                raise Dropped
            job.told = detail

        with self._turn:
            try:
                tell(job.told)
                job.plan, job.page = _planned(model, line, tell)
                job.state = "done"
            except Dropped:
                job.state = "superseded"
            except Infeasible as refusal:
                job.told, job.state = str(refusal), "refused"
            except click.ClickException as error:
                job.told, job.state = error.format_message(), "refused"
            except BaseException as error:  # noqa: BLE001 - whatever it is, whoever asked is told, and can ask again
                job.told, job.state = " ".join(str(error).split()) or type(error).__name__, "refused"


def _planned(model: str, line: list[str], tell: Any) -> tuple[Plan, str]:
    """The plan that the command line would make, and its page."""
    from shallowflow.cli import plan_command

    options = plan_command.make_context("plan", [*line, "--", model]).params
    for name in ("model", "as_json", "output", "report"):
        del options[name]
    spec = find_model(model)
    device, workload, notes = request((model, spec.name), **options)
    made = make_plan(spec, device, workload, progress=tell, notes=notes)
    made = beside_one(made, spec, device, progress=tell)
    return made, page(made, tell)


def make_app(token: str) -> flask.Flask:
    """The application, for whoever knows *token*: others on this machine could read its user's files with it.

    Its pages ask for nothing from elsewhere, and no other site's page can ask for anything here.
    """
    app = flask.Flask("shallowflow", static_folder=None)
    planner = Planner()

    @app.before_request
    def only_here() -> Any:
        """A name that somebody's server points at this machine is no name of it (DNS rebinding)."""
        name = flask.request.host.rpartition(":")[0] or flask.request.host
        if name not in (HOST, "localhost"):
            flask.abort(403)
        if flask.request.path == "/" and _same(flask.request.args.get("token", ""), token):
            answer = flask.redirect("/")
            answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
            return answer
        if not _same(flask.request.cookies.get(COOKIE, ""), token):
            return "Open the address that sfplan ui printed, with its token.", 403
        return None

    @app.after_request
    def with_headers(response: flask.Response) -> flask.Response:
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    def form() -> str:
        gpus = [(name, load_gpu(name).title) for name in gpu_names()]
        return template("app.html").render(models=model_names(), gpus=gpus, defaults=DEFAULTS, model=DEFAULT_MODEL)

    @app.post("/plans")
    def ask() -> Any:
        """Begin to plan."""
        given = {name: value.strip() for name, value in flask.request.form.items()}
        model = given.pop("model", "")
        wanted = {name: value for name, value in given.items() if name in FIELDS and value}
        return planner.ask(model or DEFAULT_MODEL, wanted).as_dict()

    @app.get("/plans/<int:number>")
    def look(number: int) -> Any:
        return _job(planner, number).as_dict()

    @app.get("/plans/<int:number>/page")
    def show(number: int) -> str:
        return _done(planner, number).page

    @app.get("/plans/<int:number>/plan.json")
    def save(number: int) -> flask.Response:
        plan = _done(planner, number).plan
        assert plan is not None
        text, name = io.BytesIO(to_json(plan).encode()), f"{Path(plan.model_name).name}.json"
        name = "".join(letter if letter.isprintable() else "_" for letter in name)  # a header is one line
        return flask.send_file(text, "application/json", as_attachment=True, download_name=name)

    return app


def _same(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())


def _job(planner: Planner, number: int) -> Job:
    return planner.jobs.get(number) or flask.abort(404)


def _done(planner: Planner, number: int) -> Job:
    job = _job(planner, number)
    return job if job.state == "done" else flask.abort(404)


class _Quiet(WSGIRequestHandler):
    """Tells nothing of every request."""

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 - werkzeug's own name
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Served:
    """The application on a port of this machine.

    Attributes:
        token: what whoever asks has to know.
    """

    server: BaseWSGIServer
    token: str

    @classmethod
    def on(cls, port: int) -> Served:
        """Take *port*, or a free one for 0.

        Raises:
            OSError: it is taken, or may not be.
        """
        token = secrets.token_urlsafe()
        with socket.socket(
            socket.AF_INET, socket.SOCK_STREAM
        ) as listening:  # werkzeug itself ends the program at an error
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((HOST, port))
            listening.listen()
            quiet: dict[str, Any] = {"threaded": True, "request_handler": _Quiet}
            return cls(make_server(HOST, port, make_app(token), fd=listening.fileno(), **quiet), token)

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server.server_address[1]}/?token={self.token}"

    def until_interrupted(self) -> None:
        """Serve until Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            self.server.serve_forever()
        self.server.server_close()
