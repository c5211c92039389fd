//! The generated task of the default recipe: sums and differences with a worked answer.
//!
//! A row is `{id, prompt, answer, difficulty, demonstration}`. The demonstration works digit by digit, units first, inside
//! `<think>` and gives the result inside `<answer>`. A stated share of the demonstrations goes wrong on purpose, so that
//! a model that imitates them well still errs and reinforcement has something to teach.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::rng::{Purpose, Stream};

/// What the problems look like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArithmeticConfig {
    /// Operands are in `0..=max_operand`.
    pub max_operand: u64,
    /// Distinct training problems.
    pub problems: usize,
    /// Share of demonstrations that go wrong in one digit.
    pub demo_noise: f64,
    /// What is done with the operands.
    pub operation: Operation,
}

/// What is done with the operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Their sum.
    #[default]
    Add,
    /// The greater less the smaller.
    Subtract,
}

impl Default for ArithmeticConfig {
    fn default() -> Self {
        Self { max_operand: 99, problems: 4000, demo_noise: 0.5, operation: Operation::Add }
    }
}

impl ArithmeticConfig {
    /// Refuses a task without a problem in each of the two sets.
    ///
    /// # Errors
    /// Operands that are too small.
    pub fn check(&self) -> std::result::Result<(), String> {
        let most = self.max_operand.min(MOST_TRIED);
        let kinds = (0..=most).flat_map(|a| (0..=most).map(move |b| is_heldout(a, b)));
        match kinds.clone().any(|heldout| heldout) && kinds.clone().any(|heldout| !heldout) {
            true => Ok(()),
            false => Err(format!(
                "max_operand = {} leaves no problem to train on or none to hold out. hint: 9 or more",
                self.max_operand
            )),
        }
    }
}

/// Operands up to here have problems in both sets.
const MOST_TRIED: u64 = 9;

/// One pair in eight is held out, whatever the seed.
fn is_heldout(a: u64, b: u64) -> bool {
    Stream::new(0, Purpose::Task, &[a, b]).at(0).is_multiple_of(8)
}

/// Which of the two disjoint sets a row belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// To train on.
    Train,
    /// To measure on.
    Heldout,
}

/// Characters of prompts and demonstrations.
const CHARACTERS: &str = "0123456789+-= ,;c";

/// The task's tokenizer: a character a token, the tags whole, `<eos>` at the end.
///
/// # Errors
/// None for the constants here; the tokenizer's own if they change.
pub fn tokenizer() -> Result<Tokenizer> {
    let tags = ["<think>", "</think>", "<answer>", "</answer>"];
    Tokenizer::from_characters(CHARACTERS, &tags, &["<eos>"], "<eos>")
}

/// The first `n` rows of a split.
pub fn generate(config: &ArithmeticConfig, seed: u64, split: Split, n: usize) -> Vec<Map<String, Value>> {
    (0..n as u64).map(|row| problem(config, seed, split, row)).collect()
}

fn problem(config: &ArithmeticConfig, seed: u64, split: Split, row: u64) -> Map<String, Value> {
    let mut draw = Stream::new(seed, Purpose::Task, &[split as u64, row]);
    let (a, b) = loop {
        let (a, b) = (draw.below(config.max_operand + 1), draw.below(config.max_operand + 1));
        if is_heldout(a, b) == (split == Split::Heldout) {
            break (a, b);
        }
    };
    let wrong = draw.next_f64() < config.demo_noise;
    let slip = (draw.below(2), 1 + draw.below(9));
    let (a, b, sign, answer) = match config.operation {
        Operation::Add => (a, b, '+', a + b),
        Operation::Subtract => (a.max(b), a.min(b), '-', a.abs_diff(b)),
    };
    // digits after the first, and carries
    let difficulty = demonstrate(a, b, config.operation, None).matches([',', 'c']).count();
    let demonstration = demonstrate(a, b, config.operation, wrong.then_some(slip));
    let name = if split == Split::Heldout { "heldout" } else { "train" };
    let row = json!({
        "id": format!("{name}-{row}"),
        "prompt": format!("{a}{sign}{b}="),
        "answer": answer.to_string(),
        "difficulty": difficulty,
        "demonstration": demonstration,
    });
    match row {
        Value::Object(map) => map,
        _ => unreachable!("the literal above is an object"),
    }
}

