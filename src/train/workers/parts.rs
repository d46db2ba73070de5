//! How arrays and units of work are cut into one part a thread.

use crate::ops::cross_entropy::BLOCK;
use crate::ops::panels::NR;
use crate::pool::share;
use std::ops::Range;

/// Each thread's columns: whole panels.
pub fn panels(n: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
    let count = n.div_ceil(NR);
    (0..threads).map(move |i| {
        let panels = share(count, threads, i);
        (panels.start * NR).min(n)..(panels.end * NR).min(n)
    })
}

/// Each thread's rows of the vocabulary: whole blocks.
pub fn vocabulary(v: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
    let count = v.div_ceil(BLOCK);
    (0..threads).map(move |i| {
        let blocks = share(count, threads, i);
        (blocks.start * BLOCK).min(v)..(blocks.end * BLOCK).min(v)
    })
}

/// Rows as ranges of values.
pub fn times(rows: impl Iterator<Item = Range<usize>>, stride: usize) -> impl Iterator<Item = Range<usize>> {
    rows.map(move |rows| rows.start * stride..rows.end * stride)
}

/// These neighbouring ranges of `values`, from the first one on.
pub fn cut<T>(values: &mut [T], ranges: impl IntoIterator<Item = Range<usize>>) -> Vec<&mut [T]> {
    let mut rest = values;
    let mut parts = Vec::new();
    for range in ranges {
        let (part, after) = rest.split_at_mut(range.len().min(rest.len()));
        rest = after;
        parts.push(part);
    }
    parts
}

/// Two of the tensors, in the order of their places.
pub fn two_of<'a>(
    values: &'a mut [f32],
    first: &Range<usize>,
    second: &Range<usize>,
) -> (&'a mut [f32], &'a mut [f32]) {
    let (before, behind) = values.split_at_mut(second.start);
    (&mut before[first.clone()], &mut behind[..second.len()])
}

/// Units of equal cost, in order, to the threads.
pub fn deal<U, S>(units: Vec<U>, scratch: &mut [S]) -> Vec<(Vec<U>, &mut S)> {
    let (n, count) = (scratch.len(), units.len());
    let mut units = units.into_iter();
    let mut parts = Vec::with_capacity(n);
    for (i, scratch) in scratch.iter_mut().enumerate() {
        parts.push((units.by_ref().take(share(count, n, i).len()).collect(), scratch));
    }
    parts
}
