// Causal attention over blocks of keys and values, for prompts and decoding alike: a block of threads has up
// to 16 consecutive queries of one head, a prompt's tile or the one query of a decoded token, and 64 channels
// of their result.
//
// Positions go in runs of 128 counted from position 0. A warp takes a run: its scores, their maximum and
// their exponentials' sum, and the weighted values; the runs are merged in ascending order, as in
// FlashAttention (Dao et al., arXiv:2205.14135). So a query's result depends on its position alone.
#include "epilogue.cuh"
#include "fragments.cuh"
#include "rows.cuh"

constexpr u32 QUERIES = 16, RUN = 128, CHANNELS = 64, WARPS = 8;
constexpr u32 GROUPS = RUN / POSITIONS, COLUMNS = 8, COLUMN_TILES = POSITIONS / COLUMNS,
              VALUE_TILES = CHANNELS / COLUMNS;

// A lane's place in m16n8k16: rows g and g + 8, columns (of a result) or inputs (of an operand) by t.
struct Lane {
    u32 g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
};

// Consecutive queries of one head of one sequence, at positions `position` to `last`. `rows` (parts, rows,
// channels of all heads) is the operand that they are rows `first_row` and on of.
struct Tile {
    Global<const u16> rows;
    int stride;
    u64 plane;
    int first_row, count, position, sequence;
    u32 head, head_size, last;

    // Operand A of two steps: 32 channels from `channel` on, of one part; queries that are not there are
    // zeros.
    DEVICE void load(Words (&a)[2], int part, u32 channel) const {
        Lane lane;
        Words low = {{0, 0, 0, 0}}, high = {{0, 0, 0, 0}};
        Global<const u16> from = rows + (part * plane + static_cast<u64>(first_row + lane.g) * stride +
                                         head * head_size + channel + lane.t * 8);
        if (static_cast<int>(lane.g) < count) low = load16(from);
        if (static_cast<int>(lane.g) + 8 < count) high = load16(from + 8 * stride);
#pragma unroll
        for (int step = 0; step < 2; ++step)
            a[step] = {{low.w[2 * step], high.w[2 * step], low.w[2 * step + 1], high.w[2 * step + 1]}};
    }
    // The last position that the lane's query of either half may see.
    DEVICE u32 visible(int half) const {
        u32 own = position + Lane().g + half * 8;
        return own < last ? own : last;
    }
};

// What a run's 128 positions score, in a lane: score[group][j][2 h + e] is of query g + 8 h and position 32
// group + 8 t + 2 j + e. A lane has eight neighbouring positions of a group, so its weights meet one load of
// values.
using Scores = float[GROUPS][COLUMN_TILES][4];

DEVICE u32 position_in_run(u32 group, u32 j, u32 e) { return group * POSITIONS + Lane().t * 8 + 2 * j + e; }

// scale q k^T of a tile's queries and a block's 32 keys (position, channel).
template <int PARTS>
DEVICE void score_keys(float (&score)[COLUMN_TILES][4], const Tile& tile, Global<const u16> keys,
                       float scale) {
    Lane lane;
    Sums<PARTS> sums[COLUMN_TILES];
    clear(sums);
    for (u32 c = 0; c < tile.head_size; c += GROUP) {
        // Column g of tile j is position 8 (g / 2) + 2 j + g % 2: see Scores.
        Words key[COLUMN_TILES];
#pragma unroll
        for (u32 j = 0; j < COLUMN_TILES; ++j)
            key[j] = load16(keys + ((lane.g / 2 * 8 + 2 * j + lane.g % 2) * tile.head_size + c + lane.t * 8));
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            Words query[2];
            tile.load(query, p, c);
#pragma unroll
            for (u32 j = 0; j < COLUMN_TILES; ++j) sums[j].add(p, query, key[j]);
        }
    }
#pragma unroll
    for (u32 j = 0; j < COLUMN_TILES; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[j][i] = sums[j].sum(i) * scale;
}

