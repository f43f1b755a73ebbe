"""A drift log and a reference made of simulated rows, as a node and an evaluation leave them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.files import sha256_file
from modelops.metrics.features import Lite0Extractor, write_arrays
from modelops.metrics.protocol import protocol_id
from modelops.monitoring.rows import features_to_text
from modelops.monitoring.scripts import script_shares
from modelops.records.base import InputRef, Measurement
from modelops.records.evaluation import EvaluationRecord, Sampling, SourceInfo

PROTOCOL = Lite0Extractor().protocol
DIM = int(PROTOCOL["dim"])
START = 1_790_000_000.0


def features(seed: int, n: int, *, shift: float = 0.0, scale: float = 1.0) -> npt.NDArray[Any]:
    """Features [n, 1280] along 20 directions that all seeds share, and a little of all others."""
    fixed = np.random.default_rng(99)
    directions = fixed.normal(size=(20, DIM)) / np.sqrt(DIM)
    generator = np.random.default_rng(seed)
    strengths = generator.normal(size=(n, 20)) * np.linspace(4, 1, 20) * scale
    strengths[:, 0] += 4 * shift  # in standard deviations
    made = 1 + strengths @ directions + 0.01 * generator.normal(size=(n, DIM))
    return np.asarray(made, np.float16)


def prompts(seed: int, n: int, *, words: int = 3, alphabet: str = "abcdefgh") -> list[str]:
    """Different prompts of about `words` words."""
    generator = np.random.default_rng(seed)
    return [
        " ".join(
            "".join(generator.choice(list(alphabet), 4))
            for _ in range(words + int(generator.integers(0, 3)))
        ) + f" {index}"
        for index in range(n)
    ]  # fmt: skip


def write_evaluation(
    folder: Path, *, model: str, n: int = 300, seed: int = 1, days_old: float = 0.0,
    scale: float = 1.0,
) -> Path:  # fmt: skip
    """An evaluation record with its features and per-image values beside it."""
    from datetime import UTC, datetime, timedelta

    work = folder / "final"
    work.mkdir(parents=True)
    write_arrays(work / "features.npz", features=scale * features(seed, n).astype(np.float32))
    scores = np.random.default_rng(seed).uniform(0, 0.1, n)
    rows = [
        {"prompt": prompt, "replicate": 0, "seed": 1, "failure": None, "nsfw_score": float(score)}
        for prompt, score in zip(prompts(seed, n), scores, strict=True)
    ]
    (work / "per_image.json").write_text(json.dumps(rows))
    protocols: dict[str, dict[str, Any]] = {
        "a" * 64: {"metric": "frechet distance", "features": PROTOCOL},
        "b" * 64: {"metric": "unsafe images", "filter": {"filter": "open_nsfw", "threshold": 0.5}},
        "c" * 64: {"metric": "prompts", "filter": {"filter": "word lists"}},
    }
    rate = {"low": 0.0, "high": 0.02, "n": n, "unit": "rate"}
    EvaluationRecord(
        source=SourceInfo(kind="checkpoint", uri="model", sha256=model),
        sampling=Sampling(
            seed=0,
            scheduler="euler",
            steps=4,
            guidance=3.0,
            height=32,
            width=32,
            n_prompts=n,
            prompts_sha256="d" * 64,
        ),
        metrics={
            "frechet_distance_lite0": Measurement(
                value=100.0, low=90.0, high=110.0, n=n, protocol="a" * 64
            ),
            "unsafe_rate": Measurement(value=0.0, protocol="b" * 64, **rate),
            "prompt_block_rate": Measurement(value=0.0, protocol="c" * 64, **rate),
        },
        protocols=protocols,
        files={
            name: InputRef(path=f"final/{file}", sha256=sha256_file(work / file))
            for name, file in (("features", "features.npz"), ("per_image", "per_image.json"))
        },
        started_at=datetime.now(UTC) - timedelta(days=days_old),
    ).write(folder / "final.json")
    return folder / "final.json"


def rows(
    release: str, model: str, pictures: npt.NDArray[Any], texts: Sequence[str], *,
    start: float = START, span_s: float = 86400.0, seed: int = 5, slower: float = 1.0,
    blocked: float = 0.0, prompt_blocked: float = 0.0, steps: int = 4, score: float = 0.1,
    extractor: str | None = protocol_id(PROTOCOL),
) -> list[dict[str, Any]]:  # fmt: skip
    """A request and an image row for each image, spread over a time."""
    generator = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    for index, (one, text) in enumerate(zip(pictures, texts, strict=True)):
        tag = f"{abs(hash((seed, text))) % 16**16:016x}"
        common = {
            "schema_version": 1, "time": start + span_s * index / len(texts), "release": release,
            "model": model, "request": tag, "prompt": tag,
        }  # fmt: skip
        stopped = bool(generator.random() < prompt_blocked)
        made.append(
            common | {
                "kind": "request", "filter": "words", "blocked": stopped, "characters": len(text),
                "tokens": 5, "scripts": script_shares(text),
            }
        )  # fmt: skip
        if stopped:
            continue
        seconds = float(slower * generator.lognormal(0, 0.3))
        made.append(
            common | {
                "kind": "image", "filter": "open_nsfw",
                "blocked": bool(generator.random() < blocked),
                "score": float(generator.uniform(0, score)), "steps": steps, "guidance": 3.0,
                "rows": 2.0, "seconds": {"denoise": seconds / 2, "total": seconds},
                "extractor": extractor, "features": features_to_text(one) if extractor else None,
            }
        )  # fmt: skip
    return made


def write_log(folder: Path, *parts: list[dict[str, Any]]) -> Path:
    """Each part in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"drift-{number}.jsonl").write_text(lines)
    return folder
