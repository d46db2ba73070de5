// Causal attention over blocks of keys and values, for prompts and decoding alike: a block of threads has up to 16
// consecutive queries of one head, a prompt's tile or the one query of a decoded token.
//
// Positions go in runs of 128 counted from position 0. A warp takes a run: its scores, their maximum and their
// exponentials' sum, and the weighted values; the runs are merged in ascending order, as in FlashAttention (Dao et al.,
// arXiv:2205.14135). So a query's result depends on its position alone.
#include "epilogue.cuh"
#include "rows.cuh"

constexpr u32 QUERIES = 16, RUN = 128, CHANNELS = 64, WARPS = 8, GROUPS = RUN / POSITIONS;

// Merges a run's maximum and sum into those before it; `before` and `after` are what the values of either are to be
// multiplied by.
DEVICE void merge(float& max, float& sum, float run_max, float run_sum, float& before, float& after) {
    float greater = max < run_max ? run_max : max;
    before = exponential(max - greater);
    after = exponential(run_max - greater);
    sum = fmaf(sum, before, run_sum * after);
    max = greater;
}

struct Tiles {
    Global<const int> first_rows, counts, positions, sequences;
};

template <int PARTS>
DEVICE void attend(Global<const u16> queries, int stride, u64 plane, const Tiles& tiles, const Cache& cache, float scale,
                   Global<u16> out, int out_parts, u64 out_plane) {
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, g = lane / 4, t = lane % 4;
    previous_done();
    next_may_start();
    u32 head = blockIdx.y, first_channel = blockIdx.z * CHANNELS, HS = cache.head_size;
    int first_row = tiles.first_rows[blockIdx.x], count = tiles.counts[blockIdx.x];
    int position = tiles.positions[first_row], sequence = tiles.sequences[first_row];
    if (position < 0) count = 0;
    u32 last = position + count - 1, n_runs = count ? last / RUN + 1 : 0;

    Shared<float> run_values = shared_at<float>(0);  // (warp, query, channel)
    Shared<float> run_max = shared_at<float>(WARPS * QUERIES * CHANNELS * sizeof(float));  // (warp, query)
    Shared<float> run_sum = run_max + WARPS * QUERIES;
    // Of query thread / 16, channels thread % 16 * 4 and on, all runs so far.
    u32 query = thread / 16, channel = thread % 16 * 4;
    float max = -infinity(), sum = 0.0f, values[4] = {0.0f, 0.0f, 0.0f, 0.0f};

    for (u32 round = 0; round < n_runs; round += WARPS) {
        u32 start = (round + warp) * RUN;
        if (round + warp < n_runs) {
            float score[GROUPS][4][4];
#pragma unroll
            for (u32 group = 0; group < GROUPS; ++group) {
                u32 at = start + group * POSITIONS;
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) score[group][j][i] = 0.0f;
                if (at > last) continue;
                Global<const u16> keys = global_at<const u16>(cache.block(sequence, at)) + cache.offset(0, head);
                float part[PARTS][4][4];
#pragma unroll
                for (int p = 0; p < PARTS; ++p)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
#pragma unroll
                        for (int i = 0; i < 4; ++i) part[p][j][i] = 0.0f;
                for (u32 c = 0; c < HS; c += 32) {
                    Words key[4];
                    // Column n of tile j is position 8 (n / 2) + 2 j + n % 2, so that a lane's weights are 8 positions.
#pragma unroll
                    for (u32 j = 0; j < 4; ++j) key[j] = load16(keys + ((g / 2 * 8 + 2 * j + g % 2) * HS + c + t * 8));
#pragma unroll
                    for (int p = 0; p < PARTS; ++p) {
                        Words low = {{0, 0, 0, 0}}, high = {{0, 0, 0, 0}};
                        Global<const u16> from = queries + (p * plane + static_cast<u64>(first_row + g) * stride +
                                                            head * HS + c + t * 8);
                        if (static_cast<int>(g) < count) low = load16(from);
                        if (static_cast<int>(g) + 8 < count) high = load16(from + 8 * stride);
#pragma unroll
                        for (int step = 0; step < 2; ++step) {
                            u32 a[4] = {low.w[2 * step], high.w[2 * step], low.w[2 * step + 1], high.w[2 * step + 1]};
#pragma unroll
                            for (int j = 0; j < 4; ++j) mma(part[p][j], a, key[j].w[2 * step], key[j].w[2 * step + 1]);
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float whole = part[0][j][i];
                        if constexpr (PARTS == 3) whole += part[1][j][i] + part[2][j][i];
                        score[group][j][i] = whole * scale;
                    }
            }
            // Rows g and g + 8: maximum, exponentials, sum.
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 visible = position + g + half * 8;
                if (visible > last) visible = last;
                float greatest = -infinity(), total = 0.0f;
#pragma unroll
                for (u32 group = 0; group < GROUPS; ++group)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float& s = score[group][j][2 * half + e];
                            if (start + group * POSITIONS + t * 8 + 2 * j + e > visible) s = -infinity();
                            greatest = greatest < s ? s : greatest;
                        }
#pragma unroll
                for (int mask = 1; mask < 4; mask *= 2) {
                    float other = shuffle_xor(greatest, mask);
                    greatest = greatest < other ? other : greatest;
                }
                // A query that sees nothing of the run has a maximum of -inf; its weights are to be zeros.
                float base = greatest == -infinity() ? 0.0f : greatest;
#pragma unroll
                for (u32 group = 0; group < GROUPS; ++group)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float& s = score[group][j][2 * half + e];
                            s = exponential(s - base);
                            total += s;
                        }
#pragma unroll
                for (int mask = 1; mask < 4; mask *= 2) total += shuffle_xor(total, mask);
                if (t == 0) {
                    run_max[warp * QUERIES + half * 8 + g] = greatest;
                    run_sum[warp * QUERIES + half * 8 + g] = total;
                }
            }
            // Values: channels are the columns, in tiles of 8.
            float value[PARTS][CHANNELS / 8][4];
#pragma unroll
            for (int p = 0; p < PARTS; ++p)
#pragma unroll
                for (u32 n = 0; n < CHANNELS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) value[p][n][i] = 0.0f;
#pragma unroll
            for (u32 group = 0; group < GROUPS; ++group) {
                u32 at = start + group * POSITIONS;
                if (at > last) continue;
                u32 weights[PARTS][2][4];
#pragma unroll
                for (int step = 0; step < 2; ++step)
#pragma unroll
                    for (int word = 0; word < 4; ++word) {
                        // Words 0, 1: rows g and g + 8 of tile 2 step; 2, 3: of the tile after it.
                        float low = score[group][2 * step + word / 2][word % 2 * 2];
                        float high = score[group][2 * step + word / 2][word % 2 * 2 + 1];
#pragma unroll
                        for (int p = 0; p < PARTS; ++p) {
                            u32 pair = pack_bfloat16(low, high);
                            weights[p][step][word] = pair;
                            low -= float_of(pair << 16);
                            high -= float_of(pair & 0xffff0000u);
                        }
                    }
                Global<const u16> cached = global_at<const u16>(cache.block(sequence, at)) + cache.offset(1, head);
#pragma unroll
                for (u32 n = 0; n < CHANNELS / 8; ++n) {
                    if (first_channel + n * 8 >= HS) continue;
                    Words v = load16(cached + ((first_channel + n * 8 + g) * POSITIONS + t * 8));
                    // What lies beyond the last position, a NaN perhaps, never counts.
#pragma unroll
                    for (u32 word = 0; word < 4; ++word) {
                        if (at + t * 8 + 2 * word > last) v.w[word] = 0;
                        else if (at + t * 8 + 2 * word == last) v.w[word] &= 0xffffu;
                    }
#pragma unroll
                    for (int p = 0; p < PARTS; ++p)
#pragma unroll
                        for (int step = 0; step < 2; ++step)
                            mma(value[p][n], weights[p][step], v.w[2 * step], v.w[2 * step + 1]);
                }
            }
#pragma unroll
            for (u32 n = 0; n < CHANNELS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float whole = value[0][n][i];
                    if constexpr (PARTS == 3) whole += value[1][n][i] + value[2][n][i];
                    run_values[(warp * QUERIES + g + i / 2 * 8) * CHANNELS + n * 8 + 2 * t + i % 2] = whole;
                }
        }
        barrier();
        for (u32 w = 0; w < WARPS && round + w < n_runs; ++w) {
            if ((round + w) * RUN > position + query) break;
            float before, after;
            merge(max, sum, run_max[w * QUERIES + query], run_sum[w * QUERIES + query], before, after);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                values[i] = fmaf(values[i], before, run_values[(w * QUERIES + query) * CHANNELS + channel + i] * after);
        }
        barrier();
    }
    bool idle = count == 0 && query == 0;  // a row that is not in use gets zeros
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if ((static_cast<int>(query) < count || idle) && first_channel + channel + i < HS)
            store_operand(out, out_parts, out_plane,
                          static_cast<u64>(first_row + query) * stride + head * HS + first_channel + channel + i,
                          idle ? 0.0f : values[i] / sum);
}

