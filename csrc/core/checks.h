// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "tenp/tensor.h"

// Checks that every op makes once, before it picks a backend. Every message reads
// "<op>: <argument> must be <expected>, got <actual>".

namespace tenp {

enum class Layout : std::uint8_t {
    kContiguous,  ///< row-major without gaps
    kRows,        ///< contiguous along the last dimension, any stride before it
    kAny,
};

/// A view and the name of the argument it came as.
struct Named {
    std::string_view name;
    const TensorView& view;
};

/// "[3, 4]"
std::string shape_text(std::initializer_list<std::int64_t> shape);

class Checks {
 public:
    /// The op's name starts every message; all arrays must be on the device of `first`.
    Checks(std::string_view op, const TensorView& first)
        : op_(op),
          device_(first.device),
          device_index_(first.device_index) {}

    Device device() const noexcept { return device_; }

    [[noreturn]] void fail(
        std::string_view argument, std::string_view expected, std::string_view actual
    ) const;

    /// The view's number of dimensions; comes first, the sizes are taken from it afterwards.
    void rank(Named array, std::int32_t rank) const;

    /// float32, bfloat16 or float16.
    void is_float(Named array) const;

    /// Dtype, shape, device, layout, alignment and that there is memory behind it.
    void array(
        Named array,
        DType dtype,
        std::initializer_list<std::int64_t> shape,
        Layout layout = Layout::kContiguous
    ) const;

    /// The second or the third dimension of a three-dimensional array has stride 1.
    void contiguous_along_second_or_third(Named array) const;

    /// `written` has no element twice and shares no memory with any of `others`.
    void apart(Named written, std::initializer_list<Named> others) const;

    /// The same among all of `written`, and between each of them and each of `read`.
    void apart(std::initializer_list<Named> written, std::initializer_list<Named> read) const;

    /// That `tokens` * `per_token` rows can be numbered in int32; returns their number.
    std::int64_t rows(std::string_view argument, std::int64_t tokens, std::int64_t per_token) const;

    /// Any array of `needed` bytes or more; one of none may be absent.
    void workspace(const TensorView& workspace, std::size_t needed) const;

    /// A size that an op's workspace depends on: within int32.
    void size(std::string_view argument, std::int64_t value) const;

    /// On the CPU: `offsets` [n] int32 never decreases and stays within 0..limit.
    void offsets(Named offsets, std::int64_t limit) const;

    /// On the CPU: values [first, last) of an int32 array are within 0..limit-1.
    void indices(Named array, std::int64_t first, std::int64_t last, std::int64_t limit) const;

 private:
    std::string op_;
    Device device_;
    std::int32_t device_index_;
};

}  // namespace tenp
