//! Rewards of spans within a completion, from a Lua script to the weights: which tokens get the credit, by closed forms; what the
//! learner makes of it; the same bytes on one thread and two and after a cut; with groups and with a critic.

#[path = "support/runs.rs"]
mod runs;

use std::path::Path;

use runs::{Folder, lines, timeless_metrics, weights};
use serde_json::{Map, Value};

const RECIPE: &str = r#"
name = "dense"
[model.new]
hidden = 32
layers = 2
heads = 2
kv_heads = 1
head_dim = 16
ffn = 64
[data]
heldout = 0
[data.arithmetic]
max_operand = 9
problems = 30
[[reward]]
script = "REWARD"
[rollout]
prompts_per_step = 4
group_size = 4
max_new_tokens = 12
[optimizer]
lr = 1e-3
[train]
steps = 4
checkpoint_every = 1
keep_checkpoints = 99
"#;

/// Every digit is worth a tenth of itself where it stands, and being long a little at the end.
const DIGITS: &str = "function reward(sample)
  local spans = {}
  for at, digit in sample.completion:gmatch('()(%d)') do
    spans[#spans + 1] = { from = at, to = at, value = tonumber(digit) / 10 }
  end
  local length = #sample.completion / 100
  if #spans == 0 then return { length = length } end
  return { digits = spans, length = length }
end
";

/// The same reward as one number a completion.
const WHOLE: &str = "function reward(sample)
  local sum = 0
  for digit in sample.completion:gmatch('%d') do sum = sum + tonumber(digit) / 10 end
  local length = #sample.completion / 100
  if not sample.completion:find('%d') then return { length = length } end
  return { digits = sum, length = length }
end
";

/// A completion's rewards by token, as the script above gives them: steps, and the part that no step gave.
struct Earned {
    group: String,
    steps: Vec<(usize, f64)>,
    outcome: f64,
    tokens: usize,
    advantages: Vec<f64>,
}

fn earned(sample: &Map<String, Value>) -> Earned {
    let text = sample["completion"].as_str().unwrap();
    let ends: Vec<usize> =
        sample["token_ends"].as_array().unwrap().iter().map(|e| e.as_u64().unwrap() as usize).collect();
    let digits = text.bytes().enumerate().filter(|(_, b)| b.is_ascii_digit());
    let step = |(at, digit): (usize, u8)| {
        (ends.iter().position(|&end| end > at).unwrap(), f64::from(digit - b'0') / 10.0)
    };
    let one = sample["advantage"].as_f64().unwrap();
    let advantages = match sample.get("token_advantages") {
        Some(all) => all.as_array().unwrap().iter().map(|a| a.as_f64().unwrap()).collect(),
        None => vec![one; ends.len()],
    };
    assert!((advantages.iter().sum::<f64>() / ends.len() as f64 - one).abs() < 1e-5, "{sample:?}");
    Earned {
        group: sample["id"].as_str().unwrap().into(),
        steps: digits.map(step).collect(),
        outcome: text.len() as f64 / 100.0,
        tokens: ends.len(),
        advantages,
    }
}

impl Earned {
    fn total(&self) -> f64 {
        self.outcome + self.steps.iter().map(|s| s.1).sum::<f64>()
    }

    /// Sum of what is earned at a token or later, `discount` a token.
    fn later(&self, token: usize, discount: f64) -> f64 {
        let from = |at: usize, r: f64| if at >= token { r * discount.powi((at - token) as i32) } else { 0.0 };
        self.steps.iter().map(|&(at, r)| from(at, r)).sum::<f64>() + from(self.tokens - 1, self.outcome)
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn deviation(values: &[f64]) -> f64 {
    let m = mean(values);
    (values.iter().map(|v| (v - m).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0)).sqrt()
}

/// The first step's completions, group by group.
fn groups(run: &Path) -> Vec<Vec<Earned>> {
    let samples = lines(&run.join("samples.jsonl"));
    let first: Vec<Earned> = samples.iter().filter(|s| s["step"] == 1).map(earned).collect();
    assert_eq!(first.len(), 16);
    let mut groups: Vec<Vec<Earned>> = Vec::new();
    for one in first {
        match groups.last_mut().filter(|g| g[0].group == one.group) {
            Some(group) => group.push(one),
            None => groups.push(vec![one]),
        }
    }
    groups
}

/// Holds every token's advantage in the first step to `expected(group, completion, token)`.
fn hold(run: &Path, expected: impl Fn(&[Earned], &Earned, usize) -> f64) {
    let (mut tokens, mut within) = (0, 0);
    for group in groups(run) {
        for one in &group {
            for (token, got) in one.advantages.iter().enumerate() {
                let want = expected(&group, one, token);
                assert!((got - want).abs() < 1e-4, "{}: token {token}: {got} for {want}", one.group);
                tokens += 1;
            }
            within += usize::from(one.advantages.iter().any(|a| *a != one.advantages[0]));
        }
    }
    println!("{tokens} tokens agree, {within} completions whose tokens differ");
    assert!(within >= 8, "{within} completions tell their tokens apart");
}

#[test]
fn every_token_has_the_advantage_of_what_it_earned() {
    let folder = Folder::with_reward(RECIPE, DIGITS);
    let one = "train.steps=1";
    // process supervision: the rest within the group, plus the group's normalised steps from the token on
    hold(&folder.run("process", &[one]), |group, own, token| {
        let outcomes: Vec<f64> = group.iter().map(|g| g.outcome).collect();
        let steps: Vec<f64> = group.iter().flat_map(|g| &g.steps).map(|s| s.1).collect();
        let spread = deviation(&steps);
        let later = own.steps.iter().filter(|(at, _)| *at >= token);
        let spread_of_outcomes = deviation(&outcomes);
        (own.outcome - mean(&outcomes)) / (spread_of_outcomes + 1e-4)
            + later.map(|(_, r)| (r - mean(&steps)) / (spread + 1e-4)).sum::<f64>()
    });
    let returns = [
        "algorithm.advantage.credit=returns",
        "algorithm.advantage.gamma=0.9",
        "algorithm.advantage.scale=none",
    ];
    hold(&folder.run("returns", &[&returns[..], &[one]].concat()), |group, own, token| {
        let totals: Vec<f64> = group.iter().map(Earned::total).collect();
        own.later(token, 0.9) - mean(&totals)
    });
    // a critic that says 0 everywhere, as at its first step
    let critic = "algorithm.critic={ gamma = 0.95, lambda = 0.9, whiten = false }";
    hold(&folder.run("critic", &[critic, one]), |_, own, token| own.later(token, 0.95 * 0.9));
}

#[test]
fn as_one_number_the_spans_are_the_reward_that_a_script_without_spans_gives() {
    let (spans, whole) = (Folder::with_reward(RECIPE, DIGITS), Folder::with_reward(RECIPE, WHOLE));
    let one = |folder: &Folder| folder.run("one", &["algorithm.advantage.credit=completion"]);
    let (a, b) = (one(&spans), one(&whole));
    assert_eq!(weights(&a), weights(&b));
    assert_eq!(timeless_metrics(&a), timeless_metrics(&b));
    assert!(!lines(&a.join("samples.jsonl")).iter().any(|s| s.contains_key("token_advantages")));
    // and by token they are not
    assert_ne!(weights(&a), weights(&spans.run("process", &[])));
}

/// Only the token that completes the first character is rewarded.
const FIRST: &str = "function reward(sample)
  if #sample.completion == 0 then return 0 end
  return { { from = 1, to = 1, value = #sample.completion:match('^%d?') + 0.5 } }
end
";

fn numbers(run: &Path) -> Vec<f32> {
    let bytes = weights(run);
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

#[test]
fn the_learner_moves_as_if_nothing_came_after_the_span() {
    let folder = Folder::with_reward(RECIPE, FIRST);
    // what a token earns is all there is, and every token weighs 1, however many follow
    let sets = [
        "train.steps=1",
        "algorithm.advantage.credit=returns",
        "algorithm.advantage.baseline=zero",
        "algorithm.advantage.scale=none",
        "algorithm.objective.aggregation=sum",
        "optimizer.kind=sgd",
        "optimizer.max_grad_norm=0",
    ];
    let run = |name: &str, more: &[&str]| folder.run(name, &[&sets[..], more].concat());
    let start = numbers(&run("start", &["optimizer.lr=1e-20"]));
    let long = numbers(&run("long", &["optimizer.lr=0.1"]));
    let short = numbers(&run("short", &["optimizer.lr=0.1", "rollout.max_new_tokens=1"]));
    let distance = |a: &[f32], b: &[f32]| {
        let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let (moved, apart) = (distance(&long, &start), distance(&long, &short));
    println!("moved {moved:.4}, apart {apart:.2e}");
    assert!(moved > 0.05 && apart < 1e-4 * moved, "moved {moved}, apart {apart}");
    // without the span, all tokens share the reward
    let shared = numbers(&run("shared", &["optimizer.lr=0.1", "algorithm.advantage.credit=completion"]));
    assert!(distance(&shared, &long) > 0.1 * moved);
}

#[test]
fn dense_rewards_give_equal_bytes_on_one_thread_and_two_and_after_a_cut() {
    let folder = Folder::with_reward(RECIPE, DIGITS);
    let critic = "algorithm.critic={ trunk = \"separate\", gamma = 0.95 }";
    for (name, set) in [("groups", "algorithm.advantage.credit=process"), ("critic", critic)] {
        let whole = folder.run(name, &[set, "devices.threads=1"]);
        let samples = |run: &Path| std::fs::read(run.join("samples.jsonl")).unwrap();
        let same = |other: &Path| {
            assert_eq!(weights(&whole), weights(other), "{name}");
            assert_eq!(timeless_metrics(&whole), timeless_metrics(other), "{name}");
            assert!(samples(&whole) == samples(other), "{name}");
        };
        same(&folder.run(&format!("{name}-two"), &[set, "devices.threads=2"]));
        for last in [1, 3] {
            same(&folder.resumed(&whole, &format!("{name}-{last}"), last));
        }
    }
}