// Turns the scores of the lane's query of one half into exponentials of what they lie below their maximum, 0
// for positions that it must not see; gives all lanes of the query that maximum and the exponentials' sum.
DEVICE void exponentials(Scores& score, int half, u32 start, u32 visible, float& greatest, float& total) {
    greatest = -infinity();
    total = 0.0f;
#pragma unroll
    for (u32 group = 0; group < GROUPS; ++group)
#pragma unroll
        for (u32 j = 0; j < COLUMN_TILES; ++j)
#pragma unroll
            for (u32 e = 0; e < 2; ++e) {
                float& s = score[group][j][2 * half + e];
                if (start + position_in_run(group, j, e) > visible) s = -infinity();
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
        for (u32 j = 0; j < COLUMN_TILES; ++j)
#pragma unroll
            for (u32 e = 0; e < 2; ++e) {
                float& s = score[group][j][2 * half + e];
                s = exponential(s - base);
                total += s;
            }
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) total += shuffle_xor(total, mask);
}

// The weights of a group as operand A of two steps, in parts: a result's columns are an operand's inputs.
template <int PARTS>
DEVICE void weight_parts(Words (&weights)[PARTS][2], const float (&score)[COLUMN_TILES][4]) {
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            // Words 0, 1: rows g and g + 8 of tile 2 step; 2, 3: of the tile after it.
            float low = score[2 * step + word / 2][word % 2 * 2];
            float high = score[2 * step + word / 2][word % 2 * 2 + 1];
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                u32 pair = pack_bfloat16(low, high);
                weights[p][step].w[word] = pair;
                low -= float_of(pair << 16);
                high -= float_of(pair & 0xffff0000u);
            }
        }
}

// A channel's values at the lane's eight positions from `at` on; what lies beyond `last`, a NaN perhaps, is
// 0.
DEVICE Words load_values(Global<const u16> from, u32 at, u32 last) {
    Words v = load16(from);
#pragma unroll
    for (u32 word = 0; word < 4; ++word) {
        if (at + 2 * word > last) v.w[word] = 0;
        else if (at + 2 * word == last) v.w[word] &= 0xffffu;
    }
    return v;
}

// sums += weights of a group times a block's values (channel, position), from `first_channel` on: channels
// are columns.
template <int PARTS>
DEVICE void weigh_values(Sums<PARTS> (&sums)[VALUE_TILES], const float (&score)[COLUMN_TILES][4],
                         const Tile& tile, Global<const u16> values, u32 first_channel, u32 at) {
    Lane lane;
    Words weights[PARTS][2];
    weight_parts(weights, score);
#pragma unroll
    for (u32 n = 0; n < VALUE_TILES; ++n) {
        u32 channel = first_channel + n * COLUMNS;
        if (channel >= tile.head_size) continue;
        Words v =
            load_values(values + ((channel + lane.g) * POSITIONS + lane.t * 8), at + lane.t * 8, tile.last);
#pragma unroll
        for (int p = 0; p < PARTS; ++p) sums[n].add(p, weights[p], v);
    }
}

// What the warps leave of their runs for merging: values (warp, query, channel), max and sum (warp, query).
struct Runs {
    Shared<float> values = shared_at<float>(0);
    Shared<float> max = shared_at<float>(WARPS * QUERIES * CHANNELS * sizeof(float));
    Shared<float> sum = max + WARPS * QUERIES;
};

