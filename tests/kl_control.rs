//! KL control: gradients against closed forms, and in whole runs what is logged against what was sampled.

#[path = "support/runs.rs"]
mod runs;

use rft_engine::config::Recipe;
use rft_engine::loss::kl::{Estimator, Gradient, KlConfig};
use runs::{DIGITS, Folder, lines, program, stderr, weights};
use serde_json::{Map, Value};

const ESTIMATORS: [(&str, Estimator); 4] =
    [("k1", Estimator::K1), ("k2", Estimator::K2), ("k3", Estimator::K3), ("abs", Estimator::Abs)];
const GRADIENTS: [(&str, Gradient); 3] = [
    ("plain", Gradient::Plain),
    ("straight_through", Gradient::StraightThrough),
    ("weighted", Gradient::Weighted),
];

fn softmax(logits: &[f64]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|l| l.exp()).sum();
    logits.iter().map(|l| l.exp() / sum).collect()
}

/// KL(p || q).
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum()
}

/// Gradient of a function of logits, by central differences.
fn slope(logits: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let h = 1e-5;
    let at = |i: usize, d: f64| {
        let mut moved = logits.to_vec();
        moved[i] += d;
        f(&moved)
    };
    (0..logits.len()).map(|i| (at(i, h) - at(i, -h)) / (2.0 * h)).collect()
}

const POLICY: [f64; 4] = [0.3, -0.7, 1.1, 0.0];
const REFERENCE: [f64; 4] = [0.1, 0.4, -0.2, 0.9];
const SAMPLER: [f64; 4] = [0.5, -0.2, 0.6, -0.4];

/// Expected gradient by the policy's logits of a token's penalty, tokens drawn from `sampler`.
fn expected(kl: &KlConfig, sampler: &[f64]) -> Vec<f64> {
    let (p, r, s) = (softmax(&POLICY), softmax(&REFERENCE), softmax(sampler));
    let mut sum = vec![0.0; 4];
    for token in 0..4 {
        let t = kl.token(p[token].ln(), r[token].ln(), p[token] / s[token]);
        for (i, sum) in sum.iter_mut().enumerate() {
            let d_logprob = f64::from(i == token) - p[i];
            *sum += s[token] * (t.direct + t.through) * d_logprob;
        }
    }
    sum
}

fn assert_close(found: &[f64], exact: &[f64], what: &str) {
    for (f, e) in found.iter().zip(exact) {
        assert!((f - e).abs() < 1e-9, "{what}: {found:?}, not {exact:?}");
    }
}

#[test]
fn expected_gradients_are_those_of_the_divergences_they_stand_for() {
    let reference = softmax(&REFERENCE);
    let forward = slope(&POLICY, |l| divergence(&softmax(l), &reference));
    let backward = slope(&POLICY, |l| divergence(&reference, &softmax(l)));
    let of = |estimator, gradient| KlConfig { estimator, gradient, ..KlConfig::default() };
    // on policy
    assert_close(&expected(&of(Estimator::K2, Gradient::Plain), &POLICY), &forward, "k2");
    for (name, estimator) in ESTIMATORS {
        let straight = of(estimator, Gradient::StraightThrough);
        assert_close(&expected(&straight, &POLICY), &forward, &format!("{name} straight through"));
    }
    assert_close(&expected(&of(Estimator::K1, Gradient::Plain), &POLICY), &[0.0; 4], "k1 has none");
    assert_close(
        &expected(&of(Estimator::K3, Gradient::Plain), &POLICY),
        &backward,
        "k3's is the other way round",
    );
    // whoever sampled
    for (name, estimator) in [ESTIMATORS[0], ESTIMATORS[2]] {
        let weighted = of(estimator, Gradient::Weighted);
        assert_close(&expected(&weighted, &SAMPLER), &forward, &format!("{name} weighted, off policy"));
        assert_close(&expected(&weighted, &POLICY), &forward, &format!("{name} weighted, on policy"));
    }
    let plain = expected(&of(Estimator::K2, Gradient::Plain), &SAMPLER);
    assert!(plain.iter().zip(&forward).any(|(a, b)| (a - b).abs() > 1e-2), "without weights it is biased");
}

