// The kernels' own source as C++: the host's twin of prim.cuh.
//
// Blocks run one after the other, in shuffled order; the threads of a block are fibers of which a random one runs until
// it waits. Nothing is left to luck that can be known: every access to shared memory is held against those before it
// (bounds, memory that nobody wrote, copies that have not landed, a barrier that is missing between two threads), every
// access to device memory against the buffer that it started from, and asynchronous copies land at their wait, never
// sooner. Launches come one after the other, so whether one may begin early is not left to luck either: until a thread
// calls previous_done, it may read weights and nothing else. The first fault ends the launch, with one sentence.
#pragma once

#include "tensor_core.h"

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;

#define KERNEL(threads, blocks) extern "C" void
#define DEVICE inline

namespace shim {

struct Index {
    u32 x = 0, y = 0, z = 0;
};

// Copies of one thread that are under way.
struct Copy {
    u32 to;
    const void* from;
};

struct Fiber {
    void* stack_pointer = nullptr;
    std::vector<char> stack;
    Index index;
    bool done = false;
    // Whether it has waited for the launch before, whose output is not to be touched sooner.
    bool waited = false;
    std::vector<std::vector<Copy>> copies;
    // What it brings to an operation of its warp, and takes away.
    u32 words[10];
};

struct Warp {
    u32 arrived = 0;
    const char* operation = nullptr;
};

// What is known of two bytes of shared memory: who wrote and read it last, in which stretch between two barriers.
struct Cell {
    static constexpr u32 SEVERAL = ~0u, ATOMIC = ~0u - 1;
    u64 written = 0, read = 0, flying = 0;
    u32 writer = 0, reader = 0;
};

constexpr u32 MAX_THREADS = 1024, MAX_SHARED = 227 << 10, STACK = 64 << 10, LANES = 32;

inline std::map<uintptr_t, size_t> regions;
inline std::vector<Fiber> fibers(MAX_THREADS);
inline std::vector<Warp> warps(MAX_THREADS / LANES);
inline std::vector<Cell> cells(MAX_SHARED / 2);
inline std::vector<u32> ready, waiting;
alignas(128) inline char shared[MAX_SHARED];
inline u32 shared_size, n_threads;
inline Fiber* current;
inline void* scheduler;
inline Index block_index, block_size, grid_size;
// Counts the stretches between barriers of all blocks that ever ran; a block begins with a new one.
inline u64 stretch = 1, block_start = 1;
inline u64 random_state;
inline std::string fault;
inline const char* kernel_name = "";
inline void (*body)();
inline TensorCore tensor_core;

inline u32 random_below(u32 n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<u32>((random_state >> 33) % n);
}

#if defined(__x86_64__)
// Saves the registers that a call keeps, and the stack pointer; goes on with another stack.
extern "C" void shim_switch(void** save, void* load);
asm(R"(
.text
.weak shim_switch
shim_switch:
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
)");
#elif defined(__aarch64__)
extern "C" void shim_switch(void** save, void* load);
asm(R"(
.text
.weak shim_switch
shim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#else
#error "switching between fibers is written for x86-64 and aarch64"
#endif

inline void yield() { shim_switch(&current->stack_pointer, scheduler); }

inline void fail(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (!current) {  // before the first block
        fault = text;
        return;
    }
    char whole[768];
    snprintf(whole, sizeof whole, "%s, block (%u, %u, %u), thread %u: %s", kernel_name, block_index.x, block_index.y,
             block_index.z, current->index.x, text);
    fault = whole;
    yield();
    abort();
}

inline void entry() {
    body();
    if (!current->waited) fail("it ended without a call of previous_done");
    for (auto& group : current->copies)
        if (!group.empty()) fail("it ended with copies under way: a wait is missing");
    current->done = true;
    yield();
    abort();
}

inline void prepare(Fiber& fiber, u32 thread) {
    if (fiber.stack.empty()) fiber.stack.resize(STACK);
    fiber.index.x = thread;
    fiber.done = fiber.waited = false;
    fiber.copies.resize(1);
    fiber.copies[0].clear();
    // Stacks begin at different lines of the cache's sets: else a block's 256 would evict one another.
    auto top = (reinterpret_cast<uintptr_t>(fiber.stack.data()) + STACK - thread % 64 * 320) & ~uintptr_t{63};
#if defined(__x86_64__)
    auto* words = reinterpret_cast<void**>(top) - 2;  // as if `entry` had been called: 8 bytes off 16
    words[0] = reinterpret_cast<void*>(&entry);
    words[1] = nullptr;
    fiber.stack_pointer = words - 6;
#else
    auto* words = reinterpret_cast<void**>(top) - 20;
    words[11] = reinterpret_cast<void*>(&entry);
    fiber.stack_pointer = words;
#endif
}

inline void run_block() {
    memset(shared, 0xff, shared_size);
    block_start = ++stretch;
    ready.clear();
    waiting.clear();
    for (u32 i = 0; i < n_threads; ++i) {
        prepare(fibers[i], i);
        warps[i / LANES] = Warp{};
        ready.push_back(i);
    }
    for (u32 left = n_threads; left;) {
        if (ready.empty()) {
            fault = std::string(kernel_name) + ": threads wait for others that never come to that barrier";
            return;
        }
        u32 pick = random_below(static_cast<u32>(ready.size()));
        current = &fibers[ready[pick]];
        ready[pick] = ready.back();
        ready.pop_back();
        shim_switch(&scheduler, current->stack_pointer);
        if (!fault.empty()) return;
        left -= current->done;
    }
}

inline void run_grid(u64 seed) {
    random_state = seed * 0x9E3779B97F4A7C15ull + 0x1234567;
    if (!random_state) random_state = 1;
    u64 count = u64{grid_size.x} * grid_size.y * grid_size.z;
    std::vector<u32> order(count);
    for (u32 i = 0; i < count; ++i) order[i] = i;
    for (u32 i = static_cast<u32>(count); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
    for (u32 flat : order) {
        block_index = {flat % grid_size.x, flat / grid_size.x % grid_size.y, flat / grid_size.x / grid_size.y};
        run_block();
        if (!fault.empty()) return;
    }
}

// The lanes of a warp meet; the last to come does the work for all.
template <class Work> void together(const char* operation, Work work) {
    u32 number = current->index.x / LANES;
    Warp& warp = warps[number];
    Fiber* lanes = &fibers[number * LANES];
    if (warp.arrived && warp.operation != operation)
        fail("lanes of one warp meet at different operations: %s and %s", warp.operation, operation);
    warp.operation = operation;
    if (++warp.arrived < LANES) return yield();
    warp.arrived = 0;
    work(lanes);
    for (u32 lane = 0; lane < LANES; ++lane)
        if (&lanes[lane] != current) ready.push_back(number * LANES + lane);
}

// Whether an access of `thread` may come before or after ours: no barrier is between the two.
inline bool unordered(u64 when, u32 thread) { return when == stretch && thread != current->index.x; }

inline Cell* cells_at(u32 at, u32 size) {
    if (at + size > shared_size)
        fail("shared memory is accessed at byte %u, and the block has %u", at, shared_size);
    if (at % size) fail("shared memory is accessed at byte %u, which is not a multiple of %u", at, size);
    return &cells[at / 2];
}

inline void on_read(u32 at, u32 size) {
    Cell* cell = cells_at(at, size);
    u32 thread = current->index.x;
    for (u32 i = 0; i < (size + 1) / 2; ++i, ++cell) {
        // Several threads have read it in this stretch, so nobody has written it.
        if (cell->read == stretch && cell->reader == Cell::SEVERAL) continue;
        if (cell->flying > block_start - 1)
            fail("byte %u of shared memory is read before the copy into it has landed: a wait is missing", at);
        if (cell->written < block_start) fail("byte %u of shared memory is read, and nobody wrote it", at);
        if (unordered(cell->written, cell->writer))
            fail("byte %u of shared memory is read, and thread %d wrote it: a barrier is missing", at,
                 static_cast<int>(cell->writer));
        cell->reader = cell->read == stretch && cell->reader != thread ? Cell::SEVERAL : thread;
        cell->read = stretch;
    }
}

inline void on_write(u32 at, u32 size, bool atomic = false) {
    Cell* cell = cells_at(at, size);
    for (u32 i = 0; i < (size + 1) / 2; ++i, ++cell) {
        if (cell->flying > block_start - 1) fail("byte %u of shared memory is written while a copy flies there", at);
        if (!(atomic && cell->writer == Cell::ATOMIC) && unordered(cell->written, cell->writer))
            fail("byte %u of shared memory is written, and so did thread %d: a barrier is missing", at,
                 static_cast<int>(cell->writer));
        if (unordered(cell->read, cell->reader))
            fail("byte %u of shared memory is written, and others read it: a barrier is missing", at);
        if (atomic && cell->written < block_start) fail("byte %u of shared memory is added to, and nobody wrote it", at);
        cell->written = stretch;
        cell->writer = atomic ? Cell::ATOMIC : current->index.x;
    }
}

inline float widened(u32 word, u32 half) {
    u32 bits = half ? word & 0xffff0000u : word << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

}  // namespace shim

#define threadIdx (shim::current->index)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

// A pointer into device memory that knows the buffer it points into.
template <class T> struct Global {
    T* at = nullptr;
    uintptr_t begin = 0, end = 0;

    Global() = default;
    Global(std::nullptr_t) {}
    Global(T* at, uintptr_t begin, uintptr_t end) : at(at), begin(begin), end(end) {}
    template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
    Global(const Global<U>& other) : at(other.at), begin(other.begin), end(other.end) {}

    explicit operator bool() const { return at != nullptr; }
    Global operator+(size_t n) const { return {at + n, begin, end}; }
    T& operator[](size_t n) const { return *checked(at + n, sizeof(T), alignof(T)); }
    T& operator*() const { return (*this)[0]; }
    T* checked(T* p, size_t size, size_t alignment) const {
        if (!shim::current->waited) shim::fail("device memory is accessed before previous_done");
        return placed(p, size, alignment);
    }
    // The same for what no launch writes, and may thus be read while the one before still runs: weights.
    T* placed(T* p, size_t size, size_t alignment) const {
        auto address = reinterpret_cast<uintptr_t>(p);
        if (!at) shim::fail("a null pointer is used");
        if (address < begin || address + size > end)
            shim::fail("device memory is accessed %lld bytes from the start of a buffer of %llu",
                       static_cast<long long>(address - begin), static_cast<u64>(end - begin));
        if (address % alignment) shim::fail("device memory is accessed at an address that is not a multiple of %zu", alignment);
        return p;
    }
};

template <class T> Global<T> global_at(u64 address) {
    if (!address) return nullptr;
    auto after = shim::regions.upper_bound(address);
    if (after == shim::regions.begin() || (--after, address >= after->first + after->second)) {
        shim::fail("address %llx is in no buffer", address);
        return nullptr;
    }
    return {reinterpret_cast<T*>(address), after->first, after->first + after->second};
}

template <class T, class U> Global<T> as(const Global<U>& from) {
    return {reinterpret_cast<T*>(from.at), from.begin, from.end};
}

// One value of shared memory.
template <class T> struct SharedValue {
    u32 at;
    operator std::remove_const_t<T>() const {
        std::remove_const_t<T> value;
        shim::on_read(at, sizeof(T));
        memcpy(&value, shim::shared + at, sizeof(T));
        return value;
    }
    T operator=(T value) const {
        shim::on_write(at, sizeof(T));
        memcpy(shim::shared + at, &value, sizeof(T));
        return value;
    }
    T operator=(const SharedValue& other) const { return *this = static_cast<T>(other); }
    T operator+=(T value) const { return *this = static_cast<T>(*this) + value; }
};

template <class T> struct Shared {
    u32 at;
    Shared operator+(size_t n) const { return {static_cast<u32>(at + n * sizeof(T))}; }
    SharedValue<T> operator[](size_t n) const { return {static_cast<u32>(at + n * sizeof(T))}; }
    operator Shared<const T>() const { return {at}; }
};

template <class T> Shared<T> shared_at(u32 offset) { return {offset}; }

struct alignas(16) Words {
    u32 w[4];
};

template <class T> Words load16(Global<T> from) {
    return *reinterpret_cast<const Words*>(from.checked(from.at, 16, 16));
}
template <class T> void store16(Global<T> to, Words words) {
    *reinterpret_cast<Words*>(to.checked(to.at, 16, 16)) = words;
}
template <class T> Words load16_streamed(Global<T> from) {
    return *reinterpret_cast<const Words*>(from.placed(from.at, 16, 16));
}
template <class T> Words load16(Shared<T> from) {
    Words to;
    shim::on_read(from.at, 16);
    memcpy(&to, shim::shared + from.at, 16);
    return to;
}

template <class T, class U> void copy16_async(Shared<T> to, Global<U> from) {
    shim::on_write(to.at, 16);
    for (u32 i = 0; i < 8; ++i) shim::cells[to.at / 2 + i].flying = shim::block_start;
    memset(shim::shared + to.at, 0xff, 16);
    shim::current->copies.back().push_back({to.at, from.checked(from.at, 16, 16)});
}

DEVICE void copies_commit() { shim::current->copies.emplace_back(); }

template <int LEFT> void copies_wait() {
    auto& groups = shim::current->copies;  // the last is open and takes what follows
    while (groups.size() > LEFT + 1) {
        for (const auto& copy : groups.front()) {
            for (u32 i = 0; i < 8; ++i) shim::cells[copy.to / 2 + i].flying = 0;
            shim::on_write(copy.to, 16);
            memcpy(shim::shared + copy.to, copy.from, 16);
        }
        groups.erase(groups.begin());
    }
}

DEVICE void previous_done() { shim::current->waited = true; }
DEVICE void next_may_start() {}

DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32* words = shim::current->words;
    memcpy(words, a, 16);
    words[4] = b0;
    words[5] = b1;
    memcpy(words + 6, d, 16);
    shim::together("mma", [](shim::Fiber* lanes) {
        float a[16][16], b[16][8], d[16][8];
        for (u32 lane = 0; lane < 32; ++lane) {
            u32 g = lane / 4, t = lane % 4;
            const u32* words = lanes[lane].words;
            for (u32 i = 0; i < 8; ++i) a[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = shim::widened(words[i / 2], i % 2);
            for (u32 i = 0; i < 4; ++i) b[2 * t + i % 2 + 8 * (i / 2)][g] = shim::widened(words[4 + i / 2], i % 2);
            for (u32 i = 0; i < 4; ++i) memcpy(&d[g + 8 * (i / 2)][2 * t + i % 2], &words[6 + i], 4);
        }
        shim::add_products(shim::tensor_core, a, b, d);
        for (u32 lane = 0; lane < 32; ++lane) {
            u32 g = lane / 4, t = lane % 4;
            for (u32 i = 0; i < 4; ++i) memcpy(&lanes[lane].words[6 + i], &d[g + 8 * (i / 2)][2 * t + i % 2], 4);
        }
    });
    memcpy(d, words + 6, 16);
}

template <class T> T shuffle_xor(T value, int mask) {
    u32* words = shim::current->words;
    memcpy(words, &value, sizeof value);
    words[4] = static_cast<u32>(mask);
    shim::together("shuffle", [](shim::Fiber* lanes) {
        for (u32 lane = 0; lane < 32; ++lane) memcpy(lanes[lane].words + 2, lanes[lane ^ lanes[lane].words[4]].words, 8);
    });
    memcpy(&value, words + 2, sizeof value);
    return value;
}

DEVICE void barrier() {
    if (shim::waiting.size() + 1 < shim::n_threads) {
        shim::waiting.push_back(shim::current->index.x);
        return shim::yield();
    }
    ++shim::stretch;
    for (u32 thread : shim::waiting) shim::ready.push_back(thread);
    shim::waiting.clear();
}

DEVICE u64 multiply_high(u64 a, u64 b) { return static_cast<u64>((static_cast<unsigned __int128>(a) * b) >> 64); }

DEVICE u64 round_to_u64(float value) { return static_cast<u64>(llrintf(value)); }

DEVICE u32 bits_of(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}
DEVICE float float_of(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

DEVICE u32 pack_bfloat16(float low, float high) {
    auto rounded = [](float value) -> u32 {
        u32 bits = bits_of(value);
        return value != value ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
}

template <class T> void add_shared(Shared<T> to, T value) {
    T sum;
    shim::on_write(to.at, sizeof(T), true);
    memcpy(&sum, shim::shared + to.at, sizeof(T));
    sum += value;
    memcpy(shim::shared + to.at, &sum, sizeof(T));
}

// From here on, what the Python side calls.
namespace shim {

struct Argument {
    char kind;  // 'b' a buffer's address, 'i' an integer, 'f' a float
    u64 bits;
};

template <class T> struct Taken {
    static constexpr char kind = std::is_same_v<T, int> ? 'i' : 'f';
    static T from(u64 bits) {
        T value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
};
template <class T> struct Taken<Global<T>> {
    static constexpr char kind = 'b';
    static Global<T> from(u64 bits) { return global_at<T>(bits); }
};

// Kernel F with a launch's arguments, whose number and kinds are to be its own.
template <auto F> struct Call;
template <class... A, void (*F)(A...)> struct Call<F> {
    static inline std::tuple<A...> taken;

    static void take(const Argument* arguments, size_t count) {
        constexpr char kinds[] = {Taken<A>::kind..., 0};
        if (count != sizeof...(A)) return (void)(fault = "a wrong number of arguments");
        for (size_t i = 0; i < count; ++i)
            if (arguments[i].kind != kinds[i]) return (void)(fault = "argument " + std::to_string(i) + " is of a wrong kind");
        take(arguments, std::index_sequence_for<A...>{});
    }
    template <size_t... I> static void take(const Argument* arguments, std::index_sequence<I...>) {
        taken = {Taken<A>::from(arguments[I].bits)...};
    }
    static void run() { std::apply(F, taken); }
};

struct Known {
    const char* name;
    u32 n_threads;
    void (*run)();
    void (*take)(const Argument*, size_t);
};

template <auto F> Known known(const char* name, u32 n_threads) { return {name, n_threads, &Call<F>::run, &Call<F>::take}; }

extern const std::vector<Known> kernels;

}  // namespace shim

extern "C" {

void* shim_alloc(u64 n_bytes) {
    u64 size = (n_bytes + 255) / 256 * 256 + 256;
    void* memory = aligned_alloc(256, size);
    if (!memory) return nullptr;
    memset(memory, 0xff, size);
    shim::regions[reinterpret_cast<uintptr_t>(memory)] = n_bytes;
    return memory;
}

void shim_free(void* memory) {
    shim::regions.erase(reinterpret_cast<uintptr_t>(memory));
    free(memory);
}

// How tensor cores add in the launches that follow.
void shim_tensor_core(int step, int fraction) { shim::tensor_core = {step, fraction}; }

// Runs one launch; null, or what went wrong.
const char* shim_launch(const char* name, const u32* grid, u32 block, u32 smem, const shim::Argument* arguments,
                               u64 n_arguments, u64 seed) {
    shim::fault.clear();
    shim::current = nullptr;
    for (const auto& kernel : shim::kernels) {
        if (strcmp(kernel.name, name)) continue;
        shim::kernel_name = kernel.name;
        shim::body = kernel.run;
        kernel.take(arguments, n_arguments);
        if (smem > shim::MAX_SHARED) shim::fault = "more shared memory than a block can have";
        if (block != kernel.n_threads)
            shim::fault = "a block of " + std::to_string(block) + " threads, and it is written for " +
                          std::to_string(kernel.n_threads);
        if (!block || block > shim::MAX_THREADS || block % 32) shim::fault = "threads that are no whole warps, or too many";
        if (!shim::fault.empty()) shim::fault = std::string(name) + ": " + shim::fault;
        shim::grid_size = {grid[0], grid[1], grid[2]};
        shim::block_size = {block, 1, 1};
        shim::n_threads = block;
        shim::shared_size = smem;
        if (shim::fault.empty()) shim::run_grid(seed);
        return shim::fault.empty() ? nullptr : shim::fault.c_str();
    }
    shim::fault = std::string(name) + ": no such kernel";
    return shim::fault.c_str();
}
}
