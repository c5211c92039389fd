//! The hand-written backward pass against finite differences, with every trainable tensor covered.

use rft_engine::config::{LoraConfig, NewModelConfig, Precision};
use rft_engine::learner::batch::{GroupTokens, Piece, micro_batches, pack};
use rft_engine::model::backprop::{PackedBatch, Trainer};
use rft_engine::model::policy::{Grads, Policy, new_model_spec};
use rft_engine::model::spec::ModelSpec;
use rft_engine::model::value_head::ValueHead;
use rft_kernels::{Pool, Warp};

const PLAIN: Warp = Warp { temperature: 0.8, top_k: 0, top_p: 1.0, min_p: 0.0 };

fn policy() -> Policy {
    // away from the symmetric start, so that no gradient is small by accident
    scaled_policy(4.0)
}

fn scaled_policy(scale: f32) -> Policy {
    let shape = NewModelConfig { hidden: 24, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, ffn: 40 };
    let mut policy = Policy::init(new_model_spec(&shape, 50, 1, 64).unwrap(), 3);
    for id in 0..policy.base.slots().len() {
        policy.base.values_mut(id).iter_mut().for_each(|w| *w *= scale);
    }
    policy.prepare(&Pool::new(1), 64, Precision::F32);
    policy
}

/// A mixture in every layer: all four experts get tokens, and every token leaves two of them out.
fn mixture(renormalise: bool) -> Policy {
    let spec = ModelSpec::from_config_json(&serde_json::json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": 20,
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": renormalise,
        "max_position_embeddings": 64,
    }));
    let mut policy = Policy::init(spec.unwrap(), 3);
    for id in 0..policy.base.slots().len() {
        policy.base.values_mut(id).iter_mut().for_each(|w| *w *= 4.0);
    }
    policy.prepare(&Pool::new(1), 64, Precision::F32);
    policy
}

fn groups() -> Vec<GroupTokens<'static>> {
    vec![
        GroupTokens { prompt: &[3, 7, 11, 2, 9], completions: vec![&[4, 5, 6, 8], &[7, 49], &[1]] },
        GroupTokens { prompt: &[12], completions: vec![&[10, 11, 30]] },
    ]
}

/// A micro-batch of an update, in which dropout masks hold.
fn packed(groups: &[GroupTokens], pieces: &[Piece]) -> PackedBatch {
    PackedBatch { update: Some(4), ..pack(groups, pieces) }
}

/// Weights of the scalar under test, by target.
fn weight(i: usize) -> (f32, f32) {
    (0.3 + 0.1 * (i % 5) as f32, 0.2 - 0.07 * (i % 3) as f32)
}

fn objective(pool: &Pool, policy: &Policy, trainer: &mut Trainer) -> f64 {
    let (groups, mut sum, mut at) = (groups(), 0.0, 0);
    for pieces in micro_batches(&groups, 100) {
        let scores = trainer.forward(pool, &policy.weights(), &packed(&groups, &pieces), &PLAIN);
        for (l, e) in scores.logprobs.iter().zip(&scores.entropies) {
            let (wl, we) = weight(at);
            sum += f64::from(*l) * f64::from(wl) + f64::from(*e) * f64::from(we);
            at += 1;
        }
    }
    sum
}

fn gradient(pool: &Pool, policy: &Policy, max_rows: usize) -> Grads {
    gradient_recomputing(pool, policy, max_rows, 0)
}

fn gradient_recomputing(pool: &Pool, policy: &Policy, max_rows: usize, recompute: usize) -> Grads {
    let (groups, mut grads, mut at) = (groups(), policy.new_grads(), 0);
    let mut trainer = Trainer::default();
    trainer.recompute = recompute;
    for pieces in micro_batches(&groups, max_rows) {
        let batch = packed(&groups, &pieces);
        let scores = trainer.forward(pool, &policy.weights(), &batch, &PLAIN);
        let d: Vec<(f32, f32)> = (at..at + scores.logprobs.len()).map(weight).collect();
        at += d.len();
        let (dl, de): (Vec<f32>, Vec<f32>) = d.into_iter().unzip();
        trainer.backward(pool, &policy.weights(), &batch, &PLAIN, &dl, &de, &mut grads);
    }
    trainer.finish(pool, &policy.weights(), &mut grads);
    grads
}

