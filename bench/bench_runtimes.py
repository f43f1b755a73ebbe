"""Denoiser speed in every runtime here, interleaved in one run; prints ratios over eager torch.

    python bench/bench_runtimes.py
    python bench/bench_runtimes.py --checkpoint CHECKPOINT --onnx ONNX_DIR --int8 INT8_DIR

Without arguments it makes a checkpoint with random weights at 64 x 64 (6.6 M parameters) and
exports it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from modelops.environment import current_environment
from modelops.export.artifact import DENOISER, GRAPH, read_artifact
from modelops.export.calibration import collect_rows
from modelops.export.graphs import available_runtimes, open_graph
from modelops.export.int8 import export_int8
from modelops.export.onnx import export_onnx, load_source
from modelops.export.openvino import openvino_has_bfloat16
from modelops.export.parity import relative_errors, torch_denoiser
from modelops.export.timing import interleaved_seconds, speed_ratio


def make_checkpoint(directory: Path) -> Path:
    """A random network of the size that the pilot trains, around the real text encoder."""
    from modelops.models.checkpoints import save_pipeline
    from modelops.models.encoders import load_text_encoder
    from modelops.models.networks import make_pipeline, make_unet

    torch.manual_seed(0)
    tokenizer, text_encoder = load_text_encoder()
    unet = make_unet(resolution=64, patch_size=4, channels=64)
    directory.mkdir(parents=True)
    save_pipeline(make_pipeline(unet, tokenizer, text_encoder, patch_size=4), directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--int8", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or make_checkpoint(Path(folder) / "checkpoint")
        fp32 = options.onnx or Path(folder) / "onnx"
        int8 = options.int8 or Path(folder) / "int8"
        if options.onnx is None:
            export_onnx(checkpoint, fp32)
        if options.int8 is None:
            export_int8(fp32, checkpoint, int8, speed_rounds=0)
        report(checkpoint, fp32, int8, rounds=options.rounds, as_json=options.json)


def report(checkpoint: Path, fp32: Path, int8: Path, *, rounds: int, as_json: bool) -> None:
    """Time and print."""
    pipeline, _ = load_source(checkpoint)
    graphs = {"onnxruntime fp32": open_graph(fp32 / DENOISER / GRAPH, "onnxruntime")}
    graphs["onnxruntime int8"] = open_graph(int8 / DENOISER / GRAPH, "onnxruntime")
    if "openvino" in available_runtimes():
        kinds = ["float32", "bfloat16"] if openvino_has_bfloat16() else ["float32"]
        for precision in kinds:
            for name, artifact in (("", fp32), ("int8+", int8)):
                graphs[f"openvino {name}{precision}"] = open_graph(
                    artifact / DENOISER / GRAPH, "openvino", precision=precision
                )
    names = graphs["onnxruntime fp32"].input_names
    rows = collect_rows(
        pipeline, names, prompts=["red heart", "dog face"], seed=1, steps=8, rows=32
    )
    results = {}
    for batch in (1, 8):
        feed = rows.take([(index * 5) % len(rows) for index in range(batch)])
        expected = torch_denoiser(pipeline.unet, feed)
        runs: dict[str, Callable[[], object]] = {
            "torch eager": partial(torch_denoiser, pipeline.unet, feed)
        }
        runs |= {name: partial(graph.run, feed) for name, graph in graphs.items()}
        seconds = interleaved_seconds(runs, rounds=rounds)
        for name in runs:
            protocol = {"batch": batch, "shape": "x".join(map(str, feed["sample"].shape))}
            eager, ort = (
                speed_ratio(seconds, of=name, over=over, protocol=protocol)
                for over in ("torch eager", "onnxruntime fp32")
            )
            error = 0.0
            if name in graphs:
                error = float(relative_errors(expected, graphs[name].run(feed)).max())
            results[f"{name}, batch {batch}"] = {
                "ms": float(np.median(seconds[name]) * 1e3),
                "over_torch_eager": [eager.value, eager.low, eager.high],
                "over_onnxruntime_fp32": [ort.value, ort.low, ort.high],
                "relative_error": error,
            }
    if as_json:
        print(json.dumps({"machine": current_environment().model_dump(), "results": results}))
        return
    machine = current_environment()
    parity = [c.value for c in read_artifact(int8).parity if c.measure == "psnr_db"]
    print(f"{machine.cpu}, {machine.cores} cores, torch threads {torch.get_num_threads()}")
    print(f"INT8 pictures against torch fp32: PSNR {', '.join(f'{v:.1f}' for v in parity)} dB")
    print(f"{'':34}{'ms':>8}  {'x eager torch':>22}  {'x onnxruntime fp32':>22}  rel. error")
    for name, row in results.items():
        ratios = ["{:.2f} ({:.2f}-{:.2f})".format(*row[key]) for key in list(row)[1:3]]
        print(
            f"{name:34}{row['ms']:8.1f}  {ratios[0]:>22}  {ratios[1]:>22}  "
            f"{row['relative_error']:.1e}"
        )


if __name__ == "__main__":
    main()
