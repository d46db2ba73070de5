//! How a cache's blocks hold keys and values, and how they get there.

use super::{BLOCK, LINE};
use crate::ops::Rows;
use crate::ops::pairs::{Bf16, Bf16Dots, F32, Int8, Pairs};
use crate::ops::round::{quantised, rounded};
use crate::simd::{Kernel, LANES, Simd};
use bytemuck::Zeroable;
use half::bf16;
use std::marker::PhantomData;

/// How many rows ahead of its use one is asked for.
const AHEAD_ROWS: usize = 4;

/// How a cache holds keys and values.
pub trait Cached: Pairs {
    /// An element.
    type Element: bytemuck::Pod;
    /// Whether a position's key and value have a scale each.
    const SCALED: bool;
    /// Where the first and the second row are in a step, and how far a lane is from the next.
    const PLACES: ([usize; 2], usize);
    /// The elements of a vector, and their scale.
    fn store<S: Simd>(simd: S, x: &[f32], out: &mut [Self::Element]) -> f32;
}

impl Cached for F32 {
    type Element = f32;
    const SCALED: bool = false;
    const PLACES: ([usize; 2], usize) = ([0, LANES], 1);

    #[inline(always)]
    fn store<S: Simd>(_: S, x: &[f32], out: &mut [f32]) -> f32 {
        out.copy_from_slice(x);
        1.0
    }
}

macro_rules! cached_bf16 {
    ($($pairs:ty),+) => {
        $(impl Cached for $pairs {
            type Element = bf16;
            const SCALED: bool = false;
            const PLACES: ([usize; 2], usize) = ([1, 0], 2);

            #[inline(always)]
            fn store<S: Simd>(simd: S, x: &[f32], out: &mut [bf16]) -> f32 {
                rounded(simd, x, out);
                1.0
            }
        })+
    };
}

cached_bf16!(Bf16, Bf16Dots);

impl Cached for Int8 {
    type Element = i8;
    const SCALED: bool = true;
    const PLACES: ([usize; 2], usize) = ([0, 1], 2);

    #[inline(always)]
    fn store<S: Simd>(simd: S, x: &[f32], out: &mut [i8]) -> f32 {
        quantised(simd, x, out)
    }
}

/// Where the parts of a block of one head are, in bytes: keys from the start, then values, then scales.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) values: usize,
    pub(super) scales: usize,
    pub(super) end: usize,
}

impl Layout {
    #[inline(always)]
    pub(super) fn of<P: Cached>(hs: usize) -> Layout {
        let step = size_of::<P::Step>();
        // Whole cache lines each.
        let values = (hs.div_ceil(2) * step).next_multiple_of(LINE);
        let scales = values + BLOCK / 2 * hs.div_ceil(LANES) * step;
        let scaled = if P::SCALED { 2 * BLOCK * size_of::<f32>() } else { 0 };
        Layout { values, scales, end: (scales + scaled).next_multiple_of(LINE) }
    }
}

/// Bytes of a block of one head of size `hs`: whole cache lines. It must be zero when it is first used.
pub fn block_bytes<P: Cached>(hs: usize) -> usize {
    Layout::of::<P>(hs).end
}

/// Writes the keys and the values of consecutive positions of one head.
pub struct Append<'a, 'b, P> {
    /// (rows, HS).
    pub keys: Rows<'a>,
    /// (rows, HS).
    pub values: Rows<'a>,
    /// How many rows.
    pub rows: usize,
    /// The first one's place, counted from the first of `blocks`.
    pub first: usize,
    /// The head's blocks that are written.
    pub blocks: &'a mut [&'b mut [u8]],
    /// How they hold it.
    pub cached: PhantomData<P>,
}

impl<P: Cached> Kernel for Append<'_, '_, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let hs = self.keys.columns();
        let width = hs.next_multiple_of(LANES);
        let layout = Layout::of::<P>(hs);
        let ([first, second], gap) = P::PLACES;
        let step = size_of::<P::Step>() / size_of::<P::Element>();
        let mut stored = vec![P::Element::zeroed(); hs];
        for row in 0..self.rows {
            let (block, slot) = ((self.first + row) / BLOCK, (self.first + row) % BLOCK);
            // Rows are far apart, so that nothing else brings the next ones.
            let next = (row + AHEAD_ROWS).min(self.rows - 1);
            for line in (0..hs).step_by(LINE / size_of::<f32>()) {
                simd.prefetch(self.keys.row(next)[line..].as_ptr());
                simd.prefetch(self.values.row(next)[line..].as_ptr());
            }
            let (keys, rest) = self.blocks[block].split_at_mut(layout.values);
            let (values, scales) = rest.split_at_mut(layout.scales - layout.values);
            let keys: &mut [P::Element] = bytemuck::cast_slice_mut(keys);
            let values: &mut [P::Element] = bytemuck::cast_slice_mut(values);
            let key_scale = P::store(simd, self.keys.row(row), &mut stored);
            for (channels, step) in stored.chunks(2).zip(keys.chunks_exact_mut(step)) {
                step[first + gap * slot] = channels[0];
                if let [_, channel] = channels {
                    step[second + gap * slot] = *channel;
                }
            }
            let value_scale = P::store(simd, self.values.row(row), &mut stored);
            let place = if slot % 2 == 0 { first } else { second };
            let steps = values[slot / 2 * 2 * width..].chunks_exact_mut(step);
            for (channels, step) in stored.chunks(LANES).zip(steps) {
                for (lane, &channel) in channels.iter().enumerate() {
                    step[place + gap * lane] = channel;
                }
            }
            if P::SCALED {
                let scales: &mut [f32] = bytemuck::cast_slice_mut(scales);
                (scales[slot], scales[BLOCK + slot]) = (key_scale, value_scale);
            }
        }
    }
}
