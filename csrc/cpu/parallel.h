// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace tenp::cpu {

/// A reference to something callable with a task number.
class TaskRef {
 public:
    template <class F>
        requires(!std::is_same_v<std::remove_cvref_t<F>, TaskRef>)
    TaskRef(F&& f)
        : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
          call_([](void* object, std::int64_t task) {
              (*static_cast<std::remove_reference_t<F>*>(object))(task);
          }) {}

    void operator()(std::int64_t task) const { call_(object_, task); }

 private:
    void* object_;
    void (*call_)(void*, std::int64_t);
};

/// Runs task(0) .. task(count - 1), each once, on up to num_threads() threads, and returns when all
/// are done. Which thread runs a task, and when, is open: tasks write to places of their own.
///
/// An exception of a task is rethrown here (of several, that of the lowest task among those that
/// ran); tasks that have not started by then may be left out. Workers compute in the caller's
/// floating-point environment.
void parallel_for(std::int64_t count, TaskRef task);

}  // namespace tenp::cpu
