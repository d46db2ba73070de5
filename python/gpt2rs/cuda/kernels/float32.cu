// Products with float32 weights: one chain of fused multiply-adds over ascending inputs for each output, as
// the reference. A block has 32 outputs and 8 rows, a thread for each pair; weights (N / 32, K, 32) and rows
// go through a ring in shared memory, 32 inputs a stage.
#include "epilogue.cuh"

constexpr u32 OUTPUTS = 32, ROWS = 8, STEP = 32;
constexpr int STAGES = 6;
constexpr u32 STAGE = (OUTPUTS + ROWS) * STEP * sizeof(float), ROWS_AT = OUTPUTS * STEP * sizeof(float);

// Rows beyond `rows`, up to a multiple of 8, are there in the operand, with any values.
KERNEL(256, 1)
matmul_float32(Global<const float> weights, int k, Global<const float> operand, int operand_stride, int rows,
               EPILOGUE_PARAMETERS) {
    u32 thread = threadIdx.x, output = thread % OUTPUTS, row = thread / OUTPUTS, steps = k / STEP;
    u32 first_row = blockIdx.y * ROWS;
    auto fetch = [&](u32 step) {
        if (step < steps) {
            u32 stage = step % STAGES * STAGE;
            copy16_async(shared_at<float>(stage + thread * 16),
                         weights + ((static_cast<u64>(blockIdx.x) * k + step * STEP) * OUTPUTS + thread * 4));
            if (thread < ROWS * STEP / 4)
                copy16_async(shared_at<float>(stage + ROWS_AT + thread * 16),
                             operand + (static_cast<u64>(first_row + thread / 8) * operand_stride +
                                        step * STEP + thread % 8 * 4));
        }
        copies_commit();
    };
    previous_done();
    next_may_start();
    for (int i = 0; i < STAGES - 1; ++i) fetch(i);
    float sum = 0.0f;
    for (u32 step = 0; step < steps; ++step) {
        copies_wait<STAGES - 2>();
        barrier();
        fetch(step + STAGES - 1);
        Shared<const float> w = shared_at<const float>(step % STAGES * STAGE);
        Shared<const float> x = shared_at<const float>(step % STAGES * STAGE + ROWS_AT) + row * STEP;
#pragma unroll
        for (u32 i = 0; i < STEP; i += 4) {
            Words four = load16(x + i);
#pragma unroll
            for (u32 j = 0; j < 4; ++j) sum = fmaf(w[(i + j) * OUTPUTS + output], float_of(four.w[j]), sum);
        }
    }
    copies_wait<0>();
    if (first_row + row < static_cast<u32>(rows))
        (EPILOGUE).store(blockIdx.z, first_row + row, blockIdx.x * OUTPUTS + output, sum);
}
