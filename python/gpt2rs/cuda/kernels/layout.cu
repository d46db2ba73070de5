// A checkpoint's matrices, laid out as the products take them. What arrives is float32 in the checkpoint's
// order; padding becomes zeros.
#include "fragments.cuh"
#include "rows.cuh"

// One side of a matrix, its outputs or its inputs. Blocks (heads, or the whole side) of `filled` indices of
// the checkpoint's `count` are padded to `block`; `stride` lies between two of them in the checkpoint's
// tensor.
struct Side {
    u32 block, filled, count;
    u64 stride;

    // Where index i, padding counted, lies from the tensor's start; false for padding.
    DEVICE bool find(u32 i, u64& place) const {
        u32 in_block = i % block, own = i / block * filled + in_block;
        place = own * stride;
        return in_block < filled && own < count;
    }
};

struct Checkpointed {
    Global<const float> tensor;
    Side outputs, inputs;

    DEVICE float at(u32 output, u32 input) const {
        u64 row, column;
        bool there = outputs.find(output, row);
        return inputs.find(input, column) && there ? tensor[row + column] : 0.0f;
    }
};

#define CHECKPOINTED_PARAMETERS                                                                        \
    Global<const float> tensor, int output_block, int output_filled, int n_outputs, int output_stride, \
        int input_block, int input_filled, int n_inputs, int input_stride
#define CHECKPOINTED                                                                                       \
    Checkpointed {                                                                                         \
        tensor,                                                                                            \
            {static_cast<u32>(output_block), static_cast<u32>(output_filled), static_cast<u32>(n_outputs), \
             static_cast<u64>(output_stride)},                                                             \
            {static_cast<u32>(input_block), static_cast<u32>(input_filled), static_cast<u32>(n_inputs),    \
             static_cast<u64>(input_stride)},                                                              \
    }

// `tiles` tiles of 16 outputs as bfloat16 in fragments, from tile `first_tile` of `to` on: a thread writes
// the 16 bytes that a lane of a product loads.
KERNEL(256, 1)
pack_fragments(CHECKPOINTED_PARAMETERS, Global<u16> to, int first_tile, int tiles, int groups) {
    previous_done();
    next_may_start();
    Checkpointed from = CHECKPOINTED;
    u64 unit = static_cast<u64>(blockIdx.x) * BLOCK + threadIdx.x;
    u32 lane = unit % WARP, step = unit / WARP % 2, group = unit / (2 * WARP) % groups;
    u32 tile = static_cast<u32>(unit / (2 * WARP) / groups);
    if (tile >= static_cast<u32>(tiles)) return;
    Words words;
#pragma unroll
    for (u32 w = 0; w < 4; ++w) {
        u32 output = tile * TILE + lane / 4 + w % 2 * 8,
            input = group * GROUP + lane % 4 * 8 + step * 4 + w / 2 * 2;
        words.w[w] = pack_bfloat16(from.at(output, input), from.at(output, input + 1));
    }
    store16(to + (static_cast<u64>(first_tile) * groups * TILE_GROUP + unit * 8), words);
}

// `n` outputs as float32 (outputs / 32, K, 32), from output `first` of `to` on: a thread writes one value.
KERNEL(256, 1) pack_columns(CHECKPOINTED_PARAMETERS, Global<float> to, int first, int n, int k) {
    previous_done();
    next_may_start();
    Checkpointed from = CHECKPOINTED;
    u64 place = static_cast<u64>(blockIdx.x) * BLOCK + threadIdx.x;
    if (place >= static_cast<u64>(n) * k) return;
    u32 output = static_cast<u32>(place / 32 / k) * 32 + place % 32, input = place / 32 % k;
    to[static_cast<u64>(first) * k + place] = from.at(output, input);
}
