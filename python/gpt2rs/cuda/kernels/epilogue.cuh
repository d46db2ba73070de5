// Where the outputs of a product go.
#pragma once
#include "rows.cuh"

enum Mode : int {
    PLAIN,     // float32 at (split, row, output): partial sums, or logits
    QKV,       // bias; queries as an operand, keys and values into their blocks
    ACTIVATE,  // bias and activation, as an operand
};

// Positions of a block of keys and values.
constexpr u32 POSITIONS = 32;

// The cache of all sequences. A block holds 32 positions: (layer, keys or values, head), then as bfloat16
// keys (position, channel) and values (channel, position), as float32 both (position, channel). Channels of a
// head are padded to a multiple of 32. `tables` (sequences, table_stride) has the addresses of each
// sequence's blocks.
struct Cache {
    Global<const u64> tables;
    int table_stride, layer, n_head, head_size;
    int wide;  // float32

    DEVICE u64 block(int sequence, u32 position) const {
        return tables[static_cast<u64>(sequence) * table_stride + position / POSITIONS];
    }
    // Elements from the start of a block to keys (0) or values (1) of a head.
    DEVICE u64 offset(int values, u32 head) const {
        return ((static_cast<u64>(layer) * 2 + values) * n_head + head) * POSITIONS * head_size;
    }
    DEVICE void store(int values, int sequence, u32 position, u32 head, u32 channel, float value) const {
        u64 address = block(sequence, position);
        u32 place = position % POSITIONS;
        if (wide) {
            global_at<float>(address)[offset(values, head) + place * head_size + channel] = value;
        } else {
            u64 at = values ? channel * POSITIONS + place : place * head_size + channel;
            global_at<u16>(address)[offset(values, head) + at] = static_cast<u16>(pack_bfloat16(value, 0.0f));
        }
    }
};

struct Epilogue {
    int mode;
    Global<const float> bias;
    int n_outputs;  // those beyond are padding
    Global<u16> out;
    int parts, stride;
    u64 plane;
    int activation;
    Global<const int> positions, sequences;
    Cache cache;

    DEVICE void store(u32 split, u32 row, u32 output, float value) const {
        if (output >= static_cast<u32>(n_outputs)) return;
        u64 at = static_cast<u64>(row) * stride + output;
        if (mode == PLAIN) {
            as<float>(out)[split * plane + at] = value;
            return;
        }
        value += bias[output];
        if (mode == ACTIVATE) {
            store_operand(out, parts, plane, at, activate(activation, value));
            return;
        }
        u32 width = cache.n_head * cache.head_size;
        u32 which = output / width, channel = output % width;
        if (which == 0) {
            store_operand(out, parts, plane, static_cast<u64>(row) * stride + channel, value);
        } else if (positions[row] >= 0) {
            cache.store(which - 1, sequences[row], positions[row], channel / cache.head_size,
                        channel % cache.head_size, value);
        }
    }
};

// The same as a kernel's parameters. plane: elements between two planes, or between two splits' sums.
#define EPILOGUE_PARAMETERS                                                                                 \
    int mode, Global<const float> bias, int n_outputs, Global<u16> out, int parts, int stride, int plane,   \
        int activation, Global<const int> positions, Global<const int> sequences, Global<const u64> tables, \
        int table_stride, int layer, int n_head, int head_size, int wide
#define EPILOGUE                                                                                   \
    Epilogue {                                                                                     \
        mode, bias, n_outputs, out, parts, stride, static_cast<u64>(plane), activation, positions, \
            sequences, {                                                                           \
            tables, table_stride, layer, n_head, head_size, wide                                   \
        }                                                                                          \
    }
