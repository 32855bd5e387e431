#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, in one call: is every kernel right there, and clean?
# The tests, of which those of a captured step run only here, then compute-sanitizer over every
# kernel; logs go to the folder given, or to device/.
# Needs torch with CUDA, and the packages of setup.py's dev extra that the tests import.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LOGS=${1:-device}
mkdir -p "$LOGS"
FAILED=()

run() { # run NAME SECONDS COMMAND …: its output goes to NAME.log, and its end to the screen
	local name=$1 seconds=$2
	shift 2
	echo "== $name"
	timeout "$seconds" "$@" >"$LOGS/$name.log" 2>&1 || FAILED+=("$name")
	tail -n 15 "$LOGS/$name.log"
}

python3 - <<'PYTHON' | tee "$LOGS/machine.txt"
import torch, triton

if not torch.cuda.is_available():
    raise SystemExit("torch sees no GPU")
capability = "".join(map(str, torch.cuda.get_device_capability()))
print(f"{torch.cuda.get_device_name()}, sm_{capability}, torch {torch.__version__}, triton {triton.__version__}")
PYTHON
[ "${PIPESTATUS[0]}" = 0 ] || exit 1

# Tests of Triton put their tensors on the GPU; the others run on the CPU.
run kernels 400 python3 -m pytest -q --durations 20 tests/kernels
run graph 120 python3 -m pytest -q tests/supernet/test_graphed_step.py
run dispatch 240 python3 bench/dispatch.py --output "$LOGS/dispatch.json"
for tool in memcheck racecheck initcheck; do
	run "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 bench/sanitize.py
done

if [ ${#FAILED[@]} -gt 0 ]; then
	echo "failed: ${FAILED[*]}"
	exit 1
fi
