"""Checks before any worker starts. A worker that cannot start is started again for ever, so every
fault that can be found beforehand is refused here, in one line. Imports no torch without a GPU.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from modelops.base.errors import UsageError
from modelops.releases.verify import verify_release
from modelops.safety.registry import check_image_filter, check_prompt_filter
from modelops.serving.deploy.preflight import require_preflight
from modelops.serving.moderation.quarantine import check_quarantine
from modelops.serving.moderation.store import make_private
from modelops.serving.provenance.manifests import Marker
from modelops.serving.provenance.signing import open_signing_key
from modelops.serving.provenance.watermark import open_watermark
from modelops.serving.rollout.active_release import release_from_settings
from modelops.serving.settings import PREFIX, NodeSettings, known_variables
from modelops.serving.telemetry.logs import check_logging
from modelops.serving.telemetry.segments import SegmentLog
from modelops.serving.telemetry.tracing import check_tracing
from modelops.serving.workers import prepare_workers

_ALIKE = 0.9
log = logging.getLogger("modelops.serving")


def check_the_start(settings: NodeSettings, environment: Mapping[str, str] = os.environ) -> None:
    """Check everything that a worker will need and that can be checked without one.

    Raises:
        ModelopsError: a setting, a file that it names, the release or a key cannot be used.
    """
    check_names(environment)
    check_prompt_filter(settings.prompt_filter)
    check_image_filter(settings.image_filter, pinned=True)
    check_tracing(environment)
    if settings.releases and not Path(settings.releases).is_dir():
        raise UsageError(f"MODELOPS_RELEASES={settings.releases}: no such folder")
    check_quarantine(settings)
    check_logging(settings)
    _check_folders(settings)
    if settings.watermark_key:
        open_watermark(settings.watermark_key)
    root = release_from_settings(settings)
    record = verify_release(root)
    if (
        settings.device.partition(":")[0] == "cuda"
        and not (
            root / record.model / "artifact.json"  # whose runtime has devices of its own
        ).is_file()
    ):
        from modelops.models.devices import open_device

        open_device(settings.device)
    signer = open_signing_key(settings.signing_key, settings.signing_chain)
    Marker(signer, software=(record.name, record.version))  # which tries it
    if (root / record.model / "artifact.json").is_file():
        log.info("preflight: %s", require_preflight(root, runtime=settings.runtime))
    prepare_workers(settings)


def _check_folders(settings: NodeSettings) -> None:
    """Make the folders that a worker writes to, or say why that cannot be.

    Raises:
        ModelopsError: one cannot be written to, or its limit is too small.
    """
    for folder, megabytes, what in (
        (settings.receipts, settings.receipts_mb, "receipts"),
        (settings.drift_log, settings.drift_log_mb, "drift log"),
    ):
        if folder:
            limit = megabytes * 1_000_000
            SegmentLog(folder, prefix="", max_bytes=limit, what=what, writers=settings.workers)
    if settings.quarantine:
        make_private(Path(settings.quarantine))


def check_names(environment: Mapping[str, str]) -> None:
    """Refuse variables that are a misspelling of one that a node reads.

    Other variables that begin with MODELOPS_ are allowed: Kubernetes makes some for each service,
    such as MODELOPS_SERVICE_HOST.

    Raises:
        UsageError: a variable is misspelled.
    """
    known = known_variables()
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in known:
            continue
        if meant := difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE):
            raise UsageError(f"{name}: no such setting", hint=f"{meant[0]} is one")
