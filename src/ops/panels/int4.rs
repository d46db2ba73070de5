//! Sixteen levels, closer together where weights are dense, and how weights are rounded to them.

use super::{Format, Int4Groups, NR, ZERO, reciprocal};

/// The levels, in units of a group's scale: the best (by Lloyd's method) for sixteen normally distributed weights whose
/// scale is chosen as [`best_scale`] does.
const LEVELS: [i8; 16] = [-127, -106, -82, -63, -48, -34, -21, -9, 3, 14, 26, 38, 51, 66, 84, 111];

/// Rows that share a scale.
const SCALED: usize = 16;

/// What the greatest weight is tried as, in units of the outermost level, of either sign.
const TRIES: [f32; 5] = [0.8, 0.9, 1.0, 1.1, 1.2];

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
    const GROUP: usize = 64;
    const GROUP_BYTES: usize = (Self::GROUP / 2 + Self::GROUP / SCALED) * NR;
    const PANEL_BYTES: usize = size_of::<f32>() * NR;

    fn encode(rows: &[[f32; NR]], panel: &mut [u8]) {
        let (groups, factors) = panel.split_at_mut(panel.len() - Self::PANEL_BYTES);
        let factors: &mut [f32] = bytemuck::cast_slice_mut(factors);
        groups.fill(0);
        let mut scales = vec![0.0; rows.len() / SCALED];
        for (column, factor) in factors.iter_mut().enumerate() {
            for (scale, rows) in scales.iter_mut().zip(rows.as_chunks().0) {
                *scale = best_scale(&weights(rows, column));
            }
            let finite = rows.iter().all(|row| row[column].is_finite());
            let greatest = scales.iter().fold(0.0_f32, |greatest, scale| greatest.max(scale.abs()));
            *factor = if finite { greatest / 127.0 } else { f32::NAN };
            for (i, (&scale, rows)) in scales.iter().zip(rows.as_chunks().0).enumerate() {
                let scale = (scale * reciprocal(*factor)).round_ties_even() as i8;
                let inverse = reciprocal(f32::from(scale) * *factor);
                let (group, part) = (i * SCALED / Self::GROUP, i % (Self::GROUP / SCALED));
                let group = &mut groups[group * Self::GROUP_BYTES..][..Self::GROUP_BYTES];
                let (group_scales, values) = group.split_at_mut(Self::GROUP / SCALED * NR);
                group_scales[part * NR + column] = scale.cast_unsigned();
                for (k, weight) in weights(rows, column).into_iter().enumerate() {
                    let (index, shift) = place(part * SCALED + k, column);
                    values[index] |= level(weight * inverse) << shift;
                }
            }
        }
    }

    fn encode_group(_: &[[f32; NR]], _: &mut [u8]) {
        unreachable!("a panel is encoded as a whole");
    }

    fn value(panel: &[u8], k: usize, column: usize) -> f32 {
        let (groups, factors) = panel.split_at(panel.len() - Self::PANEL_BYTES);
        let factors: &[f32] = bytemuck::cast_slice(factors);
        let group = &groups[k / Self::GROUP * Self::GROUP_BYTES..][..Self::GROUP_BYTES];
        let (scales, values) = group.split_at(Self::GROUP / SCALED * NR);
        let k = k % Self::GROUP;
        let (index, shift) = place(k, column);
        let level = LEVELS[usize::from(values[index] >> shift & 15)];
        let scale = scales[k / SCALED * NR + column].cast_signed();
        f32::from(level) * f32::from(scale) * factors[column]
    }
}

/// The byte of a group that holds row `k` of a column, and by how many bits it is shifted there.
fn place(k: usize, column: usize) -> (usize, usize) {
    let (step, half, row) = (k / 8, k % 8 / 4, k % 4);
    ((step * NR + column) * 4 + row, 4 * half)
}

fn weights(rows: &[[f32; NR]; SCALED], column: usize) -> [f32; SCALED] {
    rows.map(|row| row[column])
}

/// The index of the nearest level; NaN as the one nearest to zero.
fn level(value: f32) -> u8 {
    const MIDDLE: f32 = 1.5 * (1u32 << 23) as f32;
    // NaN has low bits that are zero, too.
    NEAREST[usize::from(((value.clamp(-127.0, 127.0) + MIDDLE).to_bits() as u8).wrapping_add(128))]
}

/// The scale by which the weights come out with the least squared error, of either sign: a level's opposite is none.
///
/// For each way to round tried, the best scale is by least squares; what it leaves of the squares is the less, the greater
/// (w . level)^2 / level^2.
fn best_scale(weights: &[f32; SCALED]) -> f32 {
    let greatest = weights.iter().fold(0.0_f32, |greatest, weight| greatest.max(weight.abs()));
    // In units of the greatest, whose squares are neither too small nor too large.
    let unit = reciprocal(greatest);
    let weights = weights.map(|weight| weight * unit);
    let mut best = (0.0, 0.0);
    for size in TRIES {
        for sign in [1.0, -1.0] {
            let inverse = sign * 127.0 / size;
            let (mut products, mut squares) = (0.0, 0.0);
            for weight in weights {
                let level = f32::from(LEVELS[usize::from(level(weight * inverse))]);
                products += weight * level;
                squares += level * level;
            }
            let explained = products * products / squares;
            if explained > best.0 {
                best = (explained, products / squares);
            }
        }
    }
    best.1 * greatest
}
