//! A step of preference optimisation: take stored comparisons or draw and rank, update, log.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::{Value, json};

use super::Run;
use super::comparison::{Compared, Comparisons, PLAIN, Pair, Verdict};
use super::draw::Drawn;
use super::pairs::{Choice, choose};
use super::stage_rows::StageRows;
use super::step_log::sample_rows;
use crate::config::{PairSource, PreferenceStage, StageConfig};
use crate::data::examples::{Judged, Reader};
use crate::data::prompts::Renderer;
use crate::error::{EngineError, Result};
use crate::learner::batch::GroupTokens;
use crate::learner::step::Learner;
use crate::report::health::Told;
use crate::report::health::comparison::{ComparisonSigns, DrawnSigns};
use crate::report::metrics::rss_peak_bytes;
use crate::report::progress::Progress;
use crate::report::sinks::RunFolder;
use crate::report::stages::{DrawnMetrics, PreferenceMetrics};
use crate::reward::{ScoredGroup, component_means};
use crate::rollout::RolloutEngine;
use crate::types::{FinishReason, TokenId};

/// Rollouts of a step with what the stage takes of each group.
struct Ranked {
    drawn: Drawn,
    choices: Vec<Choice>,
    /// Completions that are held against the drawn ones, by group (SPIN); empty otherwise.
    demonstrations: Vec<Vec<TokenId>>,
}

