// Weights as the tensor cores take them.
//
// A matrix of N outputs and K inputs, padded with zeros, is cut into tiles of 16 outputs and groups of 32
// inputs. A group of a tile is two operands A of m16n8k16, 1 KB in the order in which a warp's lanes load it,
// 16 bytes each. Which input sits at which k of the instruction is free as long as both operands agree: here
// lane 4 g + t has inputs 8 t .. 8 t + 7 of the group, four for either step, so that a lane takes its share
// of an activation row in one load, too.
//
// One numerics plan for every product of a matrix: its groups are cut into `ranges`, as many as the matrix
// alone decides; each is one chain of mma from zero for each part of the activations, (first + (second +
// third)) is its sum, and the sums are added in ascending order. Which warp or kernel computes a range makes
// no difference.
#pragma once
#include "prim.cuh"

constexpr u32 GROUP = 32, TILE = 16, TILE_GROUP = GROUP * TILE;

DEVICE u32 range_start(u32 groups, u32 range, u32 ranges) {
    return static_cast<u32>(static_cast<u64>(groups) * range / ranges);
}

// Element (output, input) of a matrix in fragments.
DEVICE u64 fragment_index(u32 groups, u32 output, u32 input) {
    u32 row = output % TILE, k = input % GROUP;
    u32 lane = row % 8 * 4 + k / 8, step = k / 4 % 2, word = k / 2 % 2 * 2 + row / 8;
    return (static_cast<u64>(output / TILE) * groups + input / GROUP) * TILE_GROUP +
           (step * WARP + lane) * 8 + word * 2 + k % 2;
}

template <u32 N> DEVICE void clear(float (&values)[N][4]) {
#pragma unroll
    for (u32 n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[n][i] = 0.0f;
}

// A tile of sums: one chain for each part of the activations.
template <int PARTS> struct Sums {
    float part[PARTS][4];

    // One group of a part: weights of both steps, and a row's 16 bytes.
    DEVICE void add(int p, const Words (&a)[2], const Words& b) {
        mma(part[p], a[0].w, b.w[0], b.w[1]);
        mma(part[p], a[1].w, b.w[2], b.w[3]);
    }
    DEVICE float sum(int i) const {
        if constexpr (PARTS == 1) return part[0][i];
        else return part[0][i] + (part[1][i] + part[2][i]);
    }
};

template <u32 N, int PARTS> DEVICE void clear(Sums<PARTS> (&sums)[N]) {
#pragma unroll
    for (u32 n = 0; n < N; ++n) clear(sums[n].part);
}
