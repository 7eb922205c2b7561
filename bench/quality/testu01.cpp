// TestU01 over the words of the noise contract, taken along one coordinate while the others stay at 0.
// L'Ecuyer, Simard: TestU01: A C library for empirical testing of random number generators. ACM TOMS 33 (2007).
//
//     testu01 small|crush col|row|draw|key|weak [TEST]
//
// With a TEST's number, that test alone, ten times over successive parts of the stream: what to do with a suspect
// value.
//
// Coordinates end at 2^32 (columns at 2^34). A battery that wants more words goes on with the next row, or the next
// draw for rows. `weak` is no stream of ours: a Weyl sequence, which must fail, so that a pass says something.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include <testu01/bbattery.h>
#include <testu01/swrite.h>
#include <testu01/unif01.h>
}

#include "ulr/philox.h"

namespace {

constexpr int64_t kKey = 0x243F6A8885A308D3;  // digits of pi: any key would do, and this one was not chosen by result
constexpr int kRepeats = 10, kTests = 96;     // Crush has 96 tests, SmallCrush 10
constexpr double kFailure = 1e-10;            // beyond chance for the few hundred statistics of all runs together
const ulr::KeySchedule kSchedule(kKey);

uint64_t position = 0;

uint32_t along_col() {
    static ulr::Words words;
    if (position % 4 == 0) {
        const uint64_t group = position / 4;
        words =
            ulr::philox4x32({{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0u, 0u}}, kSchedule);
    }
    return words.w[position++ % 4];
}

uint32_t along_row() {
    const uint64_t i = position++;
    return ulr::philox4x32({{0u, static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), 0u}}, kSchedule).w[0];
}

uint32_t along_draw() {
    const uint64_t i = position++;
    return ulr::philox4x32({{0u, static_cast<uint32_t>(i >> 32), static_cast<uint32_t>(i), 0u}}, kSchedule).w[0];
}

uint32_t along_key() {
    const int64_t i = static_cast<int64_t>(position++);
    return ulr::philox4x32({{0u, 0u, 0u, 0u}}, ulr::KeySchedule(i)).w[0];
}

uint32_t weak() { return static_cast<uint32_t>(position++) * 0x9E3779B9u; }

struct Stream {
    const char* name;
    uint32_t (*next)();
};
constexpr Stream kStreams[] = {
    {"col", along_col}, {"row", along_row}, {"draw", along_draw}, {"key", along_key}, {"weak", weak}};

bool run(const char* battery, unif01_Gen* generator, int test) {
    const bool small = !strcmp(battery, "small");
    if (!small && strcmp(battery, "crush")) return false;
    if (test) {
        int repeats[1 + kTests] = {};
        repeats[test] = kRepeats;
        swrite_Basic = TRUE;  // the summary would not show the values within bounds
        small ? bbattery_RepeatSmallCrush(generator, repeats) : bbattery_RepeatCrush(generator, repeats);
    } else {
        swrite_Basic = FALSE;  // the summary holds every statistic out of bounds
        small ? bbattery_SmallCrush(generator) : bbattery_Crush(generator);
    }
    return true;
}

int report(const char* battery, const char* stream) {
    int suspect = 0, failed = 0;
    for (int i = 0; i < bbattery_NTests; ++i) {
        const double p = bbattery_pVal[i];
        if (p < 0) continue;  // TestU01's mark for a statistic that was not computed
        suspect += p < 1e-3 || p > 1 - 1e-3;
        failed += p < kFailure || p > 1 - kFailure;
    }
    printf("\nulr: %s over %s: %d statistics, %d outside [0.001, 0.999] (%.1f expected), %d failed; %llu words\n",
           battery, stream, bbattery_NTests, suspect, 2e-3 * bbattery_NTests, failed,
           static_cast<unsigned long long>(position));
    return failed ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
    const int test = argc == 4 ? atoi(argv[3]) : 0;
    if (argc == 3 || (argc == 4 && test > 0 && test <= kTests))
        for (const Stream& stream : kStreams) {
            if (strcmp(argv[2], stream.name)) continue;
            char name[64];
            snprintf(name, sizeof name, "ulr noise words along %s", stream.name);
            unif01_Gen* generator = unif01_CreateExternGenBits(name, stream.next);
            if (!run(argv[1], generator, test)) break;
            const int code = report(argv[1], stream.name);
            unif01_DeleteExternGenBits(generator);
            return code;
        }
    fprintf(stderr, "usage: testu01 small|crush col|row|draw|key|weak [TEST]\n");
    return 2;
}