/// Directional derivative along the gradient of each slot: central difference against the analytic one.
fn check_every_slot(mut policy: Policy, adapter: bool) {
    let pool = Pool::new(2);
    let grads = gradient(&pool, &policy, 100);
    let grads = if adapter { grads.adapter } else { grads.base };
    let mut trainer = Trainer::default();
    for id in 0..policy.trainable().slots().len() {
        let name = policy.trainable().slots()[id].parts[0].name.clone();
        let g = grads[policy.trainable().grad_range(id).unwrap()].to_vec();
        let norm = g.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 1e-4, "{name} has no gradient ({norm})");
        // f32 forward noise is ~1e-6; a step that moves the objective by ~1e-2 leaves the curvature small
        let h = 1e-2 / norm.max(1.0) / norm;
        let mut shifted = |sign: f64| {
            let original = policy.trainable().values(id).to_vec();
            for (w, d) in policy.trainable_mut().values_mut(id).iter_mut().zip(&g) {
                *w += (sign * h * f64::from(*d)) as f32;
            }
            let value = objective(&pool, &policy, &mut trainer);
            policy.trainable_mut().values_mut(id).copy_from_slice(&original);
            value
        };
        let mut slope = |times: f64| (shifted(times) - shifted(-times)) / (2.0 * times * h);
        // Richardson's extrapolation: the third derivative cancels
        let numeric = (4.0 * slope(1.0) - slope(2.0)) / 3.0;
        let analytic = norm * norm;
        assert!(
            (numeric - analytic).abs() < 0.02 * analytic,
            "{name}: numeric {numeric}, analytic {analytic}"
        );
    }
}

#[test]
fn every_weight_gradient_matches_finite_differences() {
    check_every_slot(policy(), false);
}

#[test]
fn every_expert_and_router_gradient_matches_finite_differences() {
    check_every_slot(mixture(true), false);
    check_every_slot(mixture(false), false);
}

#[test]
fn an_expert_without_tokens_has_a_gradient_of_zero() {
    let (mut policy, pool) = (mixture(true), Pool::new(1));
    let experts = policy.weights().slots.layers[1].experts.clone().unwrap();
    let before = gradient(&pool, &policy, 100).base;
    let router = policy.base.values_mut(experts.router);
    router.iter_mut().for_each(|w| *w = 0.0);
    let grads = gradient(&pool, &policy, 100).base;
    let norm = |grads: &[f32], id| {
        grads[policy.base.grad_range(id).unwrap()].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>()
    };
    // equal probabilities: ties go to the first two experts
    for expert in 0..4 {
        for id in [experts.gate_up[expert], experts.down[expert]] {
            assert!(norm(&before, id) > 0.0);
            assert_eq!(norm(&grads, id) > 0.0, expert < 2, "expert {expert}");
        }
    }
}

fn adapted(dropout: f32) -> Policy {
    adapted_with(LoraConfig { rank: 3, alpha: 6.0, dropout, ..LoraConfig::default() })
}

fn adapted_with(config: LoraConfig) -> Policy {
    let mut policy = policy();
    let mut adapter = rft_engine::model::lora::Adapter::new(&policy.spec, &config, 5).unwrap();
    // B and magnitudes start at zero, where A has no gradient
    for id in 0..adapter.arena.slots().len() {
        let vector = matches!(adapter.arena.slots()[id].shape, rft_engine::model::params::Shape::Vector(_));
        for (i, w) in adapter.arena.values_mut(id).iter_mut().enumerate() {
            if vector {
                *w = 0.5 + 0.1 * (i * 5 % 7) as f32;
            } else if *w == 0.0 && i % 32 < 3 {
                *w = 0.05 * ((i * 7 % 11) as f32 - 5.0);
            }
        }
    }
    policy.adapter = Some(adapter);
    // of a DoRA adapter the norms are those of these weights from here on, as its gradients take them
    policy.measure_adapter(&Pool::new(1));
    policy
}

#[test]
fn every_adapter_gradient_matches_finite_differences() {
    check_every_slot(adapted(0.0), true);
    check_every_slot(adapted(0.3), true);
    let dora = LoraConfig { rank: 3, alpha: 6.0, dora: true, ..LoraConfig::default() };
    check_every_slot(adapted_with(dora.clone()), true);
    check_every_slot(adapted_with(LoraConfig { dropout: 0.3, ..dora }), true);
}

