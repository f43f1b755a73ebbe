"""`modelops bench`: latency and throughput of model sources."""

from __future__ import annotations

from dataclasses import asdict

import click

from modelops.cli import output


def _sizes(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter("give whole numbers with commas, such as 1,8") from error
    if min(sizes) < 1:
        raise click.BadParameter("a batch has at least one image")
    return sizes


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--batch-sizes",
    default="1,8",
    show_default=True,
    callback=_sizes,
    metavar="N,N",
    help="Images per call.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="INT",
    help="Sampling steps.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="INT",
    help="Interleaved repetitions.",
)
@click.option(
    "--runtime",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "onnxruntime", "openvino"]),
    help="For artifacts.",
)
@output.json_option
def bench(
    sources: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    steps: int,
    rounds: int,
    runtime: str,
    as_json: bool,
) -> None:
    """Measure checkpoints, artifacts and endpoints side by side.

    The sources take turns, so that a busy machine slows all of them alike. Speed-ups are over the
    first one: name a checkpoint first to have eager torch as the baseline.

    \b
    Example:
      modelops bench runs/pilot/checkpoints/step-1000 artifacts/pilot/onnx artifacts/pilot/int8
    """
    from modelops.environment import current_environment
    from modelops.evaluation.sources import open_source
    from modelops.export.bench import bench_sources

    opened = [open_source(uri, runtime=runtime) for uri in sources]
    with output.progress("measuring", quiet=as_json) as on_progress:
        rows = bench_sources(
            opened, batch_sizes=batch_sizes, steps=steps, rounds=rounds, on_progress=on_progress
        )
    machine = current_environment()
    result = {
        "status": "ok",
        "machine": machine.model_dump(mode="json"),
        "steps": steps,
        "rows": [
            {**asdict(row), "speedup": row.speedup.model_dump(mode="json") if row.speedup else None}
            for row in rows
        ],
    }
    output.emit(result, as_json=as_json)
    if as_json:
        return
    output.table(
        ("source", "runtime", "precision", "batch", "p50 ms", "p95 ms", "images/s", "speed-up"),
        [
            (
                row.name, row.runtime, row.precision, str(row.batch_size), f"{row.p50_s * 1e3:.0f}",
                f"{row.p95_s * 1e3:.0f}", f"{row.images_per_second:.2f}",
                "1" if row.speedup is None
                else f"{row.speedup.value:.2f} ({row.speedup.low:.2f} to {row.speedup.high:.2f})",
            )
            for row in rows
        ],
        title=f"{machine.cpu}, {machine.cores} cores; {steps} steps, {rounds} interleaved rounds",
    )  # fmt: skip
