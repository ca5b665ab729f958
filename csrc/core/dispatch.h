// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "core/float16.h"
#include "tenp/error.h"
#include "tenp/tensor.h"

namespace tenp {

template <class... Ts>
struct Types {};

using Floats = Types<float, BFloat16, Float16>;

template <class T>
inline constexpr DType kDTypeOf = DType::kUInt8;
template <>
inline constexpr DType kDTypeOf<float> = DType::kFloat32;
template <>
inline constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<Float16> = DType::kFloat16;

/// Calls f.template operator()<T>() for the T of the list whose dtype is `dtype`.
template <class... Ts, class F>
void dispatch(DType dtype, Types<Ts...>, F&& f) {
    const bool found =
        ((kDTypeOf<Ts> == dtype ? (f.template operator()<Ts>(), true) : false) || ...);
    if (!found) {
        throw Unsupported(std::string("no kernel for ") + dtype_name(dtype));
    }
}

/// The view's memory as an array of T.
template <class T>
T* data(const TensorView& view) {
    return static_cast<T*>(view.data);
}

}  // namespace tenp