/// Works a sum or difference (`a >= b`) digit by digit from the units, `c` marking what is carried to the next or taken from
/// it; `slip = (digit, by)` adds `by` to that digit.
///
/// `demonstrate(27, 58, Add, None)` is `<think>7+8=5c,2+5=8</think><answer>85</answer>`.
fn demonstrate(a: u64, b: u64, operation: Operation, slip: Option<(u64, u64)>) -> String {
    let digits = a.max(b).max(1).ilog10() as u64 + 1;
    let (mut steps, mut result, mut carry) = (Vec::new(), String::new(), 0);
    let sign = if operation == Operation::Add { '+' } else { '-' };
    for place in 0..digits {
        let digit = |x: u64| x / 10u64.pow(place as u32) % 10;
        // ten times the carry and the digit; a difference borrows ten and gives the rest back
        let mut sum = match operation {
            Operation::Add => digit(a) + digit(b) + carry,
            Operation::Subtract if digit(a) < digit(b) + carry => 20 + digit(a) - digit(b) - carry,
            Operation::Subtract => digit(a) - digit(b) - carry,
        };
        if let Some((at, by)) = slip
            && at.min(digits - 1) == place
        {
            sum = sum / 10 * 10 + (sum + by) % 10;
        }
        carry = u64::from(sum >= 10);
        let mark = if carry > 0 { "c" } else { "" };
        steps.push(format!("{}{sign}{}={}{mark}", digit(a), digit(b), sum % 10));
        result.insert_str(0, &(sum % 10).to_string());
    }
    if carry > 0 {
        result.insert(0, '1');
    }
    if operation == Operation::Subtract {
        let kept = result.trim_start_matches('0').len().max(1);
        result = result.split_off(result.len() - kept);
    }
    format!("<think>{}</think><answer>{result}</answer>", steps.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_examples() {
        assert_eq!(
            demonstrate(52, 8, Operation::Subtract, None),
            "<think>2-8=4c,5-0=4</think><answer>44</answer>"
        );
        assert_eq!(
            demonstrate(103, 98, Operation::Subtract, None),
            "<think>3-8=5c,0-9=0c,1-0=0</think><answer>5</answer>"
        );
        assert_eq!(demonstrate(7, 7, Operation::Subtract, None), "<think>7-7=0</think><answer>0</answer>");
        assert_eq!(
            demonstrate(27, 58, Operation::Add, None),
            "<think>7+8=5c,2+5=8</think><answer>85</answer>"
        );
        assert_eq!(
            demonstrate(99, 1, Operation::Add, None),
            "<think>9+1=0c,9+0=0c</think><answer>100</answer>"
        );
        assert_eq!(demonstrate(3, 4, Operation::Add, Some((0, 2))), "<think>3+4=9</think><answer>9</answer>");
    }

    #[test]
    fn without_noise_every_demonstration_gives_the_answer_and_with_it_the_stated_share_does_not() {
        let right = |noise: f64| {
            let config = ArithmeticConfig { demo_noise: noise, ..Default::default() };
            let rows = generate(&config, 1, Split::Train, 2000);
            let good = |r: &&Map<String, Value>| {
                let answer = format!("<answer>{}</answer>", r["answer"].as_str().unwrap());
                r["demonstration"].as_str().unwrap().ends_with(&answer)
            };
            rows.iter().filter(good).count()
        };
        assert_eq!(right(0.0), 2000);
        // 2000 draws at 0.4: standard deviation 22, five of them
        assert!(right(0.4).abs_diff(1200) < 110, "{}", right(0.4));
    }

    #[test]
    fn train_and_heldout_share_no_problem_and_the_tokenizer_covers_both() {
        let config = ArithmeticConfig::default();
        let (train, heldout) =
            (generate(&config, 3, Split::Train, 3000), generate(&config, 3, Split::Heldout, 300));
        let tokenizer = tokenizer().unwrap();
        for row in &heldout {
            assert!(train.iter().all(|t| t["prompt"] != row["prompt"]));
            let text =
                format!("{}{}", row["prompt"].as_str().unwrap(), row["demonstration"].as_str().unwrap());
            assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap(), true), text);
        }
    }
}
