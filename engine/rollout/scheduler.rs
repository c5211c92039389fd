//! Which tokens run in the next forward pass: admission by group, chunked prefill, preemption by recompute.
//!
//! A group's prompt is prefilled once; its samples then fork the prompt's block table, and a block that several
//! hold is copied when one of them writes to it. Full blocks that a prompt shares with an earlier one are computed
//! once too: the later one holds them as soon as the earlier has them in its table, and reads them in the pass that
//! stores them at the earliest (a pass stores the keys of all its rows before any of them looks). When blocks run
//! out, the newest sample gives its blocks back and is recomputed later; groups are served oldest first and nothing
//! overtakes, so every group ends. Since a draw depends on (seed, step, prompt, sample, token) alone and a row's
//! numbers on its own sequence alone, none of these decisions changes a result.

use std::collections::HashMap;

use rft_kernels::BLOCK;

use crate::error::{EngineError, Result};
use crate::rollout::block_pool::{BlockPool, PrefixHash};
use crate::rollout::sequence::{GroupState, Phase};
use crate::types::TokenId;

/// Whose rows a run holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The prompt of a group.
    Prompt(usize),
    /// A sample of a group.
    Sample(usize, usize),
}

/// Consecutive rows of one sequence in a [`Plan`].
#[derive(Debug, Clone, Copy)]
pub struct PlannedRun {
    /// First row.
    pub row: usize,
    /// Rows.
    pub rows: usize,
    /// Position of the first row.
    pub first_pos: usize,
    /// Whose they are.
    pub owner: Owner,
}

/// The rows of one forward pass.
#[derive(Debug, Default)]
pub struct Plan {
    /// Token of each row.
    pub tokens: Vec<TokenId>,
    /// Position of each row.
    pub positions: Vec<u32>,
    /// Slot of each row.
    pub slots: Vec<u32>,
    /// Runs, in row order.
    pub runs: Vec<PlannedRun>,
    /// Rows whose logits are drawn from.
    pub select: Vec<usize>,
    /// Who draws from each selected row.
    pub drawers: Vec<Owner>,
    /// Blocks to copy before the pass, in order.
    pub copies: Vec<(u32, u32)>,
}

impl Plan {
    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.runs.clear();
        self.select.clear();
        self.drawers.clear();
        self.copies.clear();
    }
}

/// Groups in flight over one block pool.
pub struct Scheduler<'a> {
    blocks: &'a mut BlockPool,
    /// All groups of the rollout, in request order.
    pub groups: Vec<GroupState>,
    /// Full prompt blocks that are in a table and not yet in a pass: the block, and the group that will compute it.
    pending: HashMap<PrefixHash, (u32, usize)>,
    max_new_tokens: usize,
    prefill_rows: usize,
    first_active: usize,
    /// Samples that ended, and their tokens.
    ended: (usize, usize),
    /// What happened so far.
    pub counts: Counts,
}

/// What a scheduler did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Prompt rows computed.
    pub prefill_tokens: usize,
    /// Prompt rows that shared blocks saved.
    pub cached_tokens: usize,
    /// Completion rows computed once more after a preemption.
    pub recomputed_tokens: usize,
    /// Times a sample or a prompt gave its blocks back.
    pub preemptions: usize,
}

impl<'a> Scheduler<'a> {
    /// Schedules `groups` with at most `prefill_rows` prompt rows a pass.
    ///
    /// # Errors
    /// A group that could not run alone in the whole pool.
    pub fn new(
        blocks: &'a mut BlockPool,
        groups: Vec<GroupState>,
        max_new_tokens: usize,
        prefill_rows: usize,
    ) -> Result<Self> {
        for group in &groups {
            let prompt = group.prompt.tokens.len();
            // the prompt's table and one sample that copied its tail
            let needed = prompt.div_ceil(BLOCK) + (prompt % BLOCK + max_new_tokens).div_ceil(BLOCK);
            if needed > blocks.capacity() {
                return Err(EngineError::Memory(format!(
                    "prompt {} has {prompt} tokens; with {max_new_tokens} new ones it needs {needed} KV blocks of {BLOCK} \
                     and the pool has {}. hint: raise rollout.kv_memory_mb or lower rollout.max_new_tokens",
                    group.prompt.id,
                    blocks.capacity()
                )));
            }
        }
        let (first_active, counts) = (0, Counts::default());
        let pending = HashMap::new();
        let ended = (0, 0);
        Ok(Self { blocks, groups, pending, max_new_tokens, prefill_rows, first_active, ended, counts })
    }

