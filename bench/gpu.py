"""Denoiser speed and parity on an NVIDIA GPU, and whole artifacts; see gpu.sh, which calls this.

Times include waiting for the device; inputs and outputs stay on it. TF32 is off everywhere. Parity
is the relative error of the first output against eager torch in fp32 on the same device. INT8 of
random weights is calibrated on made-up rows: its speed is that of any INT8, its error is not; give
--checkpoint for both, and --int8 for a graph that `modelops export --to int8` chose.

What fails is left out and named, and the rest is still measured.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # read when CUDA's libraries are loaded

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PARITY = {"fp32": 1e-4, "fp16": 2e-2}  # relative error allowed; INT8's is reported, not judged
ROWS = 32
Run = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Network:
    """A denoiser to measure.

    Attributes:
        about: a line on it.
        module: takes tensors as positions; returns a tensor or a tuple of them.
        example: input name to (tensor, names of its dynamic axes), in the module's order.
        outputs: output name to the names of its dynamic axes.
        rows: inputs over all noise levels, a TrajectoryRows.
    """

    about: str
    module: Any
    example: dict[str, Any]
    outputs: dict[str, Any]
    rows: Any

    def feed(self, batch: int) -> dict[str, Any]:
        """Rows spread over the noise levels, as tensors."""
        import torch

        picks = np.linspace(0, len(self.rows) - 1, num=batch).astype(int)
        arrays = self.rows.take(picks)
        return {name: torch.from_numpy(arrays[name]) for name in self.example}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    from modelops.base.errors import ModelopsError
    from modelops.export.tensorrt.library import has_tensorrt

    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu: no NVIDIA GPU here (or a torch without CUDA): nothing was measured")
        return 2 if options.require else 0
    if options.require == "tensorrt" and not has_tensorrt():
        print("bench/gpu: TensorRT is not installed here: nothing was measured")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = options.work or Path(folder)
            work.mkdir(parents=True, exist_ok=True)
            return measure(options, work)
    except ModelopsError as error:
        print(f"bench/gpu: {error}", file=sys.stderr)
        return error.exit_code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="diffusers directory of any pipeline")
    parser.add_argument(
        "--network", choices=["tiny", "pilot", "unet", "transformer"], default="pilot",
        help="random weights, where there is no --checkpoint",
    )  # fmt: skip
    parser.add_argument("--int8", type=Path, help="INT8 graph of the checkpoint's denoiser")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-artifacts", action="store_true", help="denoisers alone")
    parser.add_argument("--require", choices=["gpu", "tensorrt"])
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries it out"
    )
    parser.add_argument("--work", type=Path, help="keeps graphs, engines and timings here")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args(arguments)
    if min((*options.batches, options.rounds)) < 1:
        parser.error("batches and rounds are at least 1")
    if options.int8 and not options.checkpoint:
        parser.error("--int8 needs the --checkpoint it was made from")
    return options


def measure(options: argparse.Namespace, work: Path) -> int:
    import torch

    from modelops.base.environment import current_environment
    from modelops.base.files import write_json

    checkpoint = options.checkpoint or tiny_checkpoint(work / "checkpoint")
    network = load_network(options, checkpoint)
    skipped: dict[str, str] = {}
    graphs = write_graphs(network, work, options.int8, skipped)
    feeds = {
        batch: {name: value.to(options.device) for name, value in network.feed(batch).items()}
        for batch in options.batches
    }
    module = network.module.to(options.device)
    runs, layers = open_runs(module, graphs, feeds, options, work, skipped)
    results, failures = time_runs(runs, feeds, options, skipped)
    artifacts = {}
    if not options.no_artifacts:
        artifacts = check_artifacts(checkpoint, work / "artifacts", options, skipped, failures)
    record = {
        "machine": current_environment().model_dump(mode="json"),
        "gpu": describe_gpu() if options.device == "cuda" else None,
        "torch": torch.__version__,
        "network": network.about,
        "parameters": sum(p.numel() for p in module.parameters()),
        "rounds": options.rounds,
        "results": results,
        "artifacts": artifacts,
        "skipped": skipped,
        "int8_layers": layers,
        "failed": failures,
    }
    write_json(options.out, record)
    show(record, options)
    return 1 if failures else 0


def describe_gpu() -> dict[str, str]:
    import torch

    from modelops.export.tensorrt.fingerprint import driver_version

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver_version(),
        "cuda": str(torch.version.cuda),
    }


def tiny_checkpoint(folder: Path) -> Path:
    """A Stable Diffusion of a few thousand random weights: every kind of network, in seconds."""
    sys.path.append(str(ROOT / "tests" / "helpers"))
    from tiny_pipelines import make

    make("sd").save_pretrained(folder)
    return folder


def load_network(options: argparse.Namespace, checkpoint: Path) -> Network:
    """The checkpoint's denoiser with rows of its own trajectories, or one of random weights."""
    if not options.checkpoint and options.network != "tiny":
        sys.path.append(str(ROOT / "bench"))
        from denoisers import make_denoiser

        found = make_denoiser(options.network)
        axes = next(iter(found.example.values()))[1]
        return Network(
            found.about, found.module, found.example, {"prediction": axes},
            found.make_rows(ROWS, 0),
        )  # fmt: skip
    from modelops.export.calibration import DEFAULT_PROMPTS, collect_rows
    from modelops.export.components import find_components
    from modelops.export.source import both_sides, load_source

    source = load_source(checkpoint)
    components = find_components(source.pipeline, size=both_sides(source.size))
    denoiser = next(item for item in components if item.role == "denoiser")
    rows = collect_rows(
        source.pipeline, denoiser, prompts=DEFAULT_PROMPTS, seed=0, steps=8, rows=ROWS,
        size=source.size,
    )  # fmt: skip
    about = f"{type(source.pipeline).__name__}, {denoiser.name}"
    return Network(about, denoiser.flat, denoiser.example, denoiser.outputs, rows)


