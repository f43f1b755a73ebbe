"""Evaluation of a source: samples, features, metrics, record."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from modelops.base.environment import current_environment
from modelops.base.errors import EvaluationError, ModelopsError, UsageError
from modelops.base.files import sha256_file, write_json
from modelops.base.images import image_size
from modelops.evaluation.grids import write_grid
from modelops.evaluation.inputs import InputImages, read_input_images, require_takes_images
from modelops.evaluation.measures import FAMILIES
from modelops.evaluation.prompts import (
    PlannedImage,
    PromptSet,
    choose_prompts,
    clean_prompts,
    plan_images,
    plan_ready_images,
    plan_with_inputs,
    read_lines,
    read_prompts,
)
from modelops.evaluation.reference import RealPictures, open_folder_reference, open_reference
from modelops.evaluation.samples import Samples, draw_samples
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.workbench import Workbench
from modelops.evaluation.workers.tasks import Workers
from modelops.metrics.features import write_arrays
from modelops.metrics.known import KnownStatistics, read_statistics
from modelops.models.request import ImageRequest
from modelops.models.sources import ModelSource
from modelops.records.base import InputRef
from modelops.records.evaluation import EvaluationRecord, Sampling

OnProgress = Callable[[int, int], None]
OnStage = Callable[[str, int, int], None]  # name, number from 1, how many


def evaluate(
    source: ModelSource,
    settings: EvaluationSettings,
    *,
    out_path: str | Path,
    workers: Workers | None = None,
    on_progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> EvaluationRecord:
    """Measure a source and write the record. Samples, features, per-image values and grids go into
    a folder of the record's name beside it.

    Image k of a prompt depends on (seed, prompt, k) alone. A killed evaluation continues where it
    was. If something essential fails, the record is written with status `failed`, the error and
    the values measured so far, and the error is raised. `workers` are closed in the end.

    Raises:
        UsageError: nothing says which prompts to evaluate.
        EvaluationError: more images failed than `max_failures`, or the safety filter is broken.
        ModelopsError: an input cannot be used.
    """
    out = Path(out_path)
    if settings.manifest is None and settings.prompts_file is None and source.n_images is None:
        raise UsageError(
            "nothing says which prompts to evaluate",
            hint="give --manifest and --splits, or --prompts",
        )
    record = EvaluationRecord(
        source=source.info,
        seeds={"seed": settings.seed},
        environment=current_environment(),
        started_at=datetime.now(UTC),
    )
    clock = time.monotonic()
    try:
        problems = _evaluate(source, settings, record, out, workers, on_progress, on_stage)
    except Exception as error:
        record.status = "failed"
        record.error = (
            error.message
            if isinstance(error, ModelopsError)
            else f"{type(error).__name__}: {error}"
        )
        record.duration_s = time.monotonic() - clock
        if workers is None or workers.rank == 0:  # the first of a launcher's processes writes it
            record.write(out)
        raise
    finally:
        if workers:
            workers.close()
    record.duration_s = time.monotonic() - clock
    if problems:
        record.status, record.error = "failed", "; ".join(problems)
    record.write(out)
    if problems:
        raise EvaluationError(
            f"{out}: the evaluation failed: {record.error}",
            hint="what could be measured is in the record",
        )
    return record


def _evaluate(
    source: ModelSource,
    settings: EvaluationSettings,
    record: EvaluationRecord,
    out: Path,
    workers: Workers | None,
    on_progress: OnProgress | None,
    on_stage: OnStage | None,
) -> list[str]:
    """Fill the record; return the problems that make it `failed`."""
    workdir = out.with_suffix("")
    reference, training = _real_pictures(settings, record)
    known = _known_statistics(settings, record)
    inputs = _input_images(settings, source, record)
    prompts, plan = _plan(settings, reference, source, inputs)
    request = _request(source, settings)
    for planned in plan:
        if planned.fault is None and (planned.replicate == 0 or planned.image is not None):
            source.check(replace(request, prompt=planned.prompt, image=planned.image))
    sampling = Sampling(
        seed=settings.seed, scheduler=source.scheduler_name, steps=request.steps or 0,
        guidance=request.guidance or 0.0, height=request.height or 0, width=request.width or 0,
        n_prompts=len(prompts), replicates=-(-len(plan) // len(prompts)),
        prompts_sha256=prompts.sha256,
    )  # fmt: skip
    record.sampling = sampling
    stages = ["sampling", "features",
              *(family.__name__.rpartition(".")[2] for family in FAMILIES), "files"]  # fmt: skip

    def stage(number: int) -> None:
        if on_stage:
            on_stage(stages[number - 1], number, len(stages))

    stage(1)
    samples = draw_samples(
        source, plan, request, workdir / "samples", workers=workers, on_progress=on_progress
    )
    if inputs is not None:
        sampling = record.sampling = _with_size(sampling, samples)
    record.n_failed_images, record.n_reused_images = len(samples.failures), samples.reused

    bench = Workbench(
        settings=settings, record=record, workdir=workdir, prompts=prompts, samples=samples,
        # Not the scheduler: it belongs to the source, as its runtime and precision do.
        sampling=sampling.model_dump(exclude={"scheduler"}) | {"n": len(plan)},
        reference=reference, training=training, known=known,
        on_progress=on_progress, workers=workers,
        source_files=source.files, source_notes=source.notes,
        n_cut=len(source.cut(prompts.prompts)), has_prompts=(
            source.n_images is None or source.prompts is not None
            or settings.prompts_file is not None
        ),
    )  # fmt: skip
    if len(samples.failures) > settings.max_failures:
        first = samples.failures[min(samples.failures)]
        bench.problems.append(
            f"{len(samples.failures)} of {len(plan)} images failed, {settings.max_failures} "
            f"allowed; the first: {first}"
        )
    bench.problems += _unusable_pictures(bench)
    stage(2)
    if samples.made:
        with suppress(EvaluationError):  # the families that need them say why not
            _ = bench.features
    for number, family in enumerate(FAMILIES, 3):
        stage(number)
        bench.attempt(family.measure, family.KEYS)
    record.metrics = dict(sorted(record.metrics.items()))
    stage(len(stages))
    _write_files(bench, out)
    return bench.problems


def _real_pictures(
    settings: EvaluationSettings, record: EvaluationRecord
) -> tuple[RealPictures | None, RealPictures | None]:
    if settings.reference is not None and not settings.has_statistics:
        pictures = open_folder_reference(settings.reference)
        record.reference = InputRef(path=str(settings.reference), sha256=pictures.digest)
        return pictures, None
    if settings.manifest is None or settings.splits is None:
        return None, None
    for name, path in (("manifest", settings.manifest), ("splits", settings.splits)):
        record.inputs[name] = InputRef(path=str(path), sha256=sha256_file(path))
    wanted = tuple(dict.fromkeys((settings.split, settings.train_split)))
    found = open_reference(settings.manifest, settings.splits, wanted)
    reference, training = found[settings.split], found.get(settings.train_split)
    record.reference = InputRef(
        path=f"{settings.manifest}#{settings.split}", sha256=reference.digest
    )
    return reference, training


def _known_statistics(
    settings: EvaluationSettings, record: EvaluationRecord
) -> KnownStatistics | None:
    if settings.reference is None or not settings.has_statistics:
        return None
    known = read_statistics(settings.reference)
    record.reference = InputRef(path=str(settings.reference), sha256=known.sha256)
    return known


def _unusable_pictures(bench: Workbench) -> list[str]:
    """Return a problem if more reference images are unusable than images may fail; else nothing."""
    reference, allowed = bench.reference, bench.settings.max_failures
    if reference is None or len(reference.unusable) <= allowed:
        return []
    total = len(reference.samples) + len(reference.unusable)
    first = min(reference.unusable)
    return [
        f"{len(reference.unusable)} of {total} reference images cannot be used, {allowed} "
        f"allowed; the first, {first}: {reference.unusable[first]}"
    ]


def _input_images(
    settings: EvaluationSettings, source: ModelSource, record: EvaluationRecord
) -> InputImages | None:
    if settings.input_images is None:
        return None
    require_takes_images(source)
    found = read_input_images(settings.input_images)
    record.inputs["input_images"] = InputRef(path=str(settings.input_images), sha256=found.sha256)
    return found


def _plan(
    settings: EvaluationSettings,
    reference: RealPictures | None,
    source: ModelSource,
    inputs: InputImages | None,
) -> tuple[PromptSet, list[PlannedImage]]:
    """Plan the prompts and the images."""
    n, seed = settings.n, settings.seed
    if inputs is not None:
        assert settings.prompts_file is not None  # EvaluationSettings checks this
        return plan_with_inputs(
            read_lines(settings.prompts_file), inputs.images,
            n=n, replicates=settings.replicates, seed=seed,
        )  # fmt: skip
    if source.n_images is not None:
        # Without prompts, one nameless prompt stands for all of the folder's images.
        lines, least = ["(folder of images)"], 0
        if settings.prompts_file is not None:
            read_prompts(settings.prompts_file)  # there is one that can be used
            lines = read_lines(settings.prompts_file)
            least = len(lines)  # an image is missing where there is a line and no file
            if source.prompts is None and source.numbers is not None:
                lines = _numbered(lines, source, settings.prompts_file)
                least = len(lines)
            elif source.prompts is None and source.n_images > least:
                raise UsageError(
                    f"{source.info.uri}: {source.n_images} images for the {least} lines of "
                    f"{settings.prompts_file}",
                    hint="give one line for each image, in the natural order of the file names, or "
                    "name them as LINE-NUMBER.png, from 0: 0003-1.png is image 1 of the line 3",
                )
        if source.prompts is not None:  # whoever made the images has said of what
            unknown = set(source.prompts) - set(lines)
            if settings.prompts_file is not None and unknown:
                raise UsageError(
                    f"{settings.prompts_file}: {min(unknown)!r} is not in it, but "
                    f"{source.info.uri}/samples.json says that an image was made from it",
                    hint="leave --prompts out",
                )
            lines, least = source.prompts, 0
        return plan_ready_images(lines, n or max(source.n_images, least), seed=seed)
    if settings.prompts_file is not None:
        found = read_prompts(settings.prompts_file)
    else:
        assert reference is not None  # EvaluationSettings checks this
        samples = reference.samples
        found = clean_prompts([s.caption for s in samples], ids=[s.id for s in samples])
    chosen = choose_prompts(found, n, seed=seed)
    return chosen, plan_images(chosen, n=n, replicates=settings.replicates, seed=seed)


def _numbered(lines: list[str], source: ModelSource, path: Path) -> list[str]:
    """Return the line of each image by the number in its name, then the lines without an image."""
    assert source.numbers is not None
    if max(source.numbers) >= len(lines):
        raise UsageError(
            f"{source.info.uri}: an image is named for line {max(source.numbers)} of {path}, which "
            f"has the lines 0 to {len(lines) - 1}"
        )
    rest = [line for number, line in enumerate(lines) if number not in set(source.numbers)]
    return [lines[number] for number in source.numbers] + rest


def _request(source: ModelSource, settings: EvaluationSettings) -> ImageRequest:
    defaults = source.defaults
    return ImageRequest(
        prompt="", seed=0,
        steps=settings.steps if settings.steps is not None else defaults.steps,
        guidance=settings.guidance if settings.guidance is not None else defaults.guidance,
        # An image's size may be that of its input.
        height=settings.height or (None if settings.input_images else defaults.height),
        width=settings.width or (None if settings.input_images else defaults.width),
    )  # fmt: skip


def _with_size(sampling: Sampling, samples: Samples) -> Sampling:
    """Add the size of the images, if all have one."""
    sizes = {image_size(path.read_bytes()) for path in samples.paths.values()}
    width, height = (sizes.pop() if len(sizes) == 1 else None) or (0, 0)
    return sampling.model_copy(update={"height": height, "width": width})


def _write_files(bench: Workbench, out: Path) -> None:
    """Write features, per-image values and grids; the record names them by path and digest."""
    samples, record, workdir = bench.samples, bench.record, bench.workdir
    made: dict[str, Path] = dict(bench.pages)
    if samples.made:
        if bench.streams:
            made["features"] = bench.features_path(bench.extractor)
        else:
            write_arrays(workdir / "features.npz", features=bench.features)
            made["features"] = workdir / "features.npz"
    rows = [
        {"prompt": planned.prompt, "replicate": planned.replicate, "seed": planned.seed,
         "failure": samples.failures.get(place),
         **({"input": Path(planned.image.path).name} if planned.image is not None else {}),
         **({"file": bench.source_files[place].name} if place < len(bench.source_files) else {})}
        for place, planned in enumerate(samples.plan)
    ]  # fmt: skip
    for row, place in enumerate(samples.made):
        path = samples.paths[place]
        rows[place] |= {"image": path.relative_to(workdir).as_posix(),
                        "image_sha256": sha256_file(path)}  # fmt: skip
        rows[place] |= {key: values[row] for key, values in bench.per_image.items()}
    write_json(workdir / "per_image.json", rows)
    made["per_image"] = workdir / "per_image.json"

    def grid(name: str, places: list[int]) -> None:
        images = [samples.read(p) if p in samples.paths else None for p in places]
        labels = [samples.plan[p].prompt for p in places]
        made[name] = write_grid(workdir / f"{name}.png", images, labels)

    grid("grid", list(range(min(bench.settings.grid, len(samples.plan)))))
    if alignment := bench.per_image.get("alignment"):
        order = [samples.made[row] for row in np.argsort(alignment, kind="stable")]
        few = max(1, min(bench.settings.grid // 4, len(order) // 2))
        grid("worst", order[:few])
        grid("best", order[: -few - 1 : -1])
    record.files = {
        name: InputRef(path=path.relative_to(out.parent).as_posix(), sha256=sha256_file(path))
        for name, path in made.items()
    }
