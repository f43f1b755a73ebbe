#!/usr/bin/env bash
# Runs a command as on a processor with AVX2 and nothing newer: bench/narrow.sh COMMAND [ARGUMENT ...]
# Where the processor can fault CPUID and a C compiler is there, everything is narrowed (see
# narrow_cpu.c). Elsewhere torch and oneDNN are, by their variables; onnxruntime and OpenVINO are not.
set -euo pipefail
test $# -gt 0 || { sed -n 2,4p "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2
if grep -qw cpuid_fault /proc/cpuinfo && command -v cc >/dev/null; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  cc -O1 -shared -fPIC -o "$folder/narrow_cpu.so" "$here/narrow_cpu.c" -ldl
  LD_PRELOAD="$folder/narrow_cpu.so" "$@"
else
  echo "narrow.sh: only torch and oneDNN are narrowed here" >&2
  "$@"
fi
