// Products for many rows: prompts. A block has 64 outputs and 64 rows; weights and activations of a group of
// 32 inputs are a stage of a ring in shared memory, filled by asynchronous copies some groups ahead. The
// numerics are those of matmul.cu: ranges, chains and sums.
#include "epilogue.cuh"
#include "fragments.cuh"

constexpr u32 OUTPUTS = 64, ROWS = 64;
constexpr int STAGES = 4;
constexpr u32 WEIGHT_BYTES = OUTPUTS * GROUP * sizeof(u16), ROW_BYTES = ROWS * GROUP * sizeof(u16);

// Rows beyond `rows`, up to a multiple of 64, are there in the operand, with any values.
template <int PARTS>
DEVICE void tiled_matmul(Global<const u16> weights, u32 groups, u32 warps_k, Global<const u16> operand,
                         u32 operand_stride, u64 operand_plane, u32 rows, const Epilogue& epilogue) {
    constexpr u32 STAGE = WEIGHT_BYTES + PARTS * ROW_BYTES;
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, g = lane / 4, t = lane % 4;
    u32 range = blockIdx.z * warps_k, ranges = gridDim.z * warps_k;
    u32 first = range_start(groups, range, ranges), last = range_start(groups, range + warps_k, ranges);
    u32 first_row = blockIdx.y * ROWS;

    auto fetch = [&](u32 group) {
        if (group < last) {
            u32 stage = group % STAGES * STAGE;
            u32 tile = blockIdx.x * 4 + thread / 64;
            copy16_async(
                shared_at<u16>(stage + thread * 16),
                weights + ((static_cast<u64>(tile) * groups + group) * TILE_GROUP + thread % 64 * 8));
#pragma unroll
            for (int p = 0; p < PARTS; ++p)
                copy16_async(
                    shared_at<u16>(stage + WEIGHT_BYTES + p * ROW_BYTES + thread * 16),
                    operand + (p * operand_plane + static_cast<u64>(first_row + thread / 4) * operand_stride +
                               group * GROUP + thread % 4 * 8));
        }
        copies_commit();
    };
    previous_done();
    next_may_start();
    for (int i = 0; i < STAGES - 1; ++i) fetch(first + i);

    // The warp's 16 outputs and 32 rows, in four tiles of 8 rows.
    u32 outputs = warp % 4, half = warp / 4;
    float total[4][4];
    Sums<PARTS> sums[4];
    clear(total);
    clear(sums);
    u32 end = first;
    auto next_range = [&](u32 group) {  // the first after `group` that is not empty
        while (end == group && end < last) end = range_start(groups, ++range, ranges);
    };
    next_range(first);
    for (u32 group = first; group < last; ++group) {
        copies_wait<STAGES - 2>();
        barrier();
        fetch(group + STAGES - 1);
        u32 stage = group % STAGES * STAGE;
        Words a[2];
#pragma unroll
        for (int step = 0; step < 2; ++step)
            a[step] = load16(shared_at<const u16>(stage + outputs * 1024 + (step * WARP + lane) * 16));
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int p = 0; p < PARTS; ++p)
                sums[n].add(p, a,
                            load16(shared_at<const u16>(stage + WEIGHT_BYTES + p * ROW_BYTES +
                                                        (half * 32 + n * 8 + g) * 64 + t * 16)));
        if (group + 1 == end) {
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[n][i] += sums[n].sum(i);
            clear(sums);
            next_range(end);
        }
    }
    copies_wait<0>();
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 row = first_row + half * 32 + n * 8 + 2 * t + i % 2;
            u32 output = blockIdx.x * OUTPUTS + outputs * TILE + g + i / 2 * 8;
            if (row < rows) epilogue.store(blockIdx.z, row, output, total[n][i]);
        }
}

#define TILED_MATMUL(parts_)                                                                             \
    KERNEL(256, 1)                                                                                       \
    tiled_matmul_##parts_(Global<const u16> weights, int groups, int warps_k, Global<const u16> operand, \
                          int operand_stride, int operand_plane, int rows, EPILOGUE_PARAMETERS) {        \
        tiled_matmul<parts_>(weights, groups, warps_k, operand, operand_stride,                          \
                             static_cast<u64>(operand_plane), rows, EPILOGUE);                           \
    }

TILED_MATMUL(1)
TILED_MATMUL(3)