    /// Whether every group is done.
    pub fn is_done(&self) -> bool {
        self.first_active == self.groups.len()
    }

    /// The block table behind a run.
    pub fn table(&self, owner: Owner) -> &[u32] {
        match owner {
            Owner::Prompt(g) => &self.groups[g].table,
            Owner::Sample(g, s) => &self.groups[g].samples[s].table,
        }
    }

    /// Fills `plan` with the next pass's rows; at least one row unless everything is done.
    pub fn plan(&mut self, plan: &mut Plan) {
        self.try_plan(plan);
        while plan.runs.is_empty() {
            // No sample runs any more: the last one has just given up its blocks, or prompts that wait for room to start
            // theirs hold what the oldest needs.
            self.try_plan(plan);
            if plan.runs.is_empty() && !self.preempt_newest_after(Owner::Prompt(self.first_active)) {
                return;
            }
        }
    }

    fn try_plan(&mut self, plan: &mut Plan) {
        plan.clear();
        self.admit();
        let mut prefill_room = self.prefill_rows;
        for g in self.first_active..self.groups.len() {
            match self.groups[g].phase {
                Phase::Prefill => self.plan_run(Owner::Prompt(g), plan, &mut prefill_room),
                Phase::Ready => {
                    for s in 0..self.groups[g].samples.len() {
                        if self.groups[g].samples[s].running {
                            self.plan_run(Owner::Sample(g, s), plan, &mut prefill_room);
                        }
                    }
                }
                Phase::Waiting | Phase::Done => {}
            }
        }
    }

    /// Starts what fits beside half of what the running samples are expected to grow by, oldest first; the first that
    /// does not fit ends the round. What starts too early is preempted and computed twice.
    fn admit(&mut self) {
        let running = self.groups[self.first_active..].iter().flat_map(|g| &g.samples).filter(|s| s.running);
        let mut growth: usize = running.map(|s| self.expected_growth(s.tokens.len())).sum();
        for g in self.first_active..self.groups.len() {
            if self.groups[g].phase == Phase::Waiting {
                if !self.start_prompt(g, growth / 2) {
                    return;
                }
            } else if self.groups[g].phase == Phase::Ready {
                for s in 0..self.groups[g].samples.len() {
                    let (group, sample) = (&self.groups[g], &self.groups[g].samples[s]);
                    if sample.running || sample.finish.is_some() {
                        continue;
                    }
                    let prompt = group.prompt.tokens.len();
                    let needed = (prompt + sample.tokens.len()).div_ceil(BLOCK) - prompt / BLOCK;
                    if self.blocks.free() < needed + growth / 2 {
                        return;
                    }
                    growth += self.expected_growth(sample.tokens.len());
                    group.table.iter().for_each(|&id| self.blocks.retain(id));
                    let GroupState { table, samples, .. } = &mut self.groups[g];
                    let (sample, most) = (&mut samples[s], self.max_new_tokens);
                    sample.reserve(most - sample.tokens.len(), (prompt + most).div_ceil(BLOCK));
                    sample.table.extend_from_slice(table);
                    (sample.computed, sample.running) = (prompt, true);
                }
            }
        }
    }

    /// Blocks that a running sample of `tokens` tokens is expected to take yet: lengths are guessed to be without memory,
    /// around the mean of those that ended.
    fn expected_growth(&self, tokens: usize) -> usize {
        let mean = self.ended.1.checked_div(self.ended.0).unwrap_or(self.max_new_tokens / 2);
        mean.min(self.max_new_tokens - tokens).div_ceil(BLOCK)
    }

