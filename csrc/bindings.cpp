// _C: calls a launcher of either library (ulr/api.h) through its address, without the GIL. Python opens the libraries
// and finds the addresses, so this module works without either of them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "ulr/api.h"

namespace py = pybind11;

namespace {

using Launcher = int (*)(const ulr_noise_spec*, const ulr_tensor*, const ulr_launch*);

template <typename T>
T* pointer(py::handle address) {
    return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

// (data, dtype, sizes, strides), or None for an argument that is absent. Missing leading axes have size 1.
ulr_tensor tensor_of(py::handle object) {
    ulr_tensor result{nullptr, 0, {1, 1, 1, 1, 1}, {0, 0, 0, 0, 0}};
    if (object.is_none()) return result;
    const auto fields = py::reinterpret_borrow<py::tuple>(object);
    result.data = pointer<void>(fields[0]);
    result.dtype = fields[1].cast<int32_t>();
    const py::tuple sizes = fields[2], strides = fields[3];
    if (sizes.size() > ULR_IMAGE_AXES) throw std::invalid_argument("a tensor has at most five axes here");
    const size_t lead = (sizes.size() > ULR_MATRIX_AXES ? ULR_IMAGE_AXES : ULR_MATRIX_AXES) - sizes.size();
    for (size_t axis = 0; axis < sizes.size(); ++axis) {
        result.size[lead + axis] = sizes[axis].cast<int64_t>();
        result.stride[lead + axis] = strides[axis].cast<int64_t>();
    }
    return result;
}

// (key, sobol, dist, antithetic, draw, row_offset, col_offset, positions, width, hadamard), or None.
ulr_noise_spec noise_of(const py::tuple& fields) {
    return ulr_noise_spec{pointer<const int64_t>(fields[0]), pointer<const uint32_t>(fields[1]),
                          fields[2].cast<int32_t>(),         fields[3].cast<int32_t>(),
                          fields[4].cast<int64_t>(),         fields[5].cast<int64_t>(),
                          fields[6].cast<int64_t>(),         fields[7].cast<int64_t>(),
                          fields[8].cast<int64_t>(),         fields[9].cast<int32_t>()};
}

int launch(uintptr_t address, py::object noise, py::tuple tensors, const std::vector<int64_t>& numbers, int threads,
           int device, uintptr_t stream) {
    std::vector<ulr_tensor> views;
    views.reserve(tensors.size());
    for (py::handle tensor : tensors) views.push_back(tensor_of(tensor));
    ulr_noise_spec spec{};
    if (!noise.is_none()) spec = noise_of(py::reinterpret_borrow<py::tuple>(noise));
    const ulr_launch where{threads, device, reinterpret_cast<void*>(stream), static_cast<int32_t>(views.size()),
                           numbers.data()};
    const py::gil_scoped_release unlocked;
    return reinterpret_cast<Launcher>(address)(noise.is_none() ? nullptr : &spec, views.data(), &where);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.attr("ABI_VERSION") = ULR_ABI_VERSION;
    module.def("launch", &launch, py::arg("address"), py::arg("noise"), py::arg("tensors"),
               py::arg("numbers") = std::vector<int64_t>(), py::arg("threads") = 1, py::arg("device") = 0,
               py::arg("stream") = 0);
}
