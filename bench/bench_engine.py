"""What batching between steps gains without HTTP, and what it costs to do it for any pipeline.

    python bench/bench_engine.py --model artifacts/pilot/int8
    python bench/bench_engine.py --model sd15 --images 8 --rounds 3

The same requests (steps 8 to 30, guidance 1 or 3, from fixed seeds), interleaved:
  one by one    the pipeline's own call, a request at a time
  any pipeline  the engine as it drives a pipeline that it does not know
  own           the engine as it drives modelops' own pipeline, where the model is one
Ratios of images per second over "one by one"; median of the rounds with the least and the most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.environment import current_environment
from modelops.base.seeding import numpy_generator
from modelops.models.pipelines.arguments import pipeline_arguments
from modelops.models.pipelines.form import read_form
from modelops.models.request import ImageRequest
from modelops.serving.engine import engine as engine_module
from modelops.serving.engine.diffusers import PipelineModel
from modelops.serving.engine.engine import StepEngine
from modelops.serving.node.load import open_model

Pictures = list[Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint or artifact")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16, help="of a batch, at most")
    parser.add_argument("--profile-s", type=float, default=10.0, help="0 takes every width")
    options = parser.parse_args()
    pipeline, info = open_model(options.model, runtime=options.runtime, batch_size=options.rows)
    requests = make_requests(options.images)
    ways: dict[str, Callable[[], Pictures]] = {
        "one by one": lambda: one_by_one(pipeline, requests),
        "any pipeline": lambda: by_engine(pipeline, requests, options, PipelineModel),
    }
    if hasattr(pipeline, "predict_velocity"):
        ways["own"] = lambda: by_engine(pipeline, requests, options, None)
    machine = current_environment()
    print(f"{machine.cpu}, {machine.cores} cores; {info.runtime}, {info.precision}; "
          f"{options.images} images, {options.rounds} rounds")  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, Pictures] = {}
    for number in range(options.rounds + 1):  # the first compiles and is not counted
        for name in numpy_generator(number, "order").permutation(list(ways)):
            pictures = ways[name]()
            took = TOOK.pop()
            made[name] = pictures
            if number:
                seconds[name].append(took)
    usual = np.asarray(seconds["one by one"])
    for name, times in seconds.items():
        ratios = usual / np.asarray(times)
        apart = max(int(np.abs(a.astype(int) - b).max())
                    for a, b in zip(made[name], made["one by one"], strict=True))  # fmt: skip
        print(f"{name:13} {options.images / np.median(times):7.2f} images/s, "
              f"{np.median(ratios):.2f} x one by one ({ratios.min():.2f} to {ratios.max():.2f}), "
              f"images at most {apart} levels of 255 apart")  # fmt: skip


TOOK: list[float] = []  # seconds of the last run, without opening the engine


def make_requests(count: int) -> list[ImageRequest]:
    """Steps and guidance mixed, the same each time."""
    generator = numpy_generator(0, "bench-engine")
    return [
        ImageRequest(
            prompt=f"a drawing, number {index}", seed=index, steps=int(generator.integers(8, 31)),
            guidance=float(generator.choice([1.0, 3.0])),
        )
        for index in range(count)
    ]  # fmt: skip


def one_by_one(pipeline: Any, requests: Sequence[ImageRequest]) -> Pictures:
    """The pipeline's own call for each request."""
    pipeline.set_progress_bar_config(disable=True)
    form = read_form(pipeline)
    began = time.perf_counter()
    images = [pipeline(**pipeline_arguments(form, [one])).images[0] for one in requests]
    TOOK.append(time.perf_counter() - began)
    return [np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8) for image in images]


def by_engine(
    pipeline: Any, requests: Sequence[ImageRequest], options: argparse.Namespace, model: Any
) -> Pictures:
    """All requests at once, driven by `model`; by what the engine chooses when None."""
    chosen = engine_module.step_model
    if model is not None:
        engine_module.step_model = model
    try:
        engine = StepEngine(
            pipeline, max_rows=options.rows, queue_limit=len(requests), profile_s=options.profile_s
        )
    finally:
        engine_module.step_model = chosen
    try:
        engine.submit(requests[:1])[0].future.result()  # after the profile
        began = time.perf_counter()
        images = [job.future.result().pixels for job in engine.submit(requests)]
        TOOK.append(time.perf_counter() - began)
        return images
    finally:
        engine.close()


if __name__ == "__main__":
    main()
