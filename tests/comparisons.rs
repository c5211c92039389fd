//! Preference steps through a whole model: gradients against finite differences, and what cutting a step may not change.

use rft_engine::config::{NewModelConfig, OptimizerConfig, Precision};
use rft_engine::learner::batch::GroupTokens;
use rft_engine::learner::optimizer::OptimizerKind;
use rft_engine::learner::step::Learner;
use rft_engine::loss::preference::{KtoConfig, PairLoss, PreferenceConfig, Transform, UnpairedLoss};
use rft_engine::model::policy::{Policy, new_model_spec};
use rft_engine::train::comparison::{Compared, Comparisons, PLAIN, Pair, Verdict};
use rft_kernels::Pool;

fn sgd() -> OptimizerConfig {
    OptimizerConfig { kind: OptimizerKind::Sgd, lr: 1e-3, max_grad_norm: 0.0, ..OptimizerConfig::default() }
}

fn policy(seed: u64) -> Policy {
    let shape = NewModelConfig { hidden: 24, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, ffn: 40 };
    let mut policy = Policy::init(new_model_spec(&shape, 50, 1, 64).unwrap(), seed);
    for id in 0..policy.base.slots().len() {
        policy.base.values_mut(id).iter_mut().for_each(|w| *w *= 2.0);
    }
    policy.prepare(&Pool::new(1), 64, Precision::F32);
    policy
}

/// A group of three completions, one of which is in two pairs, and two of two.
fn groups() -> Vec<GroupTokens<'static>> {
    vec![
        GroupTokens { prompt: &[3, 7, 11, 2, 9], completions: vec![&[4, 5, 6, 8], &[7, 49], &[1]] },
        GroupTokens { prompt: &[12], completions: vec![&[10, 11, 30], &[31, 1]] },
        GroupTokens { prompt: &[20, 21, 22], completions: vec![&[23, 24], &[25, 26, 27, 28, 1]] },
    ]
}

fn pairs() -> Vec<Pair> {
    [(0, 0, 1, 0.0), (0, 2, 0, 0.3), (1, 1, 0, 0.0), (2, 0, 1, -0.2)]
        .map(|(group, chosen, rejected, margin)| Pair { group, chosen, rejected, margin })
        .to_vec()
}

fn losses(named: &[(PairLoss, f64)]) -> PreferenceConfig {
    PreferenceConfig { losses: named.to_vec(), beta: 0.5, ..PreferenceConfig::default() }
}

fn orpo() -> PreferenceConfig {
    let named = [(PairLoss::Sft, 1.0), (PairLoss::OddsRatio, 1.0)];
    PreferenceConfig { length_normalised: true, ..losses(&named) }
}

fn kto(loss: UnpairedLoss) -> Verdict {
    let config = KtoConfig { loss, beta: 0.5, desirable_weight: 1.5, undesirable_weight: 0.7 };
    Verdict::Labels(vec![true, false, true, false, true, true, false], 0.0, config)
}

/// Verdicts of every kind of path: with a reference, without, mixed, sorted over the step, single completions.
fn verdicts() -> Vec<(&'static str, Verdict, bool)> {
    let pair = |config| Verdict::Pairs(pairs(), config);
    let robust = PreferenceConfig { label_smoothing: 0.1, ..losses(&[(PairLoss::Robust, 1.0)]) };
    let js = PreferenceConfig { transform: Transform::JensenShannon, ..losses(&[(PairLoss::Sigmoid, 1.0)]) };
    let simpo = PreferenceConfig {
        length_normalised: true,
        margin: 0.25,
        beta: 2.0,
        ..losses(&[(PairLoss::Sigmoid, 1.0)])
    };
    vec![
        ("dpo", pair(losses(&[(PairLoss::Sigmoid, 1.0)])), true),
        ("rpo", pair(losses(&[(PairLoss::Sigmoid, 1.0), (PairLoss::Sft, 0.2)])), true),
        ("ipo", pair(losses(&[(PairLoss::Ipo, 1.0)])), true),
        ("robust", pair(robust), true),
        ("js", pair(js), true),
        ("simpo", pair(simpo), false),
        ("orpo", pair(orpo()), false),
        ("aot", pair(losses(&[(PairLoss::AotUnpaired, 1.0)])), true),
        ("kto", kto(UnpairedLoss::Kto), true),
        ("apo zero, unpaired", kto(UnpairedLoss::ApoZeroUnpaired), true),
    ]
}

/// The step of a verdict, its reference logprobs and KTO's baseline from another policy.
fn step(verdict: Verdict, referenced: bool, pool: &Pool, policy: &Policy) -> Comparisons<'static> {
    let mut step = Comparisons::new(groups(), verdict);
    let (other, mut learner) = (self::policy(8), Learner::new(policy, 100));
    if referenced {
        step.reference = Some(learner.score(pool, &other.weights(), &step.groups, &PLAIN).logprobs);
        let mismatched = step.mismatched();
        let new = learner.score(pool, &policy.weights(), &mismatched, &PLAIN).logprobs;
        let reference = learner.score(pool, &other.weights(), &mismatched, &PLAIN).logprobs;
        step.set_baseline(&mismatched, &new, &reference);
    }
    step
}