impl Run {
    pub(super) fn preference_step(
        &mut self,
        stage: &StageConfig,
        total: u64,
        learner: &mut Learner,
        engine: &mut RolloutEngine,
        folder: &mut RunFolder,
        progress: &mut Progress,
    ) -> Result<()> {
        let step = self.state.steps + 1;
        let settings = stage.comparison();
        let dropped = self.state.data.measured.dropped.len();
        let ranked = match settings.draws() {
            true => Some(self.rank(stage, &settings, engine, step, total)?),
            false => None,
        };
        engine.rest();
        let start = Instant::now();
        let mut known = std::mem::take(&mut self.reference_kept);
        let mut stored = Vec::new();
        let mut comparisons = match &ranked {
            Some(ranked) => of_groups(ranked, &settings),
            None => {
                let StageRows::Judged(rows) = &self.stage_rows[self.state.stage] else {
                    unreachable!("a stage of stored pairs has read them");
                };
                let chosen = self.own_rows(stage.rows_per_step());
                let rows: Vec<&Judged> = chosen.iter().map(|&row| &rows[row]).collect();
                stored = chosen;
                of_rows(&rows, &settings)
            }
        };
        if settings.needs_reference() && !comparisons.is_empty() {
            comparisons.reference = match self.recipe.algorithm.reference.stays_in_a_stage() {
                true if ranked.is_none() => {
                    self.stored_reference(learner, &stored, &comparisons.groups, &mut known)
                }
                _ => self.reference_logprobs(learner, &comparisons.groups, &PLAIN),
            };
            if comparisons.reference.is_none() {
                return Err(EngineError::Config("a preference stage has no reference policy".into()));
            }
        }
        self.reference_kept = known;
        let epochs = if ranked.is_some() { self.recipe.train.inner_epochs } else { 1 };
        let (mut first, mut lr, mut rows) = (Compared::default(), 0.0, 0);
        for epoch in 0..epochs {
            lr = self.learning_rate(stage, self.state.step_in_stage * epochs + epoch, total * epochs);
            if comparisons.is_empty() {
                continue;
            }
            if settings.unpaired.is_some() {
                let mismatched = comparisons.mismatched();
                let new = learner.score(&self.pool, &self.policy.weights(), &mismatched, &PLAIN).logprobs;
                let reference = self.reference_logprobs(learner, &mismatched, &PLAIN).unwrap_or_default();
                comparisons.set_baseline(&mismatched, &new, &reference);
            }
            let (pool, optimizer) = (&self.pool, &self.recipe.optimizer);
            let compared = comparisons
                .update(pool, &mut self.policy, learner, optimizer, lr)
                .map_err(|e| self.name_sample(e, &comparisons.groups, &comparisons.ids))?;
            rows += compared.stats.rows;
            if epoch == 0 {
                first = compared;
            }
        }
        let mut metrics = PreferenceMetrics { step, lr, ..measure(&comparisons, &first) };
        // what the policy drew itself is likelier under it than under the reference, whatever it learned
        let told = match settings.pairs {
            PairSource::Demonstrations => Told::default(),
            _ => told(&metrics, &first),
        };
        drop(comparisons);
        let evaluates =
            self.recipe.eval.every > 0 && step.is_multiple_of(self.recipe.eval.every) && self.measures();
        if ranked.is_some() || evaluates {
            learner.rest(self.plan.activations_rest);
        }
        if metrics.compared > 0 {
            self.advance_reference();
        }
        let learner_s = start.elapsed().as_secs_f64();

        self.state.steps = step;
        self.state.version = self.policy.version.0;
        self.state.updates = learner.adam.updates;
        self.state.learner_rows += rows as u64;
        self.state.learner_seconds += learner_s;
        if let Some(ranked) = &ranked {
            self.remember(&ranked.drawn, step);
            self.state.reward_states = self.scorer.states();
            self.state.rollout_tokens += ranked.drawn.stats.decoded_tokens as u64;
            self.state.rollout_seconds += ranked.drawn.stats.seconds;
        }
        if evaluates {
            metrics.eval_reward = Some(self.evaluate(engine)?.0.reward);
        }
        metrics.learner_s = learner_s;
        metrics.learner_tokens_per_s = rows as f64 / learner_s.max(1e-9);
        metrics.rss_peak_bytes = rss_peak_bytes();
        if let Some(ranked) = &ranked {
            metrics.drawn = Some(drawn_metrics(ranked));
            let logged = match self.recipe.train.log_groups {
                0 => usize::MAX,
                n => n,
            };
            folder.samples(&pair_rows(step, ranked, logged))?;
        }
        let signs = ComparisonSigns {
            drawn: ranked.as_ref().map(|r| drawn_signs(r, settings.pairs == PairSource::Groups)),
            compared: metrics.compared,
            told,
            log_ratio: metrics.log_ratio,
            grad_norm: metrics.grad_norm,
            max_grad_norm: self.recipe.optimizer.max_grad_norm,
        };
        metrics.health = self.state.health.assess(&signs);
        let change = self.state.health.remember(&signs, &metrics.health);
        folder.metrics(step, &metrics.to_json())?;
        if self.state.data.measured.dropped.len() > dropped {
            self.write_dropped(folder)?;
        }
        if let Some(ranked) = &ranked {
            self.warn_of_failures(step, &ranked.drawn, progress);
        }
        progress.preference_step(self.state.step_in_stage + 1, &metrics);
        if let Some(line) = change {
            progress.say(&format!("step {step}: {line}"));
        }
        Ok(())
    }

    /// Reference logprobs of stored rows, each computed when it first comes: they are the same bits whatever they are computed beside.
    fn stored_reference(
        &self,
        learner: &mut Learner,
        rows: &[usize],
        groups: &[GroupTokens],
        known: &mut BTreeMap<usize, Vec<f32>>,
    ) -> Option<Vec<f32>> {
        let mut new: Vec<usize> = (0..rows.len()).filter(|&i| !known.contains_key(&rows[i])).collect();
        new.sort_by_key(|&i| rows[i]);
        new.dedup_by_key(|i| rows[*i]);
        let fresh: Vec<GroupTokens> = new.iter().map(|&i| groups[i].clone()).collect();
        let logprobs = self.reference_logprobs(learner, &fresh, &PLAIN)?;
        let mut rest = &logprobs[..];
        for (&i, group) in new.iter().zip(&fresh) {
            let (own, others) = rest.split_at(group.completions.iter().map(|c| c.len()).sum());
            known.insert(rows[i], own.to_vec());
            rest = others;
        }
        Some(rows.iter().flat_map(|row| &known[row]).copied().collect())
    }

