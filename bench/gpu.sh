#!/bin/sh
# Denoiser speed and parity on an NVIDIA GPU, in one command:
#
#     bench/gpu.sh                              a random network of the pilot's size
#     bench/gpu.sh --network unet               about 60 M parameters at 64 x 64 latents
#     bench/gpu.sh --checkpoint CHECKPOINT --int8 INT8_ARTIFACT/denoiser/model.onnx
#
# With a GPU and TensorRT: eager torch, torch.compile, onnxruntime's CUDA and TensorRT providers and
# TensorRT engines in fp32, fp16 and INT8. With a GPU alone: what of these is installed. Without a
# GPU: one line. What was left out, and why, is in the JSON (--out, default gpu.json).
#
# Exit: 0 measured, or no GPU; 1 an export failed or is outside its parity bound; 2 wrong options, or
# no GPU (TensorRT) although --require gpu (--require tensorrt) was given.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$root/bench/gpu.py" "$@"
