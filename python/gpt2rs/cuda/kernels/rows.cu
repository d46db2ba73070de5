// Kernels over single rows: the embedding, LayerNorm for rows too many or too long for a product's own
// prologue, and copies of cache blocks.
#include "fragments.cuh"
#include "rows.cuh"

// x (rows, C) = wte[token] + wpe[position]; zeros for a row that is not in use, whose position is below 0.
// wte is the LM head's matrix: in fragments of bfloat16, or (V / 32, K, 32) float32 where `wide`.
KERNEL(256, 1)
embed(Global<const int> tokens, Global<const int> positions, Global<const u16> wte, int wide, int k,
      Global<const float> wpe, Global<float> x, int C) {
    previous_done();
    next_may_start();
    u32 row = blockIdx.x;
    int position = positions[row];
    u32 token = position < 0 ? 0 : tokens[row];
    for (u32 i = threadIdx.x; i < static_cast<u32>(C); i += BLOCK) {
        float value = 0.0f;
        if (position >= 0) {
            if (wide) value = as<const float>(wte)[(static_cast<u64>(token / 32) * k + i) * 32 + token % 32];
            else value = float_of(static_cast<u32>(wte[fragment_index(k / GROUP, token, i)]) << 16);
            value += wpe[static_cast<u64>(position) * C + i];
        }
        x[static_cast<u64>(row) * C + i] = value;
    }
}

// LayerNorm (Ba, Kiros and Hinton, arXiv:1607.06450) of the stream's rows, as an operand; x_out is the stream
// itself, where something was added to it. Row `first + i` of the stream is row i of the operand.
KERNEL(256, 1)
layer_norm(Global<const float> x, Global<const float> partials, int n_partials, int plane,
           Global<const float> added_bias, Global<float> x_out, Global<const float> gain,
           Global<const float> shift, float epsilon, int C, Global<u16> out, int parts, int stride,
           int out_plane, int first) {
    previous_done();
    next_may_start();
    Shared<float> lanes = shared_at<float>(0), sums = shared_at<float>(BLOCK * sizeof(float));
    Stream stream{x, partials, added_bias, n_partials, static_cast<u64>(plane), C};
    u32 row = first + blockIdx.x;
    float partial[1] = {0.0f};
    for (u32 i = threadIdx.x; i < static_cast<u32>(C); i += BLOCK) partial[0] += stream.at(row, i);
    add_rows(partial, 1, lanes, sums);
    float mean = partial[0] / static_cast<float>(C);
    partial[0] = 0.0f;
    for (u32 i = threadIdx.x; i < static_cast<u32>(C); i += BLOCK) {
        float difference = stream.at(row, i) - mean;
        partial[0] = fmaf(difference, difference, partial[0]);
    }
    barrier();
    add_rows(partial, 1, lanes, sums);
    float inverse = reciprocal_deviation(partial[0], C, epsilon);
    for (u32 i = threadIdx.x; i < static_cast<u32>(stride); i += BLOCK) {
        float value = 0.0f;
        if (i < static_cast<u32>(C)) {
            float summed = stream.at(row, i);
            if (n_partials) x_out[static_cast<u64>(row) * C + i] = summed;
            value = normalised(summed - mean, inverse, gain[i], shift[i]);
        }
        store_operand(out, parts, out_plane, static_cast<u64>(blockIdx.x) * stride + i, value);
    }
}

// Copies whole blocks of the cache: `pairs` has (to, from) addresses, one pair for each blockIdx.y.
KERNEL(256, 1) copy_blocks(Global<const u64> pairs, int n_words) {
    previous_done();
    next_may_start();
    Global<u32> to = global_at<u32>(pairs[2 * blockIdx.y]);
    Global<const u32> from = global_at<const u32>(pairs[2 * blockIdx.y + 1]);
    for (u64 i = static_cast<u64>(blockIdx.x) * BLOCK + threadIdx.x; i < static_cast<u64>(n_words);
         i += static_cast<u64>(gridDim.x) * BLOCK)
        to[i] = from[i];
}
