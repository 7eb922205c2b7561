// Error codes to text.
#include "launch.cuh"

namespace {
thread_local cudaError_t last_error = cudaSuccess;
}

void ulr::remember_error(cudaError_t error) { last_error = error; }

extern "C" const char* ulr_cuda_error(int code) {
    switch (code) {
        case ULR_OK:
            return "no error";
        case ULR_BAD_ARGUMENT:
            return "an argument has a dtype, a distribution or a size that this kernel does not take";
        default:
            return cudaGetErrorString(last_error);
    }
}
