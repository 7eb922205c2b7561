// Linked into both libraries, so that the package refuses one of another build.
#include "ulr/api.h"

#define ULR_TEXT_OF(tokens) #tokens
#define ULR_TEXT(macro) ULR_TEXT_OF(macro)
#define ULR_EXPORT extern "C" __attribute__((visibility("default")))

ULR_EXPORT int ulr_abi_version(void) { return ULR_ABI_VERSION; }

// The package's version; setup.py defines ULR_VERSION.
ULR_EXPORT const char* ulr_version(void) { return ULR_TEXT(ULR_VERSION); }
