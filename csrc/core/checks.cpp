// SPDX-License-Identifier: Apache-2.0
#include "core/checks.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>

#include "core/dispatch.h"
#include "tenp/error.h"

namespace tenp {
namespace {

constexpr std::int64_t kMostElements = std::int64_t{1} << 56;

std::string shape_text(std::span<const std::int64_t> shape) {
    std::string text = "[";
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        text.append(axis == 0 ? "" : ", ").append(std::to_string(shape[axis]));
    }
    return text + "]";
}

std::span<const std::int64_t> shape_of(const TensorView& view) {
    return {view.shape.data(), static_cast<std::size_t>(view.rank)};
}

bool is_empty(const TensorView& view) {
    for (const std::int64_t extent : shape_of(view)) {
        if (extent == 0) {
            return true;
        }
    }
    return false;
}

/// Whether the last `axes` dimensions are row-major without gaps. The stride of a dimension of
/// extent 1 is never used, so it may be anything.
bool is_packed(const TensorView& view, std::int32_t axes) {
    std::int64_t stride = 1;
    for (std::int32_t axis = view.rank - 1; axis >= view.rank - axes; --axis) {
        const auto a = static_cast<std::size_t>(axis);
        if (view.shape[a] != 1 && view.stride[a] != stride) {
            return false;
        }
        stride *= view.shape[a];
    }
    return true;
}

std::string device_text(Device device, std::int32_t index) {
    const std::string name = device_name(device);
    return device == Device::kCuda ? name + ":" + std::to_string(index) : name;
}

struct ByteRange {
    std::uintptr_t first = 0;
    std::uintptr_t last = 0;  // one past the end
};

/// From the lowest to the highest byte that the view can touch.
ByteRange byte_range(const TensorView& view) {
    if (view.data == nullptr || is_empty(view)) {
        return {};
    }
    const auto size = static_cast<std::int64_t>(dtype_size(view.dtype));
    std::int64_t low = 0;
    std::int64_t high = size;
    for (std::size_t axis = 0; axis < static_cast<std::size_t>(view.rank); ++axis) {
        const std::int64_t reach = (view.shape[axis] - 1) * view.stride[axis] * size;
        (reach < 0 ? low : high) += reach;
    }
    const auto base = reinterpret_cast<std::intptr_t>(view.data);
    return {static_cast<std::uintptr_t>(base + low), static_cast<std::uintptr_t>(base + high)};
}

bool overlap(const ByteRange& a, const ByteRange& b) {
    return a.first < b.last && b.first < a.last;
}

/// Whether rows of a kRows view reach into each other.
bool rows_overlap(const TensorView& view) {
    const auto last = static_cast<std::size_t>(view.rank - 1);
    for (std::size_t axis = 0; axis < last; ++axis) {
        const std::int64_t stride = view.stride[axis];
        if (view.shape[axis] > 1 && (stride < 0 ? -stride : stride) < view.shape[last]) {
            return true;
        }
    }
    return false;
}

}  // namespace

std::string shape_text(std::initializer_list<std::int64_t> shape) {
    return shape_text(std::span<const std::int64_t>(shape.begin(), shape.size()));
}

void Checks::fail(
    std::string_view argument, std::string_view expected, std::string_view actual
) const {
    std::string message = op_;
    message.append(": ").append(argument).append(" must be ").append(expected);
    throw InvalidArgument(message.append(", got ").append(actual));
}

void Checks::rank(Named array, std::int32_t rank) const {
    const std::int32_t actual = array.view.rank;
    if (actual != rank) {
        fail(array.name, std::to_string(rank) + "-dimensional", std::to_string(actual));
    }
    // Everything computed from extents later on must fit int64, even for an array without elements.
    std::int64_t elements = 1;
    for (const std::int64_t extent : shape_of(array.view)) {
        if (extent < 0 ||
            __builtin_mul_overflow(elements, std::max<std::int64_t>(extent, 1), &elements) ||
            elements > kMostElements) {
            fail(
                array.name, "of non-negative extents with a product of at most 2^56",
                shape_text(shape_of(array.view))
            );
        }
    }
}

void Checks::is_float(Named array) const {
    const DType dtype = array.view.dtype;
    if (dtype != DType::kFloat32 && dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
        fail(array.name, "float32, bfloat16 or float16", dtype_name(dtype));
    }
}