#[test]
fn dropout_follows_the_row_and_stays_out_of_scores() {
    let (with, without, pool) = (adapted(0.3), adapted(0.0), Pool::new(2));
    let bits = |g: Grads| g.adapter.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let whole = bits(gradient(&pool, &with, 100));
    assert_ne!(whole, bits(gradient(&pool, &without, 100)));
    assert_eq!(whole, bits(gradient(&Pool::new(1), &with, 11)), "one group a micro-batch");
    // a pass that is no update, as that of the reference, drops nothing
    let groups = groups();
    let batch = pack(&groups, &micro_batches(&groups, 100)[0]);
    let score = |policy: &Policy| Trainer::default().score(&pool, &policy.weights(), &batch, &PLAIN);
    assert_eq!(score(&with), score(&without));
    let other = PackedBatch { update: Some(5), ..batch.clone() };
    let train = |batch: &PackedBatch| Trainer::default().forward(&pool, &with.weights(), batch, &PLAIN);
    assert_ne!(train(&other), train(&PackedBatch { update: Some(6), ..batch.clone() }));
}

#[test]
fn splitting_the_batch_leaves_the_gradient_bits_alone() {
    for policy in [policy(), mixture(true)] {
        let whole = gradient(&Pool::new(2), &policy, 100);
        // 11 rows hold the first group; the second gets a micro-batch of its own
        let split = gradient(&Pool::new(1), &policy, 11);
        let bits = |g: &[f32]| g.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&whole.base), bits(&split.base));
    }
}