    /// Draws and scores the groups of a step and chooses what to compare.
    fn rank(
        &mut self,
        stage: &StageConfig,
        settings: &PreferenceStage,
        engine: &mut RolloutEngine,
        step: u64,
        total: u64,
    ) -> Result<Ranked> {
        let sampling = self.sampling(self.recipe.rollout.temperature);
        let drawn = self.draw(stage, engine, &sampling, step, total)?;
        for name in settings.rank_by.iter().chain(settings.component_margins.keys()) {
            let mut known = drawn.seen().flat_map(|g| &g.outcomes).flat_map(|o| &o.components);
            if !known.any(|(n, _)| n == name) {
                return Err(EngineError::Config(format!(
                    "stage.{}.preference: no reward has a component `{name}`. hint: it is the key that the script returns, as in \
                     the metric reward/NAME",
                    self.state.stage
                )));
            }
        }
        if settings.pairs == PairSource::Demonstrations {
            return self.against_demonstrations(drawn);
        }
        let masked = self.recipe.algorithm.mask_truncated;
        let choices = drawn.groups.iter().map(|g| choose(g, settings, masked)).collect();
        Ok(Ranked { drawn, choices, demonstrations: Vec::new() })
    }

    /// Each group's demonstration before its own completions; one that says the same is no pair.
    fn against_demonstrations(&self, drawn: Drawn) -> Result<Ranked> {
        let renderer =
            Renderer { template: None, system: None, chat: None, tokenizer: &self.tokenizer, places: None };
        let (mut choices, mut demonstrations) = (Vec::new(), Vec::new());
        for scored in &drawn.groups {
            let prompt = &scored.group.prompt;
            let text = prompt.fields.get("demonstration").and_then(Value::as_str).unwrap_or_default();
            let tokens = (Reader { renderer }).text(text).map_err(|message| {
                EngineError::Config(format!("row {}: demonstration: {message}", prompt.id))
            })?;
            let completions = scored.group.completions.iter().enumerate();
            let used: Vec<usize> = completions.filter(|(_, c)| c.tokens != tokens).map(|(i, _)| i).collect();
            // the demonstration comes first, so a drawn completion is one place further on
            let pairs = (0..used.len()).map(|i| (0, i + 1, 0.0)).collect();
            choices.push(Choice { used, pairs, desirable: Vec::new() });
            demonstrations.push(tokens);
        }
        Ok(Ranked { drawn, choices, demonstrations })
    }
}

/// Comparisons of stored rows.
fn of_rows<'a>(rows: &[&'a Judged], settings: &PreferenceStage) -> Comparisons<'a> {
    let groups = rows.iter().map(|r| GroupTokens {
        prompt: &r.prompt.tokens,
        completions: r.completions.iter().map(Vec::as_slice).collect(),
    });
    let pair = |(group, row): (usize, &&Judged)| Pair {
        group,
        chosen: 0,
        rejected: 1,
        margin: (row.margin / settings.beta) as f32,
    };
    let verdict = match settings.of_labels() {
        Some(config) => Verdict::Labels(rows.iter().flat_map(|r| r.desirable.clone()).collect(), 0.0, config),
        None => Verdict::Pairs(rows.iter().enumerate().map(pair).collect(), settings.of_pairs()),
    };
    let mut comparisons = Comparisons::new(groups.collect(), verdict);
    comparisons.ids = rows.iter().map(|r| r.prompt.id.as_str()).collect();
    comparisons
}

