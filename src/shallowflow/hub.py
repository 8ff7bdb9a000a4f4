"""A model's configuration from the Hugging Face Hub, where there is a network."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from shallowflow.profiles import FactsError, ModelSpec, UnknownName, load_model


def find_model(name: str) -> ModelSpec:
    """The model called *name*: shipped, on disk, or on the Hub.

    Raises:
        FactsError: nobody knows it, it is gated, or its configuration is broken.
    """
    try:
        return load_model(name)
    except UnknownName as unknown:
        if name.count("/") != 1 or Path(name).exists() or name.startswith((".", "/", "~")):
            raise
        return _from_hub(name, unknown)


def _from_hub(name: str, unknown: UnknownName) -> ModelSpec:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    if not _reachable():
        raise UnknownName(f"{unknown} The Hub could not be reached to look further.")
    try:
        path = hf_hub_download(name, "config.json", etag_timeout=5)
    except GatedRepoError:
        raise FactsError(
            f"{name} is gated: accept its licence on its page at huggingface.co, then log in with `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise unknown from None
    except EntryNotFoundError:
        raise FactsError(
            f"{name} has no config.json on the Hub; try the repository that it was converted from"
        ) from None
    except (HfHubHTTPError, OSError, RuntimeError, ValueError):
        raise UnknownName(f"{unknown} The Hub could not be asked.") from None
    found = load_model(path)
    return ModelSpec(name=name, config=found.config)


def _reachable() -> bool:
    """Whether the Hub answers at all; its own client would try for half a minute to find out."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=3):  # noqa: S310  # the Hub's own address
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False
