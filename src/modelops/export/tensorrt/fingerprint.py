"""Fingerprint of an engine: what it was built from, on and for. One that differs is refused.

An engine is a program for one GPU, one TensorRT and one driver, and TensorRT executes what the plan
says. So beside NAME.plan lies NAME.json; a plan is only read together with it, its bytes are hashed
before TensorRT sees them, and the same bytes are then deserialized. The fingerprint is written
last: a plan without one is unfinished. It is no signature: whoever can write both files can forge
both, which the digests in artifact.json and a signed release guard against.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from modelops.base.errors import ExportError, IntegrityError, UsageError
from modelops.base.files import read_json, sha256_bytes, sha256_file, write_json
from modelops.export.graphs.external import check_data
from modelops.export.tensorrt.library import version_numbers
from modelops.export.tensorrt.profiles import OptimizationProfile

SCHEMA_VERSION = 1
_REBUILD = "add --rebuild to build it here"


class EngineFlags(BaseModel):
    """Flags that change the engine and not its input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace_bytes: int | None = None  # None: all of the device's memory
    optimization_level: int = 3
    refit: bool = False
    version_compatible: bool = False
    tf32: bool = False


class EngineMachine(BaseModel):
    """The machine an engine is tied to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensorrt: str
    cuda: str
    driver: str
    compute_capability: str
    gpu: str
    platform: str


class EngineFingerprint(BaseModel):
    """NAME.json beside NAME.plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    onnx_sha256: str
    weights_sha256: dict[str, str] = {}  # external data: path relative to the graph -> digest
    plan_sha256: str
    machine: EngineMachine
    profiles: list[OptimizationProfile]
    flags: EngineFlags
    layers: dict[str, Any] = {}  # how many layers run in INT8, see `inspection`

    def write(self, path: str | Path) -> None:
        """Write atomically as indented JSON."""
        write_json(path, self.model_dump(mode="json"))


def fingerprint_path(plan: str | Path) -> Path:
    """NAME.json of NAME.plan."""
    return Path(plan).with_suffix(".json")


def read_fingerprint(plan: str | Path) -> EngineFingerprint:
    """The fingerprint beside a plan.

    Raises:
        UsageError: no plan, or no fingerprint beside it.
        IntegrityError: the fingerprint is not one.
    """
    path = fingerprint_path(plan)
    if not Path(plan).is_file():
        raise UsageError(f"{plan}: no such engine", hint=_REBUILD)
    if not path.is_file():
        raise UsageError(
            f"{plan}: no {path.name} beside it: an unfinished engine, or one from elsewhere",
            hint=_REBUILD,
        )
    try:
        found = EngineFingerprint.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(
            f"{path}: not an engine's fingerprint: {where}: {first['msg']}", hint=_REBUILD
        ) from error
    if found.schema_version > SCHEMA_VERSION:
        raise IntegrityError(
            f"{path}: schema_version {found.schema_version} is newer than this modelops understands"
            f" ({SCHEMA_VERSION})", hint="upgrade modelops, or " + _REBUILD,
        )  # fmt: skip
    return found


def graph_digests(onnx_path: str | Path) -> tuple[str, dict[str, str]]:
    """Return the sha256 of an ONNX file, and {file name: sha256} of the weights beside it.

    Raises:
        UsageError: no such file.
        ExportError: not an ONNX graph.
        IntegrityError: its weights are missing or lie where they may not.
    """
    path = Path(onnx_path)
    data = check_data(path)
    return sha256_file(path), {} if data is None else {data.name: sha256_file(data)}


