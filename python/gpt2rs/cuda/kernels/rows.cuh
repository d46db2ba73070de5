// What kernels share: how activations are stored, elementary functions, LayerNorm.
#pragma once
#include "prim.cuh"

constexpr u32 BLOCK = 256;
constexpr int MAX_PARTIALS = 4;

// A row of activations that enters a product is stored in `parts` planes: 0, as float32; or 1 or 3, each of
// bfloat16, whose sum is the value rounded to 8 bits, or the value itself (8 bits a part). A product of two
// bfloat16 is exact in float32, so three parts times a bfloat16 weight make the product with the float32
// activation.
constexpr u32 FLOAT32 = 0;

// The bfloat16 nearest to the value, and what is left of the value.
DEVICE u16 next_part(float& value) {
    u32 bits = pack_bfloat16(value, 0.0f);
    value -= float_of(bits << 16);
    return static_cast<u16>(bits);
}

// Element `at` of an operand whose planes have `plane` elements each.
DEVICE void store_operand(Global<u16> to, u32 parts, u64 plane, u64 at, float value) {
    if (parts == FLOAT32) as<float>(to)[at] = value;
    for (u32 part = 0; part < parts; ++part) to[part * plane + at] = next_part(value);
}

// e^x to 2 units in the last place, by the polynomial and with the bits of the CPU's `exp_lanes`; 0 below
// -87.33654.
DEVICE float exponential(float x) {
    const float highest = 88.37626f, magic = 12582912.0f;
    float clamped = highest < x ? highest : x;
    float shifted = fmaf(clamped, 1.44269504f, magic);
    float n = shifted - magic;
    float r = fmaf(n, -0.6933594f, clamped);
    r = fmaf(n, 2.1219444e-4f, r);
    float p = 1.3814592e-3f;
    p = fmaf(p, r, 8.368719e-3f);
    p = fmaf(p, r, 4.166839e-2f);
    p = fmaf(p, r, 1.6666521e-1f);
    p = fmaf(p, r, 4.9999994e-1f);
    p = fmaf(r * r, p, r + 1.0f);
    float result = clamped < -87.33654f ? 0.0f : float_of(bits_of(p) + (bits_of(shifted) << 23));
    return clamped < infinity() ? result : clamped;
}

enum Activation : int { GELU_NEW, GELU, RELU, SILU };

// x Phi(x), by the CPU's polynomial for the normal distribution's tail.
DEVICE float gelu(float x) {
    float magnitude = x > 0.0f - x ? x : 0.0f - x;
    float t = 1.0f / fmaf(magnitude, 0.2316419f, 1.0f);
    float q = -7.007066e-2f;
    q = fmaf(q, t, 2.4617136e-1f);
    q = fmaf(q, t, -1.989591e-1f);
    q = fmaf(q, t, 2.2266383e-1f);
    q = fmaf(q, t, 1.4990103e-2f);
    q = fmaf(q, t, 1.0218857e-1f);
    q = fmaf(q, t, 9.049933e-2f);
    q = fmaf(q, t, 9.251665e-2f);
    float tail = (t * q) * exponential((x * x) * -0.5f);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

DEVICE float activate(int activation, float x) {
    if (activation == GELU) return gelu(x);
    if (activation == RELU) return 0.0f > x ? 0.0f : x;
    const float twice = 1.595769f;  // 2 sqrt(2 / pi)
    float exponent = activation == SILU ? 0.0f - x : fmaf(x * x, -twice * 0.044715f, -twice) * x;
    return x / (1.0f + exponential(exponent));
}

// The residual stream (rows, C), and what is to be added to it: the sum of partial products (n_partials,
// rows, C), in their order, and the bias (C,) of that product. The sum is stored as the stream goes on, once
// for all readers.
struct Stream {
    Global<const float> x, partials, bias;
    int n_partials;
    u64 plane;
    int C;

    DEVICE float at(u32 row, u32 i) const {
        u64 index = static_cast<u64>(row) * C + i;
        float value = x[index];
        if (n_partials == 0) return value;
        float sum = partials[index];
#pragma unroll
        for (int p = 1; p < MAX_PARTIALS; ++p)
            if (p < n_partials) sum += partials[p * plane + index];
        return value + (sum + bias[i]);
    }
};

// Adds up rows of which thread i of 256 brings the sum of values i, i + 256, ...: one tree, whatever the row.
// Gives all threads all sums. `lanes` has 256 ROWS values, `sums` ROWS.
template <int ROWS>
DEVICE void add_rows(float (&partial)[ROWS], int n_rows, Shared<float> lanes, Shared<float> sums) {
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
        if (row < n_rows) lanes[row * BLOCK + thread] = partial[row];
    barrier();
    if (static_cast<int>(warp) < n_rows) {
        float part[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) part[i] = lanes[warp * BLOCK + i * WARP + lane];
        float sum = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
#pragma unroll
        for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane == 0) sums[warp] = sum;
    }
    barrier();
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
        if (row < n_rows) partial[row] = sums[row];
}

DEVICE float reciprocal_deviation(float squares, int C, float epsilon) {
    return 1.0f / sqrtf(squares / static_cast<float>(C) + epsilon);
}

// difference: from the row's mean.
DEVICE float normalised(float difference, float inverse, float gain, float shift) {
    return fmaf(difference * inverse, gain, shift);
}
