"""What commands print of what the runtime found: its types, with what they come to. Loads torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from shallowflow.runtime.calibrate import RECORD_VERSION, Calibration
from shallowflow.runtime.trainers.check import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked(Verdict):
    """What is said of a trainer's settings on one GPU, and what it comes to.

    Attributes:
        fits: whether the GPU's memory is enough.
        will_run: whether it fits, and nothing else makes it fail.
    """

    fits: bool = field()  # named so that the property of that name is no default
    will_run: bool = field()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCalibration(Calibration):
    """What a device was found to do, and where that is kept.

    Attributes:
        kind: of the record.
        profile: the file that plans for the device are made by from then on.
    """

    format_version: int
    kind: Literal["calibration"] = "calibration"
    profile: str


def checked(verdict: Verdict) -> Checked:
    """*verdict* as it is printed."""
    return Checked(**_values(verdict), fits=verdict.fits, will_run=verdict.will_run)


def kept(calibration: Calibration, profile: Path) -> KeptCalibration:
    """*calibration* as it is printed, once its *profile* is written."""
    values = _values(calibration)
    values["torch_version"] = str(calibration.torch_version)  # PyTorch's own is of a class of its own
    return KeptCalibration(**values, format_version=RECORD_VERSION, profile=str(profile))


def _values(value: Verdict | Calibration) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in fields(value)}