// A warp's run, from position `start` on: softmax(scale q k^T) v, but for the division.
template <int PARTS>
DEVICE void attend_run(const Runs& runs, const Tile& tile, const Cache& cache, u32 start, u32 first_channel,
                       float scale) {
    Lane lane;
    u32 first_query = threadIdx.x / WARP * QUERIES;
    Scores score;
#pragma unroll
    for (u32 group = 0; group < GROUPS; ++group) {
        u32 at = start + group * POSITIONS;
        clear(score[group]);
        if (at > tile.last) continue;
        Global<const u16> keys =
            global_at<const u16>(cache.block(tile.sequence, at)) + cache.offset(0, tile.head);
        score_keys<PARTS>(score[group], tile, keys, scale);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float greatest, total;
        exponentials(score, half, start, tile.visible(half), greatest, total);
        if (lane.t == 0) {
            runs.max[first_query + half * 8 + lane.g] = greatest;
            runs.sum[first_query + half * 8 + lane.g] = total;
        }
    }
    Sums<PARTS> sums[VALUE_TILES];
    clear(sums);
#pragma unroll
    for (u32 group = 0; group < GROUPS; ++group) {
        u32 at = start + group * POSITIONS;
        if (at > tile.last) continue;
        Global<const u16> values =
            global_at<const u16>(cache.block(tile.sequence, at)) + cache.offset(1, tile.head);
        weigh_values(sums, score[group], tile, values, first_channel, at);
    }
#pragma unroll
    for (u32 n = 0; n < VALUE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 query = first_query + lane.g + i / 2 * 8;
            runs.values[query * CHANNELS + n * COLUMNS + 2 * lane.t + i % 2] = sums[n].sum(i);
        }
}

// Merges a run's maximum and sum into those before it; `before` and `after` are what the values of either are
// to be multiplied by.
DEVICE void merge(float& max, float& sum, float run_max, float run_sum, float& before, float& after) {
    float greater = max < run_max ? run_max : max;
    before = exponential(max - greater);
    after = exponential(run_max - greater);
    sum = fmaf(sum, before, run_sum * after);
    max = greater;
}

// Four channels of one query over all runs so far.
struct Merged {
    float max = -infinity(), sum = 0.0f, values[4] = {0.0f, 0.0f, 0.0f, 0.0f};

    DEVICE void add(const Runs& runs, u32 query, u32 channel) {
        float before, after;
        merge(max, sum, runs.max[query], runs.sum[query], before, after);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            values[i] = fmaf(values[i], before, runs.values[query * CHANNELS + channel + i] * after);
    }
};

// Where results go: (parts, rows, channels of all heads).
struct Attended {
    Global<u16> out;
    int parts;
    u64 plane;
};

template <int PARTS>
DEVICE void attend(const Tile& tile, const Cache& cache, float scale, const Attended& to) {
    u32 first_channel = blockIdx.z * CHANNELS, warp = threadIdx.x / WARP;
    u32 n_runs = tile.count ? tile.last / RUN + 1 : 0;
    Runs runs;
    Merged merged;
    u32 query = threadIdx.x / 16, channel = threadIdx.x % 16 * 4;
    for (u32 round = 0; round < n_runs; round += WARPS) {
        if (round + warp < n_runs)
            attend_run<PARTS>(runs, tile, cache, (round + warp) * RUN, first_channel, scale);
        barrier();
        for (u32 w = 0; w < WARPS && round + w < n_runs; ++w) {
            if ((round + w) * RUN > tile.position + query) break;
            merged.add(runs, w * QUERIES + query, channel);
        }
        barrier();
    }
    bool idle = tile.count == 0 && query == 0;  // a row that is not in use gets zeros
    u64 at = static_cast<u64>(tile.first_row + query) * tile.stride + tile.head * tile.head_size +
             first_channel + channel;
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        if ((static_cast<int>(query) < tile.count || idle) && first_channel + channel + i < tile.head_size)
            store_operand(to.out, to.parts, to.plane, at + i, idle ? 0.0f : merged.values[i] / merged.sum);
}

#define ATTENTION_PARAMETERS(type)                                                                     \
    Global<const type> queries, int stride, int plane, Global<const int> first_rows,                   \
        Global<const int> counts, Global<const int> positions, Global<const int> sequences,            \
        Global<const u64> tables, int table_stride, int layer, int n_head, int head_size, float scale, \
        Global<u16> out, int out_parts, int out_plane

