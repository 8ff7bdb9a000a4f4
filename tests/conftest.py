"""What holds for every test: a cache of its own, no stopwatch for Hypothesis, and no word to the outside."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep traces away from the user's cache, unless the caller named a place for them."""
    with pytest.MonkeyPatch.context() as patch:
        if "SHALLOWFLOW_CACHE" not in os.environ:
            patch.setenv("SHALLOWFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_calibration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plan with the shipped profiles and prices, whatever was measured on this machine, and taken from AWS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHALLOWFLOW_CONFIG", str(tmp_path_factory.mktemp("configuration")))
        patch.setenv("SHALLOWFLOW_DATA", str(tmp_path_factory.mktemp("prices")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse connections to other machines; processes of one test may still talk to each other."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: tuple[str, int] | str) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"tests stay on this machine; something wants {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield
