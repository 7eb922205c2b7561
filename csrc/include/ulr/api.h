// The C ABI of both native libraries: plain structs of pointers, sizes and strides, an error code back.
// They are independent of torch and Python. Strides count elements. The caller checks all arguments.
#pragma once

#include <stdint.h>

#define ULR_ABI_VERSION 3

#ifdef __cplusplus
extern "C" {
#endif

enum { ULR_F32 = 0, ULR_BF16 = 1, ULR_F16 = 2, ULR_I64 = 3, ULR_U8 = 4 };
enum { ULR_NORMAL = 0, ULR_LAPLACE = 1, ULR_RADEMACHER = 2 };
// Every launcher of both libraries has this one signature, so a new op needs no new binding:
//     int ulr_cpu_<name>(const ulr_noise_spec*, const ulr_tensor*, const ulr_launch*)
//     int ulr_cuda_<name>(...)
// The order of the tensors is given by an enum beside each launcher. The noise may be NULL where an op has none.
typedef struct {
    int32_t threads;         // CPU: the number of threads to use
    int32_t device;          // CUDA: the ordinal
    void* stream;            // CUDA: the caller's current stream
    int32_t tensors;         // the number of tensors
    const int64_t* numbers;  // the op's own integers (a stride, a padding), in the order of an enum beside the launcher
} ulr_launch;

enum { ULR_OK = 0, ULR_BAD_ARGUMENT = 1, ULR_OUT_OF_MEMORY = 2, ULR_LAUNCH_FAILED = 3 };

// A view of up to three axes [copies, rows, cols], or of four or five [copies, images, channels, height, width]; unused
// leading axes have size 1, and a view of up to three leaves the last two entries alone. `data` NULL: the argument is
// absent. A copy axis of size C with stride 0 means that the copies share the values.
enum { ULR_MATRIX_AXES = 3, ULR_IMAGE_AXES = 5 };
typedef struct {
    void* data;
    int32_t dtype;
    int64_t size[ULR_IMAGE_AXES];
    int64_t stride[ULR_IMAGE_AXES];
} ulr_tensor;

// A block of noise: its first element is (row_offset, col_offset), its first draw `draw`.
typedef struct {
    const int64_t* key;     // one key, in the memory of the device that runs the op
    const uint32_t* sobol;  // NULL: iid; else direction numbers [21201][30], shifted to fill 32 bits
    int32_t dist;           // ULR_NORMAL ...
    int32_t antithetic;     // copies come as two halves, the second negated
    int64_t draw, row_offset, col_offset;
    int64_t positions;  // rows per sample: of a Sobol dimension or a Hadamard slot, and of the loss weights
    int64_t width;      // all columns of the noise: the Sobol dimension is (row % positions) * width + col
    int32_t hadamard;   // of ULR_RADEMACHER: the draws' lower bits choose a Walsh function; else 0
} ulr_noise_spec;

#ifdef __cplusplus
}
#endif
