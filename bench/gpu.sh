#!/usr/bin/env bash
# Everything that needs a GPU: bench/gpu.sh OUTDIR [first | second | STAGE...]
#
# Stages: build    the kernels, for the GPU that is here alone
#         samples  every kernel once, over the samples of every op, beside the torch back end
#         table    the rows of README's table, with their floors
#         rest     the other rows
#         tests    the test suite's part for a GPU
#         memcheck, racecheck (compute-sanitizer), tiles (a search for better ones)
# For a machine that is lent for minutes: `first` is build, samples and table in 8 minutes at most, `second` is rest,
# tests and memcheck in 4, on the same or another machine. Without a list all stages run, in the order above.
# A stage that fails or runs out of its time does not stop the next; what it had written stays. Nothing is downloaded:
# needs python3 with torch for CUDA, triton, pytest, pybind11, setuptools and ninja, and nvcc.
# Each result file begins with the device, the driver, the versions and the commit. Where the sources come without
# their repository, ULR_COMMIT names the commit.
# Results: build.txt samples.txt samples.json tests.txt memcheck.txt racecheck.txt tiles.json, and of rows
# {table,rest}/gpu.{json,csv,txt}
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "usage: bench/gpu.sh OUTDIR [first|second|build|samples|table|rest|tests|memcheck|racecheck|tiles ...]" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2
stages=("$@")
end=$((SECONDS + 3600)) # of all stages
case "$*" in
'') stages=(build samples table rest tests memcheck racecheck tiles) ;;
first) stages=(build samples table) end=$((SECONDS + 480)) ;;
second) stages=(rest tests memcheck) end=$((SECONDS + 240)) ;;
esac
for name in "${stages[@]}"; do
    case $name in
    build | samples | table | rest | tests | memcheck | racecheck | tiles) ;;
    *)
        echo "bench/gpu.sh: unknown stage '$name': build samples table rest tests memcheck racecheck tiles" >&2
        exit 2
        ;;
    esac
done

PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

# stage NAME SECONDS FILE COMMAND...: runs a command under a time limit, that of all stages included; its output goes to
# the screen, and after the facts to FILE. Its exit code is the command's.
stage() {
    local name=$1 seconds=$2 file=$3 start=$SECONDS code
    shift 3
    seconds=$((end - SECONDS - 20 < seconds ? end - SECONDS - 20 : seconds)) # 20: until it is killed
    if [ "$seconds" -lt 10 ]; then
        echo "== $name: no time is left" | tee -a "$out/$file"
        failed+=("$name")
        return 1
    fi
    echo "== $name (at most $seconds s)"
    {
        $PYTHON -m bench.gpu_bench facts 2>&1 | tail -1
        echo "\$ $*"
    } >"$out/$file"
    timeout --signal=INT --kill-after=20 "$seconds" "$@" 2>&1 | tee -a "$out/$file" | tail -40 # INT: pytest reports
    code=${PIPESTATUS[0]}
    echo "== $name: exit code $code after $((SECONDS - start)) s" | tee -a "$out/$file"
    [ "$code" -eq 0 ] || failed+=("$name")
    return "$code"
}

build() {
    local capability
    capability=$($PYTHON -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    [ "$capability" = 9.0 ] && capability=9.0a
    ULR_BUILD=cpp,cuda TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} \
        stage build 240 build.txt $PYTHON setup.py build_ext --inplace
}

processes=$(($(nproc) < 16 ? $(nproc) : 16)) # kernels compile on the host

samples() {
    stage samples 180 samples.txt $PYTHON -m bench.gpu_bench samples --check --workers "$processes" --out "$out"
}

tests() {
    local workers=() pair
    $PYTHON -c 'import xdist' 2>/dev/null && workers=(-n "$processes")
    : >"$out/tests.txt"
    for pair in cuda/cuda triton/cuda; do
        # A module of tests whose packages are absent is an error of its own; a test that hangs shows where it is.
        stage "tests of $pair" 270 tests.part $PYTHON -m pytest python_tests -q -p no:cacheprovider \
            --require "$pair" -k "$pair" --continue-on-collection-errors -o faulthandler_timeout=60 \
            --durations=10 "${workers[@]}"
        cat "$out/tests.part" >>"$out/tests.txt"
    done
    rm -f "$out/tests.part"
}

table() { rows table 240; }
rest() { rows rest 560; }

# rows WHICH SECONDS
rows() {
    # A row that ends its process (a lost device, a kernel that never ends) costs itself: a new one takes the rest.
    local which=$1 rows_end=$((SECONDS + $2)) code=75 go_on=()
    mkdir -p "$out/$which"
    : >"$out/rows.log"
    while [ "$code" -eq 75 ] && [ $((rows_end - SECONDS)) -gt 30 ]; do
        stage "$which" $((rows_end - SECONDS)) rows.part $PYTHON -m bench.gpu_bench rows --rows "$which" \
            --out "$out/$which" "${go_on[@]}"
        code=$?
        cat "$out/rows.part" >>"$out/rows.log"
        go_on=(--go-on)
    done
    # The table repeats what the log shows; keep what the log alone knows.
    grep -E "cannot run|must go on|failed rows|exit code|Error" "$out/rows.log" >>"$out/$which/gpu.txt" || true
    rm -f "$out/rows.log" "$out/rows.part" "$out/$which/gpu.part"
}

memcheck() {
    # Errors of calls are the launchers' own to report; other libraries make calls that may fail.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage memcheck 240 memcheck.txt \
        compute-sanitizer --tool memcheck --error-exitcode 1 --print-limit 20 --report-api-errors no \
        $PYTHON -m bench.gpu_bench samples --backends cuda
}

racecheck() {
    stage racecheck 240 racecheck.txt \
        compute-sanitizer --tool racecheck --error-exitcode 1 --print-limit 20 \
        $PYTHON -m bench.gpu_bench samples --backends cuda
}

tiles() {
    stage tiles 240 tiles.log $PYTHON -m bench.gpu_bench tiles --seconds 180 --out "$out"
    rm -f "$out/tiles.log"
}

for name in "${stages[@]}"; do
    "$name"
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed: ${failed[*]}"
    exit 1
fi
