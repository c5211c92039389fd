//! Comparisons of completions, pairs or labels, over groups that share a prompt: one update of a preference stage.
//!
//! A completion that several pairs name is computed once, and its gradient is the sum of theirs. Metrics come from one
//! evaluation of the loss over the whole step, so that micro-batches cannot be seen in them.

use std::ops::Range;

use rft_kernels::{Pool, Warp};

use crate::config::OptimizerConfig;
use crate::error::Result;
use crate::learner::batch::{GroupTokens, Piece};
use crate::learner::step::{Learner, ScoreGrads, UpdateStats};
use crate::loss::preference::{
    KtoConfig, PairInputs, PreferenceConfig, PreferenceOutputs, kto_baseline, kto_loss, pair_loss,
};
use crate::model::backprop::Scores;
use crate::model::policy::Policy;

/// The distribution that preferences are stated in: the model's own.
pub const PLAIN: Warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// Two completions of a group, the better one first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// Which group.
    pub group: usize,
    /// Number of the better completion within its group.
    pub chosen: usize,
    /// Number of the worse one.
    pub rejected: usize,
    /// Further margin, in score units.
    pub margin: f32,
}

/// What is known of the completions.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// Which one of two is better; pairs in order of their groups.
    Pairs(Vec<Pair>, PreferenceConfig),
    /// Whether each one, in order, is desirable; scores are compared with the baseline (`loss::preference::kto_baseline`).
    Labels(Vec<bool>, f64, KtoConfig),
}

/// The comparisons of a step.
#[derive(Debug, Clone)]
pub struct Comparisons<'a> {
    /// Prompts and their completions, each at least one token.
    pub groups: Vec<GroupTokens<'a>>,
    /// What is known of them.
    pub verdict: Verdict,
    /// Logprobs under the reference, token by token in the order of the groups.
    pub reference: Option<Vec<f32>>,
    /// Id of each group's row, as errors call it.
    pub ids: Vec<&'a str>,
    /// First completion of each group and the end of the last.
    first: Vec<usize>,
    /// First token of each completion and the end of the last.
    offsets: Vec<usize>,
}

/// What an update saw.
#[derive(Debug, Default)]
pub struct Compared {
    /// The loss of the whole step.
    pub outputs: PreferenceOutputs,
    /// Logprobs before the update, in the order of the groups' tokens.
    pub logprobs: Vec<f32>,
    /// Mean entropy of the next token before the update, nats.
    pub entropy: f64,
    /// The update.
    pub stats: UpdateStats,
}

impl<'a> Comparisons<'a> {
    /// Comparisons without reference logprobs and ids.
    pub fn new(groups: Vec<GroupTokens<'a>>, verdict: Verdict) -> Self {
        let (mut first, mut offsets) = (vec![0], vec![0]);
        for group in &groups {
            for completion in &group.completions {
                offsets.push(offsets[offsets.len() - 1] + completion.len());
            }
            first.push(offsets.len() - 1);
        }
        Self { groups, verdict, reference: None, ids: Vec::new(), first, offsets }
    }

    /// Pairs, or labelled completions.
    pub fn len(&self) -> usize {
        match &self.verdict {
            Verdict::Pairs(pairs, _) => pairs.len(),
            Verdict::Labels(desirable, ..) => desirable.len(),
        }
    }

    /// Whether there is nothing to learn from.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sum of the numbers of each completion's tokens.
    pub fn sums(&self, by_token: &[f32]) -> Vec<f64> {
        let row = |o: &[usize]| by_token[o[0]..o[1]].iter().map(|x| f64::from(*x)).sum();
        self.offsets.windows(2).map(row).collect()
    }

    /// Number, over all groups, of a pair's completions.
    pub fn rows_of(&self, pair: &Pair) -> (usize, usize) {
        (self.first[pair.group] + pair.chosen, self.first[pair.group] + pair.rejected)
    }

