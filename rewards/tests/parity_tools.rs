//! Tool-call rewards against the verdicts that the peers' own code recorded.

mod common;

use common::rows;
use rft_rewards::tools::*;
use serde_json::Value;

/// Prints the count and fails with the rows that disagree.
fn conclude(what: &str, agreeing: usize, disagreeing: &[String]) {
    println!("{what}: {agreeing} of {} rows agree", agreeing + disagreeing.len());
    assert!(agreeing > 0, "{what}: no rows");
    assert!(disagreeing.is_empty(), "{what}:\n{}", disagreeing.join("\n"));
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_else(|| panic!("{key} of {row}"))
}

/// "tools offered: a, b only" in a row's note.
fn offered(row: &Value) -> Option<Vec<String>> {
    let list = row["note"].as_str()?.split_once("tools offered: ")?.1.split(" only").next()?;
    Some(list.split(&[',', ' '][..]).filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

fn calls_of(value: &Value) -> Vec<Call> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Names, argument names, and (if asked for) the JSON types of the arguments.
fn shape(calls: &[Call], types: bool) -> Vec<(String, Vec<(String, u8)>)> {
    let kind = |value: &Value| match value {
        Value::Null => 0,
        Value::Bool(_) => 1,
        Value::Number(number) => 2 + u8::from(number.is_f64()),
        Value::String(_) => 4,
        Value::Array(_) => 5,
        Value::Object(_) => 6,
    };
    let fields = |call: &Call| {
        let map = call.arguments.as_object().cloned().unwrap_or_default();
        let mut fields: Vec<_> =
            map.iter().map(|(key, value)| (key.clone(), if types { kind(value) } else { 0 })).collect();
        fields.sort();
        fields
    };
    calls.iter().map(|call| (call.name.clone(), fields(call))).collect()
}

#[test]
fn parity_call_formats() {
    let (mut agreeing, mut disagreeing, mut in_full) = (0, Vec::new(), 0);
    for row in rows("rewards/tools/call_formats.jsonl") {
        let format: Format = serde_json::from_value(row["format"].clone()).unwrap();
        let dialect = if text(&row, "parser").starts_with("smg") { Dialect::Smg } else { Dialect::Vllm };
        let options = ParseOptions { dialect, tools: offered(&row) };
        let parsed = parse_with(text(&row, "text"), format, &options);
        let asserted = text(&row, "asserted");
        let problem = match (&parsed, asserted) {
            (Err(_), "error") | (Ok(_), "no_crash" | "xfail") => None,
            (Err(error), _) => Some(error.to_string()),
            (Ok(parsed), "error") => Some(format!("no error but {parsed:?}")),
            (Ok(parsed), asserted) => {
                let wanted = calls_of(&row["calls"]);
                let same_content =
                    row.get("content").is_none_or(|content| content.as_str().unwrap_or("") == parsed.content);
                let called = Some(parsed.called) == row["tools_called"].as_bool();
                in_full += usize::from(parsed.calls == wanted && called && same_content);
                let names = |calls: &[Call]| calls.iter().map(|call| call.name.clone()).collect::<Vec<_>>();
                let agrees = match asserted {
                    "exact" | "run" => parsed.calls == wanted && called && same_content,
                    "types" => called && shape(&parsed.calls, true) == shape(&wanted, true),
                    "field_names" => called && shape(&parsed.calls, false) == shape(&wanted, false),
                    "count_and_names" | "name_only" => names(&parsed.calls) == names(&wanted),
                    "count" => parsed.calls.len() == wanted.len(),
                    "at_least_one" => !parsed.calls.is_empty(),
                    other => panic!("unknown kind of assertion {other}"),
                };
                (!agrees).then(|| format!("{parsed:?}"))
            }
        };
        match problem {
            None => agreeing += 1,
            Some(problem) => disagreeing.push(format!("{} ({asserted}): {problem}\n  {row}", row["id"])),
        }
    }
    println!("call_formats: {in_full} rows have the recorded calls and content in full");
    conclude("call_formats", agreeing, &disagreeing);
}

/// What the exact dialect makes of the texts that were written for the other reader.
#[test]
fn parity_call_formats_smg() {
    let (mut agreeing, mut disagreeing) = (0, Vec::new());
    for row in rows("rewards/tools/call_formats.jsonl") {
        let format: Format = serde_json::from_value(row["format"].clone()).unwrap();
        // No parser there; the rows record what a parser of another format makes of them.
        let unknown = matches!(format, Format::Olmo3Pythonic | Format::MistralNameArgs | Format::Xlam);
        if row["smg"].is_null() || unknown {
            continue;
        }
        let options = ParseOptions { dialect: Dialect::Smg, tools: None };
        let parsed = parse_with(text(&row, "text"), format, &options).unwrap();
        if parsed.calls == calls_of(&row["smg"]["calls"]) && parsed.content == text(&row["smg"], "content") {
            agreeing += 1;
        } else {
            disagreeing.push(format!("{}: {parsed:?}\n  {row}", row["id"]));
        }
    }
    conclude("call_formats, exact dialect", agreeing, &disagreeing);
}

/// The format is found from the text alone.
#[test]
fn parity_call_formats_detected() {
    let (mut agreeing, mut disagreeing) = (0, Vec::new());
    for row in rows("rewards/tools/call_formats.jsonl") {
        let sound = matches!(text(&row, "asserted"), "exact" | "types" | "count" | "run");
        let calls = row["calls"].as_array().map_or(0, Vec::len);
        if !sound || calls == 0 {
            continue;
        }
        let (format, parsed) = parse_any(text(&row, "text")).unwrap();
        // A text of one format can hold a second call that its own reader stops before.
        if format.is_some() && parsed.calls.starts_with(&calls_of(&row["calls"])) {
            agreeing += 1;
        } else {
            disagreeing.push(format!("{}: {format:?} {parsed:?}\n  {row}", row["id"]));
        }
    }
    println!("call_formats, detected: {agreeing} of {} rows agree", agreeing + disagreeing.len());
    // Detection is a guess: a text may hold the markers of two formats.
    assert!(agreeing * 20 >= (agreeing + disagreeing.len()) * 19, "{}", disagreeing.join("\n"));
}

#[test]
fn parity_toolrl_rewards() {
    let (mut agreeing, mut disagreeing) = (0, Vec::new());
    for row in rows("rewards/tools/toolrl_rewards.jsonl") {
        let mut options = ToolRlOptions { step: row["step"].as_u64().unwrap(), ..Default::default() };
        for flag in row["flags"].as_array().unwrap() {
            match flag.as_str().unwrap() {
                "REFINEDREWARD" => options.refined = true,
                "COARSEREWARD" => options.coarse = true,
                "INTERMEDIATEREWARD" => options.intermediate = true,
                "CORRECTMAX1" => options.correct_max1 = true,
                "MAX1STEP30MAX3" => options.max1_step30_max3 = true,
                "SCHEDULEREWARD" => options.schedule = true,
                "WITHLENGTH" => options.with_length = true,
                "SCHEDULELENGTH" => options.schedule_length = true,
                other => panic!("unknown switch {other}"),
            }
        }
        let expected = &row["expected"];
        let got = toolrl(text(&row, "response"), text(&row, "gold"), &options);
        let same = match &got {
            Err(_) => expected.get("error").is_some(),
            Ok(got) => [
                ("total", got.total),
                ("format", got.format),
                ("correctness", got.correctness),
                ("length", got.length),
            ]
            .iter()
            .all(|(key, value)| expected[*key].as_f64() == Some(*value)),
        };
        if same {
            agreeing += 1;
        } else {
            disagreeing.push(format!("{}: {got:?}\n  {row}", row["id"]));
        }
    }
    conclude("toolrl_rewards", agreeing, &disagreeing);
}

#[test]
fn parity_bfcl_verdicts() {
    let cases: std::collections::HashMap<String, Value> = rows("rewards/tools/bfcl_cases.jsonl")
        .into_iter()
        .map(|case| (text(&case, "id").to_owned(), case))
        .collect();
    let (mut agreeing, mut disagreeing, mut same_error, mut invalid) = (0, Vec::new(), 0, 0);
    for row in rows("rewards/tools/bfcl_verdicts.jsonl") {
        let case = &cases[text(&row, "case_id")];
        let decode: BfclDecode = serde_json::from_value(row["format"].clone()).unwrap();
        let mut options = BfclOptions::leaderboard(BfclCategory::of(text(&row, "category")), decode);
        let judge = |options: &BfclOptions| {
            bfcl(text(&row, "text"), &case["functions"], &case["possible_answer"], options).unwrap()
        };
        let verdict = judge(&options);
        let mut same = Some(verdict.valid) == row["valid"].as_bool();
        if let Some(valid) = row.get("valid_underscore_to_dot").and_then(Value::as_bool) {
            options.underscore_to_dot = true;
            same &= judge(&options).valid == valid;
        }
        if !verdict.valid {
            invalid += 1;
            same_error += usize::from(verdict.error_type.as_deref() == row["error_type"].as_str());
        }
        if same {
            agreeing += 1;
        } else {
            disagreeing.push(format!("{}: {verdict:?}\n  {row}", row["id"]));
        }
    }
    println!("bfcl_verdicts: {same_error} of {invalid} failures have the leaderboard's error type");
    conclude("bfcl_verdicts", agreeing, &disagreeing);
}
