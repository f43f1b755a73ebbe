"""Bad input through the real command: every fault is counted, none is skipped, and --max-failures
decides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hostile_service import serve
from modelops.cli.main import main
from modelops.data.manifest import read_manifest
from modelops.data.split import read_splits
from modelops.evaluation.prompts import choose_prompts, clean_prompts
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record

Eval = Callable[..., tuple[int, EvaluationRecord, list[dict[str, Any]]]]


@pytest.fixture
def eval_(tmp_path: Path) -> Eval:
    """(exit code, record, per-image rows) of `modelops eval SOURCE ...`."""

    def run(source: str | Path, *options: str | Path) -> tuple[int, EvaluationRecord, list[Any]]:
        out = tmp_path / "records" / "a.json"
        fast = ["--resamples", "20", "--no-report", "--safety", "none", "--prompt-filter", "none"]
        code = main(["eval", str(source), *fast, *map(str, options), "--out", str(out)])
        path = out.with_suffix("") / "per_image.json"
        rows = json.loads(path.read_text("utf-8")) if path.is_file() else []
        return code, read_record(out, EvaluationRecord), rows

    return run


@pytest.fixture
def real(corpus: Any) -> list[str]:
    return ["--manifest", str(corpus.manifest), "--splits", str(corpus.splits)]


@pytest.fixture
def folder(corpus: Any, tmp_path: Path) -> Path:
    """Six real images."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted((corpus.manifest.parent / "images").iterdir())[:6]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def service() -> Iterator[str]:
    with serve() as service:
        yield service.url


def copied_corpus(corpus: Any, tmp_path: Path) -> tuple[Path, list[str]]:
    """(folder, options) of a copy that may be spoiled."""
    root = tmp_path / "data"
    shutil.copytree(corpus.manifest.parent, root, ignore=shutil.ignore_patterns(".cache"))
    return root, ["--manifest", f"{root}/manifest.parquet", "--splits", f"{root}/splits.parquet"]


def write_prompts(tmp_path: Path, lines: list[str]) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def failed(record: EvaluationRecord) -> tuple[int, int]:
    """(failed, planned) as `failed_image_rate` has them."""
    found = record.metrics["failed_image_rate"]
    assert found.value is not None
    assert found.value == pytest.approx(record.n_failed_images / found.n)
    return record.n_failed_images, found.n


def test_a_folder_with_pictures_that_cannot_be_read(
    eval_: Eval, real: list[str], folder: Path
) -> None:
    """Unreadable and NaN images fail; other sizes, modes and formats are measured."""
    (folder / "zz1.png").write_bytes(b"\x89PNG\r\n broken")
    Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(folder / "zz2.tiff")
    Image.new("RGB", (200, 90), (200, 10, 10)).save(folder / "zz3.png")
    Image.new("L", (17, 40), 100).save(folder / "zz4.jpg")
    code, record, rows = eval_(folder, *real)
    assert code == 1 and record.status == "failed"
    assert "2 of 10 images failed, 0 allowed" in (record.error or "")
    assert failed(record) == (2, 10)
    code, record, rows = eval_(folder, *real, "--max-failures", "2")
    assert code == 0 and failed(record) == (2, 10)
    assert [row["failure"] is None for row in rows] == [True] * 6 + [False] * 2 + [True] * 2
    distance = record.metrics["frechet_distance_lite0"]
    assert distance.n == 8 and "2 of 10 images failed" in distance.warnings


def test_fewer_images_than_asked(eval_: Eval, real: list[str], folder: Path) -> None:
    code, record, rows = eval_(folder, *real, "-n", "9")
    assert code == 1 and failed(record) == (3, 9)
    assert [row["failure"] is None for row in rows] == [True] * 6 + [False] * 3
    assert "only 6 images" in rows[6]["failure"]


def test_more_lines_of_prompts_than_images(
    eval_: Eval, real: list[str], folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, [f"drawing {i}" for i in range(8)])
    code, record, _ = eval_(folder, *real, "--prompts", prompts, "--max-failures", "2")
    assert code == 0 and failed(record) == (2, 8)


