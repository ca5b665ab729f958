// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "tenp/tensor.h"

namespace tenp::bindings {

/// A Python array, borrowed through DLPack for the length of one call.
class Borrowed {
 public:
    /// `array` has __dlpack__(), or is the capsule that it returns (which is not consumed), or is
    /// None for an absent array. Throws InvalidArgument for anything else.
    Borrowed(const std::string& op, const std::string& argument, const pybind11::object& array);

    const TensorView& view() const noexcept { return view_; }

 private:
    pybind11::object capsule_;  // keeps the memory alive
    TensorView view_;
};

}  // namespace tenp::bindings