def write_graphs(
    network: Network, work: Path, int8: Path | None, skipped: dict[str, str]
) -> dict[str, Path]:
    """fp32, fp16 and INT8 graphs of the module; a conversion that fails is left out."""
    from modelops.base.errors import ModelopsError
    from modelops.export.int8.qdq import quantize_graph
    from modelops.export.int8.ranges import Calibration
    from modelops.export.onnx.precision import convert_precision
    from modelops.export.onnx.writer import write_graph

    paths = {kind: work / kind / "model.onnx" for kind in ("fp32", "fp16", "int8")}
    write_graph(network.module, network.example, paths["fp32"], opset=20, outputs=network.outputs)
    feeds = network.rows.batches(min(8, len(network.rows)))
    converters: dict[str, Callable[[], object]] = {
        "fp16": partial(
            convert_precision, paths["fp32"], paths["fp16"], "float16", feeds=feeds
        ),
        "int8": partial(
            quantize_graph, paths["fp32"], paths["int8"],
            Calibration(network.rows, work / "ranges.json"),
        ),
    }  # fmt: skip
    if int8 is not None:
        paths["int8"] = int8
        del converters["int8"]
    for kind, convert in converters.items():
        paths[kind].parent.mkdir(exist_ok=True)
        try:
            convert()
        except ModelopsError as error:
            skipped[f"every {kind} graph"] = error.message
            del paths[kind]
    return paths