/// Gradient and outcome of one update.
fn update(step: &Comparisons, pool: &Pool, policy: &Policy, max_rows: usize) -> (Vec<f32>, Compared) {
    let (mut policy, mut learner) = (policy.clone(), Learner::new(policy, max_rows));
    let compared = step.update(pool, &mut policy, &mut learner, &sgd(), 1e-3).unwrap();
    (learner.last_grads().base.clone(), compared)
}

#[test]
fn a_step_of_each_loss_has_the_gradient_of_its_loss() {
    let (pool, mut policy) = (Pool::new(2), policy(3));
    for (name, verdict, referenced) in verdicts() {
        let step = step(verdict, referenced, &pool, &policy);
        let (grads, compared) = update(&step, &pool, &policy, 100);
        let mut learner = Learner::new(&policy, 100);
        let mut loss = |policy: &Policy| {
            let new = learner.score(&pool, &policy.weights(), &step.groups, &PLAIN).logprobs;
            step.loss(0..step.groups.len(), &new).loss
        };
        assert_eq!(loss(&policy), compared.outputs.loss, "{name}");
        for id in 0..policy.base.slots().len() {
            let slot = policy.base.slots()[id].parts[0].name.clone();
            let g = grads[policy.base.grad_range(id).unwrap()].to_vec();
            let norm = g.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 1e-5, "{name}: {slot} has no gradient ({norm})");
            // moves the loss by about 4e-3, far above the noise of its f32 logprobs
            let h = 2e-3 / norm / norm;
            let original = policy.base.values(id).to_vec();
            let mut at = |sign: f64| {
                for (w, d) in policy.base.values_mut(id).iter_mut().zip(&g) {
                    *w += (sign * h * f64::from(*d)) as f32;
                }
                let value = loss(&policy);
                policy.base.values_mut(id).copy_from_slice(&original);
                value
            };
            let numeric = (at(1.0) - at(-1.0)) / (2.0 * h);
            assert!(
                (numeric - norm * norm).abs() < 0.03 * norm * norm,
                "{name}: {slot}: numeric {numeric}, analytic {}",
                norm * norm
            );
        }
    }
}

#[test]
fn cutting_a_step_leaves_gradient_and_metrics_alone() {
    let (one, two, policy) = (Pool::new(1), Pool::new(2), policy(3));
    let bits = |g: &[f32]| g.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for (name, verdict, referenced) in verdicts() {
        let step = step(verdict, referenced, &two, &policy);
        let (whole, all) = update(&step, &two, &policy, 100);
        // 9 rows hold the largest group whole, 6 do not: its prompt is computed twice, which sums in another order
        let (split, by_group) = update(&step, &one, &policy, 9);
        assert_eq!(bits(&whole), bits(&split), "{name}");
        let (cut, by_completion) = update(&step, &two, &policy, 6);
        let norm = whole.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let apart = whole.iter().zip(&cut).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        assert!(apart < 1e-5 * norm, "{name}: {apart} of {norm}");
        for other in [&by_group, &by_completion] {
            assert_eq!(all.outputs.loss.to_bits(), other.outputs.loss.to_bits(), "{name}");
            assert_eq!(all.outputs.chosen_rewards, other.outputs.chosen_rewards, "{name}");
            assert_eq!(bits(&all.logprobs), bits(&other.logprobs), "{name}");
        }
    }
}

#[test]
fn a_completion_in_two_pairs_gets_both_gradients() {
    let (pool, policy) = (Pool::new(1), policy(3));
    let of = |pairs: Vec<Pair>, total: f64| {
        let step = step(Verdict::Pairs(pairs, losses(&[(PairLoss::Hinge, total)])), true, &pool, &policy);
        let new = Learner::new(&policy, 100).score(&pool, &policy.weights(), &step.groups, &PLAIN).logprobs;
        step.loss(0..3, &new).d_new
    };
    let all = pairs();
    let both = of(all[..2].to_vec(), 1.0);
    // alone in its step a pair has twice the weight that it has beside another
    let (first, second) = (of(vec![all[0]], 0.5), of(vec![all[1]], 0.5));
    assert!(first[..4].iter().all(|d| *d != 0.0) && second[..4].iter().all(|d| *d != 0.0));
    for (t, d) in both.iter().enumerate() {
        assert_eq!(*d, first[t] + second[t], "token {t}");
    }
}

#[test]
fn the_baseline_of_labels_pairs_each_prompt_with_its_neighbours_answers() {
    let step = Comparisons::new(groups(), kto(UnpairedLoss::Kto));
    let mismatched = step.mismatched();
    assert_eq!(mismatched[1].prompt, [12]);
    let want: [&[u32]; 2] = [&[4, 5, 6, 8], &[7, 49]];
    assert_eq!(mismatched[1].completions, want);
    let want: [&[u32]; 3] = [&[23, 24], &[25, 26, 27, 28, 1], &[23, 24]];
    assert_eq!(mismatched[0].completions, want);
}
