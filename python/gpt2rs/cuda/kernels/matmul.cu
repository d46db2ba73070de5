// Products for a few rows: decoding. Weights stream from memory straight into registers, the first of them
// before the kernel before has ended, since they depend on nothing.
//
// A block has 8 warps, `8 / warps_k` tiles of 16 outputs, and up to 8 rows. The warps of a tile share out its
// ranges of K; where K is cut further, over blockIdx.z, the sums of the splits are added by whoever reads
// them.
#include "epilogue.cuh"
#include "fragments.cuh"

constexpr int ROWS = 8;
constexpr u32 WARPS = 8, TILE_SUMS = ROWS * TILE;
constexpr int AHEAD = 4;    // groups whose weights are under way
constexpr int COLUMNS = 7;  // values of a row that a thread normalises at most: rows of up to 1792

DEVICE u32 padded_stride(u32 k) { return k % 64 ? k : k + 32; }  // rows of an operand in different banks

struct NormInput {
    static constexpr bool NORM = true;
    Stream stream;
    Global<float> x_out;
    Global<const float> gain, shift;
    float epsilon;
};

struct OperandInput {
    static constexpr bool NORM = false;
    Global<const u16> rows;
    int stride;
    u64 plane;
};

// Normalises the rows into shared memory, (PARTS, row_room, padded stride).
template <int PARTS>
DEVICE void normalise(const NormInput& in, u32 first_row, int n_rows, u32 row_room, u32 k, u32 at) {
    u32 thread = threadIdx.x, C = in.stream.C, stride = padded_stride(k);
    Shared<float> lanes = shared_at<float>(at), sums = shared_at<float>(at + ROWS * BLOCK * sizeof(float));
    Shared<u16> operand = shared_at<u16>(0);
    float x[ROWS][COLUMNS], mean[ROWS], squares[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        mean[row] = 0.0f;
        if (row >= n_rows) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            if (thread + c * BLOCK < C) x[row][c] = in.stream.at(first_row + row, thread + c * BLOCK);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            if (thread + c * BLOCK < C) {
                mean[row] += x[row][c];
                if (in.stream.n_partials && blockIdx.x == 0)
                    in.x_out[static_cast<u64>(first_row + row) * C + thread + c * BLOCK] = x[row][c];
            }
    }
    add_rows(mean, n_rows, lanes, sums);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        squares[row] = 0.0f;
        if (row >= n_rows) continue;
        mean[row] /= static_cast<float>(in.stream.C);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            if (thread + c * BLOCK < C) {
                x[row][c] -= mean[row];  // in place: few registers are left
                squares[row] = fmaf(x[row][c], x[row][c], squares[row]);
            }
    }
    barrier();
    add_rows(squares, n_rows, lanes, sums);
    float inverse[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
        inverse[row] = reciprocal_deviation(squares[row], in.stream.C, in.epsilon);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        u32 i = thread + c * BLOCK;
        if (i >= k) continue;
        float gain = i < C ? in.gain[i] : 0.0f, shift = i < C ? in.shift[i] : 0.0f;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            if (row >= n_rows) continue;
            float value = i < C ? normalised(x[row][c], inverse[row], gain, shift) : 0.0f;
#pragma unroll
            for (int p = 0; p < PARTS; ++p) operand[(p * row_room + row) * stride + i] = next_part(value);
        }
    }
}