/// Rounding has no slope of its own; the gradient passes it by. So it is that of an f32 pass up to the rounding of keys and
/// values, which is 2^-9 of each.
#[test]
fn a_bf16_cache_changes_the_gradient_by_its_rounding_only() {
    let (pool, groups) = (Pool::new(1), groups());
    let mut rounded = scaled_policy(1.0);
    rounded.kv_precision = Precision::Bf16;
    let [exact, rounded] = [scaled_policy(1.0), rounded].map(|policy| {
        let (mut trainer, mut grads) = (Trainer::default(), policy.new_grads());
        let batch = packed(&groups, &micro_batches(&groups, 100)[0]);
        let n = trainer.forward(&pool, &policy.weights(), &batch, &PLAIN).logprobs.len();
        let d: Vec<f32> = (0..n).map(|i| weight(i).0).collect();
        trainer.backward(&pool, &policy.weights(), &batch, &PLAIN, &d, &vec![0.0; n], &mut grads);
        trainer.finish(&pool, &policy.weights(), &mut grads);
        grads.base
    });
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let off = norm(&mut exact.iter().zip(&rounded).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
    println!("relative distance of the gradients: {off:.5}");
    assert!(off > 1e-5 && off < 0.01, "{off}");
}

/// Norms around both halves of a layer, sliding windows, softcaps.
fn sandwich() -> Policy {
    let spec = ModelSpec::from_config_json(&serde_json::json!({
        "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "sliding_window": 3,
        "query_pre_attn_scalar": 8, "max_position_embeddings": 64,
    }));
    let mut policy = Policy::init(spec.unwrap(), 3);
    policy.prepare(&Pool::new(1), 64, Precision::F32);
    policy
}

#[test]
fn making_activations_again_leaves_the_gradient_bits_alone() {
    let bits = |g: Grads| g.base.iter().chain(&g.adapter).map(|x| x.to_bits()).collect::<Vec<_>>();
    let (mut bf16, pool) = (adapted(0.3), Pool::new(2));
    bf16.prepare(&pool, 64, Precision::Bf16);
    let mut rounded = policy();
    rounded.kv_precision = Precision::Bf16;
    for policy in [policy(), mixture(true), sandwich(), adapted(0.0), adapted(0.3), bf16, rounded] {
        let kept = bits(gradient(&pool, &policy, 100));
        assert!(kept.iter().any(|&bits| bits << 1 != 0));
        for recompute in 1..=policy.spec.layers {
            assert_eq!(
                kept,
                bits(gradient_recomputing(&pool, &policy, 100, recompute)),
                "{recompute} layers"
            );
            let split = gradient_recomputing(&Pool::new(1), &policy, 11, recompute);
            assert_eq!(kept, bits(split), "{recompute} layers, split");
        }
    }
}

/// A group's prompt stands once and its completions share it: the gradient is that of every completion with a prompt of its
/// own, one after another, whose gradients are summed here in f64.
#[test]
fn a_group_has_the_gradient_of_its_separate_sequences() {
    let pool = Pool::new(2);
    for policy in [policy(), mixture(true), sandwich(), adapted(0.0)] {
        let shared = gradient(&pool, &policy, 100);
        let groups = groups();
        let mut sums = vec![0.0f64; shared.base.len() + shared.adapter.len()];
        let (mut rows, mut at) = (0, 0);
        for group in &groups {
            for completion in &group.completions {
                let alone = [GroupTokens { prompt: group.prompt, completions: vec![completion] }];
                let batch = packed(&alone, &micro_batches(&alone, 100)[0]);
                rows += batch.tokens.len();
                let (mut trainer, mut grads) = (Trainer::default(), policy.new_grads());
                trainer.forward(&pool, &policy.weights(), &batch, &PLAIN);
                let (dl, de): (Vec<f32>, Vec<f32>) = (at..at + completion.len()).map(weight).unzip();
                at += completion.len();
                trainer.backward(&pool, &policy.weights(), &batch, &PLAIN, &dl, &de, &mut grads);
                trainer.finish(&pool, &policy.weights(), &mut grads);
                for (sum, g) in sums.iter_mut().zip(grads.base.iter().chain(&grads.adapter)) {
                    *sum += f64::from(*g);
                }
            }
        }
        let whole = packed(&groups, &micro_batches(&groups, 100)[0]).tokens.len();
        assert_eq!((whole, rows), (5 + 3 + 1 + 1 + 2, 3 * 5 + 3 + 1 + 1 + 2), "rows computed");
        let square = |x: f64| x * x;
        let norm = sums.iter().map(|&s| square(s)).sum::<f64>().sqrt();
        let off =
            shared.base.iter().chain(&shared.adapter).zip(&sums).map(|(g, s)| square(f64::from(*g) - s));
        let off = off.sum::<f64>().sqrt() / norm;
        // f32 sums of some dozens of terms in two orders
        assert!(off < 2e-6, "the gradients differ by {off:e} of their norm");
    }
}

/// Groups of odd sizes, so that no micro-batch ends where a block of a bf16 sum does.
fn odd_groups() -> Vec<(Vec<u32>, Vec<Vec<u32>>)> {
    let tokens = |len: usize, salt: usize| (0..len).map(|i| ((i * 7 + salt * 13) % 23) as u32).collect();
    (0..7)
        .map(|g| (tokens(3 + g * 2, g), (0..1 + g % 3).map(|c| tokens(5 + 3 * c + g, g + c)).collect()))
        .collect()
}

#[test]
fn splitting_the_batch_leaves_the_gradient_bits_alone_in_bf16() {
    let groups = odd_groups();
    let groups: Vec<GroupTokens> = groups
        .iter()
        .map(|(prompt, c)| GroupTokens { prompt, completions: c.iter().map(Vec::as_slice).collect() })
        .collect();
    let largest =
        groups.iter().map(|g| g.prompt.len() + g.completions.iter().map(|c| c.len() - 1).sum::<usize>());
    let largest = largest.max().unwrap();
    for mut policy in [policy(), mixture(true), adapted(0.0), adapted(0.3)] {
        policy.prepare(&Pool::new(1), 64, Precision::Bf16);
        let gradient = |threads: usize, max_rows: usize| {
            let pool = Pool::new(threads);
            let (mut grads, mut trainer, mut at) = (policy.new_grads(), Trainer::default(), 0);
            let cuts = micro_batches(&groups, max_rows);
            for pieces in &cuts {
                let batch = PackedBatch { update: Some(3), ..pack(&groups, pieces) };
                let scores = trainer.forward(&pool, &policy.weights(), &batch, &PLAIN);
                let (l, e): (Vec<f32>, Vec<f32>) = (at..at + scores.logprobs.len()).map(weight).unzip();
                at += l.len();
                trainer.backward(&pool, &policy.weights(), &batch, &PLAIN, &l, &e, &mut grads);
            }
            trainer.finish(&pool, &policy.weights(), &mut grads);
            let bits = |g: &[f32]| g.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            (cuts.len(), bits(&grads.base), bits(&grads.adapter))
        };
        let (one, base, adapter) = gradient(2, 1000);
        assert_eq!(one, 1);
        for (threads, max_rows) in [(1, largest), (2, largest + 9), (3, 2 * largest)] {
            let (cuts, base_now, adapter_now) = gradient(threads, max_rows);
            assert!(cuts > 1, "{max_rows} rows hold all");
            assert!(
                base == base_now && adapter == adapter_now,
                "{max_rows} rows a micro-batch, {cuts} of them"
            );
        }
    }
}

/// A head away from its start of zeros.
fn value_head() -> ValueHead {
    let mut head = ValueHead::new(24);
    head.weights.iter_mut().enumerate().for_each(|(i, w)| *w = 0.1 * ((i * 5 % 13) as f32 - 6.0));
    head
}

/// Sum of the weighted values and, with `logits`, of what [`objective`] sums.
fn valued(policy: &Policy, head: &ValueHead, logits: bool) -> f64 {
    let (groups, pool, mut trainer) = (groups(), Pool::new(2), Trainer::default());
    let batch = packed(&groups, &micro_batches(&groups, 100)[0]);
    trainer.forward_hidden(&pool, &policy.weights(), &batch, false);
    let values = trainer.values(&batch, head);
    let sum = values.iter().enumerate().map(|(i, v)| f64::from(*v) * (1.0 - 0.3 * (i % 4) as f64));
    sum.sum::<f64>() + if logits { objective(&pool, policy, &mut trainer) } else { 0.0 }
}

/// Gradients of [`valued`] by the trunk and by the head.
fn valued_gradient(policy: &Policy, head: &ValueHead, logits: bool, max_rows: usize) -> (Grads, Vec<f32>) {
    let (groups, pool, mut trainer) = (groups(), Pool::new(2), Trainer::default());
    let (mut grads, mut head_grad, mut at) = (policy.new_grads(), vec![0.0; head.weights.len()], 0);
    for pieces in micro_batches(&groups, max_rows) {
        let batch = packed(&groups, &pieces);
        let targets = at..at + batch.targets.len();
        at = targets.end;
        let (mut dl, mut de) = (Vec::new(), Vec::new());
        if logits {
            trainer.forward(&pool, &policy.weights(), &batch, &PLAIN);
            (dl, de) = targets.clone().map(weight).unzip();
        } else {
            trainer.forward_hidden(&pool, &policy.weights(), &batch, true);
        }
        let d: Vec<f32> = targets.map(|i| 1.0 - 0.3 * (i % 4) as f32).collect();
        trainer.values_backward(&batch, head, &d, &mut head_grad);
        trainer.backward(&pool, &policy.weights(), &batch, &PLAIN, &dl, &de, &mut grads);
    }
    trainer.finish(&pool, &policy.weights(), &mut grads);
    (grads, head_grad)
}

#[test]
fn a_value_heads_gradient_reaches_the_whole_trunk() {
    for logits in [false, true] {
        let (mut policy, mut head) = (policy(), value_head());
        let (grads, head_grad) = valued_gradient(&policy, &head, logits, 100);
        let check = |name: &str, g: &[f32], shifted: &mut dyn FnMut(f64) -> f64| {
            let norm = g.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 1e-4, "{name} has no gradient ({norm})");
            let h = 1e-2 / norm.max(1.0) / norm;
            let numeric = (shifted(h) - shifted(-h)) / (2.0 * h);
            let analytic = norm * norm;
            assert!(
                (numeric - analytic).abs() < 0.02 * analytic,
                "{name}: numeric {numeric}, analytic {analytic}"
            );
        };
        for id in 0..policy.base.slots().len() {
            let name = policy.base.slots()[id].parts[0].name.clone();
            let g = grads.base[policy.base.grad_range(id).unwrap()].to_vec();
            check(&name, &g, &mut |h| {
                let original = policy.base.values(id).to_vec();
                for (w, d) in policy.base.values_mut(id).iter_mut().zip(&g) {
                    *w += (h * f64::from(*d)) as f32;
                }
                let value = valued(&policy, &head, logits);
                policy.base.values_mut(id).copy_from_slice(&original);
                value
            });
        }
        check("head", &head_grad, &mut |h| {
            let original = head.clone();
            head.weights.iter_mut().zip(&head_grad).for_each(|(w, d)| *w += (h * f64::from(*d)) as f32);
            let value = valued(&policy, &head, logits);
            head = original;
            value
        });
        let (split, split_head) = valued_gradient(&policy, &head, logits, 11);
        let bits = |g: &[f32]| g.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&grads.base), bits(&split.base));
        assert_eq!(bits(&head_grad), bits(&split_head));
    }
}
