//! Packing: groups of token sequences into micro-batches in which a group's prompt stands once.
//!
//! A completion of n tokens takes n − 1 rows: its first token is predicted by the prompt's last row, and its
//! last token predicts nothing. Targets come out group by group, completion by completion, token by token.

use std::ops::Range;

use rft_kernels::{Segment, Span};

use crate::model::backprop::{PackedBatch, Target};
use crate::types::{Group, TokenId};

/// A prompt and the completions that share it, by reference.
#[derive(Debug, Clone)]
pub struct GroupTokens<'a> {
    /// At least one token.
    pub prompt: &'a [TokenId],
    /// Any number, any length.
    pub completions: Vec<&'a [TokenId]>,
}

impl<'a> From<&'a Group> for GroupTokens<'a> {
    /// The tokens of a rollout's group.
    fn from(group: &'a Group) -> Self {
        Self {
            prompt: &group.prompt.tokens,
            completions: group.completions.iter().map(|c| c.tokens.as_slice()).collect(),
        }
    }
}

/// Some of a group's completions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Which group.
    pub group: usize,
    /// Which of its completions.
    pub completions: Range<usize>,
}

fn completion_rows(tokens: &[TokenId]) -> usize {
    tokens.len().saturating_sub(1)
}

/// Cuts groups into micro-batches of at most `max_rows` rows, in order. A group stays whole where it fits;
/// one that does not is cut between completions, and its prompt is computed again for each piece. A single
/// completion longer than `max_rows` gets a micro-batch of its own.
pub fn micro_batches(groups: &[GroupTokens], max_rows: usize) -> Vec<Vec<Piece>> {
    let mut batches: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    for (g, group) in groups.iter().enumerate() {
        let whole = group.prompt.len() + group.completions.iter().map(|c| completion_rows(c)).sum::<usize>();
        let mut from = 0;
        while from < group.completions.len() {
            let (mut to, mut rows) = (from, group.prompt.len());
            if whole <= max_rows {
                (to, rows) = (group.completions.len(), whole);
            } else {
                while to < group.completions.len() {
                    let more = completion_rows(group.completions[to]);
                    if to > from && rows + more > max_rows {
                        break;
                    }
                    rows += more;
                    to += 1;
                }
            }
            let piece = Piece { group: g, completions: from..to };
            match batches.last_mut() {
                Some(last) if rows <= room => {
                    last.push(piece);
                    room -= rows;
                }
                _ => {
                    batches.push(vec![piece]);
                    room = max_rows.saturating_sub(rows);
                }
            }
            from = to;
        }
    }
    batches
}

/// Rows of one micro-batch.
pub fn rows(groups: &[GroupTokens], pieces: &[Piece]) -> usize {
    let of = |piece: &Piece| {
        let group = &groups[piece.group];
        let completions = &group.completions[piece.completions.clone()];
        group.prompt.len() + completions.iter().map(|c| completion_rows(c)).sum::<usize>()
    };
    pieces.iter().map(of).sum()
}

/// Packs the pieces of one micro-batch.
pub fn pack(groups: &[GroupTokens], pieces: &[Piece]) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for piece in pieces {
        let group = &groups[piece.group];
        let prompt = push_rows(&mut batch, group.prompt, 0, row_key(piece.group, 0));
        batch.segments.push(Segment { rows: prompt, prefix: None });
        for c in piece.completions.clone() {
            let completion = group.completions[c];
            let tokens = &completion[..completion_rows(completion)];
            let rows = push_rows(&mut batch, tokens, prompt.len, row_key(piece.group, c + 1));
            if rows.len > 0 {
                batch.segments.push(Segment { rows, prefix: Some(prompt) });
            }
            for (i, &token) in completion.iter().enumerate() {
                let row = if i == 0 { prompt.row + prompt.len - 1 } else { rows.row + i - 1 };
                batch.targets.push(Target { row, token });
            }
        }
    }
    batch
}

/// Key of the first row of a part of a group (0 is the prompt, then the completions); the next rows follow it.
fn row_key(group: usize, part: usize) -> u64 {
    (group as u64) << 44 | (part as u64) << 24
}

fn push_rows(batch: &mut PackedBatch, tokens: &[TokenId], first_position: usize, key: u64) -> Span {
    let span = Span { row: batch.tokens.len(), len: tokens.len() };
    batch.tokens.extend_from_slice(tokens);
    batch.row_keys.extend((0..tokens.len() as u64).map(|i| key + i));
    batch.positions.extend((first_position..first_position + tokens.len()).map(|p| p as u32));
    span
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups() -> Vec<GroupTokens<'static>> {
        vec![
            GroupTokens { prompt: &[1, 2, 3], completions: vec![&[4, 5, 6], &[7], &[]] },
            GroupTokens { prompt: &[8, 9], completions: vec![&[10, 11]] },
        ]
    }

    #[test]
    fn a_prompt_stands_once_and_the_last_token_takes_no_row() {
        let groups = groups();
        let all = micro_batches(&groups, 100);
        assert_eq!(all.len(), 1);
        let batch = pack(&groups, &all[0]);
        assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 8, 9, 10]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 0, 1, 2]);
        let targets: Vec<(usize, u32)> = batch.targets.iter().map(|t| (t.row, t.token)).collect();
        assert_eq!(targets, [(2, 4), (3, 5), (4, 6), (2, 7), (6, 10), (7, 11)]);
    }

    #[test]
    fn every_completion_is_in_exactly_one_micro_batch() {
        let groups = groups();
        for max_rows in 1..12 {
            let mut seen = Vec::new();
            for pieces in micro_batches(&groups, max_rows) {
                let rows = pack(&groups, &pieces).tokens.len();
                assert_eq!(rows, super::rows(&groups, &pieces));
                assert!(
                    rows <= max_rows || (pieces.len() == 1 && pieces[0].completions.len() <= 2),
                    "{rows}"
                );
                seen.extend(pieces.iter().flat_map(|p| p.completions.clone().map(|c| (p.group, c))));
            }
            assert_eq!(seen, [(0, 0), (0, 1), (0, 2), (1, 0)], "max_rows {max_rows}");
        }
    }
}