def open_runs(
    module: Any,
    graphs: dict[str, Path],
    feeds: dict[int, dict[str, Any]],
    options: argparse.Namespace,
    work: Path,
    skipped: dict[str, str],
) -> tuple[dict[str, Run], dict[str, Any]]:
    """What can be run here, and what engines say of their layers; what cannot is in `skipped`."""
    import torch

    from modelops.base.errors import ModelopsError
    from modelops.export.graphs.axes import read_axes
    from modelops.export.runtimes.onnxruntime import OrtGraph
    from modelops.export.runtimes.tensorrt import TensorRtGraph
    from modelops.export.tensorrt.build import ensure_engine
    from modelops.export.tensorrt.profiles import limits_of_shapes, make_profile

    runs: dict[str, Run] = {"torch eager fp32": partial(run_torch, module)}
    modules: dict[str, tuple[Any, Any]] = {"fp32": (module, None)}
    if options.device == "cuda":
        modules["fp16"] = (copy.deepcopy(module).half(), torch.float16)
        runs["torch eager fp16"] = partial(run_torch, modules["fp16"][0], dtype=torch.float16)
    if not options.no_compile:
        for kind, (eager, dtype) in modules.items():
            compiled = torch.compile(eager, dynamic=False)  # one program for each batch size
            runs[f"torch.compile {kind}"] = partial(run_torch, compiled, dtype=dtype)
    axes = read_axes(graphs["fp32"])
    profiles = [
        make_profile(axes, limits_of_shapes(axes, {name: v.shape for name, v in feed.items()}))
        for feed in feeds.values()
    ]
    layers: dict[str, Any] = {}
    cache = work / "cache"
    cache.mkdir(exist_ok=True)

    def ort(kind: str, provider: str) -> Run:
        extra: dict[str, Any] = {}
        if provider == "tensorrt":
            extra = {"cache_dir": cache, "profiles": profiles}
        return OrtGraph(graphs[kind], provider=provider, **extra).run_device

    def engine(kind: str) -> Run:
        plan = work / kind / "engine.plan"
        built = ensure_engine(
            graphs[kind], plan, profiles, timing_cache=cache, on_progress=tell_progress
        )
        layers[kind] = built.layers
        return TensorRtGraph(plan, onnx_path=graphs[kind], profiles=profiles).run_device

    provider = "cuda" if options.device == "cuda" else "cpu"
    makers: dict[str, Callable[[], Run]] = {}
    for kind in graphs:
        makers[f"onnxruntime {provider} {kind}"] = partial(ort, kind, provider)
        if options.device == "cuda":
            makers[f"onnxruntime tensorrt {kind}"] = partial(ort, kind, "tensorrt")
            makers[f"TensorRT {kind}"] = partial(engine, kind)
    for name, make in makers.items():
        try:
            runs[name] = make()
        except (ModelopsError, RuntimeError) as error:
            skipped[name] = reason_of(error)
    return runs, layers


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def tell_progress(phase: str, done: int, steps: int) -> None:
    if done == 0:
        print(f"  {phase} ({steps} steps)", file=sys.stderr)


def run_torch(module: Any, feed: dict[str, Any], dtype: Any = None) -> list[Any]:
    import torch

    with torch.inference_mode():
        values = [
            value if dtype is None or not value.is_floating_point() else value.to(dtype)
            for value in feed.values()
        ]
        found = module(*values)
        return [found] if isinstance(found, torch.Tensor) else list(found)


