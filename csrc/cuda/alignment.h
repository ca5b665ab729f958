// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace tenp::cuda {

/// Whether 16 bytes at a time can be copied from rows of this start and stride, in elements.
template <class T>
bool rows_are_aligned(const T* first, std::int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(first) % 16 == 0 &&
           stride * static_cast<std::int64_t>(sizeof(T)) % 16 == 0;
}

}  // namespace tenp::cuda
