"""What bfloat16 costs a denoiser in OpenVINO, beside torch's own bfloat16, family by family.

    python bench/bench_bfloat16.py
    python bench/bench_bfloat16.py --family prx --checkpoint my-pipeline/

Each network is exported in fp32 and fed what its pipeline feeds it while it draws; what comes out
is compared with eager torch in fp32. The hint alone is OpenVINO's precision hint without
`keep_sinusoids_in_float32`, which is what its users get otherwise; time is what a call of two rows
takes with it over without, interleaved: median and middle half. The families' networks are tiny
and have random weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from modelops.export.artifact.directory import GRAPH
from modelops.export.calibration import DEFAULT_PROMPTS, collect_rows
from modelops.export.components import Component, find_components
from modelops.export.runtimes import openvino as runtime
from modelops.export.runtimes.openvino import OpenVinoGraph
from modelops.export.runtimes.precision import openvino_has_bfloat16
from modelops.export.runtimes.probe import relative_errors
from modelops.export.timing import interleaved_seconds
from modelops.export.to_onnx import write_component
from modelops.models.sources import load_checkpoint

FAMILY_PROMPTS = ["a red heart", "the green dog", "a blue house with the sun", "cat of the flag"]
FAMILY_SIZE = (32, 32)
ROUNDS = 31
Feed = dict[str, Any]
Size = tuple[int, int] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", help="all when not given")
    parser.add_argument("--checkpoint", nargs="*", type=Path, default=[], help="pipelines as well")
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    if not openvino_has_bfloat16():
        raise SystemExit("OpenVINO has no bfloat16 on this processor")
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
    import tiny_pipelines

    families = tiny_pipelines.FAMILIES if options.family is None else options.family
    print("| network | rows | torch's bf16 | OpenVINO's | by the hint alone | its fp32 | time |")
    print("|---|---|---|---|---|---|---|")
    for name in families:
        show(name, tiny_pipelines.make(name), FAMILY_PROMPTS, FAMILY_SIZE, options.rows)
    for path in options.checkpoint:
        show(path.name, load_checkpoint(path), DEFAULT_PROMPTS[:4], None, options.rows)


def show(name: str, pipeline: Any, prompts: Sequence[str], size: Size, count: int) -> None:
    """A row of the table."""
    rows, errors, times = compare(pipeline, prompts, size, count)
    figures = " | ".join(f"{error:.1e}" for error in errors)
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    print(f"| {name} | {rows} | {figures} | {middle:.3f} ({low:.3f} to {high:.3f}) |", flush=True)


def compare(
    pipeline: Any, prompts: Sequence[str], size: Size, count: int
) -> tuple[int, list[float], Any]:
    """Rows, root mean squares of relative errors in the order of the table, and how many times the
    hint's time each of some calls of two rows takes."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    denoiser = next(
        item for item in find_components(pipeline, size=size) if item.role == "denoiser"
    )
    rows = collect_rows(
        pipeline, denoiser, prompts=prompts, seed=0, steps=8, rows=count, size=size or (None, None)
    )
    feeds = rows.batches(2)
    expected = [denoiser.run(feed)[0] for feed in feeds]
    with tempfile.TemporaryDirectory() as folder:
        write_component(pipeline, denoiser, Path(folder), opset=20)

        def served(precision: str) -> Callable[[], Any]:
            graph = OpenVinoGraph(Path(folder) / GRAPH, precision=precision)
            errors.append(error_of([graph.run(feed) for feed in feeds], expected))
            return partial(graph.run, feeds[0])

        errors = [error_of([in_bfloat16(denoiser, feed) for feed in feeds], expected)]
        runs = {"ours": served("bfloat16")}
        with patch.object(runtime, "keep_sinusoids_in_float32", lambda core, model: 0):
            runs["hint"] = served("bfloat16")
        served("float32")
        seconds = interleaved_seconds(runs, rounds=ROUNDS)
    return len(rows), errors, np.divide(seconds["ours"], seconds["hint"])


def in_bfloat16(denoiser: Component, feed: Feed) -> Any:
    """What torch makes of a feed under autocast; float32."""
    values = [torch.from_numpy(feed[name]) for name in denoiser.signature.inputs]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        return denoiser.flat(*values)[0].float().numpy()


def error_of(outputs: list[Any], expected: list[Any]) -> float:
    """Root mean square over rows."""
    errors = [relative_errors(*both) for both in zip(expected, outputs, strict=True)]
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


if __name__ == "__main__":
    main()
