"""How far INT8 is off where sums saturate: by network, range of the weights and runtime.

    python bench/bench_saturation.py
    bench/narrow.sh python bench/bench_saturation.py     as on a processor with AVX2 alone

The networks are those of the tests, everything in INT8. Errors are relative, root mean squares over
the rows, beside the same network in fp32. "Exact" multiplies and adds the rounded numbers in float;
"as it comes" is onnxruntime without the session option that modelops sets.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.base.processor import this_processor
from modelops.export.graphs.graph import available_runtimes
from modelops.export.int8.qdq import QdqWriter
from modelops.export.int8.ranges import measure_ranges
from modelops.export.int8.variants import root_mean_square
from modelops.export.onnx.weight_range import WEIGHT_TOPS
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.probe import relative_errors

Feed = dict[str, npt.NDArray[np.float32]]


def main() -> None:
    print(f"{this_processor().kind}\n")
    print("| network | weights | exact | onnxruntime as it comes | onnxruntime | OpenVINO |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (source, feed) in networks(Path(folder)).items():
            writer = QdqWriter(source)
            ranges = measure_ranges(source, writer.calibrated_tensors(), [feed])
            expected = OrtGraph(source).run(feed)
            for weight_range, top in WEIGHT_TOPS.items():
                path = Path(folder) / f"{name}.{weight_range}.onnx"
                writer.write(path, ranges, list(writer.nodes), weight_range=weight_range)
                errors = [root_mean_square(relative_errors(expected, out))
                          for out in outputs(path, feed).values()]  # fmt: skip
                bits = f"{'8' if top == 127 else '7'} bits"
                print(f"| {name} | {bits} | {' | '.join(f'{e:.4f}' for e in errors)} |")


def networks(folder: Path) -> Mapping[str, tuple[Path, Feed]]:
    """Graphs in fp32 and rows for them."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
    import small_graphs as small

    found: dict[str, tuple[Path, Feed]] = {}
    for network in (small.Transformer(), small.ConvNet()):
        name = type(network).__name__.lower()
        path = small.export_network(network, folder / name / "model.onnx")
        found[name] = path, small.random_rows(network, 8, 1).take(range(8))
    joint = small.write_joint_attention(folder / "joint.onnx")
    found["joint attention"] = joint, small.joint_feed()
    x = np.random.default_rng(1).standard_normal((3, 6, 8)).astype(np.float32)
    found["cut product"] = small.write_gated(folder / "gated.onnx"), {"x": x}
    return found


def outputs(path: Path, feed: Feed) -> dict[str, npt.NDArray[np.float32]]:
    """Of an INT8 graph, by the columns of the table."""
    import onnxruntime

    plain = onnxruntime.SessionOptions()
    plain.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), plain, providers=["CPUExecutionProvider"])
    made = {
        "exact": OrtGraph(path, as_written=True).run(feed),
        "as it comes": session.run(None, feed)[0],
        "onnxruntime": OrtGraph(path).run(feed),
    }
    if "openvino" in available_runtimes():
        made["openvino"] = open_graph(path, "openvino").run(feed)
    return made


if __name__ == "__main__":
    main()
