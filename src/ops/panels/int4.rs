//! Sixteen levels, closer together where weights are dense.

use super::{Format, Int4Groups, NR, ZERO, greatest};
use half::bf16;

/// The levels, in units of a group's scale.
const LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Magnitudes that the greatest weight of a group is tried as, of either sign.
const TRIES: [f32; 7] = [97.0, 103.0, 108.0, 113.0, 118.0, 122.0, 127.0];

/// The index of the level nearest to each integer from -128 on.
const NEAREST: [u8; 256] = {
    let mut nearest = [0; 256];
    let mut level = 0;
    let mut i = 0;
    while i < 256 {
        let value = i as i32 - 128;
        while level < 15 && (LEVELS[level + 1] as i32 - value).abs() < (LEVELS[level] as i32 - value).abs() {
            level += 1;
        }
        nearest[i] = level as u8;
        i += 1;
    }
    nearest
};

impl Int4Groups {
    /// The levels as unsigned bytes.
    pub const BYTES: [u8; 16] = {
        let mut bytes = [0; 16];
        let mut i = 0;
        while i < 16 {
            bytes[i] = (LEVELS[i] as i32 + ZERO) as u8;
            i += 1;
        }
        bytes
    };
}

impl Format for Int4Groups {
    const GROUP: usize = 32;
    const GROUP_BYTES: usize = (16 + 2) * NR;

    fn encode(rows: &[[f32; NR]], group: &mut [u8]) {
        let (values, scales) = group.split_at_mut(Self::GROUP / 2 * NR);
        values.fill(0);
        for (column, scale) in bytemuck::cast_slice_mut::<u8, bf16>(scales).iter_mut().enumerate() {
            let mut weights = [0.0; 32];
            for (weight, row) in weights.iter_mut().zip(rows) {
                *weight = row[column];
            }
            *scale = best_scale(&weights, greatest(rows, column));
            let inverse = super::reciprocal(scale.to_f32());
            for (k, &weight) in weights.iter().enumerate() {
                let (step, half, row) = (k / 8, k % 8 / 4, k % 4);
                values[(step * NR + column) * 4 + row] |= level(weight * inverse) << (4 * half);
            }
        }
    }

    fn decode(group: &[u8], rows: &mut [[f32; NR]]) {
        let (values, scales) = group.split_at(Self::GROUP / 2 * NR);
        let scales: &[bf16] = bytemuck::cast_slice(scales);
        for (k, row) in rows.iter_mut().enumerate() {
            let (step, half, place) = (k / 8, k % 8 / 4, k % 4);
            for (column, (value, scale)) in row.iter_mut().zip(scales).enumerate() {
                let byte = values[(step * NR + column) * 4 + place];
                *value = f32::from(LEVELS[usize::from(byte >> (4 * half) & 15)]) * scale.to_f32();
            }
        }
    }
}

/// The index of the nearest level; NaN as the one nearest to zero.
fn level(value: f32) -> u8 {
    const MIDDLE: f32 = 1.5 * (1u32 << 23) as f32;
    let integer = value.clamp(-127.0, 127.0);
    if integer.is_nan() {
        return NEAREST[128];
    }
    NEAREST[usize::from(((integer + MIDDLE).to_bits() as u8).wrapping_add(128))]
}

/// The scale, of those tried, by which the weights come out with the least squared error.
fn best_scale(weights: &[f32; 32], greatest: f32) -> bf16 {
    let mut best = (f32::INFINITY, bf16::from_f32(greatest / 127.0));
    for magnitude in TRIES {
        for sign in [1.0, -1.0] {
            let scale = bf16::from_f32(sign * greatest / magnitude);
            let inverse = super::reciprocal(scale.to_f32());
            let mut error = 0.0;
            for &weight in weights {
                let value = weight * inverse;
                let difference = value - f32::from(LEVELS[usize::from(level(value))]);
                error += difference * difference;
            }
            error *= scale.to_f32() * scale.to_f32();
            if error < best.0 {
                best = (error, scale);
            }
        }
    }
    best.1
}
