#!/bin/sh
# Denoiser speed and parity on an NVIDIA GPU, and whole artifacts, in one command:
#
#     bench/gpu.sh                              a random network of the pilot's size
#     bench/gpu.sh --network unet               about 60 M parameters at 64 x 64 latents
#     bench/gpu.sh --network transformer        the same size of a transformer
#     bench/gpu.sh --checkpoint CHECKPOINT --int8 INT8_ARTIFACT/unet/model.onnx
#
# First the denoiser alone, then `modelops export --to onnx` and `--to tensorrt` of the checkpoint
# (of a tiny random Stable Diffusion without one), compared with torch and drawn from.
#
# With a GPU and TensorRT: eager torch, torch.compile, onnxruntime's CUDA and TensorRT providers and
# TensorRT engines in fp32, fp16 and INT8. With a GPU alone: what of these is installed. Without a
# GPU: one line. What was left out, and why, is in the JSON (--out, default gpu.json).
#
# Exit: 0 measured, or no GPU; 1 an export failed or is outside its parity bound; 2 wrong options, or
# no GPU (TensorRT) although --require gpu (--require tensorrt) was given. Never run on a GPU yet;
# --device cpu tries the script itself.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}
needed='import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))'
if ! "$python" -c "$needed" torch diffusers onnx onnxruntime; then
    echo "bench/gpu: $python lacks modelops' packages; try: PYTHON=VENV/bin/python bench/gpu.sh" >&2
    exit 2
fi
PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$root/bench/gpu.py" "$@"
