// SPDX-License-Identifier: Apache-2.0
#include "cpu/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <charconv>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "tenp/error.h"
#include "tenp/threads.h"

namespace tenp::cpu {
namespace {

/// One parallel_for, on the stack of its caller.
class Job {
 public:
    Job(std::int64_t count, TaskRef task) : count_(count), task_(task) {
        std::fegetenv(&environment_);
    }

    /// Takes tasks until none is left.
    void work() noexcept {
        while (true) {
            const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
            if (task >= count_) {
                return;
            }
            try {
                task_(task);
            } catch (...) {
                const std::scoped_lock lock(error_mutex_);
                if (error_ == nullptr || task < error_task_) {
                    error_ = std::current_exception();
                    error_task_ = task;
                }
                next_.store(count_, std::memory_order_relaxed);
            }
        }
    }

    const std::fenv_t& environment() const { return environment_; }

    void rethrow_error() const {
        if (error_ != nullptr) {
            std::rethrow_exception(error_);
        }
    }

 private:
    std::int64_t count_;
    TaskRef task_;
    std::fenv_t environment_;
    std::atomic<std::int64_t> next_ = 0;
    std::mutex error_mutex_;
    std::exception_ptr error_;
    std::int64_t error_task_ = 0;
};

/// Where the process is held to some of the machine's processors (taskset, containers), those.
int processors() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        return CPU_COUNT(&allowed);
    }
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int threads_from_environment() {
    const char* text = std::getenv("TENP_NUM_THREADS");
    if (text == nullptr || *text == '\0') {
        return processors();
    }
    int threads = 0;
    const char* end = text + std::strlen(text);
    const auto [rest, error] = std::from_chars(text, end, threads);
    if (error != std::errc() || rest != end || threads < 1) {
        throw InvalidArgument(
            "num_threads: TENP_NUM_THREADS must be a positive number, got '" + std::string(text) +
            "'"
        );
    }
    return threads;
}

class Pool {
 public:
    void run(Job& job, int helpers) {
        // A busy pool is left alone: waiting for it would deadlock a task that starts a job.
        if (helpers < 1 || busy_.exchange(true, std::memory_order_acquire)) {
            job.work();
            return;
        }
        {
            const std::scoped_lock lock(mutex_);
            start_workers(helpers);
            job_ = &job;
            open_places_ = helpers;
        }
        wake_.notify_all();
        job.work();
        {
            // Workers that slept through the job are not waited for.
            std::unique_lock lock(mutex_);
            open_places_ = 0;
            job_ = nullptr;
            done_.wait(lock, [&] { return working_ == 0; });
        }
        busy_.store(false, std::memory_order_release);
    }

 private:
    void start_workers(int wanted) {
        try {
            for (; workers_ < wanted; ++workers_) {
                std::thread([this] { worker(); }).detach();
            }
        } catch (const std::system_error&) {
            // No more threads to be had: those that there are do the work.
        }
    }

    void worker() {
        std::unique_lock lock(mutex_);
        while (true) {
            wake_.wait(lock, [&] { return open_places_ > 0; });
            --open_places_;
            ++working_;
            Job& job = *job_;
            lock.unlock();
            std::fesetenv(&job.environment());
            job.work();
            lock.lock();
            if (--working_ == 0) {
                done_.notify_one();
            }
        }
    }

    std::atomic<bool> busy_ = false;  // a caller's job is being run
    std::mutex mutex_;                // guards everything below
    std::condition_variable wake_;
    std::condition_variable done_;
    Job* job_ = nullptr;
    int open_places_ = 0;  // workers that may still join the job
    int working_ = 0;
    int workers_ = 0;
};

std::atomic<int> thread_count = 0;  // 0: not asked for yet

// Never destroyed: workers sleep in it until the process ends. A forked child has none of the
// parent's threads, and its copy of a mutex may be held by one of them, so it forgets the pool.
std::atomic<Pool*> current_pool = nullptr;

Pool& pool() {
    [[maybe_unused]] static const int registered =
        pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
    Pool* pool = current_pool.load();
    if (pool == nullptr) {
        auto fresh = std::make_unique<Pool>();
        if (current_pool.compare_exchange_strong(pool, fresh.get())) {
            pool = fresh.release();
        }
    }
    return *pool;
}

}  // namespace

void parallel_for(std::int64_t count, TaskRef task) {
    if (count < 1) {
        return;
    }
    Job job(count, task);
    pool().run(job, static_cast<int>(std::min<std::int64_t>(num_threads(), count) - 1));
    job.rethrow_error();
}

}  // namespace tenp::cpu

namespace tenp {

int num_threads() {
    int threads = cpu::thread_count.load();
    if (threads == 0) {
        const int wanted = cpu::threads_from_environment();
        threads = cpu::thread_count.compare_exchange_strong(threads, wanted) ? wanted : threads;
    }
    return threads;
}

void set_num_threads(int threads) {
    if (threads < 1) {
        throw InvalidArgument(
            "set_num_threads: threads must be positive, got " + std::to_string(threads)
        );
    }
    cpu::thread_count.store(threads);
}

}  // namespace tenp