def time_runs(
    runs: dict[str, Run],
    feeds: dict[int, dict[str, Any]],
    options: argparse.Namespace,
    skipped: dict[str, str],
) -> tuple[dict[str, Any], list[str]]:
    """Medians, 95th percentiles, ratios over eager torch and relative errors, by batch size.

    What fails at one batch size is left out from there on.
    """
    import torch

    from modelops.export.timing import interleaved_seconds, speed_ratio

    def timed(run: Run, feed: dict[str, Any]) -> None:
        run(feed)
        if options.device == "cuda":
            torch.cuda.synchronize()

    results: dict[str, Any] = {}
    failures: list[str] = []
    runs = dict(runs)
    for batch, feed in feeds.items():
        reference = runs["torch eager fp32"](feed)[0].double()
        errors = {}
        for name in list(runs):
            try:
                difference = runs[name](feed)[0].double() - reference
            except Exception as error:  # of a compiler, of CUDA, of a runtime: the rest stands
                skipped[f"{name} from batch {batch} on"] = reason_of(error)
                del runs[name]
                continue
            errors[name] = float(difference.norm() / reference.norm())
            bound = PARITY.get(name.rsplit(" ", 1)[-1])
            if bound is not None and not errors[name] <= bound:  # NaN is outside, too
                failures.append(f"{name}, batch {batch}: {errors[name]:.1e} > {bound:.0e}")
        seconds = interleaved_seconds(
            {name: partial(timed, run, feed) for name, run in runs.items()},
            rounds=options.rounds, warmup=3,
        )  # fmt: skip
        rows = {}
        for name in runs:
            ratio = speed_ratio(
                seconds, of=name, over="torch eager fp32", protocol={"batch": batch}
            )
            rows[name] = {
                "ms": float(np.median(seconds[name]) * 1e3),
                "p95_ms": float(np.quantile(seconds[name], 0.95) * 1e3),
                "over_torch_eager_fp32": [ratio.value, ratio.low, ratio.high],
                "relative_error": errors[name] if np.isfinite(errors[name]) else None,
            }
        results[str(batch)] = rows
    return results, failures


def check_artifacts(
    checkpoint: Path,
    folder: Path,
    options: argparse.Namespace,
    skipped: dict[str, str],
    failures: list[str],
) -> dict[str, Any]:
    """Export the checkpoint as `modelops export` does and draw an image from what was written.

    An export compares every network and the images with torch on the CPU; one that differs or
    fails is in `failures`, one whose packages are missing in `skipped`.
    """
    from modelops.base.errors import MissingExtraError, ModelopsError
    from modelops.export.artifact.open import open_artifact
    from modelops.export.to_onnx import export_onnx
    from modelops.export.to_tensorrt import export_tensorrt
    from modelops.models.request import ImageRequest

    onnx, engines = folder / "onnx", folder / "tensorrt"
    exports: dict[str, tuple[Path, str, Callable[[], Any]]] = {
        "onnx": (onnx, "onnxruntime", partial(export_onnx, checkpoint, onnx, overwrite=True))
    }
    if options.device == "cuda":
        exports["tensorrt"] = (
            engines, "tensorrt",
            partial(export_tensorrt, onnx, checkpoint, engines, overwrite=True),
        )  # fmt: skip
    found = {}
    for name, (path, runtime, export) in exports.items():
        try:
            record = export()
            source = open_artifact(path, runtime=runtime)
            source.generate([ImageRequest(prompt="a red heart", seed=0, steps=2)])
        except MissingExtraError as error:
            skipped[f"artifact in {name}"] = error.message
        except (ModelopsError, RuntimeError) as error:
            failures.append(f"artifact in {name}: {reason_of(error)}")
        else:
            found[name] = {
                "runtime": source.info.runtime,
                "parity": [check.model_dump(mode="json") for check in record.parity],
            }
    return found


def show(record: dict[str, Any], options: argparse.Namespace) -> None:
    where = record["gpu"]["name"] if record["gpu"] else "CPU (a trial of the script)"
    print(f"{record['network']}, {record['parameters'] / 1e6:.1f} M parameters, {where}")
    print(f"{'':30}{'batch':>6}{'ms':>10}  {'x eager torch fp32':>20}  rel. error")
    for batch, rows in record["results"].items():
        for name, row in rows.items():
            ratio = "{:.2f} ({:.2f}-{:.2f})".format(*row["over_torch_eager_fp32"])
            error = row["relative_error"]
            told = "not finite" if error is None else f"{error:.1e}"
            print(f"{name:30}{batch:>6}{row['ms']:10.3f}  {ratio:>20}  {told}")
    for name, artifact in record["artifacts"].items():
        print(f"artifact in {name}: equal to its checkpoint in {artifact['runtime']}")
    for name, reason in record["skipped"].items():
        print(f"not measured: {name}: {reason}")
    for line in record["failed"]:
        print(f"failed: {line}")
    print(f"written to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