/// Comparisons of the groups that have any.
fn of_groups<'a>(ranked: &'a Ranked, settings: &PreferenceStage) -> Comparisons<'a> {
    let (mut groups, mut ids) = (Vec::new(), Vec::new());
    let (mut pairs, mut desirable) = (Vec::new(), Vec::new());
    for (i, (scored, choice)) in ranked.drawn.groups.iter().zip(&ranked.choices).enumerate() {
        if choice.used.is_empty() {
            continue;
        }
        let own = choice.used.iter().map(|&c| scored.group.completions[c].tokens.as_slice());
        let completions = ranked.demonstrations.get(i).map(Vec::as_slice).into_iter().chain(own).collect();
        let pair = |&(chosen, rejected, margin)| Pair { group: groups.len(), chosen, rejected, margin };
        pairs.extend(choice.pairs.iter().map(pair));
        desirable.extend_from_slice(&choice.desirable);
        ids.push(scored.group.prompt.id.as_str());
        groups.push(GroupTokens { prompt: &scored.group.prompt.tokens, completions });
    }
    if settings.unpaired.is_some() && groups.len() < 2 {
        // the baseline of a completion is the answer to another prompt
        (groups, desirable) = (Vec::new(), Vec::new());
    }
    let verdict = match settings.of_labels() {
        Some(config) => Verdict::Labels(desirable, 0.0, config),
        None => Verdict::Pairs(pairs, settings.of_pairs()),
    };
    let mut comparisons = Comparisons::new(groups, verdict);
    comparisons.ids = ids;
    comparisons
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), x| (sum + x, n + 1));
    (n > 0).then(|| sum / n as f64)
}

/// Metrics of an update's comparisons, before it.
fn measure(comparisons: &Comparisons, compared: &Compared) -> PreferenceMetrics {
    let mut m = PreferenceMetrics {
        compared: comparisons.len(),
        loss: compared.outputs.loss,
        entropy: compared.entropy,
        grad_norm: compared.stats.grad_norm,
        ..PreferenceMetrics::default()
    };
    if comparisons.is_empty() {
        return m;
    }
    let logps = comparisons.sums(&compared.logprobs);
    if let Some(reference) = &comparisons.reference {
        let far = compared.logprobs.iter().zip(reference).map(|(new, old)| f64::from((new - old).abs()));
        m.log_ratio = mean(far);
    }
    let out = &compared.outputs;
    match &comparisons.verdict {
        Verdict::Pairs(pairs, _) => {
            let rows: Vec<(usize, usize)> = pairs.iter().map(|p| comparisons.rows_of(p)).collect();
            m.logps_chosen = mean(rows.iter().map(|r| logps[r.0]));
            m.logps_rejected = mean(rows.iter().map(|r| logps[r.1]));
            m.rewards_chosen = mean(out.chosen_rewards.iter().copied());
            m.rewards_rejected = mean(out.rejected_rewards.iter().copied());
            let better = || out.chosen_rewards.iter().zip(&out.rejected_rewards);
            m.accuracies = mean(better().map(|(c, r)| f64::from(u8::from(c > r))));
        }
        Verdict::Labels(desirable, baseline, _) => {
            let of = |values: &[f64], wanted: bool| {
                mean(values.iter().zip(desirable).filter(|(_, d)| **d == wanted).map(|(v, _)| *v))
            };
            m.logps_chosen = of(&logps, true);
            m.logps_rejected = of(&logps, false);
            m.rewards_chosen = of(&out.chosen_rewards, true);
            m.rewards_rejected = of(&out.chosen_rewards, false);
            m.baseline = Some(*baseline);
        }
    }
    m
}

/// How an update's scores told completions apart, before it.
fn told(metrics: &PreferenceMetrics, compared: &Compared) -> Told {
    let out = &compared.outputs;
    let better = || out.chosen_rewards.iter().zip(&out.rejected_rewards);
    let count = |n: usize| n as u64;
    let (right, apart) = match out.rejected_rewards.is_empty() {
        true => (None, out.chosen_rewards.iter().filter(|r| **r != 0.0).count()),
        false => (Some(better().filter(|(c, r)| c > r).count()), better().filter(|(c, r)| c != r).count()),
    };
    let margin = metrics.margin();
    // a step of labels of one kind has no margin
    let apart = if margin.is_some() { apart } else { 0 };
    Told { right: right.map(count), apart: count(apart), margin: margin.unwrap_or(0.0) }
}