void Checks::array(
    Named array, DType dtype, std::initializer_list<std::int64_t> shape, Layout layout
) const {
    const TensorView& view = array.view;
    if (view.device != device_ || view.device_index != device_index_) {
        fail(
            array.name, "on " + device_text(device_, device_index_),
            device_text(view.device, view.device_index)
        );
    }
    if (view.dtype != dtype) {
        fail(array.name, dtype_name(dtype), dtype_name(view.dtype));
    }
    rank(array, static_cast<std::int32_t>(shape.size()));
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        if (view.shape[axis] != shape.begin()[axis]) {
            fail(array.name, shape_text(shape), shape_text(shape_of(view)));
        }
    }
    if (is_empty(view)) {
        return;
    }
    if (view.data == nullptr) {
        fail(array.name, "an array of shape " + shape_text(shape), "no memory");
    }
    if (reinterpret_cast<std::uintptr_t>(view.data) % dtype_size(dtype) != 0) {
        fail(array.name, std::string("aligned to ") + dtype_name(dtype), "another address");
    }
    const std::span<const std::int64_t> strides(view.stride.data(), shape.size());
    if (layout == Layout::kContiguous && !is_packed(view, view.rank)) {
        fail(array.name, "contiguous", "strides " + shape_text(strides));
    }
    if (layout == Layout::kRows && !is_packed(view, 1)) {
        fail(array.name, "contiguous along its last dimension", "strides " + shape_text(strides));
    }
}

void Checks::contiguous_along_second_or_third(Named array) const {
    const TensorView& view = array.view;
    const auto is_contiguous = [&](std::size_t axis) {
        return view.stride[axis] == 1 || view.shape[axis] <= 1;
    };
    if (!is_contiguous(1) && !is_contiguous(2)) {
        fail(
            array.name, "contiguous along its second or third dimension",
            "strides " + shape_text({view.stride[0], view.stride[1], view.stride[2]})
        );
    }
}

void Checks::apart(Named written, std::initializer_list<Named> others) const {
    if (written.view.data != nullptr && !is_empty(written.view) && rows_overlap(written.view)) {
        fail(written.name, "without overlapping rows", "a row stride smaller than a row");
    }
    const ByteRange range = byte_range(written.view);
    for (const Named& other : others) {
        if (overlap(range, byte_range(other.view))) {
            fail(written.name, "memory of its own", "an overlap with " + std::string(other.name));
        }
    }
}

void Checks::apart(std::initializer_list<Named> written, std::initializer_list<Named> read) const {
    for (const Named& array : written) {
        apart(array, read);
        for (const Named& other : written) {
            if (&other != &array) {
                apart(array, {other});
            }
        }
    }
}

std::int64_t Checks::rows(
    std::string_view argument, std::int64_t tokens, std::int64_t per_token
) const {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    if (tokens > kMost || per_token > kMost || tokens * per_token > kMost) {
        fail(
            argument, "at most " + std::to_string(kMost) + " slots in all",
            shape_text({tokens, per_token})
        );
    }
    return tokens * per_token;
}

void Checks::workspace(const TensorView& workspace, std::size_t needed) const {
    std::size_t bytes = 0;
    if (workspace.data != nullptr) {
        const Named named{"workspace", workspace};
        rank(named, 1);
        array(named, workspace.dtype, {workspace.shape[0]});
        bytes = static_cast<std::size_t>(workspace.shape[0]) * dtype_size(workspace.dtype);
    }
    if (bytes < needed) {
        fail("workspace", std::to_string(needed) + " bytes or more", std::to_string(bytes));
    }
}

void Checks::size(std::string_view argument, std::int64_t value) const {
    if (value < 0 || value > INT32_MAX) {
        fail(argument, "within 0.." + std::to_string(INT32_MAX), std::to_string(value));
    }
}

void Checks::offsets(Named offsets, std::int64_t limit) const {
    if (device_ != Device::kCpu) {
        return;
    }
    const auto* values = data<const std::int32_t>(offsets.view);
    std::int64_t before = 0;
    for (std::int64_t i = 0; i < offsets.view.shape[0]; ++i) {
        if (values[i] < before || values[i] > limit) {
            fail(
                offsets.name, "non-decreasing within 0.." + std::to_string(limit),
                std::to_string(values[i]) + " at index " + std::to_string(i) + " after " +
                    std::to_string(before)
            );
        }
        before = values[i];
    }
}

void Checks::indices(Named array, std::int64_t first, std::int64_t last, std::int64_t limit) const {
    if (device_ != Device::kCpu) {
        return;
    }
    const auto* values = data<const std::int32_t>(array.view);
    for (std::int64_t i = first; i < last; ++i) {
        if (values[i] < 0 || values[i] >= limit) {
            fail(
                array.name, "within 0.." + std::to_string(limit - 1),
                std::to_string(values[i]) + " at index " + std::to_string(i)
            );
        }
    }
}

}  // namespace tenp
