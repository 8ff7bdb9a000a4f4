"""What went wrong at AWS, in a word that tells neither account nor secret: an answer's own text may hold either."""

from __future__ import annotations

import botocore.exceptions


def reason(error: Exception) -> str:
    """AWS's code for it, or what kind of failure it is."""
    if isinstance(error, botocore.exceptions.ClientError):
        return str(error.response.get("Error", {}).get("Code") or status(error))
    if isinstance(error, botocore.exceptions.NoCredentialsError):
        return "no AWS credentials were found; a role, a profile or variables give them"
    return type(error).__name__


def status(error: botocore.exceptions.ClientError) -> int:
    """The answer's HTTP status; 0 where there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
