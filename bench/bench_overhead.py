"""How much of one image's time at batch 1 is spent outside the networks, and on what.

    python bench/bench_overhead.py --checkpoint CHECKPOINT --runtime openvino
    python bench/bench_overhead.py --artifact artifacts/pilot/int8 --runtime openvino --steps 24

Outside is everything but the runtime's own call: tokenizer, scheduler, guidance, conversions,
copies, bytes. A profile (cProfile, which makes Python look slower than it is) says where it goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelops.base.environment import current_environment
from modelops.base.seeding import numpy_generator
from modelops.export.artifact.open import open_artifact
from modelops.export.graphs.graph import process_cores
from modelops.models.request import ImageRequest
from modelops.models.sources import PipelineSource

GOAL = 0.05
# The calls that are the networks, in each runtime.
NETWORK_CALLS = (
    ("onnxruntime", "InferenceSession", ("run", "run_with_iobinding")),
    ("openvino", "InferRequest", ("infer",)),
)


class OneRow(PipelineSource):
    """Calls its pipeline with exactly the requests it is given."""

    def rows_per_call(self, request: ImageRequest) -> int:
        return self.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--artifact", type=Path)
    what.add_argument("--checkpoint", type=Path, help="export this one to ONNX first")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=process_cores())
    parser.add_argument("--steps", type=int, help="the artifact's own when not given")
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--lines", type=int, default=25, help="of the profile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.checkpoint:
            from modelops.export.to_onnx import export_onnx

            options.artifact = Path(folder) / "onnx"
            export_onnx(options.checkpoint, options.artifact)
        report(options)


def report(options: argparse.Namespace) -> None:
    """Time, profile and print."""
    opened = open_artifact(
        options.artifact, runtime=options.runtime, precision=options.precision,
        threads=options.threads,
    )  # fmt: skip
    source = OneRow(opened.pipeline, opened.info, batch_size=1)
    request = ImageRequest(prompt="red heart", seed=0, steps=options.steps)
    totals, inside = timed(source, request, options.images)
    shares = 1.0 - inside / totals
    share = float(np.median(shares))
    picks = numpy_generator(0, "overhead").integers(0, len(shares), size=(2000, len(shares)))
    low, high = np.quantile(np.median(shares[picks], axis=1), [0.025, 0.975])
    machine = current_environment()
    print(f"{machine.cpu}, {machine.cores} cores, {options.threads} threads")
    print(f"{opened.info.runtime}, {opened.info.precision}, {options.images} images at batch 1")
    print(f"one image {np.median(totals) * 1e3:.1f} ms, in the networks "
          f"{np.median(inside) * 1e3:.1f} ms")  # fmt: skip
    verdict = "met" if share <= GOAL else "NOT MET"
    print(f"outside the networks: {share:.1%} ({low:.1%} to {high:.1%}), goal <= {GOAL:.0%}: "
          f"{verdict}")  # fmt: skip
    lines = profiled(source, request, max(3, options.images // 3))
    print(f"\n{'self ms':>9}{'with calls':>12}{'calls':>8}  per image, under the profiler")
    for line in lines[: options.lines]:
        print(f"{line['self_ms']:9.2f}{line['cumulative_ms']:12.2f}{line['calls']:8.1f}  "
              f"{line['function']}")  # fmt: skip
    if options.json:
        result = {
            "machine": machine.model_dump(), "runtime": opened.info.runtime,
            "image_ms": float(np.median(totals) * 1e3), "share_outside": share,
            "low": float(low), "high": float(high), "goal": GOAL, "profile": lines,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def timed(source: OneRow, request: ImageRequest, images: int) -> tuple[Any, Any]:
    """Seconds of each image [images], in all and in the networks."""
    totals, inside = [], []
    with counting() as spent:
        for index in range(-3, images):  # three to warm up
            before, start = spent(), time.perf_counter()
            source.generate([replace(request, seed=index + 3)])
            if index >= 0:
                totals.append(time.perf_counter() - start)
                inside.append(spent() - before)
    return np.asarray(totals), np.asarray(inside)


@contextmanager
def counting() -> Iterator[Callable[[], float]]:
    """Time every call of NETWORK_CALLS; yields a function that says how many seconds so far."""
    total = 0.0
    undo: list[tuple[Any, str, Any]] = []

    def timing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                total += time.perf_counter() - start

        return wrapper

    for module_name, class_name, methods in NETWORK_CALLS:
        try:
            owner = getattr(__import__(module_name), class_name)
        except ImportError:
            continue
        for method in methods:
            original = getattr(owner, method)
            undo.append((owner, method, original))
            setattr(owner, method, timing(original))
    try:
        yield lambda: total
    finally:
        for owner, method, original in undo:
            setattr(owner, method, original)


def profiled(source: OneRow, request: ImageRequest, images: int) -> list[dict[str, Any]]:
    """Functions by their own time, in milliseconds for an image."""
    profiler = cProfile.Profile()
    profiler.enable()
    for index in range(images):
        source.generate([replace(request, seed=index)])
    profiler.disable()
    stats: Any = pstats.Stats(profiler)
    lines = []
    for (file, number, name), (_, calls, own, cumulative, _) in stats.stats.items():
        place = "" if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{number} "
        lines.append({
            "function": f"{place}{name}", "calls": calls / images,
            "self_ms": own * 1e3 / images, "cumulative_ms": cumulative * 1e3 / images,
        })  # fmt: skip
    return sorted(lines, key=lambda line: -line["self_ms"])


if __name__ == "__main__":
    main()
