"""Denoiser speed and parity on an NVIDIA GPU; see gpu.sh, which calls this.

Times include waiting for the device; inputs and outputs stay on it. TF32 is off everywhere. Parity
is the relative error of the first output against eager torch in fp32 on the same device. INT8 made
here is calibrated on noise: its speed is that of any INT8, its error is not; give --int8 a graph
from `modelops export --to int8` for both.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PARITY = {"fp32": 1e-4, "fp16": 2e-2}  # relative error allowed; INT8's is reported, not judged
Run = Callable[[dict[str, Any]], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    from modelops.errors import ModelopsError
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
    parser.add_argument("--checkpoint", type=Path, help="diffusers directory with a UNet")
    parser.add_argument("--network", choices=["tiny", "pilot", "unet"], default="pilot")
    parser.add_argument("--int8", type=Path, help="INT8 graph of the checkpoint's denoiser")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
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

    from modelops.environment import current_environment
    from modelops.files import write_json

    module, names = load_network(options)
    feeds = {batch: example_feed(module, names, batch, seed=batch) for batch in options.batches}
    graphs = write_graphs(module, names, work, options.int8)
    on_device = {
        batch: {name: value.to(options.device) for name, value in feed.items()}
        for batch, feed in feeds.items()
    }
    module = module.to(options.device)
    runs, skipped, layers = open_runs(module, graphs, feeds, options, work)
    results, failures = time_runs(runs, on_device, options)
    record = {
        "machine": current_environment().model_dump(mode="json"),
        "gpu": describe_gpu() if options.device == "cuda" else None,
        "torch": torch.__version__,
        "network": str(options.checkpoint.name) if options.checkpoint else options.network,
        "parameters": sum(p.numel() for p in module.parameters()),
        "rounds": options.rounds,
        "results": results,
        "skipped": skipped,
        "int8_layers": layers,
        "outside_parity": failures,
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


def load_network(options: argparse.Namespace) -> tuple[Any, list[str]]:
    """A denoiser as a module of positional tensors, and its inputs' names."""
    import torch
    from diffusers import UNet2DConditionModel

    from modelops.errors import UsageError
    from modelops.models.networks import make_unet

    torch.manual_seed(0)
    if options.checkpoint:
        folder = options.checkpoint / "unet"
        if not folder.is_dir():
            raise UsageError(f"{options.checkpoint}: no unet in it")
        unet = UNet2DConditionModel.from_pretrained(folder)
    else:
        sizes = {"tiny": (16, 2, 16), "pilot": (32, 2, 64), "unet": (128, 2, 192)}
        resolution, patch, channels = sizes[options.network]
        unet = make_unet(resolution=resolution, patch_size=patch, channels=channels)
    names = ["sample", "timestep", "class_labels"]
    if any("attn2" in name for name, _ in unet.named_modules()):
        names.append("encoder_hidden_states")

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(
            self, sample: Any, timestep: Any, class_labels: Any, tokens: Any = None
        ) -> torch.Tensor:
            return self.unet(
                sample, timestep, encoder_hidden_states=tokens, class_labels=class_labels,
                return_dict=False,
            )[0]  # fmt: skip

    return Denoiser().eval().requires_grad_(False), names


def example_feed(module: Any, names: list[str], batch: int, *, seed: int) -> dict[str, Any]:
    """Noise at noise levels spread over (0, 1], in the shapes that the network was made for."""
    import torch

    config, generator = module.unet.config, torch.Generator().manual_seed(seed)
    size, text = config.sample_size, config.cross_attention_dim
    shapes = {
        "sample": (batch, config.in_channels, size, size),
        "class_labels": (batch, config.projection_class_embeddings_input_dim or text),
        "encoder_hidden_states": (batch, 16, text),
    }
    feed = {
        name: torch.randn(shapes[name], generator=generator) for name in names if name in shapes
    }
    feed["timestep"] = 1000 * (torch.arange(batch) + 1) / batch
    return {name: feed[name] for name in names}


