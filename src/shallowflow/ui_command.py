"""``sfplan ui``: plans in a browser, served to this machine alone."""

from __future__ import annotations

import importlib.util
import webbrowser

import click

from shallowflow.session import RequestError

PORT = 8650


@click.command("ui")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=PORT,
    show_default=True,
    help="Of this machine; 0 takes a free one.",
)
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open a page of the browser.")
def ui_command(port: int, browser: bool) -> None:
    """Choose a model, a GPU and data in a browser, and see the plan change; nothing is trained or rented.

    Only this machine can reach it. Ctrl-C ends it.

    \b
    sfplan ui
    sfplan ui --port 8000 --no-browser
    """
    if importlib.util.find_spec("flask") is None:
        raise RequestError("sfplan ui needs the package flask; install it with: pip install 'shallowflow[ui]'")
    from shallowflow.webapp import Served

    try:
        served = Served.on(port)
    except OSError as error:
        raise RequestError(f"port {port} cannot be served: {error.strerror}; give another, such as --port 0") from None
    click.echo(f"{served.address}  (this machine alone; Ctrl-C ends it)")
    if browser:
        webbrowser.open(served.address)
    served.until_interrupted()
