// SPDX-License-Identifier: Apache-2.0
#include "tenp/tensor.h"

namespace tenp {

const char* dtype_name(DType dtype) noexcept {
    switch (dtype) {
        case DType::kFloat32: return "float32";
        case DType::kFloat16: return "float16";
        case DType::kBFloat16: return "bfloat16";
        case DType::kFloat64: return "float64";
        case DType::kInt32: return "int32";
        case DType::kInt64: return "int64";
        case DType::kInt8: return "int8";
        case DType::kUInt8: return "uint8";
    }
    return "unknown";
}

std::size_t dtype_size(DType dtype) noexcept {
    switch (dtype) {
        case DType::kFloat32:
        case DType::kInt32: return 4;
        case DType::kFloat16:
        case DType::kBFloat16: return 2;
        case DType::kFloat64:
        case DType::kInt64: return 8;
        case DType::kInt8:
        case DType::kUInt8: return 1;
    }
    return 1;
}

const char* device_name(Device device) noexcept {
    return device == Device::kCuda ? "cuda" : "cpu";
}

}  // namespace tenp
