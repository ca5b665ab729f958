// SPDX-License-Identifier: Apache-2.0
#include "emulation.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "races.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulation {
namespace {

// ---- fibers -------------------------------------------------------------------------------------

constexpr std::size_t kStackBytes = 256 << 10;
constexpr std::size_t kSharedAlignment = 128;

#ifdef __x86_64__
// Saves the registers that a function call must keep on the stack of one fiber and loads those of
// another. ucontext does the same with two system calls, which would be most of the run time.
extern "C" void tenp_emulation_switch(void** save, void* load);
asm(R"(
    .text
    .globl tenp_emulation_switch
    .hidden tenp_emulation_switch
    .type tenp_emulation_switch, @function
tenp_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size tenp_emulation_switch, . - tenp_emulation_switch
)");

struct Context {
    void* stack_pointer = nullptr;

    void start(char* stack, void (*entry)()) {
        auto** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
        *top = reinterpret_cast<void*>(entry);  // where the first switch returns to
        stack_pointer = top - 6;
        std::memset(stack_pointer, 0, 6 * sizeof(void*));
    }
    void switch_to(Context& other) { tenp_emulation_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
    ucontext_t state;

    void start(char* stack, void (*entry)()) {
        getcontext(&state);
        state.uc_stack = {stack, 0, kStackBytes};
        state.uc_link = nullptr;
        makecontext(&state, entry, 0);
    }
    void switch_to(Context& other) { swapcontext(&state, &other.state); }
};
#endif

/// Arrivals at one meeting point. `generation` counts the meetings that are over.
struct Barrier {
    unsigned arrived = 0;
    std::uint64_t generation = 0;
    const void* instruction = nullptr;
    /// What orders this meeting and the next, see races.h. Memory of its own: what was ordered by
    /// an address before would be ordered by it still, until that is freed.
    std::unique_ptr<char[]> order = std::make_unique<char[]>(2);
};

struct Copy {
    void* destination;
    const void* source;
    int bytes;
};

/// What a thread needs of the host.
struct Seat {
    char* stack;
    races::Thread thread;
};

struct Fiber {
    Context context;
    Seat seat{};
    bool is_done = false;
    const Barrier* barrier = nullptr;  // what it waits for, until its generation passes
    std::uint64_t generation = 0;
    std::vector<Copy> open_copies;
    std::deque<std::vector<Copy>> groups;
    std::unique_ptr<char> fenced;  // what came before its last fence
    std::vector<char*> met;        // what others had fenced when it met them
    void* fake_stack = nullptr;    // AddressSanitizer's

