#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, in one call of at most nine minutes: is every kernel right there,
# and clean, and how fast is it beside its peers?
#
#     bench/device.sh [OUTPUT [PART …]]        OUTPUT is $OUT or device/ by default
#
# Parts: kernels graph sanitizer races attention dispatch gate, and tune, which must be named. All of
# them want more than nine minutes (MINUTES is the limit): "kernels graph sanitizer" are one call,
# "races" with PEERS another, then "dispatch attention", while build/peers is still there, "gate", and
# "tune". PEERS names a folder with the source distributions of mamba-ssm and causal-conv1d
# (bench/peers.py), which are built while other parts run, and waited for before anything is timed.
# BASE names the revision, or the folder, that the gate compares with; where git does not reach,
# TOSSUP_COMMIT says in records what was measured.
# OUTPUT gets device.tgz with all logs and JSON, and summary.json, which says how each part ended: one
# that found no time is for another call.
# Needs torch with CUDA, and the packages of setup.py's dev extra.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT=$(realpath -m "${1:-${OUT:-device}}")
PARTS=${*:2}
: "${PARTS:=kernels graph sanitizer races attention dispatch gate}"
DEADLINE=$((SECONDS + ${MINUTES:-9} * 60))
LOGS=$PWD/build/device PEERS_BUILT=$PWD/build/peers
rm -rf "$LOGS"
mkdir -p "$OUTPUT" "$LOGS" "$PEERS_BUILT"
export PYTHONPATH="$PWD:$PEERS_BUILT${PYTHONPATH:+:$PYTHONPATH}"
ENDED=()

pack() { # after each part, as the machine may go before the last
	printf '{\n%s\n}\n' "$(IFS=$'\n'; sed 's/$/,/; $s/,$//' <<<"${ENDED[*]}")" >"$LOGS/summary.json"
	cp "$LOGS/summary.json" "$OUTPUT/.summary.json" && mv "$OUTPUT/.summary.json" "$OUTPUT/summary.json"
	# 1: a log grew meanwhile
	{ tar czf "$OUTPUT/.device.tgz" -C "$LOGS" . || [ $? = 1 ]; } && mv "$OUTPUT/.device.tgz" "$OUTPUT/device.tgz"
}

run() { # run NAME SECONDS COMMAND …: its output goes to NAME.log, and its end to the screen
	local name=$1 seconds=$2 start=$SECONDS left=$((DEADLINE - SECONDS)) code
	shift 2
	[ "$left" -lt "$seconds" ] && seconds=$left
	if [ "$seconds" -le 0 ]; then
		ENDED+=("\"$name\": \"no time was left\"")
		return
	fi
	echo "== $name (at most $seconds s)"
	# interrupted, pytest still says what failed, and the gate takes its worktree away
	timeout --signal=INT --kill-after 15 "$seconds" "$@" >"$LOGS/$name.log" 2>&1
	code=$?
	case $code in
	0) ENDED+=("\"$name\": \"passed in $((SECONDS - start)) s\"") ;;
	124 | 137) ENDED+=("\"$name\": \"stopped after $seconds s\"") ;;
	*) ENDED+=("\"$name\": \"failed with $code after $((SECONDS - start)) s\"") ;;
	esac
	tail -n 15 "$LOGS/$name.log"
	pack
}

alone() { # alone SECONDS: peers are built, or given up that long before the end
	[ -n "$BUILD" ] || return
	local left=$((DEADLINE - SECONDS - $1))
	timeout $((left > 1 ? left : 1)) tail --pid="$BUILD" -f /dev/null || kill "$BUILD"
	tail -n 3 "$LOGS/peers.log"
	BUILD=
}

python3 - <<'PYTHON' | tee "$LOGS/machine.txt"
import shutil, sysconfig
from importlib import import_module
from pathlib import Path

import torch, triton

if not torch.cuda.is_available():
    raise SystemExit("torch sees no GPU")
# Imported, as a package may lack what it needs itself, and our own last
needed = "numpy numba pydantic yaml safetensors tqdm pytest xdist hypothesis einops transformers"
broken = []
for name in [*needed.split(), "tests.oracles", "tossup.supernet.cli", "tossup.supernet.train"]:
    try:
        import_module(name)
    except Exception as error:
        broken.append(f"{name} ({error})")