const RECIPE: &str = r#"
name = "kl"
[data]
heldout = 4
[data.arithmetic]
max_operand = 9
problems = 30
[[reward]]
script = "REWARD"
[rollout]
prompts_per_step = 3
group_size = 4
max_new_tokens = 8
[algorithm]
reference = {kind = "base"}
[algorithm.objective.kl]
coefficient = 0.1
[optimizer]
lr = 3e-3
[train]
steps = 4
"#;

const NEW: &str = "[model.new]\nhidden = 32\nlayers = 2\nheads = 2\nkv_heads = 1\nhead_dim = 16\nffn = 64\n";

struct Place(Folder);

impl Place {
    /// A model of its own making, and the recipe that starts from it.
    fn new() -> Self {
        let folder = Folder::with_reward(&format!("{RECIPE}{NEW}"), DIGITS);
        let recipe = std::fs::read_to_string(folder.at("recipe.toml")).unwrap();
        let first = folder.run("first", &["stage=[{kind = \"sft\", steps = 2, batch = 4}]"]);
        let model = format!("[model]\npath = {:?}\n", first.join("final"));
        folder.write("recipe.toml", &recipe.replace(NEW, &model));
        Self(folder)
    }

    fn launch(&self, run: &str, sets: &[&str]) -> Vec<Map<String, Value>> {
        lines(&self.0.run(run, sets).join("metrics.jsonl"))
    }

    /// Of every sample of a run: step, reward, advantage, logprobs as drawn and under the model that the run began with.
    fn samples(&self, run: &str) -> Vec<Sample> {
        let (model, file) = (self.0.at("first/final"), self.0.at(run).join("samples.jsonl"));
        let output =
            program(&["logprobs", "--model", model.to_str().unwrap(), "--data", file.to_str().unwrap()]);
        assert!(output.status.success(), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let numbers =
            |v: &Value| v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<f64>>();
        lines(&file)
            .iter()
            .zip(text.lines())
            .map(|(row, base)| Sample {
                step: row["step"].as_u64().unwrap(),
                reward: row["reward"].as_f64().unwrap(),
                advantage: row["advantage"].as_f64().unwrap(),
                drawn: numbers(&row["logprobs"]),
                base: numbers(&serde_json::from_str::<Value>(base).unwrap()["logprobs"]),
            })
            .collect()
    }
}

struct Sample {
    step: u64,
    reward: f64,
    advantage: f64,
    drawn: Vec<f64>,
    base: Vec<f64>,
}

fn number(row: &Map<String, Value>, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row:?}"))
}

/// The definition of `kl`: the estimator's mean over the completion tokens of the step, nats.
#[test]
fn the_logged_kl_is_the_estimators_mean_over_the_sampled_tokens() {
    let place = Place::new();
    for (name, estimator) in ESTIMATORS {
        let set = format!("algorithm.objective.kl={{estimator = \"{name}\", measure = true}}");
        let rows = place.launch(name, &[&set]);
        let samples = place.samples(name);
        for row in &rows {
            let of_step = samples.iter().filter(|s| s.step == row["step"].as_u64().unwrap());
            let tokens: Vec<(f64, f64)> =
                of_step.flat_map(|s| s.drawn.iter().copied().zip(s.base.iter().copied())).collect();
            let mean = tokens.iter().map(|(new, base)| estimator.value_and_slope(*new, *base).0).sum::<f64>()
                / tokens.len() as f64;
            assert!((number(row, "kl") - mean).abs() < 1e-6, "{name}: {mean}, logged {}", row["kl"]);
            assert_eq!(number(row, "kl_coefficient"), 0.0);
        }
        assert!(number(&rows[3], "kl").abs() > 1e-4, "{name}: the policy has moved");
    }
}

