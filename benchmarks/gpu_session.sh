#!/usr/bin/env bash
# All that a GPU should be asked in one short session, in order of worth. From the repository's root:
#
#     benchmarks/gpu_session.sh OUT [STAGES]
#
# Each stage has a time limit of its own, and all of them SESSION_SECONDS (480) together. OUT gets session.jsonl, one
# line for each stage as it ends and one for each kernel's figure as it is measured; divergence.json, linear.json and
# scores.json, written anew by those benchmarks after each of their parts; session.log, what the stages printed; and
# triton-cache.tar, what was compiled. What ran is so kept whenever the session is cut off, and a second session begins
# with the first one's OUT, so with its cache: compiling takes most of a cold one. STAGES is a file of lines
# "name|seconds|command" in place of those below. A stage that cannot run here, for want of a GPU, a tool or a package,
# is skipped, with a line that says why.
set -uo pipefail

out=${1:?usage: benchmarks/gpu_session.sh OUT [STAGES]}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
export OUT=$out PYTHON=${PYTHON:-.venv/bin/python} PYTHONUNBUFFERED=1
export RECORD=$out/session.jsonl TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/rmsd-triton-cache}
log=$out/session.log cache=$out/triton-cache.tar
seconds=${SESSION_SECONDS:-480} save_every=120
began=$SECONDS saved=$SECONDS

stages() {
    if [ -n "${1:-}" ]; then
        cat "$1"
        return
    fi
    local vocab=151936 tests="$PYTHON -m pytest -q -o addopts= -p no:cacheprovider --dist worksteal -n"
    echo "tests of a GPU|100|needs_gpu $tests 3 tests/test_gpu.py tests/test_gpu_models.py tests/test_split.py"
    echo "kernels|60|needs_gpu $PYTHON -m benchmarks.gpu_measure --repeats 7 --write \$RECORD"
    echo "five rows|20|needs_gpu $PYTHON -m benchmarks.gpu_measure --rows 5 --repeats 25 --write \$RECORD"
    echo "top-k against torch.topk and TRL|45|needs_gpu needs_package trl $PYTHON -m benchmarks.bench_divergence \
--rows 4096 --vocab $vocab --dtype bf16 --repeats 7 --write \$OUT"
    echo "hidden states against Liger and the bare products|45|needs_gpu needs_package liger_kernel \
$PYTHON -m benchmarks.bench_linear \
--rows 2048 --vocab $vocab --hidden 2560 --dtype bf16 --repeats 5 --json --write \$OUT"
    echo "kernel tests|150|needs_gpu $tests 12 -k triton tests/test_divergence.py tests/test_scores.py \
tests/test_selection.py tests/test_linear.py"
    echo "scores against TRL and torch.compile|45|needs_gpu needs_package trl $PYTHON -m benchmarks.bench_scores \
--rows 4096 --vocab $vocab --dtype bf16 --repeats 7 --write \$OUT"
    echo "workspace|30|needs_gpu $PYTHON -m benchmarks.gpu_workspace --write \$RECORD"
    echo "clusters and a second stream|45|needs_gpu $PYTHON -m benchmarks.gpu_options --write \$RECORD"
    echo "sanitizer|90|needs_gpu needs compute-sanitizer --error-exitcode 9 $PYTHON -m benchmarks.gpu_sanitize"
    echo "demo|90|needs_gpu $PYTHON -m rmsd train recipes/house_tool.yaml train.max_steps=5 \
output_dir=\$(mktemp -d)/run resume=false"
}

# These run what follows them, or end with 77, which is a stage that was skipped.
needs_gpu() {
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "skipped: no GPU"; return 77; }
    "$@"
}
needs() {
    command -v "$1" >/dev/null || { echo "skipped: no $1"; return 77; }
    "$@"
}
needs_package() { # by the name that is imported
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1" ||
        { echo "skipped: no $1 (pip install -e '.[bench]')"; return 77; }
    "${@:2}"
}
export -f needs_gpu needs needs_package

record() { # name, result, exit status, seconds
    printf '{"stage": "%s", "result": "%s", "status": %d, "seconds": %d}\n' "$@" >>"$RECORD"
}

save_cache() { # whole or not at all
    [ -d "$TRITON_CACHE_DIR" ] && tar -cf "$cache.part" -C "$TRITON_CACHE_DIR" . && mv "$cache.part" "$cache"
    saved=$SECONDS
}

mkdir -p "$TRITON_CACHE_DIR"
earlier=$(cat "$RECORD" 2>/dev/null | wc -l)
[ -f "$cache" ] && tar -xf "$cache" -C "$TRITON_CACHE_DIR"
card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)
printf '{"card": "%s", "commit": "%s"}\n' "${card:-none}" "$(git rev-parse --short HEAD 2>/dev/null)" >>"$RECORD"

while IFS='|' read -r name limit command <&3; do
    left=$((seconds - (SECONDS - began)))
    if [ "$left" -lt 5 ]; then
        record "$name" "no time left" 0 0
        continue
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    start=$SECONDS
    echo "==== $name: $limit s at most" | tee -a "$log"
    # KILL soon after TERM: a stage that hangs in the driver would otherwise take the others' time.
    timeout --kill-after=3 "$limit" bash -c "$command" >>"$log" 2>&1 3<&-
    status=$?
    case $status in
        0) result=passed ;;
        77) result=skipped ;;
        124 | 137) result="out of time" ;;
        *) result=failed ;;
    esac
    record "$name" "$result" "$status" $((SECONDS - start))
    echo "     $result after $((SECONDS - start)) s"
    [ $((SECONDS - saved)) -ge "$save_every" ] && save_cache
done 3< <(stages "${2:-}")
save_cache
! grep -q '"result": "failed"' <(tail -n "+$((earlier + 1))" "$RECORD")
