// Linked into both libraries, so that the loader refuses one of another build.
#include "ulr/api.h"

extern "C" __attribute__((visibility("default"))) int ulr_abi_version(void) { return ULR_ABI_VERSION; }
