// Does a column of an MMA, or a row, depend on where it stands? PTX leaves the order of the sums inside an MMA open, so a
// row of a batch keeps its bits only if the hardware computes the same column alike in each of the eight places, and a
// query of attention only if it computes the same row alike in each of the sixteen.
#include "prim.cuh"

// Block i multiplies a chain of n_steps matrices (16, 16) into (16, 8), of which column `place` is always the same and the
// others are not; for place 0 to 7. a: the matrices as lanes hold them, 4 words a lane. column: its 8 words a step.
// others: 2 words a lane and step, of columns that change with the place. out (blocks, 8, 16) float32: the column's sums.
KERNEL(32, 1) columns(Global<const u32> a, Global<const u32> column, Global<const u32> others, Global<float> out,
                      int n_steps) {
    previous_done();
    next_may_start();
    u32 lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (u32 place = 0; place < 8; ++place) {
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (u32 step = 0; step < static_cast<u32>(n_steps); ++step) {
            u64 at = static_cast<u64>(blockIdx.x) * n_steps + step;
            u32 words[4];
            for (u32 i = 0; i < 4; ++i) words[i] = a[(at * WARP + lane) * 4 + i];
            u64 other = ((at + place) % (static_cast<u64>(gridDim.x) * n_steps) * WARP + lane) * 2;
            u32 b0 = g == place ? column[at * 8 + t] : others[other];
            u32 b1 = g == place ? column[at * 8 + 4 + t] : others[other + 1];
            mma(sums, words, b0, b1);
        }
        if (t == place / 2) {
            u64 row = (static_cast<u64>(blockIdx.x) * 8 + place) * 16;
            out[row + g] = place % 2 ? sums[1] : sums[0];
            out[row + g + 8] = place % 2 ? sums[3] : sums[2];
        }
    }
}

// The same of rows: of a chain of matrices (16, 16), the row `place` is always the same and the others are not; for place
// 0 to 15. row: its 8 words a step. others: 4 words a lane and step. b: the matrices (16, 8) as lanes hold them, 2 words a
// lane. out (blocks, 16, 8) float32: the row's sums.
KERNEL(32, 1) rows(Global<const u32> b, Global<const u32> row, Global<const u32> others, Global<float> out, int n_steps) {
    previous_done();
    next_may_start();
    u32 lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (u32 place = 0; place < 16; ++place) {
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (u32 step = 0; step < static_cast<u32>(n_steps); ++step) {
            u64 at = static_cast<u64>(blockIdx.x) * n_steps + step;
            u64 other = ((at + place) % (static_cast<u64>(gridDim.x) * n_steps) * WARP + lane) * 4;
            // Words 0 and 2 are of row g, words 1 and 3 of row g + 8; words 2 and 3 of the second half of k.
            u32 words[4];
            for (u32 i = 0; i < 4; ++i)
                words[i] = g + 8 * (i % 2) == place ? row[at * 8 + 4 * (i / 2) + t] : others[other + i];
            mma(sums, words, b[(at * WARP + lane) * 2], b[(at * WARP + lane) * 2 + 1]);
        }
        if (g == place % 8) {
            u64 to = (static_cast<u64>(blockIdx.x) * 16 + place) * 8 + 2 * t;
            out[to] = place < 8 ? sums[0] : sums[2];
            out[to + 1] = place < 8 ? sums[1] : sums[3];
        }
    }
}
