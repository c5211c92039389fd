//! Causal attention with grouped queries over a paged cache (rollouts) and over packed segments (learner).
//!
//! Both walk keys by logical position with one rule, so that they give the same bits for the same sequence:
//! a score is one chain over the head dimension; scores lie in logical order; their maximum is exact; exponentials are summed
//! in 16 lanes by position mod 16, then one tree; each is multiplied by the sum's reciprocal; an output is one chain of
//! probability times value over positions ascending.
//! How keys are stored (pages, spans), which rows are worked on together, and who works on them is not part of the rule.

mod core;
mod paged;
mod segments;
mod segments_backward;

pub use paged::{PagedRun, paged_attention};
pub use segments::{Segment, Span, segment_attention};
pub use segments_backward::segment_attention_backward;

/// Shape of one attention layer. Fused rows are [heads·d | kv_heads·d | kv_heads·d].
#[derive(Clone, Copy, Debug)]
pub struct AttnShape {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// What scores are multiplied by, usually 1/sqrt(head_dim).
    pub scale: f32,
    /// Positions that a row sees, itself included; `None`: all before it.
    pub window: Option<usize>,
    /// Scores become cap·tanh(score / cap) (Gemma 2).
    pub softcap: Option<f32>,
}

impl AttnShape {
    /// Elements of a fused row.
    pub fn stride(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Query heads of one key/value head.
    pub fn queries_per_key(&self) -> usize {
        self.heads / self.kv_heads
    }

    pub(crate) fn k_at(&self, kv_head: usize) -> usize {
        (self.heads + kv_head) * self.head_dim
    }

    pub(crate) fn v_at(&self, kv_head: usize) -> usize {
        (self.heads + self.kv_heads + kv_head) * self.head_dim
    }

    /// First position that the row at `position` sees.
    pub(crate) fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    pub(crate) fn check(&self) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "heads is a multiple of kv_heads"
        );
        assert!(self.window != Some(0), "a window holds at least the row itself");
    }
}