    bool may_run() const {
        return !is_done && (barrier == nullptr || barrier->generation != generation);
    }
};

struct Warp {
    Barrier barrier;
    Slots in, out;
};

struct Block {
    std::array<unsigned, 3> index;
    std::size_t place = 0;  // among the blocks that run at once
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    unsigned char* shared = nullptr;
    std::size_t shared_bytes = 0;
    const std::function<void()>* body = nullptr;
    std::size_t current = 0;
    Context scheduler;
    races::Thread host = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    std::size_t scheduler_stack_bytes = 0;
};

Block block;
std::mutex one_launch_at_a_time;
std::map<const void*, std::size_t> allowed_shared;

struct Free {
    void operator()(unsigned char* memory) const {
        ::operator delete(memory, std::align_val_t{kSharedAlignment});
    }
};

/// What the blocks that run at once have of their own, and two launches. The characters stand for
/// what orders threads, see races.h.
struct Launch {
    std::array<std::vector<Seat>, races::kBlocksAtOnce> seats;
    std::array<std::unique_ptr<unsigned char, Free>, races::kBlocksAtOnce> shared;
    char begin = 0;                                        // what the host did before it
    char arguments = 0;                                    // that its threads have
    char end = 0;                                          // of its threads
    std::map<const int*, std::unique_ptr<char>> meetings;  // at an atomic integer
    bool allows_next = false;
};
Launch launches[2];
std::size_t launch_number = 0;

Launch& this_launch() {
    return launches[launch_number % 2];
}
Launch& previous_launch() {
    return launches[(launch_number + 1) % 2];
}

/// Stacks are mapped once, with an unmapped page below each.
Seat seat_of(std::size_t thread) {
    auto& seats = this_launch().seats[block.place];
    while (seats.size() <= thread) {
        constexpr std::size_t kGuard = 4096;
        void* memory = mmap(
            nullptr, kStackBytes + kGuard, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
        );
        if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
            throw std::bad_alloc();
        }
        seats.push_back({static_cast<char*>(memory) + kGuard, races::make_thread()});
    }
    return seats[thread];
}

Fiber& self() {
    return block.fibers[block.current];
}

void resume(std::size_t thread) {
    block.current = thread;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(
        &block.scheduler_fake_stack, block.fibers[thread].seat.stack, kStackBytes
    );
#endif
    races::become(block.fibers[thread].seat.thread);
    block.scheduler.switch_to(block.fibers[thread].context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void pause(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(
        fiber.is_done ? nullptr : &fiber.fake_stack, block.scheduler_stack,
        block.scheduler_stack_bytes
    );
#endif
    races::become(block.host);
    fiber.context.switch_to(block.scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
    races::acquire(this_launch().begin);
    (*block.body)();
    races::release(this_launch().end);
    self().is_done = true;
    pause(self());
}

/// True for the last of `expected` to come, who ends the meeting itself.
bool meet(Barrier& barrier, unsigned expected, const void* instruction) {
    if (barrier.arrived == 0) {
        barrier.instruction = instruction;
    }
    require(
        barrier.instruction == instruction, "the lanes of a warp execute different instructions"
    );
    if (++barrier.arrived == expected) {
        return true;
    }
    Fiber& fiber = self();
    fiber.barrier = &barrier;
    fiber.generation = barrier.generation;
    pause(fiber);
    fiber.barrier = nullptr;
    return false;
}

void end_meeting(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.generation;
}

/// All `expected` threads' accesses before it come before those after it.
void order_by(Barrier& barrier, unsigned expected) {
    char& order = barrier.order[barrier.generation % 2];
    races::release(order);
    if (meet(barrier, expected, &order)) {
        end_meeting(barrier);
    }
    races::acquire(order);
}

bool runs_in_reverse() {
    const char* value = std::getenv("TENP_EMULATION_REVERSE");
    return value != nullptr && value[0] == '1';
}

void run_block(bool reverse, void (*enter)(unsigned, const std::array<unsigned, 3>&)) {
    const std::size_t threads = block.fibers.size();
    for (std::size_t thread = 0; thread < threads; ++thread) {
        const Unseen unseen;
        Fiber& fiber = block.fibers[thread];
        fiber = {};
        fiber.seat = seat_of(thread);
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(fiber.seat.stack, kStackBytes);
#endif
        fiber.context.start(fiber.seat.stack, fiber_main);
    }
    block.warps = std::vector<Warp>((threads + 31) / 32);
    block.barrier = {};
    auto& shared = this_launch().shared[block.place];
    shared.reset(
        static_cast<unsigned char*>(
            ::operator new(block.shared_bytes, std::align_val_t{kSharedAlignment})
        )
    );
    block.shared = shared.get();
    std::memset(block.shared, 0xff, block.shared_bytes);
    races::release(this_launch().begin);

    for (bool any_ran = true; any_ran;) {
        any_ran = false;
        for (std::size_t turn = 0; turn < threads; ++turn) {
            const std::size_t thread = reverse ? threads - 1 - turn : turn;
            if (block.fibers[thread].may_run()) {
                any_ran = true;
                enter(static_cast<unsigned>(thread), block.index);
                resume(thread);
            }
        }
    }
    for (const Fiber& fiber : block.fibers) {
        require(fiber.is_done, "threads wait at a barrier that the others never reach");
        require(fiber.groups.empty() && fiber.open_copies.empty(), "copies that nobody waited for");
    }
}

}  // namespace

void fail(const char* what) {
    std::fprintf(
        stderr, "emulation: block %u, thread %zu: must hold: %s\n", block.index[0], block.current,
        what
    );
    std::abort();
}

Unseen::Unseen() {
    races::look_away();
}

Unseen::~Unseen() {
    races::look_again();
}

bool allow_shared(const void* kernel, int bytes) {
    // What every GPU since Ampere lends to one block; sm_86, 89 and 120 have the least.
    constexpr int kMostShared = 99 << 10;
    if (bytes > kMostShared) {
        return false;
    }
    allowed_shared[kernel] = static_cast<std::size_t>(bytes);
    return true;
}

bool run(
    const void* kernel,
    std::array<unsigned, 3> grid,
    unsigned threads,
    std::size_t shared_bytes,
    bool overlaps_previous,
    const std::function<void()>& body,
    void (*enter)(unsigned, const std::array<unsigned, 3>&),
    const std::function<void()>& start
) {
    const std::lock_guard lock(one_launch_at_a_time);
    const std::size_t allowed = std::max<std::size_t>(48 << 10, allowed_shared[kernel]);
    const std::uint64_t blocks = std::uint64_t{grid[0]} * grid[1] * grid[2];
    if (blocks == 0 || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535 ||
        threads == 0 || threads > 1024 || threads % 32 != 0 || shared_bytes > allowed) {
        return false;
    }
    block.host = races::this_thread();
    ++launch_number;
    if (!overlaps_previous) {
        races::acquire(previous_launch().end);
    }
    this_launch().allows_next = false;
    this_launch().meetings.clear();
    block.shared_bytes = shared_bytes;
    block.body = &body;
    block.fibers.resize(threads);
    start();
    const bool reverse = runs_in_reverse();
    for (std::uint64_t turn = 0; turn < blocks; ++turn) {
        const std::uint64_t number = reverse ? blocks - 1 - turn : turn;
        block.index = {
            static_cast<unsigned>(number % grid[0]),
            static_cast<unsigned>(number / grid[0] % grid[1]),
            static_cast<unsigned>(number / grid[0] / grid[1]),
        };
        block.place = turn % races::kBlocksAtOnce;
        if (block.place == 0) {
            races::acquire(this_launch().end);
        }
        run_block(reverse, enter);
    }
    races::acquire(this_launch().arguments);
    if (overlaps_previous) {
        races::acquire(previous_launch().end);
    }
    if (!this_launch().allows_next) {
        races::acquire(this_launch().end);
    }
    return true;
}

void have_arguments() {
    races::release(this_launch().arguments);
}

int lane() {
    return static_cast<int>(block.current % 32);
}

void block_barrier() {
    order_by(block.barrier, static_cast<unsigned>(block.fibers.size()));
}

void warp_barrier() {
    order_by(block.warps[block.current / 32].barrier, 32);
}

void fence() {
    const Unseen unseen;
    for (char* meeting : self().met) {
        races::acquire(*meeting);
    }
    if (self().fenced == nullptr) {
        self().fenced = std::make_unique<char>();
    }
    races::release(*self().fenced);
}

void meet_at(const int* atomic) {
    if (!races::kAreFound) {
        return;
    }
    const Unseen unseen;
    auto& meeting = this_launch().meetings[atomic];
    if (meeting == nullptr) {
        meeting = std::make_unique<char>();
    }
    self().met.push_back(meeting.get());
    if (self().fenced != nullptr) {
        // Not all that this thread did, only what it fenced: a thread that knows nothing takes it.
        const races::Thread me = races::this_thread();
        races::become(block.host);
        const races::Thread courier = races::make_thread();
        races::become(courier);
        races::acquire(*self().fenced);
        races::release(*meeting);
        races::become(me);
        races::destroy(courier);
    }
}

void wait_for_previous_grid() {
    races::acquire(previous_launch().end);
}

void allow_next_grid() {
    this_launch().allows_next = true;
}

unsigned char* shared_begin() {
    return block.shared;
}

void check_shared(const void* pointer, std::size_t bytes) {
    const auto* p = static_cast<const unsigned char*>(pointer);
    require(is_aligned(p, bytes), "shared memory is accessed at aligned addresses");
    require(
        p >= block.shared && p + bytes <= block.shared + block.shared_bytes,
        "accesses stay inside the block's shared memory"
    );
}

void start_copy(void* destination, const void* source, int bytes) {
    races::writes(destination, 16);
    const Unseen unseen;
    std::memset(destination, 0xff, 16);
    self().open_copies.push_back({destination, source, bytes});
}

void commit_copies() {
    const Unseen unseen;
    self().groups.push_back(std::move(self().open_copies));
    self().open_copies.clear();
}

void finish_copies(int groups_that_may_be_missing) {
    auto& groups = self().groups;
    while (groups.size() > static_cast<std::size_t>(groups_that_may_be_missing)) {
        for (const Copy& copy : groups.front()) {
            races::writes(copy.destination, 16);
            races::reads(copy.source, static_cast<std::size_t>(copy.bytes));
            const Unseen unseen;
            std::memset(copy.destination, 0, 16);
            if (copy.bytes > 0) {
                std::memcpy(copy.destination, copy.source, static_cast<std::size_t>(copy.bytes));
            }
        }
        const Unseen unseen;
        groups.pop_front();
    }
}

Slots& inputs() {
    return block.warps[block.current / 32].in;
}

Slots& outputs() {
    return block.warps[block.current / 32].out;
}

bool arrive(const void* instruction) {
    return meet(block.warps[block.current / 32].barrier, 32, instruction);
}

void leave() {
    end_meeting(block.warps[block.current / 32].barrier);
}

}  // namespace emulation