#define ATTENTION_PARAMETERS(type)                                                                                     \
    Global<const type> queries, int stride, int plane, Global<const int> first_rows, Global<const int> counts,          \
        Global<const int> positions, Global<const int> sequences, Global<const u64> tables, int table_stride,           \
        int layer, int n_head, int head_size, float scale, Global<u16> out, int out_parts, int out_plane

#define ATTENTION(parts_)                                                                                              \
    KERNEL(256, 1) attention_##parts_(ATTENTION_PARAMETERS(u16)) {                                                     \
        attend<parts_>(queries, stride, static_cast<u64>(plane), Tiles{first_rows, counts, positions, sequences},       \
                       Cache{tables, table_stride, layer, n_head, head_size, 0}, scale, out, out_parts,                \
                       static_cast<u64>(out_plane));                                                                    \
    }

ATTENTION(1)
ATTENTION(3)

// The same over a float32 cache, as the reference: a query at a time, chains of fused multiply-adds; the runs and their
// merging are those above. A block has 128 threads, one for each position of a run, then one for each channel.
KERNEL(128, 1) attention_float32(ATTENTION_PARAMETERS(float)) {
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    previous_done();
    next_may_start();
    Cache cache{tables, table_stride, layer, n_head, head_size, 1};
    u32 head = blockIdx.y, HS = head_size, channel = blockIdx.z * RUN + thread;
    u32 row = first_rows[blockIdx.x];
    int first_position = positions[row], sequence = sequences[row], count = counts[blockIdx.x];
    Shared<float> weights = shared_at<float>(0), of_warps = weights + RUN;
    if (first_position < 0) count = 1;
    for (int query = 0; query < count; ++query) {
        u32 position = first_position + query;
        float max = -infinity(), sum = 0.0f, value = 0.0f;
        for (u32 start = 0; first_position >= 0 && start <= position; start += RUN) {
            u32 at = start + thread;
            float score = -infinity();
            if (at <= position) {
                Global<const float> key = global_at<const float>(cache.block(sequence, at)) + (cache.offset(0, head) + at % POSITIONS * HS);
                Global<const float> own = queries + (static_cast<u64>(row + query) * stride + head * HS);
                score = 0.0f;
                for (u32 c = 0; c < HS; ++c) score = fmaf(own[c], key[c], score);
                score *= scale;
            }
            float greatest = score;
            for (int mask = 16; mask; mask /= 2) {
                float other = shuffle_xor(greatest, mask);
                greatest = greatest < other ? other : greatest;
            }
            if (lane == 0) of_warps[warp] = greatest;
            barrier();
            for (u32 w = 0; w < RUN / WARP; ++w) greatest = greatest < of_warps[w] ? static_cast<float>(of_warps[w]) : greatest;
            float weight = exponential(score - greatest), total = weight;
            weights[thread] = weight;
            for (int mask = 16; mask; mask /= 2) total += shuffle_xor(total, mask);
            barrier();
            if (lane == 0) of_warps[warp] = total;
            barrier();
            total = (of_warps[0] + of_warps[1]) + (of_warps[2] + of_warps[3]);
            float run_value = 0.0f, before, after;
            if (channel < HS)
                for (u32 i = 0; i < RUN && start + i <= position; ++i)
                    run_value = fmaf(weights[i], global_at<const float>(cache.block(sequence, start + i))[cache.offset(1, head) + (start + i) % POSITIONS * HS + channel], run_value);
            merge(max, sum, greatest, total, before, after);
            value = fmaf(value, before, run_value * after);
            barrier();
        }
        if (channel < HS)
            store_operand(out, out_parts, static_cast<u64>(out_plane),
                          static_cast<u64>(row + query) * stride + head * HS + channel,
                          first_position < 0 ? 0.0f : value / sum);
    }
}