def machine_differences(
    built: EngineMachine, here: EngineMachine, *, compatible: bool
) -> list[str]:
    """One "what: there, here" for everything that ties an engine to another machine.

    Args:
        built: where the engine was built.
        here: this machine.
        compatible: the engine was built version-compatible: a newer TensorRT may run it.
    """
    different = [
        f"{name} is {theirs} there and {ours} here"
        for name, theirs, ours in (
            ("the GPU", built.gpu, here.gpu),
            ("its compute capability", built.compute_capability, here.compute_capability),
            ("the driver", built.driver, here.driver),
            ("CUDA", built.cuda, here.cuda),
            ("the platform", built.platform, here.platform),
        )
        if theirs != ours
    ]
    newer = version_numbers(here.tensorrt) >= version_numbers(built.tensorrt) != ()
    if built.tensorrt != here.tensorrt and not (compatible and newer):
        different.append(f"TensorRT is {built.tensorrt} there and {here.tensorrt} here")
    return different


def fingerprint_differences(
    built: EngineFingerprint,
    here: EngineMachine,
    *,
    onnx_path: str | Path | None = None,
    profiles: Sequence[OptimizationProfile] | None = None,
    flags: EngineFlags | None = None,
) -> list[str]:
    """Return why an engine is not for this machine, graph, profiles or flags; empty if it is.

    What is not given is not compared.
    """
    different = machine_differences(built.machine, here, compatible=built.flags.version_compatible)
    if onnx_path is not None:
        digest, weights = graph_digests(onnx_path)
        if digest != built.onnx_sha256:
            different.append(
                f"the graph was {built.onnx_sha256[:12]} and {Path(onnx_path).name} is "
                f"{digest[:12]}"
            )
        changed = sorted(
            name
            for name in {*weights, *built.weights_sha256}
            if weights.get(name) != built.weights_sha256.get(name)
        )
        if changed:
            different.append(f"other weights in {', '.join(changed)}")
    if profiles is not None and list(profiles) != built.profiles:
        different.append("other optimization profiles were asked for")
    if flags is not None and flags != built.flags:
        theirs, ours = built.flags.model_dump(), flags.model_dump()
        different += [
            f"{name} was {theirs[name]} and {ours[name]} is asked for"
            for name in theirs
            if theirs[name] != ours[name]
        ]
    return different


def read_verified_plan(
    plan: str | Path,
    here: EngineMachine,
    *,
    onnx_path: str | Path | None = None,
    profiles: Sequence[OptimizationProfile] | None = None,
    flags: EngineFlags | None = None,
) -> tuple[bytes, EngineFingerprint]:
    """The bytes of an engine that belongs here, and its fingerprint.

    Raises:
        UsageError: no plan or no fingerprint.
        IntegrityError: the plan's bytes are not those of its digest.
        ExportError: it was built on another machine, from another graph, or otherwise.
    """
    built = read_fingerprint(plan)
    different = fingerprint_differences(
        built, here, onnx_path=onnx_path, profiles=profiles, flags=flags
    )
    if different:
        raise ExportError(f"{plan}: not built for this: {'; '.join(different)}", hint=_REBUILD)
    data = Path(plan).read_bytes()
    if sha256_bytes(data) != built.plan_sha256:
        raise IntegrityError(
            f"{plan}: differs from its digest in {fingerprint_path(plan).name}, so it is not "
            "loaded", hint=_REBUILD,
        )  # fmt: skip
    return data, built


def current_machine(device: int = 0) -> EngineMachine:
    """This machine, with its GPU `device`. Needs TensorRT and a GPU; not run where it was written.

    Raises:
        MissingExtraError: TensorRT is not installed.
        ExportError: no such GPU.
    """
    from modelops.export.tensorrt.library import require_gpu, require_tensorrt

    version = require_tensorrt()
    require_gpu(device)
    import torch

    properties = torch.cuda.get_device_properties(device)
    return EngineMachine(
        tensorrt=version,
        cuda=str(torch.version.cuda),
        driver=driver_version(),
        compute_capability=f"{properties.major}.{properties.minor}",
        gpu=properties.name,
        platform=f"{platform.system()} {platform.machine()}",
    )


def driver_version() -> str:
    """Version of NVIDIA's driver as nvidia-smi or the kernel module gives it, else "unknown"."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        lines = done.stdout.split()
        if lines:
            return lines[0]
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group(0) if found else "unknown"