    /// Gives a waiting prompt its blocks, shared ones where there are; false when they do not fit beside `reserve`.
    fn start_prompt(&mut self, g: usize, reserve: usize) -> bool {
        let group = &self.groups[g];
        let tokens = group.prompt.tokens.len();
        // the last token is computed again in any case: its logits are wanted
        let shareable = &group.prefixes[..(tokens - 1) / BLOCK];
        let (mut shared, mut held) = (0, 0);
        while let Some(id) = shareable.get(shared).and_then(|prefix| self.find(prefix)) {
            shared += 1;
            held += usize::from(self.blocks.is_held(id));
        }
        let needed = tokens.div_ceil(BLOCK);
        // room for the first block of each sample too, unless nothing else runs
        let margin = if self.anything_held(g) { group.samples.len() + reserve } else { 0 };
        if self.blocks.free() < needed - held + margin {
            return false;
        }
        let mut table = Vec::with_capacity(needed);
        for prefix in &shareable[..shared] {
            let id = self.find(prefix).expect("found above");
            self.blocks.retain(id);
            table.push(id);
        }
        for index in shared..needed {
            let id = self.blocks.take().expect("counted above");
            if let Some(prefix) = group.prefixes.get(index) {
                self.pending.entry(*prefix).or_insert((id, g));
            }
            table.push(id);
        }
        self.counts.cached_tokens += shared * BLOCK;
        let group = &mut self.groups[g];
        (group.table, group.computed, group.phase) = (table, shared * BLOCK, Phase::Prefill);
        true
    }

    /// The block of a prefix that is computed or about to be.
    fn find(&self, prefix: &PrefixHash) -> Option<u32> {
        self.blocks.find(prefix).or_else(|| self.pending.get(prefix).map(|(id, _)| *id))
    }

    fn anything_held(&self, except: usize) -> bool {
        self.groups[self.first_active..]
            .iter()
            .enumerate()
            .any(|(i, g)| i + self.first_active != except && matches!(g.phase, Phase::Prefill | Phase::Ready))
    }

    /// Adds the owner's next rows; a sample one token behind always gets its row, the rest shares `prefill_room`.
    fn plan_run(&mut self, owner: Owner, plan: &mut Plan, prefill_room: &mut usize) {
        let (known, computed) = match owner {
            Owner::Prompt(g) => (self.groups[g].prompt.tokens.len(), self.groups[g].computed),
            Owner::Sample(g, s) => {
                let sample = &self.groups[g].samples[s];
                (self.groups[g].prompt.tokens.len() + sample.tokens.len(), sample.computed)
            }
        };
        let pending = known - computed;
        let decode = matches!(owner, Owner::Sample(..)) && pending == 1;
        let rows = if decode { 1 } else { pending.min(*prefill_room) };
        match owner {
            Owner::Prompt(g) => {
                let (before, after) = (computed / BLOCK, (computed + rows) / BLOCK);
                let prefixes = &self.groups[g].prefixes;
                if before > 0 && self.pending.contains_key(&prefixes[before - 1]) {
                    // an earlier prompt has not come to the shared blocks yet
                    return;
                }
                // its own blocks, even where later prompts hold them already
                for prefix in &prefixes[before..after] {
                    if self.pending.get(prefix).is_some_and(|(_, by)| *by == g) {
                        self.pending.remove(prefix);
                    }
                }
            }
            Owner::Sample(..) => {
                for position in computed..computed + rows {
                    if !self.make_writable(owner, position / BLOCK, plan) {
                        return self.preempt(owner);
                    }
                }
            }
        }
        if rows == 0 {
            return;
        }
        if !decode {
            *prefill_room -= rows;
        }
        let run = PlannedRun { row: plan.tokens.len(), rows, first_pos: computed, owner };
        let table = self.table(owner);
        for position in computed..computed + rows {
            plan.slots.push(table[position / BLOCK] * BLOCK as u32 + (position % BLOCK) as u32);
            plan.positions.push(position as u32);
        }
        let (g, sample) = match owner {
            Owner::Prompt(g) => (g, None),
            Owner::Sample(g, s) => (g, Some(s)),
        };
        let group = &self.groups[g];
        let prompt = &group.prompt.tokens;
        let token_at = |position: usize| match sample {
            Some(s) if position >= prompt.len() => group.samples[s].tokens[position - prompt.len()],
            _ => prompt[position],
        };
        plan.tokens.extend((computed..computed + rows).map(token_at));
        plan.runs.push(run);
        let first_draw = sample.is_some() || group.samples.iter().all(|s| s.tokens.is_empty());
        if computed + rows == known && first_draw {
            plan.select.push(run.row + rows - 1);
            plan.drawers.push(owner);
        }
    }