if broken:
    raise SystemExit(f"these cannot be imported: {', '.join(broken)}")
import numba
numba.njit(lambda x: x + 1)(1)  # what is too old for numpy fails here
if not shutil.which("gcc") and not shutil.which("clang"):
    raise SystemExit("Triton needs gcc or clang, for the launcher of each kernel")
if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
    raise SystemExit("Triton needs Python.h (python3-dev), for the launcher of each kernel")
capability = "".join(map(str, torch.cuda.get_device_capability()))
print(f"{torch.cuda.get_device_name()}, sm_{capability}, torch {torch.__version__}, triton {triton.__version__}")
PYTHON
[ "${PIPESTATUS[0]}" = 0 ] || exit 1
nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu --format=csv |
	tee -a "$LOGS/machine.txt"

BUILD=
if [ -n "${PEERS:-}" ]; then
	MAX_JOBS=${MAX_JOBS:-$(nproc)} timeout 480 python3 -m bench.peers "$PEERS" "$PEERS_BUILT" >"$LOGS/peers.log" 2>&1 &
	BUILD=$!
fi

for part in $PARTS; do
	case $part in
	# Tests of Triton put their tensors on the GPU, where there is one. Most of the time
	# is compilation, which processes share out. The tests without Triton run anywhere else.
	kernels) run kernels 330 python3 -m pytest -q -n 12 --dist worksteal --durations 20 -k triton tests/kernels ;;
	# A captured step, and that nothing in one waits for the device
	graph) run graph 150 python3 -m pytest -q tests/supernet/test_graphed_step.py tests/supernet/test_no_host_reads.py ;;
	races)
		alone 300
		# shellcheck disable=SC2046
		run races 330 python3 -m bench.record --device cuda --seconds 0.3 --limit 80 --output "$LOGS/results" \
			--op $(python3 -c 'from tossup.autotune.workloads import OPS; print(*list(OPS)[1:])')
		;;
	attention) # OPS' first, by itself, as FlexAttention is compiled for each shape
		alone 280
		left=$((DEADLINE - SECONDS < 280 ? DEADLINE - SECONDS : 280))
		if [ "$left" -gt 15 ]; then
			run attention "$left" python3 -m bench.record --device cuda --seconds 0.3 --limit $((left - 15)) --output "$LOGS/results" --op attention
		else
			ENDED+=('"attention": "no time was left"')
		fi
		;;
	dispatch)
		alone 250
		# mamba-ssm looks for causal-conv1d's Python too, which elsewhere would stand in our package's way
		export PYTHONPATH="$(echo "$PEERS_BUILT"/sources/causal_conv1d-*):$PYTHONPATH"
		run dispatch 150 python3 -m bench.dispatch --output "$LOGS/dispatch.json"
		run dispatch-samples 100 python3 -m bench.dispatch --per-sample --output "$LOGS/dispatch-samples.json"
		PYTHONPATH=${PYTHONPATH#*:}
		;;
	sanitizer)
		run sanitizer-none 60 python3 bench/sanitize.py # compiles, outside the tools
		# Out of the caching allocator, so that what lies behind a tensor is not another one
		for tool in memcheck racecheck initcheck; do
			PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool" 90 \
				compute-sanitizer --tool "$tool" --error-exitcode 1 python3 bench/sanitize.py
		done
		;;
	gate)
		if [ -n "${BASE:-}" ]; then
			alone 200
			run gate 200 python3 -m bench.gate --base "$BASE" --device cuda --rounds 3
		else
			ENDED+=('"gate": "no BASE was named"')
		fi
		;;
	tune) # killed, it goes on from build/configs.json, if that is still there; it is for kernels/configs/
		run tune 500 python3 -m tossup.supernet tune --output build/configs.json
		cp build/configs.json "$LOGS" && pack
		;;
	*) ENDED+=("\"$part\": \"is no part\"") ;;
	esac
done

[ -n "$BUILD" ] && kill "$BUILD" 2>/dev/null
pack
cat "$OUTPUT/summary.json"
! grep -qE 'failed|stopped|no part|no time|no BASE' "$OUTPUT/summary.json"
