"""NNCF's post-training INT8 of an ONNX graph, as OpenVINO IR. `bench_nncf.py` runs it, in another
interpreter where need be: it imports nothing of modelops.

    python bench/nncf_quantize.py model.onnx rows.npz out.xml [--transformer]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nncf
import numpy as np
import openvino


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("onnx", type=Path)
    parser.add_argument("rows", type=Path, help="input name to array [R, ...]")
    parser.add_argument("out", type=Path)
    parser.add_argument("--transformer", action="store_true", help="NNCF's model type")
    options = parser.parse_args()
    with np.load(options.rows) as stored:
        rows = {name: stored[name] for name in stored.files}
    count = len(next(iter(rows.values())))
    feeds = [{name: array[i : i + 1] for name, array in rows.items()} for i in range(count)]
    quantized = nncf.quantize(
        openvino.Core().read_model(options.onnx),
        nncf.Dataset(feeds),
        subset_size=count,
        model_type=nncf.ModelType.TRANSFORMER if options.transformer else None,
    )
    openvino.save_model(quantized, options.out, compress_to_fp16=False)
    print(f"nncf {nncf.__version__}")


if __name__ == "__main__":
    main()
