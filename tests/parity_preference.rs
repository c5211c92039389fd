//! Preference objectives against recorded results of TRL: losses, gradients, rewards.

#[path = "support/golden.rs"]
mod golden;

use golden::{Tally, Tensor, Tensors, json, number, numbers, optional, or};
use rft_engine::loss::preference::{
    KtoConfig, PairInputs, PairLoss, PreferenceConfig, Transform, UnpairedLoss, kto_baseline, kto_loss,
    pair_loss, wpo_weights,
};
use serde_json::Value;

const RTOL: f64 = 1e-4;
const ATOL: f64 = 2e-6;

fn pair_loss_named(name: &str) -> PairLoss {
    serde_json::from_value(Value::String(name.into())).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Padded rows without their padding, and where each kept token came from.
struct Ragged {
    offsets: Vec<usize>,
    from: Vec<usize>,
}

impl Ragged {
    fn new(mask: &[bool], columns: usize) -> Self {
        let mut r = Self { offsets: vec![0], from: vec![] };
        for (row, m) in mask.chunks(columns).enumerate() {
            r.from.extend((0..columns).filter(|c| m[*c]).map(|c| row * columns + c));
            r.offsets.push(r.from.len());
        }
        r
    }

    fn take(&self, t: &Tensor) -> Vec<f32> {
        self.from.iter().map(|i| t.data[*i]).collect()
    }

    fn spread(&self, x: &[f32], len: usize) -> Vec<f32> {
        let mut out = vec![0.0; len];
        self.from.iter().zip(x).for_each(|(i, x)| out[*i] = *x);
        out
    }
}

/// 0 outside the completions: the recorded sums run over padding too, whose logprobs no objective reads.
fn only(x: &[f32], mask: &[bool]) -> Vec<f32> {
    x.iter().zip(mask).map(|(x, m)| if *m { *x } else { 0.0 }).collect()
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

#[test]
fn parity_losses_dpo() {
    let (file, tensors) = (json("losses/preference.json"), Tensors::open("losses/preference.safetensors"));
    let ids_mask = tensors.get("dpo.batch.completion_mask");
    let columns = ids_mask.columns() - 1;
    // column t of a logprob scores token t + 1
    let mask: Vec<bool> = ids_mask.mask().chunks(columns + 1).flat_map(|r| r[1..].to_vec()).collect();
    let ragged = Ragged::new(&mask, columns);
    let (new, reference) =
        (ragged.take(tensors.get("dpo.batch.logps")), ragged.take(tensors.get("dpo.batch.ref")));
    let pairs = ids_mask.rows() / 2;
    let mut t = Tally::new("preference.json: DPO family, loss, gradient, rewards");
    for c in file["dpo"].as_array().unwrap() {
        let (id, o) = (c["id"].as_str().unwrap(), &c["options"]);
        let names: Vec<&str> =
            o["loss_type"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
        t.case(format!("{id} {names:?}"));
        let weights =
            if o["loss_weights"].is_null() { vec![1.0; names.len()] } else { numbers(&o["loss_weights"]) };
        // of these losses, only some read the smoothing
        let reads = |n: &&str| matches!(*n, "robust" | "exo_pair" | "aot" | "aot_unpaired");
        let smoothing = if names.iter().any(reads) { or(&o["label_smoothing"], 0.0) } else { 0.0 };
        let rate = or(&o["f_alpha_divergence_coef"], 1.0) - 1.0;
        let config = PreferenceConfig {
            losses: names.iter().map(|n| pair_loss_named(n)).zip(weights).collect(),
            beta: number(&o["beta"]),
            label_smoothing: smoothing,
            transform: match o["f_divergence_type"].as_str().unwrap_or("reverse_kl") {
                "reverse_kl" => Transform::Identity,
                "forward_kl" => Transform::Power { rate: -1.0 },
                "js_divergence" => Transform::JensenShannon,
                "alpha_divergence" => Transform::Power { rate },
                other => panic!("unknown divergence {other}"),
            },
            ld_alpha: optional(&o["ld_alpha"]),
            discopop_tau: or(&o["discopop_tau"], 0.05),
            ..PreferenceConfig::default()
        };
        let pair_weights = (o["use_weighting"] == true)
            .then(|| wpo_weights(&ragged.offsets, &new, &ragged.take(tensors.get("dpo.batch.lssp"))));
        let out = pair_loss(
            &PairInputs {
                offsets: &ragged.offsets,
                new: &new,
                reference: Some(&reference),
                weights: pair_weights.as_deref(),
                margins: None,
                total_pairs: pairs,
                total_chosen_tokens: ragged.offsets[pairs],
            },
            &config,
        );
        t.value("loss", out.loss, number(&c["loss"]), RTOL, ATOL);
        let d = ragged.spread(&out.d_new, mask.len());
        let want = only(&tensors.get(&format!("dpo.{id}.grad_logps")).data, &mask);
        t.values("gradient", &d, &want, RTOL, ATOL);
        let m = &c["metrics"];
        let (chosen, rejected) = (mean(&out.chosen_rewards), mean(&out.rejected_rewards));
        t.value("rewards/chosen", chosen, number(&m["rewards/chosen"]), RTOL, ATOL);
        t.value("rewards/rejected", rejected, number(&m["rewards/rejected"]), RTOL, ATOL);
        t.value("rewards/margins", chosen - rejected, number(&m["rewards/margins"]), RTOL, ATOL);
        let better = out.chosen_rewards.iter().zip(&out.rejected_rewards).filter(|(c, r)| c > r).count();
        t.value(
            "rewards/accuracies",
            better as f64 / pairs as f64,
            number(&m["rewards/accuracies"]),
            RTOL,
            ATOL,
        );
    }
    t.finish();
}

#[test]
fn parity_losses_kto() {
    let (file, tensors) = (json("losses/preference.json"), Tensors::open("losses/preference.safetensors"));
    let get = |k: &str| tensors.get(&format!("kto.batch.{k}"));
    let (logps, reference) = (get("logps"), get("ref"));
    let offsets: Vec<usize> = (0..=logps.rows()).map(|r| r * logps.columns()).collect();
    let labels: Vec<bool> = file["kto_labels"].as_array().unwrap().iter().map(|l| *l == true).collect();
    let sums = |t: &Tensor| -> Vec<f64> {
        t.data.chunks(t.columns()).map(|r| r.iter().map(|x| f64::from(*x)).sum()).collect()
    };
    let baseline = kto_baseline(&sums(get("KL_logps")), &sums(get("ref_KL_logps")));
    let completion = get("completion_mask").mask();
    let columns = get("completion_mask").columns();
    let mask: Vec<bool> = completion.chunks(columns).flat_map(|r| r[1..].to_vec()).collect();
    let mut t = Tally::new("preference.json: KTO, loss, gradient, rewards");
    for c in file["kto"].as_array().unwrap() {
        let (id, o) = (c["id"].as_str().unwrap(), &c["options"]);
        t.case(id);
        let config = KtoConfig {
            loss: match o["loss_type"].as_str().unwrap_or("kto") {
                "kto" => UnpairedLoss::Kto,
                "apo_zero_unpaired" => UnpairedLoss::ApoZeroUnpaired,
                other => panic!("unknown loss_type {other}"),
            },
            beta: number(&o["beta"]),
            desirable_weight: or(&o["desirable_weight"], 1.0),
            undesirable_weight: or(&o["undesirable_weight"], 1.0),
        };
        let out = kto_loss(&offsets, &logps.data, &reference.data, &labels, baseline, labels.len(), &config);
        t.value("loss", out.loss, number(&c["loss"]), RTOL, ATOL);
        let want = only(&tensors.get(&format!("kto.{id}.grad_logps")).data, &mask);
        t.values("gradient", &only(&out.d_new, &mask), &want, RTOL, ATOL);
        if config.loss == UnpairedLoss::Kto {
            t.value("kl", baseline, number(&c["metrics"]["kl"]), RTOL, ATOL);
        }
        for (name, good) in [("chosen", true), ("rejected", false)] {
            let picked: Vec<f64> = out
                .chosen_rewards
                .iter()
                .zip(&labels)
                .filter(|(_, l)| **l == good)
                .map(|(r, _)| *r)
                .collect();
            t.value(name, mean(&picked), number(&c["metrics"][format!("rewards/{name}")]), RTOL, ATOL);
        }
    }
    t.finish();
}

/// One logprob a completion: the library sums or averages before it.
fn check_scalar(t: &mut Tally, tensors: &Tensors, prefix: &str, config: &PreferenceConfig, sign: f64) {
    let (chosen, rejected) = (&tensors.get("cpo.chosen_logps").data, &tensors.get("cpo.rejected_logps").data);
    let n = chosen.len();
    let out = pair_loss(
        &PairInputs {
            offsets: &(0..=2 * n).collect::<Vec<_>>(),
            new: &[&chosen[..], &rejected[..]].concat(),
            total_pairs: n,
            total_chosen_tokens: n,
            ..PairInputs::default()
        },
        config,
    );
    let losses: Vec<f64> = out.losses.iter().map(|l| sign * l).collect();
    t.values("losses", &losses, &tensors.get(&format!("{prefix}.losses")).data, RTOL, ATOL);
    t.values("chosen", &out.d_new[..n], &tensors.get(&format!("{prefix}.grad_chosen")).data, RTOL, ATOL);
    t.values("rejected", &out.d_new[n..], &tensors.get(&format!("{prefix}.grad_rejected")).data, RTOL, ATOL);
    // rewards are of plain scores here, of transformed ones there
    let rewards =
        tensors.find(&format!("{prefix}.chosen_rewards")).filter(|_| config.transform == Transform::Identity);
    if let Some(rewards) = rewards {
        t.values("chosen rewards", &out.chosen_rewards, &rewards.data, RTOL, ATOL);
    }
}

#[test]
fn parity_losses_cpo_and_orpo() {
    let (file, tensors) = (json("losses/preference.json"), Tensors::open("losses/preference.safetensors"));
    let mut t = Tally::new("preference.json: CPO, SimPO, AlphaPO and ORPO, losses and gradients");
    for c in file["cpo"].as_array().unwrap() {
        let (id, o) = (c["id"].as_str().unwrap(), &c["options"]);
        let name = o["loss_type"].as_str().unwrap();
        t.case(format!("cpo {id} {name}"));
        let (alpha, beta) = (or(&o["alpha"], 0.0), number(&o["beta"]));
        let is_simpo = name == "simpo";
        let config = PreferenceConfig {
            losses: vec![(pair_loss_named(if is_simpo { "sigmoid" } else { name }), 1.0)],
            beta,
            label_smoothing: or(&o["label_smoothing"], 0.0),
            transform: if alpha == 0.0 { Transform::Identity } else { Transform::Power { rate: -alpha } },
            margin: if is_simpo { number(&o["simpo_gamma"]) / beta } else { 0.0 },
            ..PreferenceConfig::default()
        };
        check_scalar(&mut t, &tensors, &format!("cpo.{id}"), &config, 1.0);
    }
    for c in file["orpo"].as_array().unwrap() {
        let id = c["id"].as_str().unwrap();
        t.case(format!("orpo {id}"));
        let config = PreferenceConfig {
            losses: vec![(PairLoss::OddsRatio, 1.0)],
            beta: number(&c["options"]["beta"]),
            ..PreferenceConfig::default()
        };
        // the recorded term is what is subtracted from the likelihood loss
        check_scalar(&mut t, &tensors, &format!("orpo.{id}"), &config, -1.0);
    }
    t.finish();
}