fn drawn_signs(ranked: &Ranked, by_reward: bool) -> DrawnSigns {
    let outcomes = || ranked.drawn.seen().flat_map(|g| &g.outcomes);
    let equal = |g: &&ScoredGroup| {
        let mut rewards = g.outcomes.iter().filter_map(|o| o.reward);
        let first = rewards.next();
        rewards.all(|r| Some(r) == first)
    };
    let cut =
        |g: &ScoredGroup| g.group.completions.iter().filter(|c| c.finish == FinishReason::Length).count();
    DrawnSigns {
        groups: ranked.drawn.seen().count(),
        equal: ranked.drawn.seen().filter(equal).count(),
        completions: outcomes().count(),
        rewarded: outcomes().filter(|o| o.reward.is_some()).count(),
        failed: outcomes().filter(|o| !o.errors.is_empty()).count(),
        truncated: ranked.drawn.seen().map(cut).sum(),
        ranked: by_reward,
    }
}

fn drawn_metrics(ranked: &Ranked) -> DrawnMetrics {
    let drawn = &ranked.drawn;
    let completions = || drawn.seen().flat_map(|g| &g.group.completions);
    let outcomes = || drawn.seen().flat_map(|g| &g.outcomes);
    let count = completions().count().max(1) as f64;
    let without = ranked.choices.iter().filter(|c| c.used.is_empty()).count();
    DrawnMetrics {
        reward_mean: mean(outcomes().filter_map(|o| o.reward)),
        components: component_means(drawn.seen()),
        reward_errors: outcomes().map(|o| o.errors.len()).sum(),
        groups_without_pair: without + drawn.left_out.len(),
        completion_tokens_mean: completions().map(|c| c.tokens.len()).sum::<usize>() as f64 / count,
        truncated_fraction: completions().filter(|c| c.finish == FinishReason::Length).count() as f64 / count,
        rollout_s: drawn.stats.seconds,
        reward_s: drawn.reward_s,
        rollout_tokens_per_s: drawn.stats.decoded_tokens as f64 / drawn.stats.seconds.max(1e-9),
        kv_blocks_peak: drawn.stats.peak_blocks,
        choice: drawn.metrics.clone(),
    }
}

/// Rows of samples.jsonl: every completion with the numbers of those that it was preferred to and of those preferred to it
/// (-1 is the row's demonstration), or its label.
fn pair_rows(step: u64, ranked: &Ranked, logged: usize) -> Vec<Value> {
    let drawn = &ranked.drawn;
    let nothing = Choice::default();
    let choices = ranked.choices[..drawn.fresh].iter().chain(std::iter::repeat(&nothing));
    let mut rows = sample_rows(step, drawn.seen().take(logged), std::iter::repeat(&0.0));
    let mut at = 0;
    for (scored, choice) in drawn.seen().take(logged).zip(choices) {
        let n = scored.outcomes.len();
        // with a demonstration, which has place 0, drawn completions are one place further on
        let shifted = !ranked.demonstrations.is_empty();
        let name = |place: usize| match shifted {
            true => place.checked_sub(1).map_or(-1, |p| choice.used[p] as i64),
            false => choice.used[place] as i64,
        };
        for (sample, row) in rows[at..at + n].iter_mut().enumerate() {
            let Value::Object(row) = row else { continue };
            row.shift_remove("advantage");
            if let Some(label) =
                choice.used.iter().position(|u| *u == sample).and_then(|p| choice.desirable.get(p))
            {
                row.insert("desirable".into(), json!(label));
            } else if choice.desirable.is_empty() {
                let named = choice.pairs.iter().map(|(c, r, _)| (name(*c), name(*r)));
                let over: Vec<i64> =
                    named.clone().filter(|(c, _)| *c == sample as i64).map(|(_, r)| r).collect();
                let under: Vec<i64> = named.filter(|(_, r)| *r == sample as i64).map(|(c, _)| c).collect();
                row.insert("preferred_to".into(), json!(over));
                row.insert("rejected_for".into(), json!(under));
            }
        }
        at += n;
    }
    rows
}
