// Everything that is not plain C++: PTX, intrinsics and memory. The host shim has a twin of each, so the
// kernels' own source also runs as C++ on a CPU, with every access checked.
#pragma once

#ifdef __CUDACC__

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define DEVICE __device__ __forceinline__

// Pointers into device memory and into shared memory; the shim's know their bounds.
template <class T> using Global = T*;
template <class T> using Shared = T*;

extern __shared__ __align__(128) unsigned char shared_memory[];

// `count` values at `offset` bytes of the block's dynamic shared memory.
template <class T> DEVICE Shared<T> shared_at(u32 offset) {
    return reinterpret_cast<T*>(shared_memory + offset);
}

// Memory at an address that a kernel read from memory.
template <class T> DEVICE Global<T> global_at(u64 address) { return reinterpret_cast<T*>(address); }

// The same memory as values of another type.
template <class T, class U> DEVICE Global<T> as(Global<U> from) { return reinterpret_cast<Global<T>>(from); }

// Four words, as one instruction moves them.
struct __align__(16) Words {
    u32 w[4];
};

DEVICE Words load16(const void* from) { return *static_cast<const Words*>(from); }

DEVICE void store16(void* to, Words words) { *static_cast<Words*>(to) = words; }

// Weights: read once by this block, so they need not stay in its first-level cache.
DEVICE Words load16_streamed(const void* from) {
    Words to;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.w[0]), "=r"(to.w[1]), "=r"(to.w[2]), "=r"(to.w[3])
                 : "l"(from));
    return to;
}

// Copies 16 bytes into shared memory while the thread goes on; they are there after copies_wait and a
// barrier.
DEVICE void copy16_async(void* to, const void* from) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

// Closes a group of this thread's copies.
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, but for those of its last LEFT groups.
template <int LEFT> DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Waits for the kernel before this one, where it may still be running. Only weights may be read before.
DEVICE void previous_done() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin, up to its own previous_done. After that of this kernel, so that no more than
// two overlap.
DEVICE void next_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// d (16, 8) += a (16, 16) b (16, 8) over a warp: bfloat16 products, float32 sums. Lane 4 g + t holds a: rows
// g and g + 8 (words 0, 1) of k 2 t, 2 t + 1, then the same of k + 8 (words 2, 3); b: k 2 t, 2 t + 1 and k +
// 8 of column g; d: columns 2 t, 2 t + 1 of row g, then of row g + 8.
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two float32 rounded to nearest even, the first in the low half.
DEVICE u32 pack_bfloat16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <class T> DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

DEVICE void barrier() { __syncthreads(); }

DEVICE u64 multiply_high(u64 a, u64 b) { return __umul64hi(a, b); }

// To the nearest integer, even among equals.
DEVICE u64 round_to_u64(float value) { return __float2ull_rn(value); }

DEVICE void add_shared(u32* to, u32 value) { atomicAdd(to, value); }
DEVICE void add_shared(u64* to, u64 value) { atomicAdd(to, value); }

DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }

#else
#include "shim.h"
#endif

constexpr u32 WARP = 32;

DEVICE float infinity() { return float_of(0x7f800000u); }
