//! What may follow a text, read from the text itself.

/// Tokens that may come next.
#[derive(Debug, PartialEq)]
pub struct Guess {
    /// The tokens, one or more.
    pub tokens: Vec<u32>,
    /// How many tokens before the place they were read from are those at the end of the text; counted up to
    /// [`LONGEST_COUNTED`].
    pub matched: usize,
}

/// From here on a longer match is no better a sign.
pub const LONGEST_COUNTED: usize = 8;

/// The `count` tokens that followed the last time that the text's last n tokens occurred, with the greatest n of
/// `1..=max_ngram` for which they did.
///
/// transformers takes the first place where they occurred; the last is nearer in subject, and near the end of a text that
/// repeats itself what follows is then read on from the guess itself, as LZ77 copies.
pub fn guess(tokens: &[u32], max_ngram: usize, count: usize) -> Option<Guess> {
    let mut best = (0, 0);
    for end in (1..tokens.len()).rev() {
        let matched = common_suffix(&tokens[..end], tokens, max_ngram);
        if matched > best.0 {
            best = (matched, end);
            if matched == max_ngram {
                break;
            }
        }
    }
    let (matched, end) = best;
    if matched == 0 || count == 0 {
        return None;
    }
    let period = tokens.len() - end;
    Some(Guess {
        tokens: (0..count).map(|i| tokens[end + i % period]).collect(),
        matched: common_suffix(&tokens[..end], tokens, LONGEST_COUNTED),
    })
}

/// Length of the longest common ending of two texts, `most` at most.
fn common_suffix(a: &[u32], b: &[u32], most: usize) -> usize {
    a.iter().rev().zip(b.iter().rev()).take(most).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(tokens: &[u32], max_ngram: usize, count: usize) -> Option<(Vec<u32>, usize)> {
        guess(tokens, max_ngram, count).map(|guess| (guess.tokens, guess.matched))
    }

    #[test]
    fn the_longest_match_counts_then_the_last() {
        let text = [1, 2, 3, 9, 2, 4, 1, 2, 5, 9, 2, 6, 1, 2];
        assert_eq!(found(&text, 1, 2), Some((vec![6, 1], 1)));
        assert_eq!(found(&text, 2, 3), Some((vec![5, 9, 2], 2)));
        // No three of them occurred before, so two do.
        assert_eq!(found(&text, 3, 1), Some((vec![5], 2)));
        assert_eq!(found(&[7, 1, 2, 3, 8, 7, 1, 2], 1, 1), Some((vec![3], 3)), "counted beyond max_ngram");
    }

    #[test]
    fn a_repetition_is_read_on() {
        assert_eq!(found(&[4, 1, 2, 3, 1, 2, 3], 2, 7), Some((vec![1, 2, 3, 1, 2, 3, 1], 3)));
        assert_eq!(found(&[5, 5, 5], 2, 4), Some((vec![5, 5, 5, 5], 2)));
    }

    #[test]
    fn without_a_match_there_is_no_guess() {
        for text in [&[][..], &[1], &[1, 2, 3]] {
            assert_eq!(found(text, 3, 5), None);
        }
        assert_eq!(found(&[1, 1], 0, 5), None);
        assert_eq!(found(&[1, 1], 2, 0), None);
    }
}