@pytest.mark.parametrize("n", [[], ["-n", "4"]], ids=["all", "four"])
def test_an_image_of_a_folder_keeps_the_prompt_of_its_line(
    eval_: Eval, real: list[str], folder: Path, tmp_path: Path, n: list[str]
) -> None:
    """With -n too, and after a line that is repeated, blank or unusable."""
    lines = ["one", "one", "", "four", "fi\0ve", "six"]
    prompts = write_prompts(tmp_path, lines)
    _, record, rows = eval_(folder, *real, "--prompts", prompts, "--max-failures", "2", *n)
    assert record.status == "ok"
    wanted = ["one", "one", "", "four", "fi\N{SYMBOL FOR NULL}ve", "six"]
    assert [row["prompt"] for row in rows] == wanted[: 4 if n else 6]
    assert [row["failure"] for row in rows if row["failure"]] == [
        "its line of the prompts is blank", "the prompt holds a null byte"
    ][: 1 if n else 2]  # fmt: skip


def test_prompts_that_cannot_be_used(eval_: Eval, tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = ["sun", "", "sun", "do\0g", "x" * 10_001, "y" * 10_000, "moon"]
    prompts = ["--prompts", write_prompts(tmp_path, lines), "--steps", "1"]
    code, record, _ = eval_(tiny_checkpoint, *prompts)
    assert code == 1 and "2 of 5 images failed, 0 allowed" in (record.error or "")
    code, record, rows = eval_(tiny_checkpoint, *prompts, "--max-failures", "2")
    assert code == 0 and failed(record) == (2, 5)
    details = record.metrics["failed_image_rate"].details
    assert (details["unusable_prompts"], details["blank_prompts"]) == (2, 1)
    assert details["repeated_prompts"] == 1
    assert record.sampling is not None and record.sampling.n_prompts == 5
    reasons = [row["failure"] for row in rows if row["failure"]]
    assert reasons == [
        "the prompt holds a null byte", "the prompt has 10001 characters, more than 10000"
    ]  # fmt: skip


def test_only_prompts_that_cannot_be_used_are_a_usage_error(
    eval_: Eval, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    code, record, _ = eval_(tiny_checkpoint, "--prompts", write_prompts(tmp_path, ["a\0", ""]))
    assert code == 2 and record.status == "failed" and record.metrics == {}


def test_a_choice_of_prompts_of_which_none_can_be_used(
    eval_: Eval, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Nothing can be measured, and no filter is blamed for it."""
    lines = next(
        lines for lines in (["a\0", "b\0", f"sun {i}"] for i in range(1000))
        if not choose_prompts(clean_prompts(lines), 2, seed=0).prompts
    )  # fmt: skip
    prompts = ["--prompts", write_prompts(tmp_path, lines), "-n", "2", "--steps", "1"]
    code, record, _ = eval_(tiny_checkpoint, *prompts, "--prompt-filter", "words")
    assert code == 1 and (record.error or "").startswith("2 of 2 images failed, 0 allowed")
    assert "filter" not in (record.error or "") and failed(record) == (2, 2)
    assert record.metrics["prompt_block_rate"].not_measured == "no prompt can be used"


def test_an_endpoint_with_every_fault(eval_: Eval, service: str, tmp_path: Path) -> None:
    """Time-out, 429 for ever, blocked, another size, no image: each fails, nothing else does."""
    faults = {"hang": "timed out", "always busy": "HTTP 429", "blocked": "blocked:",
              "another size": "16x16", "no image": "without an image"}  # fmt: skip
    good = ["sun", "moon", "star", "hill"]
    prompts = write_prompts(tmp_path, [*faults, *good])
    options = ["--prompts", prompts, "--timeout", "0.5"]
    code, record, rows = eval_(service, *options)
    assert code == 1 and "5 of 9 images failed, 0 allowed" in (record.error or "")
    assert failed(record) == (5, 9)
    assert record.metrics["failed_image_rate"].details["blocked_by_source"] == 1
    for row in rows:
        if row["prompt"] in faults:
            assert faults[row["prompt"]] in row["failure"], row
        else:
            assert row["failure"] is None, row
    code, record, _ = eval_(service, *options, "--max-failures", "5")
    assert code == 0 and failed(record) == (5, 9)


def test_a_model_that_gives_nan_for_one_prompt(
    eval_: Eval, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are real; the pixels of one row are made NaN where the pipeline gives them."""
    from modelops.models.pipeline import PixelFlowPipeline

    real_call = PixelFlowPipeline.__call__

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        made = real_call(self, *arguments, **named)
        for row, prompt in enumerate(named["prompt"]):
            if prompt == "moon":
                made.images[row] = np.nan
        return made

    call.__signature__ = __import__("inspect").signature(real_call)  # type: ignore[attr-defined]
    monkeypatch.setattr(PixelFlowPipeline, "__call__", call)
    prompts = write_prompts(tmp_path, ["sun", "moon", "star"])
    code, record, rows = eval_(tiny_checkpoint, "--prompts", prompts, "--steps", "1")
    assert code == 1 and failed(record) == (1, 3)
    assert [row["failure"] for row in rows] == [
        None, "the model produced NaN or infinite pixels", None
    ]  # fmt: skip


@pytest.fixture
def broken(corpus: Any, tmp_path: Path) -> tuple[list[str], dict[str, int]]:
    """(options, {split: pictures}) of a copy of the corpus with a broken image in each split."""
    root, options = copied_corpus(corpus, tmp_path)
    manifest = read_manifest(root / "manifest.parquet")
    splits = read_splits(root / "splits.parquet")
    counts: dict[str, int] = {}
    for sample in manifest.rows:
        split = splits[sample.id]
        if split not in counts:
            manifest.image_path(sample).write_bytes(b"broken")
        counts[split] = counts.get(split, 0) + 1
    return options, counts


def test_real_pictures_that_cannot_be_used(
    eval_: Eval, broken: tuple[list[str], dict[str, int]], folder: Path
) -> None:
    options, counts = broken
    total = counts["test"]
    code, record, _ = eval_(folder, *options)
    assert code == 1
    assert f"1 of {total} reference images cannot be used, 0 allowed" in (record.error or "")
    code, record, _ = eval_(folder, *options, "--max-failures", "1")
    assert code == 0
    for name in ("frechet_distance_lite0", "kernel_distance_lite0", "precision_lite0"):
        warnings = record.metrics[name].warnings
        assert f"1 of {total} reference images cannot be used and are left out" in warnings
    assert record.memorization is not None
    assert any("1 training images cannot be used" in c for c in record.memorization.caveats)
    details = record.metrics["failed_image_rate"].details
    assert details["unusable_reference_pictures"] == details["unusable_training_pictures"] == 1


def test_reference_pictures_that_were_trained_on_are_found_in_another_encoding_too(
    eval_: Eval, corpus: Any, folder: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from modelops.base.files import sha256_file
    from modelops.data.manifest import write_manifest

    root, options = copied_corpus(corpus, tmp_path)
    manifest = read_manifest(root / "manifest.parquet")
    splits = read_splits(root / "splits.parquet")
    rows = list(manifest.rows)
    train, test = (
        [i for i, row in enumerate(rows) if splits[row.id] == name] for name in ("train", "test")
    )
    copies = [f"images/copy{k}.{end}" for k, end in enumerate(("png", "bmp"))]
    for place, copied, name in zip(test, train, copies, strict=False):
        with Image.open(manifest.image_path(rows[copied])) as picture:
            picture.convert("RGB").save(root / name)
        if name.endswith("png"):
            shutil.copy(manifest.image_path(rows[copied]), root / name)
        rows[place] = replace(rows[place], filepath=name, sha256=sha256_file(root / name))
    write_manifest(root / "manifest.parquet", rows)
    ids = [row.id for row in rows]
    names = [splits[name] for name in ids]
    pq.write_table(pa.table({"id": ids, "split": names, "group": ids}), root / "splits.parquet")
    code, record, _ = eval_(folder, *options)
    assert code == 0
    note = f"2 of {len(test)} reference images are training images"
    for name in ("frechet_distance_lite0", "kernel_distance_lite0", "recall_lite0"):
        assert note in record.metrics[name].warnings, name
    assert record.memorization is not None
    assert any(f"2 of {len(test)} held-out" in c for c in record.memorization.caveats)
