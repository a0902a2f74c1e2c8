#!/usr/bin/env bash
# All that needs a GPU, in one go: the tests, then the tables into benchmarks/results/.
#
#     benchmarks/gpu.sh          Llama 3.2 1B and 3B shapes with random bf16 weights, about 20 minutes
#
# Takes the python on the PATH, with torch 2.11 or newer for CUDA, transformers and the package's
# `test` extra. Every part runs even if one before it failed; the exit status tells whether all went.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

failed=()
part() {
    echo "+ $*"
    "$@" || failed+=("$*")
}

python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
part python3 -m pytest tests/gpu
for shape in 1B 3B; do
    part python3 benchmarks/gpu.py "$shape" --save
    part python3 benchmarks/gpu_forms.py "$shape" --save
done
part python3 benchmarks/throughput.py 1B --dtype bfloat16 --device cuda --save

for command in "${failed[@]}"; do
    echo "failed: $command" >&2
done
[ "${#failed[@]}" -eq 0 ]
