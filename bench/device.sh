#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, in one call of at most nine minutes: is every kernel right there,
# and clean, and how fast is it beside its peers?
#
#     bench/device.sh [OUTPUT [PART …]]        OUTPUT is device/ by default, all parts are run
#
# Parts: kernels graph races dispatch sanitizer gate; and tune, which is run where it is named. PEERS names a folder with the source
# distributions of mamba-ssm and causal-conv1d (bench/peers.py), which are built while tests run;
# BASE names the revision, or the folder, that the gate compares with (HEAD~1 by default). MINUTES is
# the limit of all. Where git does not reach, TOSSUP_COMMIT says in records what was measured.
# Each part has its own; logs and JSON go to OUTPUT, and summary.json says how each part ended: one
# that found no time is for another call.
# Needs torch with CUDA, and the packages of setup.py's dev extra that the tests import.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=$(realpath -m "${1:-device}")
PARTS=${*:2}
: "${PARTS:=kernels graph races dispatch sanitizer gate}"
DEADLINE=$((SECONDS + ${MINUTES:-9} * 60))
mkdir -p "$OUT"
ENDED=()

run() { # run NAME SECONDS COMMAND …: its output goes to NAME.log, and its end to the screen
	local name=$1 seconds=$2 start=$SECONDS left=$((DEADLINE - SECONDS)) code
	shift 2
	[ "$left" -lt "$seconds" ] && seconds=$left
	if [ "$seconds" -le 0 ]; then
		ENDED+=("\"$name\": \"no time was left\"")
		return
	fi
	echo "== $name (at most $seconds s)"
	timeout --kill-after 5 "$seconds" "$@" >"$OUT/$name.log" 2>&1
	code=$?
	case $code in
	0) ENDED+=("\"$name\": \"passed in $((SECONDS - start)) s\"") ;;
	124 | 137) ENDED+=("\"$name\": \"stopped after $seconds s\"") ;;
	*) ENDED+=("\"$name\": \"failed with $code after $((SECONDS - start)) s\"") ;;
	esac
	tail -n 15 "$OUT/$name.log"
}

python3 - <<'PYTHON' | tee "$OUT/machine.txt"
import torch, triton

if not torch.cuda.is_available():
    raise SystemExit("torch sees no GPU")
capability = "".join(map(str, torch.cuda.get_device_capability()))
print(f"{torch.cuda.get_device_name()}, sm_{capability}, torch {torch.__version__}, triton {triton.__version__}")
PYTHON
[ "${PIPESTATUS[0]}" = 0 ] || exit 1
nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu --format=csv |
	tee -a "$OUT/machine.txt"

BUILD=
if [ -n "${PEERS:-}" ]; then
	timeout 480 python3 -m bench.peers "$PEERS" "$OUT/peers" >"$OUT/peers.log" 2>&1 &
	BUILD=$!
	export PYTHONPATH="$OUT/peers${PYTHONPATH:+:$PYTHONPATH}"
fi

for part in $PARTS; do
	case $part in
	# Tests of Triton put their tensors on the GPU; the others run on the CPU.
	kernels) run kernels 180 python3 -m pytest -q --durations 20 tests/kernels ;;
	# A captured step, and that nothing in one waits for the device
	graph) run graph 60 python3 -m pytest -q tests/supernet/test_graphed_step.py tests/supernet/test_no_host_reads.py ;;
	races)
		if [ -n "$BUILD" ]; then # nothing else may run beside a race
			timeout 120 tail --pid="$BUILD" -f /dev/null || kill "$BUILD"
			tail -n 3 "$OUT/peers.log"
		fi
		run races 270 python3 -m bench.record --device cuda --seconds 0.3 --limit 120 --output "$OUT/results"
		;;
	dispatch)
		run dispatch 60 python3 bench/dispatch.py --output "$OUT/dispatch.json"
		run dispatch-samples 60 python3 bench/dispatch.py --per-sample --output "$OUT/dispatch-samples.json"
		;;
	# Killed, it goes on where it was: OUTPUT/configs.json goes to kernels/configs/<gpu>.json
	tune) run tune 500 python3 -m tossup.supernet tune --output "$OUT/configs.json" ;;
	sanitizer)
		for tool in memcheck racecheck initcheck; do
			run "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 bench/sanitize.py
		done
		;;
	gate) run gate 90 python3 -m bench.gate --base "${BASE:-HEAD~1}" --device cuda --rounds 3 ;;
	*) ENDED+=("\"$part\": \"is no part\"") ;;
	esac
done

[ -n "$BUILD" ] && kill "$BUILD" 2>/dev/null
printf '{\n%s\n}\n' "$(IFS=$'\n'; sed 's/$/,/; $s/,$//' <<<"${ENDED[*]}")" >"$OUT/summary.json.part"
mv "$OUT/summary.json.part" "$OUT/summary.json"
cat "$OUT/summary.json"
! grep -qE 'failed|stopped|no part|no time' "$OUT/summary.json"
