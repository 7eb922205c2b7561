// Picks the instruction set: the best of this machine, or the one that a test sets.
#include "dispatch.h"

#include <string.h>

#include <atomic>
#include <vector>

namespace {

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#define ULR_CPU_ISAS(X) X(avx512, has_avx512()) X(avx2, has_avx2()) X(portable, true)
#elif defined(__aarch64__)
#define ULR_CPU_ISAS(X) X(neon, true) X(portable, true)
#else
#define ULR_CPU_ISAS(X) X(portable, true)
#endif

using Launcher = int(const ulr_noise_spec*, const ulr_tensor*, const ulr_launch*);

}  // namespace

#define ULR_DECLARE(set, name) Launcher name;
#define ULR_DECLARE_SET(set, available) \
    namespace ulr::set {                \
    ULR_CPU_LAUNCHERS(ULR_DECLARE, set) \
    }
ULR_CPU_ISAS(ULR_DECLARE_SET)

namespace {

#define ULR_MEMBER(set, name) Launcher* name;
struct InstructionSet {
    const char* name_of_set;
    bool available;
    ULR_CPU_LAUNCHERS(ULR_MEMBER, )
};

// The best first; the last one is always available.
#define ULR_ADDRESS(set, name) &ulr::set::name,
#define ULR_ENTRY(set, available) {#set, available, ULR_CPU_LAUNCHERS(ULR_ADDRESS, set)},
const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> sets{ULR_CPU_ISAS(ULR_ENTRY)};
    return sets;
}

const InstructionSet* best() {
    const InstructionSet* set = instruction_sets().data();
    while (!set->available) ++set;
    return set;
}

std::atomic<const InstructionSet*> active{nullptr};

const InstructionSet& current() {
    const InstructionSet* set = active.load(std::memory_order_acquire);
    if (!set) active.store(set = best(), std::memory_order_release);
    return *set;
}

}  // namespace

#define ULR_FORWARD(set, name)                                                                                      \
    ULR_EXPORT int ulr_cpu_##name(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) { \
        return current().name(spec, tensors, where);                                                                \
    }
ULR_CPU_LAUNCHERS(ULR_FORWARD, )

// The name of the instruction set in use.
ULR_EXPORT const char* ulr_cpu_isa(void) { return current().name_of_set; }

// Use another one from now on; NULL: the best. ULR_BAD_ARGUMENT: unknown here, or this machine lacks it.
ULR_EXPORT int ulr_cpu_set_isa(const char* name) {
    if (!name) {
        active.store(best());
        return ULR_OK;
    }
    for (const InstructionSet& set : instruction_sets()) {
        if (set.available && !strcmp(set.name_of_set, name)) {
            active.store(&set);
            return ULR_OK;
        }
    }
    return ULR_BAD_ARGUMENT;
}

// The i-th instruction set that this build has and this machine runs, the best first; NULL past the last.
ULR_EXPORT const char* ulr_cpu_available_isa(int i) {
    for (const InstructionSet& set : instruction_sets())
        if (set.available && i-- == 0) return set.name_of_set;
    return nullptr;
}