template <int PARTS, class Input>
DEVICE void row_matmul(Global<const u16> weights, u32 tiles, u32 groups, u32 warps_k, const Input& in,
                       int rows, const Epilogue& epilogue) {
    constexpr bool NORM = Input::NORM;
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, g = lane / 4, t = lane % 4;
    u32 tile = blockIdx.x * (WARPS / warps_k) + warp / warps_k;
    u32 range = blockIdx.z * warps_k + warp % warps_k, ranges = gridDim.z * warps_k;
    u32 first = range_start(groups, range, ranges),
        last = tile < tiles ? range_start(groups, range + 1, ranges) : first;

    Global<const u16> own = weights + (static_cast<u64>(tile) * groups * TILE_GROUP + lane * 8);
    Words ahead[AHEAD][2];
    auto fetch = [&](Words(&to)[2], u32 group) {
        to[0] = load16_streamed(own + static_cast<u64>(group) * TILE_GROUP);
        to[1] = load16_streamed(own + (static_cast<u64>(group) * TILE_GROUP + WARP * 8));
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (first + i < last) fetch(ahead[i], first + i);
    previous_done();
    next_may_start();

    u32 first_row = blockIdx.y * ROWS, k = groups * GROUP;
    int n_rows = rows - first_row < ROWS ? rows - first_row : ROWS;
    u32 row_room = rows < ROWS ? rows : ROWS, stride = padded_stride(k);
    u32 scratch = NORM ? PARTS * row_room * stride * sizeof(u16) : 0;
    if constexpr (NORM) {
        normalise<PARTS>(in, first_row, n_rows, row_room, k, scratch);
        barrier();
    }
    bool has_row = static_cast<int>(g) < n_rows;
    auto activations = [&](int part, u32 group) {
        Words b = {{0, 0, 0, 0}};
        u32 i = group * GROUP + t * 8;
        if (has_row) {
            if constexpr (NORM) b = load16(shared_at<const u16>(0) + ((part * row_room + g) * stride + i));
            else b = load16(in.rows + (part * in.plane + static_cast<u64>(first_row + g) * in.stride + i));
        }
        return b;
    };

    Sums<PARTS> sums;
    clear(sums.part);
    for (u32 start = first; start < last; start += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            u32 group = start + i;
            if (group >= last) break;
            Words a[2] = {ahead[i][0], ahead[i][1]};
            if (group + AHEAD < last) fetch(ahead[i], group + AHEAD);
#pragma unroll
            for (int p = 0; p < PARTS; ++p) sums.add(p, a, activations(p, group));
        }
    }

    // (warp, row, output of the tile)
    Shared<float> partial = shared_at<float>(scratch);
    if constexpr (NORM) barrier();
#pragma unroll
    for (int i = 0; i < 4; ++i)
        partial[warp * TILE_SUMS + (2 * t + i % 2) * TILE + g + i / 2 * 8] = sums.sum(i);
    barrier();
    for (u32 item = thread; item < TILE_SUMS * WARPS / warps_k; item += BLOCK) {
        u32 local = item / TILE_SUMS, row = item % TILE_SUMS / TILE,
            output = (blockIdx.x * (WARPS / warps_k) + local) * TILE + item % TILE;
        float sum = 0.0f;
        for (u32 w = 0; w < warps_k; ++w)
            sum += partial[(local * warps_k + w) * TILE_SUMS + item % TILE_SUMS];
        if (static_cast<int>(row) < n_rows) epilogue.store(blockIdx.z, first_row + row, output, sum);
    }
}

#define NORM_MATMUL(parts_)                                                                                 \
    KERNEL(256, 2)                                                                                          \
    norm_matmul_##parts_(Global<const u16> weights, int tiles, int groups, int warps_k,                     \
                         Global<const float> x, Global<const float> partials, int n_partials, int x_plane,  \
                         Global<const float> added_bias, Global<float> x_out, Global<const float> gain,     \
                         Global<const float> shift, float epsilon, int C, int rows, EPILOGUE_PARAMETERS) {  \
        Stream stream{x, partials, added_bias, n_partials, static_cast<u64>(x_plane), C};                   \
        row_matmul<parts_>(weights, tiles, groups, warps_k, NormInput{stream, x_out, gain, shift, epsilon}, \
                           rows, EPILOGUE);                                                                 \
    }

#define MATMUL(parts_)                                                                                   \
    KERNEL(256, 2)                                                                                       \
    matmul_##parts_(Global<const u16> weights, int tiles, int groups, int warps_k,                       \
                    Global<const u16> operand, int operand_stride, int operand_plane, int rows,          \
                    EPILOGUE_PARAMETERS) {                                                               \
        row_matmul<parts_>(weights, tiles, groups, warps_k,                                              \
                           OperandInput{operand, operand_stride, static_cast<u64>(operand_plane)}, rows, \
                           EPILOGUE);                                                                    \
    }

NORM_MATMUL(1)
NORM_MATMUL(3)
MATMUL(1)
MATMUL(3)
