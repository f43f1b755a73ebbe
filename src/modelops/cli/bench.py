"""`modelops bench`: latency and throughput of model sources."""

from __future__ import annotations

from dataclasses import asdict

import click

from modelops.cli import output
from modelops.cli.options import trust_code_option


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter("give whole numbers with commas, such as 1,8") from error
    if min(numbers) < 1:
        raise click.BadParameter("numbers start at 1")
    return tuple(dict.fromkeys(numbers))


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--batch-sizes",
    default="1,8",
    show_default=True,
    callback=_numbers,
    metavar="N,N",
    help="Numbers of images made together; for a service, of concurrent requests.",
)
@click.option(
    "--threads",
    callback=_numbers,
    metavar="N,N",
    help="Numbers of CPU threads to measure with.  [default: all cores]",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="INT",
    help="Number of sampling steps.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="INT",
    help="Number of interleaved repetitions.",
)
@click.option(
    "--runtime",
    default="auto",
    show_default=True,
    help="Runtime of exported artifacts: auto, onnxruntime or openvino.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Device of checkpoints: cpu, cuda, cuda:1."
)
@click.option(
    "--baseline",
    metavar="CHECKPOINT",
    help="Checkpoint to compare with.  [default: those that the artifacts were made from]",
)
@click.option(
    "--no-compile",
    is_flag=True,
    help="Do not measure torch.compile, which may compile for minutes.",
)
@trust_code_option
@output.json_option
def bench(
    sources: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    threads: tuple[int, ...],
    steps: int,
    rounds: int,
    runtime: str,
    device: str,
    baseline: str | None,
    no_compile: bool,
) -> None:
    """Measure checkpoints, artifacts and endpoints side by side.

    The sources take turns, so that a busy machine slows all of them alike. An artifact is compared
    with the checkpoint it was made from, in eager torch and under torch.compile. Speed-ups are over
    that eager torch or, where no checkpoint is found, over the first source. The first call, which
    may compile, is not part of the timing and is printed beside it.

    \b
    Example:
      modelops bench artifacts/pilot/onnx artifacts/pilot/int8 --threads 1,2
      modelops bench http://localhost:3000 --baseline runs/pilot/checkpoints/step-1000
    """
    from functools import partial

    from modelops.base.environment import current_environment
    from modelops.evaluation.sources.open import open_source
    from modelops.export.bench import bench_sources, make_contenders

    with output.progress("loading") as on_progress:
        contenders, notes = make_contenders(
            sources, open_source=partial(open_source, device=device), runtime=runtime,
            baseline=baseline, with_compile=not no_compile,
        )  # fmt: skip
        on_progress.stage("measuring")
        measured = bench_sources(
            contenders, batch_sizes=batch_sizes, threads=threads, steps=steps, rounds=rounds,
            on_progress=on_progress,
        )  # fmt: skip
    machine = current_environment()
    notes += measured.notes
    result = {
        "status": "ok",
        "machine": machine.model_dump(mode="json"),
        "steps": steps,
        "rounds": rounds,
        "notes": notes,
        "rows": [
            {**asdict(row), "speedup": row.speedup.model_dump(mode="json") if row.speedup else None}
            for row in measured.rows
        ],
    }
    output.emit(result)
    if output.is_json():
        return
    output.table(
        ("source", "runtime", "precision", "batch", "threads", "p50 ms", "p95 ms", "images/s",
         "speed-up", "first call s"),
        [
            (
                row.name, row.runtime, row.precision, str(row.batch_size),
                "its own" if row.threads is None else str(row.threads),
                f"{row.p50_s * 1e3:.0f}", f"{row.p95_s * 1e3:.0f}", f"{row.images_per_second:.2f}",
                "1" if row.speedup is None
                else f"{row.speedup.value:.2f} ({row.speedup.low:.2f} to {row.speedup.high:.2f})",
                f"{row.first_s:.1f}",
            )
            for row in measured.rows
        ],
        title=f"{machine.cpu}, {machine.cores} cores; {steps} steps, {rounds} interleaved rounds",
    )  # fmt: skip
    for note in notes:
        output.say(note)
