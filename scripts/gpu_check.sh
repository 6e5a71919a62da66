#!/usr/bin/env bash
# What only a GPU can show: builds the CUDA kernels in place, runs every test that needs a GPU, looks for wrong
# accesses with compute-sanitizer, and measures. Needs torch with CUDA, pytest, nvcc and a C++ compiler; Triton, if it
# is there, is checked, too; `quantize` and `serve` need all that llmquant's do. No network. Logs, JSON and summary.txt
# go into OUTDIR; exit code 1 if any step failed.
#
#     scripts/gpu_check.sh OUTDIR [--only kernels|solver|quantize|serve]
#
# What is not timed runs at once, and is over before anything is. PYTHON names the interpreter (python3).
set -euo pipefail

readonly PARTS="kernels solver quantize serve"

fail() {
    echo "error: $1" >&2
    exit 2
}

usage="usage: scripts/gpu_check.sh OUTDIR [--only ${PARTS// /|}]"
[[ $# -eq 1 || $# -eq 3 ]] || fail "$usage"
out=$1
parts=$PARTS
if [[ $# -eq 3 ]]; then
    [[ $2 == --only && " $PARTS " == *" $3 "* ]] || fail "$usage"
    parts=$3
fi

python=${PYTHON:-python3}
nvcc=$(command -v nvcc || true)
[[ -n $nvcc ]] || nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
[[ $python != */* || $python == /* ]] || python=$PWD/$python
command -v "$python" >/dev/null || fail "there is no $python; name an interpreter by PYTHON"
[[ -x $nvcc ]] || fail "there is no nvcc on the PATH or in CUDA_HOME; install the CUDA toolkit"
"$python" -c 'import pytest, torch' 2>/dev/null || fail "$python has no torch or no pytest; install both"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "torch sees no CUDA GPU on this machine"

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
status=0
checks=()
: >"$out/summary.txt"

# step NAME SECONDS COMMAND...: its output goes to NAME.log, its outcome into the summary.
step() {
    local name=$1 limit=$2 code=0 began=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    local outcome=ok
    [[ $code -eq 0 ]] || outcome="failed ($code), see $name.log"
    [[ $code -ne 124 ]] || outcome="stopped after $limit s, see $name.log"
    printf '%-12s %4d s  %s\n' "$name" "$((SECONDS - began))" "$outcome" | tee -a "$out/summary.txt"
    return "$code"
}

tests() {
    local name=$1
    shift
    step "$name" 300 "$python" -m pytest -q -rs -p no:cacheprovider "${workers[@]}" --junitxml="$out/$name.xml" "$@"
}

# The allocator's own blocks would hide what is read or written beyond a tensor.
sanitized() {
    local tool=$1
    (
        cd "$checked"
        PYTHONPATH=$checked:$PYTHONPATH PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 180 "$sanitizer" --tool "$tool" \
            --error-exitcode 3 "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_cuda_device.py \
            -k "not triton and (whole_numbers or around or (clusters and 4096))"
    )
}

# A model quantized twice has the same bytes, answers, and is measured.
quantized() {
    local run
    model=$(mktemp -d)
    trap 'rm -rf "$model"' EXIT
    step model 60 "$python" scripts/make_tiny.py "$model/original" --layers 3 || return
    for run in first second; do
        step "quantize-$run" 120 "$python" -m llmquant.cli quantize "$model/original" -o "$model/$run" --device cuda ||
            return
    done
    step same-bytes 20 cmp "$model/first/SHA256SUMS" "$model/second/SHA256SUMS" || return
    step generate 60 "$python" -m llmquant.cli generate "$model/first" -p Hello --device cuda --stats || return
    step eval 60 "$python" -m llmquant.cli eval "$model/first" --baseline "$model/original" --text-file README.md \
        --seq-len 128 --device cuda
}

# compile NAME DIRECTORY OPTION...: the library of the kernels, for this GPU.
compile() {
    local name=$1 directory=$2
    shift 2
    step "$name" 240 "$nvcc" -std=c++17 -O3 -gencode "arch=compute_$arch,code=sm_$arch" --threads 0 -cudart static \
        -shared -Xcompiler -fPIC,-fvisibility=hidden "$@" csrc/cuda/*.cu -o "$directory/llmquant_cuda.so"
}

workers=()
! "$python" -c 'import xdist' 2>/dev/null || workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")

# sm_90a is sm_90 with instructions of its own, which csrc/cuda uses.
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
[[ $arch != 90 ]] || arch=90a
sanitizer=$(command -v compute-sanitizer || true)
if [[ $parts == *kernels* && -n $sanitizer ]]; then
    # Kernels that compute-sanitizer understands, in a tree of their own (csrc/cuda/warpgroups.h).
    checked=$(mktemp -d)
    trap 'rm -rf "$checked"' EXIT
    cp -r llmquant tests scripts pyproject.toml "$checked"
    rm -f "$checked"/llmquant/_native/*.so
    compile build-checks "$checked/llmquant/_native" -DLLMQUANT_RACECHECK &
    checks+=("$!")
fi
compile build llmquant/_native || status=1
for process in "${checks[@]}"; do wait "$process" || status=1; done
checks=()
torch=$("$python" -c 'import importlib.util as util; print(util.find_spec("torch").submodule_search_locations[0])')
step binding 60 "${CXX:-c++}" -std=c++17 -O3 -shared -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000 \
    -isystem "$torch/include" csrc/torch/cuda_ops.cpp -Lllmquant/_native -l:llmquant_cuda.so "-L$torch/lib" -ltorch_cpu \
    "-Wl,-rpath,\$ORIGIN" -o llmquant/_native/llmquant_torch_cuda.so || status=1
step runtime 60 "$python" -c 'from llmquant.native import describe_gpu_backend; print(describe_gpu_backend())' || status=1

if [[ $parts == *kernels* ]]; then
    tests kernels tests/kernels/test_cuda_device.py tests/kernels/test_triton_linear.py \
        tests/kernels/test_slabs.py tests/runtime/test_cuda_model.py tests/evaluate/test_cuda_evaluation.py \
        tests/bench/test_gpu_bench.py &
    checks+=("$!")
    if [[ -n $sanitizer ]]; then
        sanitized memcheck &
        checks+=("$!")
        sanitized racecheck &
        checks+=("$!")
    else
        status=1
        echo "memcheck     not run: there is no compute-sanitizer on the PATH" | tee -a "$out/summary.txt"
    fi
fi
if [[ $parts == *solver* ]]; then
    tests solver tests/solve/test_gpu_columns.py tests/solve/test_triton_columns.py &
    checks+=("$!")
fi
if [[ $parts == *quantize* ]]; then
    quantized &
    checks+=("$!")
fi
if [[ $parts == *serve* ]]; then
    tests serve tests/server/test_cuda_serve.py &
    checks+=("$!")
fi
for process in "${checks[@]}"; do wait "$process" || status=1; done
if [[ $parts == *kernels* ]]; then
    shapes=8192x28672,8192x8192,4096x14336,14336x4096
    step bench 240 "$python" scripts/bench_kernels.py "$out/kernels.json" --device cuda --shapes "$shapes" \
        --tokens 1,2,4,8,16,32,64,128,256,512,1024,4096 || status=1
    # What the table does not choose, beside what it does.
    step bench-paths 120 "$python" scripts/bench_kernels.py "$out/paths.json" --device cuda --shapes "$shapes" \
        --tokens 512,1024,4096 --paths --backends 'llmquant wgmma,llmquant pairs,llmquant boxes,cuBLAS' || status=1
fi
if [[ $parts == *solver* ]]; then
    step bench-solve 180 "$python" scripts/bench_solve.py --device cuda --json "$out/solve.json" || status=1
fi

[[ ! -f $out/bench.log ]] || cat "$out/bench.log"
[[ ! -f $out/bench-paths.log ]] || cat "$out/bench-paths.log"
[[ ! -f $out/bench-solve.log ]] || cat "$out/bench-solve.log"
cat "$out/summary.txt"
exit "$status"
