// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace tenp::cpu {

/// Memory that grows and is never given back before its thread ends. Declare it thread_local: fresh
/// pages would have to be faulted in by every call, and that can cost more than the work on them.
class Scratch {
 public:
    /// `count` values of T on a cache line of their own; what they hold is left over from before.
    template <class T>
    T* get(std::int64_t count) {
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
        if (bytes > size_) {
            memory_.reset();
            size_ = 0;
            memory_.reset(::operator new(bytes, kAlignment));
            size_ = bytes;
        }
        return static_cast<T*>(memory_.get());
    }

 private:
    static constexpr std::align_val_t kAlignment{64};

    struct Free {
        void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
    };

    std::unique_ptr<void, Free> memory_;
    std::size_t size_ = 0;
};

}  // namespace tenp::cpu
