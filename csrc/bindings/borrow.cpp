// SPDX-License-Identifier: Apache-2.0
#include "bindings/borrow.h"

#include <cstddef>
#include <optional>

#include "bindings/dlpack.h"
#include "tenp/error.h"

namespace py = pybind11;

namespace tenp::bindings {
namespace {

std::optional<DType> dtype_of(const DLDataType& type) {
    const auto is = [&](DLDataTypeCode code, int bits) {
        return type.code == code && type.bits == bits && type.lanes == 1;
    };
    if (is(kDLFloat, 32)) return DType::kFloat32;
    if (is(kDLBfloat, 16)) return DType::kBFloat16;
    if (is(kDLFloat, 16)) return DType::kFloat16;
    if (is(kDLFloat, 64)) return DType::kFloat64;
    if (is(kDLInt, 32)) return DType::kInt32;
    if (is(kDLInt, 64)) return DType::kInt64;
    if (is(kDLInt, 8)) return DType::kInt8;
    if (is(kDLUInt, 8)) return DType::kUInt8;
    return std::nullopt;
}

std::optional<Device> device_of(const DLDevice& device) {
    switch (device.device_type) {
        case kDLCPU:
        case kDLCUDAHost: return Device::kCpu;
        case kDLCUDA:
        case kDLCUDAManaged: return Device::kCuda;
    }
    return std::nullopt;
}

}  // namespace

Borrowed::Borrowed(const std::string& op, const std::string& argument, const py::object& array) {
    const auto fail = [&](const std::string& expected, const std::string& actual) {
        throw InvalidArgument(op + ": " + argument + " must be " + expected + ", got " + actual);
    };
    if (array.is_none()) {
        return;
    }
    if (PyCapsule_CheckExact(array.ptr())) {
        capsule_ = array;
    } else if (py::hasattr(array, "__dlpack__")) {
        capsule_ = array.attr("__dlpack__")();
    } else {
        fail("an array with __dlpack__()", py::str(py::type::of(array).attr("__name__")));
    }
    if (!PyCapsule_IsValid(capsule_.ptr(), "dltensor")) {
        fail("a DLPack capsule named dltensor that nobody has consumed", "another capsule");
    }
    const DLTensor& tensor =
        static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"))->dl_tensor;

    const auto dtype = dtype_of(tensor.dtype);
    if (!dtype) {
        fail(
            "of a dtype that tenp knows", "DLPack type " + std::to_string(tensor.dtype.code) +
                                              " of " + std::to_string(tensor.dtype.bits) + " bits"
        );
    }
    const auto device = device_of(tensor.device);
    if (!device) {
        fail(
            "on a CPU or CUDA device", "DLPack device " + std::to_string(tensor.device.device_type)
        );
    }
    const auto rank = static_cast<std::size_t>(tensor.ndim);
    if (rank > view_.shape.size()) {
        fail(
            "of at most " + std::to_string(view_.shape.size()) + " dimensions", std::to_string(rank)
        );
    }
    view_.data =
        tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
    view_.dtype = *dtype;
    view_.device = *device;
    view_.device_index = *device == Device::kCuda ? tensor.device.device_id : 0;
    view_.rank = tensor.ndim;
    std::int64_t packed = 1;
    for (std::size_t axis = rank; axis-- > 0;) {
        view_.shape[axis] = tensor.shape[axis];
        // Where there is one row its stride means nothing, and some versions of torch make it 1;
        // kernels ask strides whether all rows are aligned.
        const bool is_given = tensor.strides != nullptr && tensor.shape[axis] != 1;
        view_.stride[axis] = is_given ? tensor.strides[axis] : packed;
        packed *= tensor.shape[axis];
    }
}

}  // namespace tenp::bindings
