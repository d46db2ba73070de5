// Logits to token, with the CPU sampler's numbers: penalties, temperature, top-k, top-p, min-p and the draw,
// or the greatest score. Weights are integers in units of 2^-40 of the greatest, so their sums are exact in
// any order, and the same logits, settings and random bits give the same token as there.
#include "rows.cuh"

constexpr u32 THREADS = 512, BINS = 1024, SUMS = 32, NOT_A_SCORE = 0xffffffffu;

// As packed by sampling.py.
struct Settings {
    u64 seed, index;
    u64 top_p;       // in units of 2^-63; 2^63 keeps all
    u64 min_weight;  // of what min_p keeps
    double presence_penalty, frequency_penalty;
    float scale;  // 1 / temperature
    float repetition_penalty;
    int do_sample, top_k /* 0 keeps all */, prompt_len, penalise;
};

// A number that is the smaller the greater the score is; 0 and -0 are one, and a NaN comes last.
DEVICE u32 descending(float score) {
    if (score != score) return NOT_A_SCORE;
    u32 bits = bits_of(score + 0.0f);
    return bits >> 31 ? bits : ~(bits | 1u << 31);
}

// The least integer that is not below `total` times `units` / 2^63.
DEVICE u64 share(u64 total, u64 units) {
    u64 high = multiply_high(total, units), low = total * units;
    return (high << 1 | low >> 63) + ((low << 1) != 0);
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011): 64 bits for the token at `position`.
DEVICE u64 random_bits(u64 seed, u64 index, u64 position) {
    u32 c[4] = {static_cast<u32>(index), static_cast<u32>(index >> 32), static_cast<u32>(position),
                static_cast<u32>(position >> 32)};
    u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        u64 a = static_cast<u64>(c[0]) * 0xD2511F53u, b = static_cast<u64>(c[2]) * 0xCD9E8D57u;
        u32 c1 = c[1], c3 = c[3];
        c[0] = static_cast<u32>(b >> 32) ^ c1 ^ k0;
        c[1] = static_cast<u32>(b);
        c[2] = static_cast<u32>(a >> 32) ^ c3 ^ k1;
        c[3] = static_cast<u32>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return static_cast<u64>(c[1]) << 32 | c[0];
}

// The tokens that may still be drawn.
struct Candidates {
    Global<const float> scores;
    u32 n;
    float max, scale;
    u64 last = ~0ull;  // greatest (score's key, id) that top-k and top-p keep
    u64 min_weight = 1;

    DEVICE u32 key(u32 id) const { return descending(scores[id]); }
    DEVICE u64 weight(u32 id) const {
        float score = scores[id];
        if ((static_cast<u64>(descending(score)) << 32 | id) > last) return 0;
        float scaled = (score - max) * scale;
        u64 weight = scaled == scaled ? round_to_u64(exponential(scaled) * 1099511627776.0f) : 0;
        return weight < min_weight ? 0 : weight;
    }
};

struct Scratch {
    // BINS; SUMS, of warps or of stretches of bins, and three results for all threads.
    Shared<u64> bins, sums;

    // The bin in which the sum of bins reaches `mass`, and how much of it is left for that bin. For all
    // threads.
    DEVICE u32 find(u64& mass) const {
        barrier();
        if (threadIdx.x < SUMS) {
            u64 sum = 0;
            for (u32 i = 0; i < BINS / SUMS; ++i) sum += bins[threadIdx.x * (BINS / SUMS) + i];
            sums[threadIdx.x] = sum;
        }
        barrier();
        if (threadIdx.x == 0) {
            u64 left = mass;
            u32 bin = 0;
            while (bin < BINS - BINS / SUMS && sums[bin / (BINS / SUMS)] < left) {
                left -= sums[bin / (BINS / SUMS)];
                bin += BINS / SUMS;
            }
            while (bin < BINS - 1 && bins[bin] < left) left -= bins[bin++];
            sums[SUMS] = bin;
            sums[SUMS + 1] = left;
        }
        barrier();
        u32 bin = static_cast<u32>(static_cast<u64>(sums[SUMS]));
        mass = sums[SUMS + 1];
        barrier();
        return bin;
    }