    /// Gives the owner a block of its own at `index`; false when it must give up.
    fn make_writable(&mut self, owner: Owner, index: usize, plan: &mut Plan) -> bool {
        let current = self.table(owner).get(index).copied();
        if current.is_some_and(|id| !self.blocks.is_shared(id)) {
            return true;
        }
        let fresh = loop {
            if let Some(id) = self.blocks.take() {
                break id;
            }
            if !self.preempt_newest_after(owner) {
                return false;
            }
        };
        let table = match owner {
            Owner::Prompt(g) => &mut self.groups[g].table,
            Owner::Sample(g, s) => &mut self.groups[g].samples[s].table,
        };
        match current {
            Some(shared) => {
                table[index] = fresh;
                plan.copies.push((shared, fresh));
                self.blocks.release(shared);
            }
            None => table.push(fresh),
        }
        true
    }

    /// Frees blocks of whatever is newest and comes after `owner` in this pass.
    fn preempt_newest_after(&mut self, owner: Owner) -> bool {
        let (own_group, own_sample) = match owner {
            Owner::Prompt(g) => (g, usize::MAX),
            Owner::Sample(g, s) => (g, s),
        };
        for g in (own_group..self.groups.len()).rev() {
            let group = &self.groups[g];
            let after = |s: usize| g > own_group || s > own_sample;
            if let Some(s) = (0..group.samples.len()).rev().find(|&s| after(s) && group.samples[s].running) {
                self.preempt(Owner::Sample(g, s));
                return true;
            }
            if g > own_group && matches!(group.phase, Phase::Prefill | Phase::Ready) {
                self.preempt(Owner::Prompt(g));
                return true;
            }
        }
        false
    }

    fn preempt(&mut self, owner: Owner) {
        self.counts.preemptions += 1;
        match owner {
            Owner::Prompt(g) => {
                release_all(self.blocks, &mut self.groups[g].table);
                self.pending.retain(|_, (_, by)| *by != g);
                let group = &mut self.groups[g];
                (group.phase, group.computed) = (Phase::Waiting, 0);
            }
            Owner::Sample(g, s) => {
                let sample = &mut self.groups[g].samples[s];
                release_all(self.blocks, &mut sample.table);
                (sample.running, sample.computed) = (false, 0);
            }
        }
    }

    /// Records that the planned rows are in the cache.
    pub fn computed(&mut self, plan: &Plan) {
        for run in &plan.runs {
            match run.owner {
                Owner::Sample(g, s) => {
                    let group = &mut self.groups[g];
                    let sample = &mut group.samples[s];
                    sample.computed += run.rows;
                    // the newest token's row is new, whatever came before it
                    let known = group.prompt.tokens.len() + sample.tokens.len();
                    self.counts.recomputed_tokens += run.rows - usize::from(sample.computed == known);
                }
                Owner::Prompt(g) => {
                    self.counts.prefill_tokens += run.rows;
                    let group = &mut self.groups[g];
                    let before = group.computed / BLOCK;
                    group.computed += run.rows;
                    for full in before..group.computed / BLOCK {
                        self.blocks.publish(group.table[full], group.prefixes[full]);
                    }
                    if group.computed == group.prompt.tokens.len() {
                        group.phase = Phase::Ready;
                    }
                }
            }
        }
    }

    /// Frees a finished sample's blocks, and the group's when it was the last; true then.
    pub fn finished(&mut self, g: usize, s: usize) -> bool {
        let group = &mut self.groups[g];
        group.samples[s].running = false;
        self.ended = (self.ended.0 + 1, self.ended.1 + group.samples[s].tokens.len());
        release_all(self.blocks, &mut group.samples[s].table);
        if group.samples.iter().any(|s| s.finish.is_none()) {
            return false;
        }
        release_all(self.blocks, &mut group.table);
        group.phase = Phase::Done;
        while self.groups.get(self.first_active).is_some_and(|g| g.phase == Phase::Done) {
            self.first_active += 1;
        }
        true
    }
}

impl Drop for Scheduler<'_> {
    /// A rollout that ends early (an error, Ctrl-C) leaves no block held.
    fn drop(&mut self) {
        for group in &mut self.groups {
            release_all(self.blocks, &mut group.table);
            group.samples.iter_mut().for_each(|s| release_all(self.blocks, &mut s.table));
        }
    }
}

/// Releases a table from its end, so that the start of a prefix stays findable longest.
fn release_all(blocks: &mut BlockPool, table: &mut Vec<u32>) {
    while let Some(id) = table.pop() {
        blocks.release(id);
    }
}
