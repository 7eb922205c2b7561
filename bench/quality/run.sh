#!/usr/bin/env bash
# TestU01 over the words of the noise contract: bench/quality/run.sh [small|crush] [stream...]
# Streams: col row draw key (the default: all four), and weak, a generator that must fail. col:73 repeats test 73 alone,
# ten times over successive parts of the stream: what to do with a suspect value.
# Needs TestU01 (Debian and Ubuntu: libtestu01-0-dev, in non-free). SmallCrush takes ten seconds a stream, Crush
# half an hour. Logs go to bench/quality/results/<battery>-<stream>.log.
set -euo pipefail
cd "$(dirname "$0")/../.."

battery=${1:-small}
shift || true
streams=("$@")
[ ${#streams[@]} -gt 0 ] || streams=(col row draw key)
results=bench/quality/results
program=build/quality/testu01

if [ ! -e /usr/include/testu01/bbattery.h ]; then
    echo "bench/quality/run.sh: TestU01 not found: install libtestu01-0-dev" >&2
    exit 2
fi
mkdir -p build/quality "$results"
${CXX:-g++} -O3 -std=c++17 -Wall -Wextra -march=native -I csrc/include bench/quality/testu01.cpp \
    -ltestu01 -ltestu01probdist -ltestu01mylib -lm -o "$program"

status=0
for stream in "${streams[@]}"; do
    log="$results/$battery-${stream/:/-}.log"
    {
        echo "# $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)," \
            "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1), $(${CXX:-g++} --version | head -1)"
        # shellcheck disable=SC2086  # a stream and the number of a test are two words
        "$program" "$battery" ${stream/:/ } && code=0 || code=$?
    } >"$log.part"
    mv "$log.part" "$log"
    tail -1 "$log"
    [ "$code" -eq 0 ] || status=1
done
exit $status