#define ATTENTION(parts_)                                                                                    \
    KERNEL(256, 1) attention_##parts_(ATTENTION_PARAMETERS(u16)) {                                           \
        previous_done();                                                                                     \
        next_may_start();                                                                                    \
        int first_row = first_rows[blockIdx.x], count = counts[blockIdx.x], position = positions[first_row]; \
        if (position < 0) count = 0;                                                                         \
        u32 last = position + count - 1;                                                                     \
        attend<parts_>(Tile{queries, stride, static_cast<u64>(plane), first_row, count, position,            \
                            sequences[first_row], blockIdx.y, static_cast<u32>(head_size), last},            \
                       Cache{tables, table_stride, layer, n_head, head_size, 0}, scale,                      \
                       Attended{out, out_parts, static_cast<u64>(out_plane)});                               \
    }

ATTENTION(1)
ATTENTION(3)

// Over a block's 128 threads, for all of them; `of_warps` has a value a warp.
DEVICE float greatest_of_block(float value, Shared<float> of_warps) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        float other = shuffle_xor(value, mask);
        value = value < other ? other : value;
    }
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    barrier();
#pragma unroll
    for (u32 w = 0; w < RUN / WARP; ++w) {
        float other = of_warps[w];
        value = value < other ? other : value;
    }
    return value;
}

DEVICE float total_of_block(float value, Shared<float> of_warps) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
    barrier();
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    barrier();
    return (of_warps[0] + of_warps[1]) + (of_warps[2] + of_warps[3]);
}

// A head's key or value (head_size) in a float32 cache.
DEVICE Global<const float> cached(const Cache& cache, int values, int sequence, u32 position, u32 head) {
    return global_at<const float>(cache.block(sequence, position)) +
           (cache.offset(values, head) + position % POSITIONS * cache.head_size);
}

// The same over a float32 cache, as the reference: a query at a time, chains of fused multiply-adds; the runs
// and their merging are those above. A block has 128 threads, one for each position of a run, then one for
// each channel.
KERNEL(128, 1) attention_float32(ATTENTION_PARAMETERS(float)) {
    previous_done();
    next_may_start();
    Cache cache{tables, table_stride, layer, n_head, head_size, 1};
    u32 thread = threadIdx.x, head = blockIdx.y, HS = head_size, channel = blockIdx.z * RUN + thread;
    u32 row = first_rows[blockIdx.x];
    int first_position = positions[row], sequence = sequences[row], count = counts[blockIdx.x];
    Shared<float> weights = shared_at<float>(0), of_warps = weights + RUN;
    if (first_position < 0) count = 1;
    for (int query = 0; query < count; ++query) {
        u32 position = first_position + query;
        u64 at_head = static_cast<u64>(row + query) * stride + head * HS;
        float max = -infinity(), sum = 0.0f, value = 0.0f;
        for (u32 start = 0; first_position >= 0 && start <= position; start += RUN) {
            u32 at = start + thread;
            float score = -infinity();
            if (at <= position) {
                Global<const float> key = cached(cache, 0, sequence, at, head), own = queries + at_head;
                score = 0.0f;
                for (u32 c = 0; c < HS; ++c) score = fmaf(own[c], key[c], score);
                score *= scale;
            }
            float greatest = greatest_of_block(score, of_warps);
            float weight = exponential(score - greatest);
            weights[thread] = weight;
            float total = total_of_block(weight, of_warps);
            float run_value = 0.0f, before, after;
            if (channel < HS)
                for (u32 i = 0; i < RUN && start + i <= position; ++i)
                    run_value =
                        fmaf(weights[i], cached(cache, 1, sequence, start + i, head)[channel], run_value);
            merge(max, sum, greatest, total, before, after);
            value = fmaf(value, before, run_value * after);
            barrier();
        }
        if (channel < HS)
            store_operand(out, out_parts, static_cast<u64>(out_plane), at_head + channel,
                          first_position < 0 ? 0.0f : value / sum);
    }
}
