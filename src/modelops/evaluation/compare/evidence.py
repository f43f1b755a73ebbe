"""Files beside two evaluation records: per-image values, features, the reference."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, IntegrityError
from modelops.base.files import read_json, sha256_file, sha256_json
from modelops.evaluation.reference import RealPictures, open_reference
from modelops.metrics.protocol import protocol_id
from modelops.models.encoders import LITE0_NAME
from modelops.records.base import InputRef
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record

Features = npt.NDArray[np.floating]


@dataclass(slots=True)
class Evidence:
    """Evaluation record and the files that it names.

    Attributes:
        sha256: of the record's file.
    """

    path: Path
    record: EvaluationRecord
    sha256: str
    _rows: list[dict[str, Any]] | None = None
    _features: dict[str, Features] = field(default_factory=dict)

    @property
    def reference(self) -> InputRef:
        """The record itself, as an input of what is made from it."""
        return InputRef(path=str(self.path), sha256=self.sha256)

    def rows(self) -> list[dict[str, Any]]:
        """Per-image values, one row for each planned image.

        Raises:
            EvaluationError: they are not there.
            IntegrityError: they are other than the record's digest says.
        """
        if self._rows is None:
            self._rows = read_json(self._file("per_image", "per-image values"))
        assert self._rows is not None
        return self._rows

    def made(self) -> list[dict[str, Any]]:
        """Rows of the images that were made, which are those with a row of features."""
        return [row for row in self.rows() if row.get("failure") is None]

    def features(self, protocol: Mapping[str, Any]) -> Features:
        """Features [N, D] of the images that were made, by the extractor of this protocol.

        Lite0's come from the file that the record names; others from the cache beside it, which
        goes by the images' own digests.

        Raises:
            EvaluationError: they are not there.
            IntegrityError: they are other than the record's digest says.
        """
        key = protocol_id(protocol)
        if key not in self._features:
            if protocol.get("extractor") == LITE0_NAME:
                found: Features | None = _read(self._file("features", "features"))
            else:
                digests = [str(row.get("image_sha256")) for row in self.made()]
                found = self.cached(protocol, digests)
            if found is None:
                raise EvaluationError(f"{self.path}: its features are not there")
            if len(found) != len(self.made()):
                raise EvaluationError(
                    f"{self.path}: {len(found)} features, {len(self.made())} images"
                )
            self._features[key] = found
        return self._features[key]

    def cached(self, protocol: Mapping[str, Any], digests: list[str]) -> Features | None:
        """Read the features of images, named by content, from the evaluation's cache."""
        return _find(self.path.with_suffix("") / "cache", protocol, digests)

    def _file(self, name: str, what: str) -> Path:
        entry = self.record.files.get(name)
        path = self.path.parent / entry.path if entry else None
        if entry is None or path is None or not path.is_file():
            raise EvaluationError(f"{self.path}: its {what} are not there")
        if sha256_file(path) != entry.sha256:
            raise IntegrityError(
                f"{path}: differs from the digest in {self.path}",
                hint="run `modelops eval` again; the images are still there",
            )
        return path


def read_evidence(path: str | Path) -> Evidence:
    """Open an evaluation record.

    Raises:
        UsageError: it is not one.
    """
    record = read_record(path, EvaluationRecord)
    return Evidence(Path(path), record, sha256_file(path))


@dataclass(slots=True)
class Reference:
    """Real images that both records were measured against, opened at the first use."""

    first: Evidence
    second: Evidence
    manifest: Path | None = None
    splits: Path | None = None
    _pictures: RealPictures | None = None
    _problem: str = ""

    def features(self, protocol: Mapping[str, Any]) -> Features:
        """Features [M, D] of the reference images by the extractor of this protocol.

        Raises:
            EvaluationError: the images or their features cannot be found.
        """
        pictures = self._open()
        if protocol.get("extractor") == LITE0_NAME:
            return pictures.features
        digests = pictures.digests
        for evidence in (self.first, self.second):
            if (found := evidence.cached(protocol, digests)) is not None:
                return found
        if (found := _find(pictures.cache_dir, protocol, digests)) is not None:
            return found
        raise EvaluationError("the reference's features are in no cache: measure one source again")

    def _open(self) -> RealPictures:
        if self._pictures is None:
            if not self._problem:
                try:
                    self._pictures = self._find()
                except EvaluationError as error:
                    self._problem = error.message
            if self._pictures is None:
                raise EvaluationError(self._problem)
        return self._pictures

    def _find(self) -> RealPictures:
        reference = self.first.record.reference
        if reference is None:
            raise EvaluationError("the record names no reference images")
        split = reference.path.rpartition("#")[2]
        manifest, splits = (
            self._input("manifest", self.manifest),
            self._input("splits", self.splits),
        )
        pictures = open_reference(manifest, splits, (split,))[split]
        if pictures.digest != reference.sha256:
            raise EvaluationError("the reference images have changed since they were measured")
        return pictures

    def _input(self, name: str, given: Path | None) -> Path:
        """Find the manifest or the splits: the user's path, the record's, or one beside it."""
        entry = self.first.record.inputs.get(name)
        if entry is None:
            raise EvaluationError(f"the record names no {name}")
        if given is not None:
            if sha256_file(given) != entry.sha256:
                raise IntegrityError(
                    f"{given}: not the {name} that {self.first.path} was measured with"
                )
            return given
        roots = [Path(), *self.first.path.resolve().parents, *self.second.path.resolve().parents]
        for root in roots:
            path = root / entry.path
            if path.is_file() and sha256_file(path) == entry.sha256:
                return path
        raise EvaluationError(f"{entry.path} is not to be found; name it with --{name}")


def _find(folder: Path, protocol: Mapping[str, Any], digests: list[str]) -> Features | None:
    """Find the features of images, named by content, in a cache; None if they are not there."""
    key = sha256_json({"protocol": protocol_id(protocol), "images": digests})
    paths = [folder / f"{key}{suffix}" for suffix in (".npz", ".npy")]
    return next((_read(path) for path in paths if path.is_file()), None)


def _read(path: Path) -> Features:
    try:
        stored = np.load(path, allow_pickle=False)
        features = np.asarray(stored["features"] if path.suffix == ".npz" else stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path}: cannot be read as features") from error
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise IntegrityError(f"{path}: an array of shape {features.shape}, not features")
    return features
