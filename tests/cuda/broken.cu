// Small kernels that are whole, or broken each in one way; test_shim.py says what is to be caught.
#include "rows.cuh"

// Reverses 64 values through shared memory, with what a kernel has to wait for, or without.
template <bool WAIT, bool BARRIER> DEVICE void reverse(Global<const float> from, Global<float> to) {
    previous_done();
    u32 i = threadIdx.x;
    Shared<float> held = shared_at<float>(0);
    if (i < 16) copy16_async(held + 4 * i, from + 4 * i);
    copies_commit();
    if (WAIT) copies_wait<0>();
    if (BARRIER) barrier();
    to[i] = held[63 - i];
}
KERNEL(64, 1) whole(Global<const float> from, Global<float> to) { reverse<true, true>(from, to); }
KERNEL(64, 1) no_wait(Global<const float> from, Global<float> to) { reverse<false, true>(from, to); }
KERNEL(64, 1) no_barrier(Global<const float> from, Global<float> to) { reverse<true, false>(from, to); }

KERNEL(64, 1) written_twice(Global<const float> from, Global<float> to) {
    previous_done();
    Shared<float> held = shared_at<float>(0);
    held[threadIdx.x % 32] = from[threadIdx.x];
    barrier();
    to[threadIdx.x] = held[threadIdx.x % 32];
}
KERNEL(64, 1) overwritten(Global<const float> from, Global<float> to) {
    previous_done();
    Shared<float> held = shared_at<float>(0);
    held[threadIdx.x] = from[threadIdx.x];
    barrier();
    to[threadIdx.x] = held[63 - threadIdx.x];
    held[threadIdx.x] = 0.0f;
}
KERNEL(64, 1) unwritten(Global<const float> from, Global<float> to) {
    previous_done();
    Shared<float> held = shared_at<float>(0);
    if (threadIdx.x < 63) held[threadIdx.x] = from[threadIdx.x];
    barrier();
    to[threadIdx.x] = held[threadIdx.x];
}
KERNEL(64, 1) beyond_shared(Global<const float> from, Global<float> to) {
    previous_done();
    Shared<float> held = shared_at<float>(0);
    held[threadIdx.x + 1] = from[threadIdx.x];
}
KERNEL(64, 1) beyond_input(Global<const float> from, Global<float> to) {
    previous_done();
    to[threadIdx.x] = from[threadIdx.x + 1];
}
KERNEL(64, 1) beyond_output(Global<const float> from, Global<float> to) {
    previous_done();
    to[63 + threadIdx.x / 63] = from[threadIdx.x];
}
KERNEL(64, 1) before_input(Global<const float> from, Global<float> to) {
    previous_done();
    to[threadIdx.x] = from[threadIdx.x - 1ull];
}
KERNEL(64, 1) not_aligned(Global<const float> from, Global<float> to) {
    previous_done();
    to[0] = float_of(load16(from + 1).w[0]);
}
KERNEL(64, 1) barrier_of_some(Global<const float> from, Global<float> to) {
    previous_done();
    if (threadIdx.x < 32) barrier();
    to[threadIdx.x] = from[threadIdx.x];
}
KERNEL(64, 1) shuffle_of_some(Global<const float> from, Global<float> to) {
    previous_done();
    to[threadIdx.x] = threadIdx.x == 5 ? 0.0f : shuffle_xor(from[threadIdx.x], 1);
}
KERNEL(64, 1) copy_left(Global<const float> from, Global<float> to) {
    previous_done();
    copy16_async(shared_at<float>(threadIdx.x / 16 * 64), from);
}
KERNEL(64, 1) too_early(Global<const float> from, Global<float> to) {
    float value = from[threadIdx.x];
    previous_done();
    to[threadIdx.x] = value;
}
KERNEL(64, 1) never_waits(Global<const float> from, Global<float>) { load16_streamed(from); }

// d (16, 8) += a (16, 16) b (16, 8) of bfloat16 in rows.
KERNEL(32, 1) product(Global<const u32> a, Global<const u32> b, Global<float> d) {
    previous_done();
    u32 g = threadIdx.x / 4, t = threadIdx.x % 4;
    float sums[4];
    for (u32 i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    u32 words[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    mma(sums, words, b[g * 8 + t], b[g * 8 + t + 4]);
    for (u32 i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