#[test]
fn a_penalty_in_the_loss_adds_its_mean_and_one_in_the_reward_moves_the_advantages() {
    let place = Place::new();
    for row in place.launch("loss", &["algorithm.objective.aggregation=\"token\""]) {
        let samples = place.samples("loss");
        let of_step: Vec<&Sample> =
            samples.iter().filter(|s| s.step == row["step"].as_u64().unwrap()).collect();
        let tokens: usize = of_step.iter().map(|s| s.drawn.len()).sum();
        let gain: f64 =
            of_step.iter().map(|s| s.advantage * s.drawn.len() as f64).sum::<f64>() / tokens as f64;
        let expected = 0.1 * number(&row, "kl") - gain;
        assert!((number(&row, "loss") - expected).abs() < 1e-6, "{expected}, logged {}", row["loss"]);
    }
    for (name, estimator) in ESTIMATORS {
        let run = format!("reward-{name}");
        let set = format!(
            "algorithm.objective.kl={{coefficient = 0.3, estimator = \"{name}\", placement = \"reward\"}}"
        );
        place.launch(&run, &[&set, "algorithm.advantage.scale=\"none\""]);
        for group in place.samples(&run).chunks(4) {
            let paid: Vec<f64> = group
                .iter()
                .map(|s| {
                    let kl = |(new, base): (&f64, &f64)| estimator.value_and_slope(*new, *base).0;
                    s.reward - 0.3 * s.drawn.iter().zip(&s.base).map(kl).sum::<f64>()
                })
                .collect();
            let mean = paid.iter().sum::<f64>() / 4.0;
            for (s, paid) in group.iter().zip(&paid) {
                assert!(
                    (s.advantage - (paid - mean)).abs() < 1e-5,
                    "{name}: {} {}",
                    s.advantage,
                    paid - mean
                );
            }
        }
    }
}

#[test]
fn every_gradient_runs_and_they_differ() {
    let place = Place::new();
    let mut ends = Vec::new();
    for (e, _) in ESTIMATORS {
        for (g, _) in GRADIENTS {
            let run = format!("{e}-{g}");
            let set = format!(
                "algorithm.objective.kl={{coefficient = 1.0, estimator = \"{e}\", gradient = \"{g}\"}}"
            );
            place.launch(&run, &[&set, "train.inner_epochs=2"]);
            ends.push(weights(&place.0.at(&run)));
        }
    }
    // straight through, the estimator is only what is logged
    let straight: Vec<&Vec<u8>> = ends.iter().skip(1).step_by(3).collect();
    assert!(straight.iter().all(|w| *w == straight[0]));
    assert_eq!(
        ends.iter().collect::<std::collections::BTreeSet<_>>().len(),
        4 + 4 + 1 - 1,
        "k2's own is it too"
    );
}

#[test]
fn the_coefficient_moves_as_its_control_says() {
    let place = Place::new();
    let control = "{coefficient = 0.2, control = {adaptive = {target = 0.002, horizon = 300.0}}}";
    let rows = place.launch("adaptive", &[&format!("algorithm.objective.kl={control}")]);
    let mut coefficient = 0.2;
    for row in &rows {
        assert!((number(row, "kl_coefficient") - coefficient).abs() < 1e-12);
        let tokens = (number(row, "completion_tokens_mean") * 12.0).round();
        let error = (number(row, "kl") / 0.002 - 1.0).clamp(-0.2, 0.2);
        coefficient *= 1.0 + error * tokens / 300.0;
    }
    let signs: Vec<bool> = rows.iter().map(|row| number(row, "kl") > 0.002).collect();
    assert!(signs.contains(&true) && signs.contains(&false), "both directions were taken: {signs:?}");

    let control = "{coefficient = 0.0, control = {scheduled = {end = 0.3, steps = 3}}}";
    let rows = place.launch("scheduled", &[&format!("algorithm.objective.kl={control}")]);
    for (row, expected) in rows.iter().zip([0.0, 0.1, 0.2, 0.3]) {
        assert!((number(row, "kl_coefficient") - expected).abs() < 1e-12, "{row:?}");
    }
}

#[test]
fn settings_without_effect_are_refused() {
    for (value, says) in [
        ("{coefficient = -0.1}", "coefficient"),
        ("{coefficient = nan}", "coefficient"),
        ("{coefficient = 0.0, control = {adaptive = {target = 0.1, horizon = 1000.0}}}", "never moves"),
        ("{coefficient = 0.1, control = {adaptive = {target = 0.0, horizon = 1000.0}}}", "target"),
        ("{coefficient = 0.1, control = {scheduled = {end = -1.0, steps = 3}}}", "end"),
        ("{coefficient = 0.1, placement = \"reward\", gradient = \"weighted\"}", "gradient"),
    ] {
        let set = format!("algorithm.objective.kl={value}");
        let error = Recipe::load(None, &[set]).unwrap_err().to_string();
        assert!(error.contains(says), "{value}: {error}");
    }
}
