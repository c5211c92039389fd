//! The shipped scripts, through the sandbox, against the numbers that the cores under them are held to.
//!
//! The way through Lua has conversions of its own (numbers, nil, empty lists); these rows show what it changes.

mod common;

use common::rows;
use rft_rewards::{Context, Outcome, RewardSpec, Sample, Verifiers, resolve};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::sync::Arc;

fn object(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

/// Calls of shipped scripts; a sandbox is kept for each set of options.
#[derive(Default)]
struct Scripts(HashMap<String, Verifiers>);

impl Scripts {
    fn score(&mut self, name: &str, options: Value, completion: &str, fields: Value, step: u64) -> Outcome {
        let key = format!("{name} {options}");
        let verifiers = self.0.entry(key).or_insert_with(|| {
            let spec = RewardSpec { options: object(options), ..RewardSpec::new(resolve(name).unwrap()) };
            Verifiers::new(vec![spec])
        });
        let fields = Arc::new(object(fields));
        let sample = Sample { completion: completion.into(), fields, ..Sample::default() };
        verifiers.score(&[sample], &Context { step, ..Context::default() }).remove(0)
    }
}

fn component(outcome: &Outcome, name: &str) -> Option<f64> {
    outcome.components.iter().find(|(own, _)| own == name)?.1
}

#[derive(Default)]
struct Tally(usize, Vec<String>);

impl Tally {
    fn add(&mut self, agrees: bool, row: &Value, outcome: &Outcome) {
        if agrees {
            self.0 += 1;
        } else {
            self.1.push(format!("{}: {:?} {:?}", row["id"], outcome.components, outcome.errors));
        }
    }

    fn share(&self, what: &str) -> f64 {
        println!("{what}: {} of {} rows agree", self.0, self.0 + self.1.len());
        assert!(self.0 > 0, "{what}: no rows");
        self.0 as f64 / (self.0 + self.1.len()) as f64
    }

    fn all(&self, what: &str) {
        assert!(self.share(what) == 1.0, "{what}:\n{}", self.1.join("\n"));
    }
}

#[test]
fn parity_lua_math() {
    let (mut scripts, mut tally, mut false_accepts) = (Scripts::default(), Tally::default(), Vec::new());
    for row in rows("rewards/math/generated.jsonl") {
        let (Some(intended), true) = (row["intended"].as_bool(), row["mode"] == "answer") else { continue };
        let pred = row["pred"].as_str().unwrap();
        let outcome = scripts.score("math", json!({}), pred, json!({"answer": row["gold"]}), 0);
        tally.add(outcome.reward == Some(f64::from(u8::from(intended))), &row, &outcome);
        if !intended && outcome.reward == Some(1.0) {
            false_accepts.push(row["id"].to_string());
        }
        assert!(outcome.errors.is_empty(), "{}: {:?}", row["id"], outcome.errors);
    }
    let share = tally.share("math.lua");
    assert!(share >= 0.97, "{}", tally.1.join("\n"));
    assert!(false_accepts.is_empty(), "accepted: {false_accepts:?}");
}

#[test]
fn parity_lua_toolrl() {
    let (mut scripts, mut tally) = (Scripts::default(), Tally::default());
    let names: HashMap<&str, &str> = HashMap::from([
        ("REFINEDREWARD", "refined"),
        ("COARSEREWARD", "coarse"),
        ("INTERMEDIATEREWARD", "intermediate"),
        ("CORRECTMAX1", "correct_max1"),
        ("MAX1STEP30MAX3", "max1_step30_max3"),
        ("SCHEDULEREWARD", "schedule"),
        ("WITHLENGTH", "with_length"),
        ("SCHEDULELENGTH", "schedule_length"),
    ]);
    for row in rows("rewards/tools/toolrl_rewards.jsonl") {
        let mut options = json!({"kind": "toolrl"});
        for flag in row["flags"].as_array().unwrap() {
            options[names[flag.as_str().unwrap()]] = json!(true);
        }
        let with_length = options.get("with_length").is_some();
        let (response, step) = (row["response"].as_str().unwrap(), row["step"].as_u64().unwrap());
        let found = scripts.score("tool_call", options, response, json!({"solution": row["gold"]}), step);
        let expected = &row["expected"];
        let same = match expected.get("error") {
            Some(_) => found.reward.is_none(),
            None => ["format", "correctness", "length"]
                .iter()
                .filter(|part| **part != "length" || with_length)
                .all(|part| component(&found, part) == expected[*part].as_f64()),
        };
        tally.add(same, &row, &found);
    }
    tally.all("tool_call.lua, toolrl");
}

#[test]
fn parity_lua_bfcl() {
    let cases: HashMap<String, Value> = rows("rewards/tools/bfcl_cases.jsonl")
        .into_iter()
        .map(|case| (case["id"].as_str().unwrap().to_string(), case))
        .collect();
    let (mut scripts, mut tally) = (Scripts::default(), Tally::default());
    for row in rows("rewards/tools/bfcl_verdicts.jsonl") {
        let case = &cases[row["case_id"].as_str().unwrap()];
        let fields = json!({"functions": case["functions"], "possible_answer": case["possible_answer"],
            "category": row["category"]});
        // the leaderboard's own judgement, holes included
        let options =
            json!({"kind": "bfcl", "decode": row["format"], "greedy": true, "ignore_broken_blocks": true});
        let found = scripts.score("tool_call", options, row["text"].as_str().unwrap(), fields, 0);
        let expected = row["valid"].as_bool().unwrap();
        tally.add(found.reward == Some(f64::from(u8::from(expected))), &row, &found);
    }
    tally.all("tool_call.lua, bfcl");
}

#[test]
fn parity_lua_boxes() {
    let (mut scripts, mut tally) = (Scripts::default(), Tally::default());
    for row in rows("rewards/iou/peer_rewards.jsonl") {
        let expected = row.get("expected_formula").unwrap_or(&row["expected"]);
        let (script, kind, expected) = match row["reward"].as_str().unwrap() {
            "visual_rft_detection" => ("detection", "visual_rft", expected),
            "vlm_r1_detection" => ("detection", "vlm_r1", expected),
            "vision_r1" => ("detection", "vision_r1", &expected["no_step"]),
            "visual_rft_lisa_giou" => ("grounding", "visual_rft", expected),
            "vlm_r1_rec" => ("grounding", "vlm_r1", expected),
            other => panic!("unknown reward {other}"),
        };
        let fields = json!({"solution": row["gold_text"], "boxes": row["gold_boxes"],
            "input_size": row["input_size"], "image_size": row["image_size"]});
        let completion = row["completion"].as_str().unwrap();
        let found = scripts.score(script, json!({"kind": kind}), completion, fields, 0);
        // Vision-R1 computes in single precision.
        let tolerance = if kind == "vision_r1" { 1e-6 } else { 1e-9 };
        let same = found.errors.is_empty()
            && found.components.iter().all(|(name, value)| match (value, expected[name].as_f64()) {
                (Some(value), Some(expected)) => {
                    (value - expected).abs() <= tolerance * expected.abs().max(1.0)
                }
                // a part that the published code fails on: no score at all
                (None, _) => object(expected.clone()).values().any(|part| !part.is_number()),
                (Some(_), None) => expected.get(name).is_none(),
            });
        tally.add(same, &row, &found);
    }
    tally.all("detection.lua and grounding.lua, published rewards");
}

#[test]
fn parity_lua_iou() {
    let (mut scripts, mut tally) = (Scripts::default(), Tally::default());
    for row in rows("rewards/iou/box_pairs.jsonl") {
        let Some(expected) = row["iou"].as_f64() else { continue };
        let found = scripts.score("iou", json!({}), &row["pred"].to_string(), json!({"box": row["gold"]}), 0);
        let same =
            found.reward.is_some_and(|found| (found - expected).abs() <= 1e-9 * expected.abs().max(1.0));
        tally.add(same, &row, &found);
    }
    tally.all("iou.lua");
}
