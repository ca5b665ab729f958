// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "tenp/export.h"

// Borrowed arrays. A view owns nothing: the caller keeps the memory alive until the call has
// finished (on a CUDA device: until the stream has passed it).

struct CUstream_st;

namespace tenp {

/// The same type as cudaStream_t, without the CUDA headers. Ignored on the CPU.
using Stream = ::CUstream_st*;

enum class DType : std::uint8_t {
    kFloat32,
    kFloat16,
    kBFloat16,
    kFloat64,
    kInt32,
    kInt64,
    kInt8,   ///< quantized weights
    kUInt8,  ///< bytes; workspaces only
};

enum class Device : std::uint8_t { kCpu, kCuda };

/// "float32", "bfloat16", ...
TENP_API const char* dtype_name(DType dtype) noexcept;

/// Bytes of one element.
TENP_API std::size_t dtype_size(DType dtype) noexcept;

/// "cpu" or "cuda".
TENP_API const char* device_name(Device device) noexcept;

/// A strided array of up to four dimensions. Strides are in elements.
struct TensorView {
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    Device device = Device::kCpu;
    std::int32_t rank = 0;
    std::array<std::int64_t, 4> shape{};
    std::array<std::int64_t, 4> stride{};
    std::int32_t device_index = 0;  ///< which CUDA device
};

/// A row-major view of `shape` at `data`.
inline TensorView contiguous_view(
    const void* data,
    DType dtype,
    std::initializer_list<std::int64_t> shape,
    Device device = Device::kCpu
) {
    TensorView view{const_cast<void*>(data), dtype, device, 0, {}, {}};
    for (const std::int64_t extent : shape) {
        view.shape.at(static_cast<std::size_t>(view.rank++)) = extent;
    }
    std::int64_t stride = 1;
    for (auto axis = static_cast<std::size_t>(view.rank); axis-- > 0;) {
        view.stride[axis] = stride;
        stride *= view.shape[axis];
    }
    return view;
}

/// The same for C++ element types; 16-bit floats have none, so they name their dtype.
template <class T>
TensorView contiguous_view(
    T* data, std::initializer_list<std::int64_t> shape, Device device = Device::kCpu
) {
    using Element = std::remove_const_t<T>;
    if constexpr (std::is_same_v<Element, float>) {
        return contiguous_view(data, DType::kFloat32, shape, device);
    } else if constexpr (std::is_same_v<Element, double>) {
        return contiguous_view(data, DType::kFloat64, shape, device);
    } else if constexpr (std::is_same_v<Element, std::int32_t>) {
        return contiguous_view(data, DType::kInt32, shape, device);
    } else if constexpr (std::is_same_v<Element, std::int64_t>) {
        return contiguous_view(data, DType::kInt64, shape, device);
    } else if constexpr (std::is_same_v<Element, std::int8_t>) {
        return contiguous_view(data, DType::kInt8, shape, device);
    } else {
        static_assert(sizeof(Element) == 1, "no dtype for this element type");
        return contiguous_view(data, DType::kUInt8, shape, device);
    }
}

}  // namespace tenp
