//! The mathematics of `rft.math` against recorded verdicts of other graders.
//!
//! Rows come from `rewards/math/*.jsonl` under `RFT_FIXTURES` or the repository's `tests/fixtures`.

mod common;

use rft_rewards::math::{
    CosineBounds, EqualOptions, ExtractOptions, GymError, GymItem, Verdict, VerifyOptions, accuracy, check,
    cosine_scaled, equal, extract_choice, gym_score, reasoning_accuracy, repetition, soft_overlong,
    think_format, verify,
};
use serde_json::Value;
use std::collections::BTreeMap;

fn rows(name: &str) -> Vec<Value> {
    common::rows(&format!("rewards/math/{name}"))
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_else(|| panic!("{}: no text {key}", row["id"]))
}

/// Counts of agreeing rows by family, and the rows that do not agree.
#[derive(Default)]
struct Tally {
    families: BTreeMap<String, (usize, usize)>,
    wrong: Vec<String>,
}

impl Tally {
    fn add(&mut self, family: &str, agrees: bool, note: impl FnOnce() -> String) {
        let counts = self.families.entry(family.to_string()).or_default();
        counts.0 += usize::from(agrees);
        counts.1 += 1;
        if !agrees {
            self.wrong.push(note());
        }
    }

    fn print(&self, title: &str) -> f64 {
        let (mut good, mut all) = (0, 0);
        for (family, (g, n)) in &self.families {
            println!("{title} {family}: {g}/{n}");
            good += g;
            all += n;
        }
        println!("{title}: {good}/{all} rows agree ({:.2} %)", 100.0 * good as f64 / all.max(1) as f64);
        for line in &self.wrong {
            println!("  {line}");
        }
        good as f64 / all.max(1) as f64
    }
}

#[test]
fn parity_peer_tests() {
    let mut tally = Tally::default();
    for row in rows("peer_tests.jsonl") {
        if row["doubtful"].as_str().is_some() || row["doubtful"].as_bool() == Some(true) {
            continue;
        }
        let family = text(&row, "family");
        if let Some(wanted) = row["expected_extraction"].as_array() {
            let found = extract_choice(text(&row, "pred"), "ABCD");
            let found: Vec<String> =
                found.map(|c| vec![c.to_lowercase().to_string(), c.to_string()]).unwrap_or_default();
            let wanted: Vec<&str> = wanted.iter().filter_map(Value::as_str).collect();
            tally.add(family, found == wanted, || format!("{} {found:?} not {wanted:?}", row["id"]));
            continue;
        }
        let (gold, pred) = (text(&row, "gold"), text(&row, "pred"));
        let expected = row["expected"].as_bool().expect("a verdict");
        let config = &row["config"];
        let got = if config["grader"].is_string() {
            // A grader of bare strings, which tells lists apart by their order.
            equal(gold, pred, &EqualOptions { ordered_lists: true, ..EqualOptions::default() })
        } else {
            let has = |kind: &str| {
                config["extract"].as_array().is_some_and(|e| e.iter().any(|k| k.as_str() == Some(kind)))
            };
            let options = VerifyOptions::peer(
                has("latex"),
                has("expr"),
                config["boxed_match_priority"].as_u64().unwrap_or(50) as u32,
                config["float_rounding"].as_u64().unwrap_or(6) as u32,
                config["strict"].as_bool().unwrap_or(true),
                config["allow_set_relation_comp"].as_bool().unwrap_or(false),
            );
            verify(gold, pred, &options) == Verdict::Equal
        };
        tally.add(family, got == expected, || {
            let tail =
                |s: &str| s.chars().rev().take(150).collect::<Vec<_>>().into_iter().rev().collect::<String>();
            format!("{} wants {expected}: {:?} against {:?}", row["id"], tail(gold), tail(pred))
        });
    }
    assert!(tally.print("peer_tests") >= 0.97);
}