    // The key at which the weights, by ascending key, first sum to `mass`; what of it is left for that key. A
    // search by digits over keys low .. high.
    template <class Keys> DEVICE u32 key_at_mass(u32 n, u32 low, u32 high, u64& mass, Keys keys) const {
        while (low < high) {
            u32 range = high - low, shift = 0;
            while (range >> shift >= BINS) ++shift;
            for (u32 i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
            barrier();
            for (u32 id = threadIdx.x; id < n; id += THREADS) {
                u32 key;
                u64 weight = keys(id, key);
                if (weight && low <= key && key <= high) add_shared(bins + ((key - low) >> shift), weight);
            }
            low += find(mass) << shift;
            if (high - low > (1u << shift) - 1) high = low + ((1u << shift) - 1);
        }
        return low;
    }

    DEVICE u64 total(u64 value) const {
#pragma unroll
        for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
        if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = value;
        barrier();
        u64 sum = 0;
        for (u32 i = 0; i < THREADS / WARP; ++i) sum += sums[i];
        barrier();
        return sum;
    }

    DEVICE u64 least(u64 value) const {
#pragma unroll
        for (int mask = 16; mask; mask /= 2) {
            u64 other = shuffle_xor(value, mask);
            value = other < value ? other : value;
        }
        if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = value;
        barrier();
        for (u32 i = 0; i < THREADS / WARP; ++i) value = sums[i] < value ? static_cast<u64>(sums[i]) : value;
        barrier();
        return value;
    }
};

DEVICE u64 total_weight(const Scratch& scratch, const Candidates& candidates) {
    u64 sum = 0;
    for (u32 id = threadIdx.x; id < candidates.n; id += THREADS) sum += candidates.weight(id);
    return scratch.total(sum);
}

// Changes the scores of tokens that were there before, each once.
DEVICE void penalise(const Settings& settings, Global<float> scores, Global<const int> history,
                     int n_tokens) {
    for (int i = threadIdx.x; i < n_tokens; i += THREADS) {
        int token = history[i], count = 0;
        bool first = true;
        for (int j = 0; j < n_tokens; ++j)
            if (history[j] == token) {
                first = first && j >= i;
                count += j >= settings.prompt_len;
            }
        if (!first) continue;
        float score = scores[token] + 0.0f, penalty = settings.repetition_penalty;
        if (penalty != 1.0f) score = score < 0.0f ? score * penalty : score / penalty;
        if (count)
            score -= static_cast<float>(settings.presence_penalty + settings.frequency_penalty * count);
        scores[token] = score;
    }
    barrier();
}

// A draw among the tokens that the settings leave; `best` has the greatest score.
DEVICE u32 draw(const Settings& settings, const Scratch& scratch, Global<const float> scores, u32 n, u32 best,
                u64 bits) {
    Candidates candidates{scores, n, scores[best], settings.scale};
    u32 first_key = descending(scores[best]);
    const u32 infinitely_small = descending(-infinity());
    if (settings.top_k > 0 && static_cast<u32>(settings.top_k) < n) {
        u64 mass = settings.top_k;
        u32 key = scratch.key_at_mass(n, first_key, NOT_A_SCORE, mass, [&](u32 id, u32& key) {
            key = candidates.key(id);
            return 1ull;
        });
        candidates.last = static_cast<u64>(key) << 32 | 0xffffffffu;
    }
    if (settings.top_p < 1ull << 63) {
        u64 mass = share(total_weight(scratch, candidates), settings.top_p);
        if (mass == 0) mass = 1;
        u32 last_key = scratch.key_at_mass(n, first_key, infinitely_small, mass, [&](u32 id, u32& key) {
            key = candidates.key(id);
            return candidates.weight(id);
        });
        // Among equal scores the lower ids come first.
        u32 last_id = scratch.key_at_mass(n, 0, n - 1, mass, [&](u32 id, u32& key) {
            key = id;
            return candidates.key(id) == last_key ? candidates.weight(id) : 0;
        });
        candidates.last = static_cast<u64>(last_key) << 32 | last_id;
    }
    candidates.min_weight = settings.min_weight > 1 ? settings.min_weight : 1;

    // A thread has a stretch of ids, so that the inverse of the distribution is looked for in one of them.
    u32 stretch = (n + THREADS - 1) / THREADS, start = threadIdx.x * stretch;
    u32 end = start + stretch < n ? start + stretch : n;
    u64 sum = 0;
    for (u32 id = start; id < end; ++id) sum += candidates.weight(id);
    u64 total = scratch.total(sum);
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) scratch.bins[i] = i < THREADS ? sum : 0;
    u64 mass = multiply_high(bits, total) + 1;
    u32 thread = scratch.find(mass);
    if (threadIdx.x == thread) {
        u32 id = start;
        for (u64 weight; id + 1 < end && (weight = candidates.weight(id)) < mass; ++id) mass -= weight;
        scratch.sums[SUMS + 2] = id;
    }
    barrier();
    return static_cast<u32>(static_cast<u64>(scratch.sums[SUMS + 2]));
}

// Chooses the next token of every row from its logits (rows, stride), the first V of which count and which
// penalties change in place, and takes it in: as the row's token, at the next position, into `history` (rows,
// history_stride) and, for the host, into slot step % n_slots of `mailbox` (n_slots, rows). Where no score is
// finite the token is -1, and the row is idle from then on.
KERNEL(512, 1)
sample(Global<float> logits, int stride, int n_vocab, Global<const Settings> all_settings, Global<int> tokens,
       Global<int> positions, Global<int> history, int history_stride, Global<int> mailbox, int n_slots,
       Global<int> steps) {
    previous_done();
    next_may_start();
    u32 row = blockIdx.x, n = n_vocab;
    int position = positions[row];
    if (position < 0) return;
    Settings settings = all_settings[row];
    Global<float> scores = logits + static_cast<u64>(row) * stride;
    Global<int> past = history + static_cast<u64>(row) * history_stride;
    Scratch scratch{shared_at<u64>(0), shared_at<u64>(BINS * sizeof(u64))};
    if (settings.penalise) penalise(settings, scores, past, position + 1);

    u64 best = ~0ull;
#pragma unroll 4
    for (u32 id = threadIdx.x * 4; id < n; id += THREADS * 4) {
        Words four = load16(scores + id);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            u64 ranked = static_cast<u64>(descending(float_of(four.w[i]))) << 32 | (id + i);
            if (id + i < n) best = ranked < best ? ranked : best;
        }
    }
    best = scratch.least(best);
    u32 id = static_cast<u32>(best);
    int token = static_cast<int>(id);
    bool finite = (bits_of(scores[id]) & 0x7f800000u) != 0x7f800000u;
    if (!finite) {
        token = -1;
    } else if (settings.do_sample) {
        token =
            draw(settings, scratch, scores, n, id, random_bits(settings.seed, settings.index, position + 1));
    }
    barrier();
    if (threadIdx.x == 0) {
        int step = steps[row];
        mailbox[static_cast<u64>(step % n_slots) * gridDim.x + row] = token;
        steps[row] = step + 1;
        tokens[row] = token;
        positions[row] = token < 0 ? -1 : position + 1;
        if (token >= 0 && position + 1 < history_stride) past[position + 1] = token;
    }
}
