//! The greatest scores of a row, found without sorting it.

/// Scores of a chunk; each of its sixteen lanes holds every sixteenth of them.
const CHUNK: usize = 256;
const LANES: usize = 16;

/// The greatest score in each lane of each chunk of a row. NaN counts as -inf.
///
/// A lane is a group of at most sixteen scores, so the k-th greatest peak is a lower bound of the k-th greatest score,
/// and a chunk whose peaks are all below a bound holds nothing above it.
#[derive(Debug, Default)]
pub struct Peaks {
    /// (chunks, LANES)
    lanes: Vec<[f32; LANES]>,
    /// Room for selecting among values.
    values: Vec<f32>,
}

impl Peaks {
    /// Reads the whole row once.
    pub fn measure(&mut self, scores: &[f32]) {
        self.lanes.clear();
        self.lanes.extend(scores.chunks(CHUNK).map(lane_peaks));
    }

    /// The greatest score of the row, -inf when it has none.
    pub fn max(&self) -> f32 {
        max(self.lanes.as_flattened())
    }

    /// The lowest id that has the greatest score, which must not be -inf. `scores` is the row that was measured.
    pub fn argmax(&self, scores: &[f32]) -> usize {
        let max = self.max();
        let chunk = self.lanes.iter().position(|lanes| lanes.contains(&max)).expect("a measured row");
        let start = chunk * CHUNK;
        start + scores[start..].iter().position(|&score| score == max).expect("the row that was measured")
    }

    /// Fills `ids` with all ids, ascending, whose score is at least the `k`-th greatest, so with more than `k` where
    /// others tie with that one; ids whose score is -inf or NaN never count. `scores` is the row that was measured.
    pub fn best(&mut self, scores: &[f32], k: usize, ids: &mut Vec<u32>) {
        ids.clear();
        if k == 0 {
            return;
        }
        let bound = if k < self.lanes.len() * LANES {
            self.values.clear();
            self.values.extend_from_slice(self.lanes.as_flattened());
            kth_greatest(&mut self.values, k)
        } else {
            f32::NEG_INFINITY
        };
        let counts = |score: f32, bound: f32| score >= bound && score > f32::NEG_INFINITY;
        for (chunk, lanes) in self.lanes.iter().enumerate() {
            if lanes.iter().any(|&peak| counts(peak, bound)) {
                let start = chunk * CHUNK;
                let end = scores.len().min(start + CHUNK);
                ids.extend((start..end).filter(|&id| counts(scores[id], bound)).map(|id| id as u32));
            }
        }
        if ids.len() > k {
            self.values.clear();
            self.values.extend(ids.iter().map(|&id| scores[id as usize]));
            let kth = kth_greatest(&mut self.values, k);
            ids.retain(|&id| scores[id as usize] >= kth);
        }
    }
}

/// The greatest of each of the sixteen lanes of `scores`. Written so that it becomes vector instructions everywhere.
fn lane_peaks(scores: &[f32]) -> [f32; LANES] {
    let mut peaks = [f32::NEG_INFINITY; LANES];
    let (rows, rest) = scores.as_chunks::<LANES>();
    for row in rows {
        for (peak, &score) in peaks.iter_mut().zip(row) {
            *peak = if score > *peak { score } else { *peak };
        }
    }
    for (peak, &score) in peaks.iter_mut().zip(rest) {
        *peak = if score > *peak { score } else { *peak };
    }
    peaks
}

/// The greatest of `scores`, where NaN counts as -inf; -inf when there is none.
pub fn max(scores: &[f32]) -> f32 {
    lane_peaks(scores).into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// The `k`-th greatest of `values`, which are not NaN; `k` counts from 1.
fn kth_greatest(values: &mut [f32], k: usize) -> f32 {
    *values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// An integer that is the smaller the greater `score` is; that of 0 and -0 is the same.
pub fn descending(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { bits } else { !(bits | 1 << 31) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Rows of odd lengths with many ties, infinities and NaN.
    fn rows() -> impl Strategy<Value = Vec<f32>> {
        let score = prop_oneof![
            8 => (-6i8..6).prop_map(|n| f32::from(n) * 0.5),
            8 => -9.0f32..9.0,
            1 => Just(f32::NEG_INFINITY),
            1 => Just(f32::NAN),
            1 => Just(-0.0),
        ];
        prop::collection::vec(score, 1..1400)
    }

    proptest! {
        #[test]
        fn the_first_of_the_greatest(row in rows()) {
            let mut peaks = Peaks::default();
            peaks.measure(&row);
            let mut naive: Option<usize> = None;
            for (id, &score) in row.iter().enumerate() {
                if score > naive.map_or(f32::NEG_INFINITY, |best| row[best]) {
                    naive = Some(id);
                }
            }
            match naive {
                Some(id) => prop_assert_eq!(peaks.argmax(&row), id),
                None => prop_assert_eq!(peaks.max(), f32::NEG_INFINITY),
            }
        }

        #[test]
        fn the_best_k_with_their_ties(row in rows(), k in 0usize..1500) {
            let mut peaks = Peaks::default();
            peaks.measure(&row);
            let mut sorted: Vec<f32> = row.iter().copied().filter(|s| *s > f32::NEG_INFINITY).collect();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let kept = |score: f32| match sorted.get(k.wrapping_sub(1)) {
                Some(&kth) => score >= kth,
                None => k > 0 && score > f32::NEG_INFINITY,
            };
            let naive: Vec<u32> = (0..row.len() as u32).filter(|&id| kept(row[id as usize])).collect();
            let mut ids = vec![7];
            peaks.best(&row, k, &mut ids);
            prop_assert_eq!(ids, naive);
        }
    }

    #[test]
    fn no_row_at_all() {
        let mut peaks = Peaks::default();
        peaks.measure(&[]);
        assert_eq!(peaks.max(), f32::NEG_INFINITY);
    }
}
