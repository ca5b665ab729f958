// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

// Cuts a caller's workspace into arrays. The same sequence of take() calls with base nullptr gives
// its size, so a layout is written once.

namespace tenp::cuda {

class Workspace {
 public:
    explicit Workspace(void* base = nullptr) : base_(reinterpret_cast<std::uintptr_t>(base)) {
        // Callers promise no alignment: whatever is missing at the front is part of the size.
        next_ = base == nullptr ? kAlignment : (base_ + kAlignment - 1) / kAlignment * kAlignment;
    }

    template <class T>
    T* take(std::int64_t count) {
        const std::uintptr_t first = next_;
        const auto bytes = static_cast<std::uintptr_t>(count) * sizeof(T);
        next_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
        return reinterpret_cast<T*>(first);
    }

    /// Bytes that are enough for what was taken, wherever the memory starts.
    std::size_t bytes() const { return next_ - base_; }

 private:
    static constexpr std::uintptr_t kAlignment = 256;

    std::uintptr_t base_;
    std::uintptr_t next_;
};

}  // namespace tenp::cuda