    /// The same completions, each behind the prompt of the next group: the pairs of prompt and completion whose summed
    /// log-ratios are KTO's baseline (Ethayarajh et al. 2024, arXiv 2402.01306, section 4.2).
    pub fn mismatched(&self) -> Vec<GroupTokens<'a>> {
        let n = self.groups.len();
        let other = |g: usize, c: usize| {
            let of = &self.groups[(g + n - 1) % n].completions;
            of[c % of.len()]
        };
        let swap = |(g, group): (usize, &GroupTokens<'a>)| GroupTokens {
            prompt: group.prompt,
            completions: (0..group.completions.len()).map(|c| other(g, c)).collect(),
        };
        self.groups.iter().enumerate().map(swap).collect()
    }

    /// Sets KTO's baseline from logprobs of [`Self::mismatched`] under policy and reference.
    pub fn set_baseline(&mut self, mismatched: &[GroupTokens], new: &[f32], reference: &[f32]) {
        let lengths = mismatched.iter().flat_map(|g| &g.completions).map(|c| c.len());
        let mut at = 0;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for len in lengths {
            let sum = |x: &[f32]| x[at..at + len].iter().map(|x| f64::from(*x)).sum::<f64>();
            ours.push(sum(new));
            theirs.push(sum(reference));
            at += len;
        }
        if let Verdict::Labels(_, baseline, _) = &mut self.verdict {
            *baseline = kto_baseline(&ours, &theirs);
        }
    }

    /// One update of the policy.
    ///
    /// # Errors
    /// As [`Learner::update`].
    pub fn update(
        &self,
        pool: &Pool,
        policy: &mut Policy,
        learner: &mut Learner,
        optimizer: &OptimizerConfig,
        lr: f64,
    ) -> Result<Compared> {
        let sorts = match &self.verdict {
            Verdict::Pairs(_, config) => config.losses.iter().any(|(loss, _)| loss.sorts_the_step()),
            Verdict::Labels(..) => false,
        };
        // a pair that is cut apart, or that is compared with all others, needs every score before the first gradient
        let ahead = (sorts || !learner.keeps_whole(&self.groups)).then(|| {
            let scores = learner.preview(pool, &policy.weights(), &self.groups, &PLAIN);
            self.loss(0..self.groups.len(), &scores.logprobs).d_new
        });
        let (mut logprobs, mut entropy) = (Vec::new(), 0.0);
        let gradient = |pieces: &[Piece], scores: &Scores| {
            let from = logprobs.len();
            logprobs.extend_from_slice(&scores.logprobs);
            entropy += scores.entropies.iter().map(|e| f64::from(*e)).sum::<f64>();
            let d = match &ahead {
                Some(d) => d[from..logprobs.len()].to_vec(),
                None => {
                    self.loss(pieces[0].group..pieces[pieces.len() - 1].group + 1, &scores.logprobs).d_new
                }
            };
            Ok(ScoreGrads { entropies: vec![0.0; d.len()], logprobs: d })
        };
        let stats = learner.update(pool, policy, &self.groups, &PLAIN, optimizer, lr, gradient)?;
        let outputs = self.loss(0..self.groups.len(), &logprobs);
        entropy /= logprobs.len().max(1) as f64;
        Ok(Compared { outputs, logprobs, entropy, stats })
    }

    /// The share of some groups in the step's loss, given the logprobs of their tokens; gradients are in that order too.
    pub fn loss(&self, groups: Range<usize>, new: &[f32]) -> PreferenceOutputs {
        let rows = self.first[groups.start]..self.first[groups.end];
        let from = self.offsets[rows.start];
        let reference = self.reference.as_ref().map(|r| &r[from..self.offsets[rows.end]]);
        match &self.verdict {
            Verdict::Labels(desirable, baseline, config) => {
                let offsets: Vec<usize> =
                    self.offsets[rows.start..=rows.end].iter().map(|o| o - from).collect();
                let none = vec![0.0; new.len()];
                let reference = reference.unwrap_or(&none);
                kto_loss(&offsets, new, reference, &desirable[rows], *baseline, desirable.len(), config)
            }
            Verdict::Pairs(pairs, config) => {
                let some = pairs.partition_point(|p| p.group < groups.start)
                    ..pairs.partition_point(|p| p.group < groups.end);
                self.pair_loss(&pairs[some], pairs, from, new, reference, config)
            }
        }
    }

    /// Loss of some of the step's pairs, of which each takes copies of its completions' numbers.
    fn pair_loss(
        &self,
        pairs: &[Pair],
        all: &[Pair],
        from: usize,
        new: &[f32],
        reference: Option<&[f32]>,
        config: &PreferenceConfig,
    ) -> PreferenceOutputs {
        let tokens = |row: usize| self.offsets[row] - from..self.offsets[row + 1] - from;
        let chosen = pairs.iter().map(|p| self.rows_of(p).0);
        let rows: Vec<usize> = chosen.chain(pairs.iter().map(|p| self.rows_of(p).1)).collect();
        let mut offsets = vec![0];
        for &row in &rows {
            offsets.push(offsets[offsets.len() - 1] + tokens(row).len());
        }
        let gather = |x: &[f32]| rows.iter().flat_map(|&r| &x[tokens(r)]).copied().collect::<Vec<f32>>();
        let reference = reference.map(gather);
        let margins: Vec<f32> = pairs.iter().map(|p| p.margin).collect();
        let row_len = |row: usize| self.offsets[row + 1] - self.offsets[row];
        let mut out = pair_loss(
            &PairInputs {
                offsets: &offsets,
                new: &gather(new),
                reference: reference.as_deref(),
                weights: None,
                margins: Some(&margins),
                total_pairs: all.len(),
                total_chosen_tokens: all.iter().map(|p| row_len(self.rows_of(p).0)).sum(),
            },
            config,
        );
        let mut d_new = vec![0.0; new.len()];
        for (&row, place) in rows.iter().zip(offsets.windows(2)) {
            for (d, add) in d_new[tokens(row)].iter_mut().zip(&out.d_new[place[0]..place[1]]) {
                *d += add;
            }
        }
        out.d_new = d_new;
        out
    }
}