#[test]
fn parity_generated() {
    let mut tally = Tally::default();
    let mut peer = (0, 0);
    let mut false_accepts = Vec::new();
    let mut seconds = Vec::new();
    for row in rows("generated.jsonl") {
        let family = text(&row, "family");
        let (gold, pred) = (text(&row, "gold"), text(&row, "pred"));
        let verifier = VerifyOptions::default();
        let started = std::time::Instant::now();
        let got = match row["pred_answer"].as_str() {
            Some(answer) => equal(gold, answer, &EqualOptions::default()),
            None => check(gold, pred, &ExtractOptions::default(), &EqualOptions::default()) == Verdict::Equal,
        };
        seconds.push(started.elapsed().as_secs_f64());
        let boxed = verify(&format!("$\\boxed{{{gold}}}$"), pred, &verifier) == Verdict::Equal;
        peer.0 += usize::from(Some(boxed) == row["expected"].as_bool());
        peer.1 += 1;
        let Some(intended) = row["intended"].as_bool() else { continue };
        let line = || {
            format!(
                "{} {family} wants {intended}, answer {got}, text {boxed}: {gold:?} against {:?} ({})",
                text(&row, "id"),
                row["pred_answer"].as_str().unwrap_or(pred),
                row["note"].as_str().unwrap_or("")
            )
        };
        if !intended && (got || boxed) {
            false_accepts.push(line());
        }
        tally.add(family, got == intended && boxed == intended, line);
    }
    let share = tally.print("generated");
    println!("generated: {}/{} rows agree with math-verify's own verdict", peer.0, peer.1);
    let total: f64 = seconds.iter().sum();
    println!(
        "generated: mean {:.1} µs, slowest {:.2} ms a check",
        1e6 * total / seconds.len() as f64,
        1e3 * seconds.iter().fold(0.0f64, |a, b| a.max(*b))
    );
    assert!(false_accepts.is_empty(), "false accepts: {false_accepts:#?}");
    assert!(share >= 0.97);
}

#[test]
fn parity_trl_rewards() {
    let mut tally = Tally::default();
    for row in rows("trl_rewards.jsonl") {
        let reward = text(&row, "reward");
        let whole = |key: &str| row[key].as_u64().unwrap_or_else(|| panic!("{}: no {key}", row["id"]));
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{}: no {key}", row["id"]));
        let got = match reward {
            "think_format" => Some(think_format(text(&row, "completion"))),
            "soft_overlong" => {
                Some(soft_overlong(whole("length"), whole("max_completion_len"), whole("soft_punish_cache")))
            }
            "repetition" => {
                let ids: Vec<u32> = row["completion_ids"]
                    .as_array()
                    .map(|a| a.iter().filter_map(|v| v.as_u64().map(|n| n as u32)).collect())
                    .unwrap_or_default();
                Some(repetition(&ids, whole("ngram_size") as usize, number("max_penalty")))
            }
            "cosine_scaled" => {
                let bounds = match row["bounds"]
                    .as_array()
                    .map(|b| b.iter().filter_map(Value::as_f64).collect::<Vec<_>>())
                {
                    Some(b) => {
                        let [min_wrong, max_wrong, min_correct, max_correct] =
                            <[f64; 4]>::try_from(b).expect("four bounds");
                        CosineBounds { min_wrong, max_wrong, min_correct, max_correct }
                    }
                    None => CosineBounds::default(),
                };
                let correct = row["correct"].as_bool().expect("correct or not");
                Some(cosine_scaled(whole("length"), whole("max_len"), correct, &bounds))
            }
            "accuracy" => accuracy(text(&row, "completion"), text(&row, "solution")),
            "reasoning_accuracy" => reasoning_accuracy(text(&row, "completion"), text(&row, "solution")),
            other => panic!("{}: unknown reward {other}", row["id"]),
        };
        let expected = row["expected"].as_f64();
        let agrees = match (got, expected) {
            (Some(a), Some(b)) => (a - b).abs() <= 1e-15,
            (a, b) => a == b,
        };
        tally.add(reward, agrees, || format!("{} {got:?} not {expected:?}", row["id"]));
    }
    assert_eq!(tally.print("trl_rewards"), 1.0);
}

#[test]
fn parity_reasoning_gym() {
    let mut tally = Tally::default();
    for row in rows("reasoning_gym.jsonl") {
        let task = text(&row, "task");
        let numbers: Vec<i64> = row["numbers"]
            .as_array()
            .map(|a| a.iter().filter_map(Value::as_i64).collect())
            .unwrap_or_default();
        let item = GymItem {
            task,
            question: text(&row, "question"),
            gold: text(&row, "gold"),
            numbers: &numbers,
            target: row["target"].as_f64(),
        };
        for candidate in row["candidates"].as_array().expect("candidates") {
            let got = gym_score(&item, candidate["text"].as_str());
            let agrees = match (&got, &candidate["score"]) {
                (Ok(score), expected) if expected.is_number() => {
                    expected.as_f64().is_some_and(|e| (score - e).abs() <= 1e-12)
                }
                (Err(GymError::Unscorable { .. }), expected) => {
                    expected.as_str().is_some_and(|e| e.starts_with("error:"))
                }
                _ => false,
            };
            tally.add(task, agrees, || {
                format!("{} {}: {got:?} not {}", row["id"], candidate["text"], candidate["score"])
            });
        }
    }
    assert_eq!(tally.print("reasoning_gym"), 1.0);
}