def write_graphs(module: Any, names: list[str], work: Path, int8: Path | None) -> dict[str, Path]:
    """fp32, fp16 and INT8 graphs of the module."""
    from modelops.export.calibration import TrajectoryRows
    from modelops.export.int8.quantize import quantize_graph
    from modelops.export.onnx.precision import convert_precision
    from modelops.export.onnx.writer import write_graph

    axes = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "timestep": {0: "batch"},
        "class_labels": {0: "batch"},
        "encoder_hidden_states": {0: "batch", 1: "tokens"},
    }
    example = example_feed(module, names, 2, seed=0)
    paths = {kind: work / kind / "model.onnx" for kind in ("fp32", "fp16", "int8")}
    write_graph(
        module, {name: (value, axes[name]) for name, value in example.items()}, paths["fp32"],
        opset=20, outputs={"output": axes["sample"]},
    )  # fmt: skip
    feed = {name: value.numpy() for name, value in example_feed(module, names, 8, seed=1).items()}
    for kind in ("fp16", "int8"):
        paths[kind].parent.mkdir(exist_ok=True)
    convert_precision(paths["fp32"], paths["fp16"], "float16", feeds=[feed])
    if int8 is not None:
        return paths | {"int8": int8}
    rows = TrajectoryRows(feeds=feed, sigmas=feed["timestep"] / 1000, record={"of": "noise"})
    quantize_graph(paths["fp32"], paths["int8"], rows=rows, table=work / "ranges.json")
    return paths


def open_runs(
    module: Any,
    graphs: dict[str, Path],
    feeds: dict[int, dict[str, Any]],
    options: argparse.Namespace,
    work: Path,
) -> tuple[dict[str, Run], dict[str, str], dict[str, Any]]:
    """What can be run here, what cannot and why, and what engines say of their layers."""
    import torch

    from modelops.errors import ModelopsError
    from modelops.export.onnx.axes import read_axes
    from modelops.export.runtimes.onnxruntime import OrtGraph
    from modelops.export.tensorrt.build import ensure_engine
    from modelops.export.tensorrt.engine import TensorRtGraph
    from modelops.export.tensorrt.profiles import limits_of_shapes, make_profile

    half = copy.deepcopy(module).half()
    runs: dict[str, Run] = {
        "torch eager fp32": partial(run_torch, module),
        "torch eager fp16": partial(run_torch, half, dtype=torch.float16),
    }
    if options.device == "cpu":
        del runs["torch eager fp16"]
    if not options.no_compile:
        runs["torch.compile fp32"] = partial(run_torch, torch.compile(module))
        if options.device == "cuda":
            runs["torch.compile fp16"] = partial(
                run_torch, torch.compile(half), dtype=torch.float16
            )
    axes = read_axes(graphs["fp32"])
    profiles = [
        make_profile(axes, limits_of_shapes(axes, {name: v.shape for name, v in feed.items()}))
        for feed in feeds.values()
    ]
    skipped: dict[str, str] = {}
    layers: dict[str, Any] = {}
    cache = work / "cache"
    cache.mkdir(exist_ok=True)

    def ort(kind: str, provider: str) -> Run:
        extra = {"cache_dir": cache, "profiles": profiles} if provider == "tensorrt" else {}
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
            skipped[name] = str(error)
    return runs, skipped, layers


def tell_progress(phase: str, done: int, steps: int) -> None:
    if done == 0:
        print(f"  {phase} ({steps} steps)", file=sys.stderr)


def run_torch(module: Any, feed: dict[str, Any], dtype: Any = None) -> list[Any]:
    import torch

    with torch.inference_mode():
        values = [value if dtype is None else value.to(dtype) for value in feed.values()]
        return [module(*values)]


def time_runs(
    runs: dict[str, Run], feeds: dict[int, dict[str, Any]], options: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """Medians, 95th percentiles, ratios over eager torch and relative errors, by batch size."""
    import torch

    from modelops.export.timing import interleaved_seconds, speed_ratio

    def timed(run: Run, feed: dict[str, Any]) -> None:
        run(feed)
        if options.device == "cuda":
            torch.cuda.synchronize()

    results: dict[str, Any] = {}
    failures: list[str] = []
    for batch, feed in feeds.items():
        reference = runs["torch eager fp32"](feed)[0].double()
        errors = {}
        for name, run in runs.items():
            difference = run(feed)[0].double() - reference
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
    for name, reason in record["skipped"].items():
        print(f"not measured: {name}: {reason}")
    for line in record["outside_parity"]:
        print(f"outside parity: {line}")
    print(f"written to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
