//! No text makes the tool and box rewards panic or slow.
//!
//! Readers see mutated answers of every format, arbitrary text, a megabyte of any one thing, and more boxes than are
//! compared.

use proptest::prelude::*;
use rft_rewards::{boxes::*, tools::*};
use serde_json::json;
use std::time::{Duration, Instant};

/// Everything that reads a completion.
fn read_all(text: &str) {
    for format in Format::ALL {
        for dialect in [Dialect::Vllm, Dialect::Smg] {
            let _ = parse_with(text, format, &ParseOptions { dialect, tools: None });
        }
    }
    let _ = parse_any(text);
    let gold_turn =
        "<think> t </think>\n<tool_call>\n{\"name\": \"f\", \"parameters\": {\"a\": 1}}\n</tool_call>";
    for intermediate in [false, true] {
        let options = ToolRlOptions { intermediate, with_length: true, ..Default::default() };
        let _ = toolrl(text, gold_turn, &options);
        let _ = toolrl(gold_turn, text, &options);
    }
    let functions = json!([{ "name": "f", "parameters": { "required": ["a"], "properties": {
        "a": { "type": "array", "items": { "type": "dict" } }, "b": { "type": "string" } } } }]);
    let answers = json!([{ "f": { "a": [[{ "k": ["x", ""] }]], "b": ["x", ""] } }]);
    for decode in [BfclDecode::Hermes, BfclDecode::Python] {
        for category in [BfclCategory::Simple, BfclCategory::Parallel, BfclCategory::Irrelevance] {
            let options = BfclOptions { category, decode, ..Default::default() };
            let _ = bfcl(text, &functions, &answers, &options);
        }
    }
    let gold = [LabeledBox { label: "cat".into(), bbox: [0.0, 0.0, 10.0, 10.0] }];
    let _ = detection(text, &gold, &DetectionOptions::default());
    let _ = detection(text, &[], &DetectionOptions::default());
    let _ = grounding(text, &gold[0].bbox, &GroundingOptions::default());
    let list = "<answer>```json\n[{\"bbox_2d\": [0, 0, 10, 10], \"label\": \"cat\"}]\n```</answer>";
    let _ = vlm_r1_detection(text, list);
    let _ = vlm_r1_detection(list, text);
    let _ = vlm_r1_rec(text, "<answer>[0, 0, 10, 10]</answer>", &VlmR1RecOptions::default());
    let _ = vlm_r1_repetition(text);
    let _ = vlm_r1_yes_no(text, "yes");
    let _ = yes_no(text, "yes");
    let solution = "<answer>[{'Position': [0, 0, 10, 10], 'Confidence': 1.0}]</answer>";
    let _ = visual_rft_detection(text, solution);
    let _ = visual_rft_detection(solution, text);
    let _ = visual_rft_grounding(text, "<answer>(1,1),(5,5)</answer>");
    let _ = visual_rft_classification(text, "cat");
    let _ = classification(text, "cat", &ClassificationOptions::default());
    let _ = vision_r1(text, &gold, &VisionR1Options { step: Some(1500), ..Default::default() });
}

/// Texts that reach deep into the readers; proptest cuts, repeats and splices them.
const SEEDS: &[&str] = &[
    "<think>t</think>\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, 2.5e3, null], \"b\": \"x\\u00e9\"}}\n</tool_call>",
    "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {\"é\": \"ü\"}}",
    "[f(a='x\\n', b=-3, c={'k': (1, [True])}), g.h(d=\"\"\"long\"\"\", e=2**3)]",
    "<function_calls>f(a=null)\ng()</function_calls>",
    "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}}] trail",
    "[TOOL_CALLS]f{\"a\": 1}[TOOL_CALLS]g[ARGS]{}",
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name=\"f\"><steptml:parameter name=\"a\">1</steptml:parameter></steptml:invoke><｜tool_call_end｜>",
    "<think>t</think><answer>[{'Position': [1, 2, 3, 4], 'Confidence': 0.5}, {'Position': [1, 2",
    "<answer>```json\n[{\"bbox_2d\": [0, 0, 9, 9], \"label\": \"cat\"}, {\"bbox_2d\": [1, NaN, 1e999, 4]}]\n```</answer>",
    "<answer>(1,2),(3,4) (5.5,6),(7,8)</answer>",
];

fn mutated() -> impl Strategy<Value = String> {
    let piece = (0..SEEDS.len(), any::<prop::sample::Index>(), any::<prop::sample::Index>());
    prop::collection::vec((piece, "\\PC{0,3}"), 1..5).prop_map(|pieces| {
        let mut text = String::new();
        for ((seed, from, to), noise) in pieces {
            let chars: Vec<char> = SEEDS[seed].chars().collect();
            let (a, b) = (from.index(chars.len() + 1), to.index(chars.len() + 1));
            text.extend(&chars[a.min(b)..a.max(b)]);
            text.push_str(&noise);
        }
        text
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn mutated_texts_never_panic(text in mutated()) {
        read_all(&text);
    }

    #[test]
    fn any_text_never_panics(text in any::<String>()) {
        read_all(&text);
    }

    #[test]
    fn rewards_stay_in_range(text in mutated()) {
        let gold = [LabeledBox { label: "cat".into(), bbox: [0.0, 0.0, 9.0, 9.0] }];
        let reward = detection(&text, &gold, &DetectionOptions::default()).unwrap();
        for part in [reward.iou, reward.precision, reward.recall, reward.f1, reward.confidence, reward.format] {
            prop_assert!((0.0..=1.0).contains(&part), "{reward:?}");
        }
        let accuracy = grounding(&text, &gold[0].bbox, &GroundingOptions::default()).unwrap().accuracy;
        prop_assert!((0.0..=1.0).contains(&accuracy));
    }

    #[test]
    fn overlaps_stay_in_range(a in any::<[f64; 4]>(), b in any::<[f64; 4]>()) {
        prop_assert!((0.0..=1.0).contains(&iou(&a, &b)));
        prop_assert!((-1.0..=1.0).contains(&giou(&a, &b)));
        let turned = |b: [f64; 4]| RotatedBox { cx: b[0], cy: b[1], w: b[2], h: b[3], angle_degrees: b[0] };
        prop_assert!((0.0..=1.0).contains(&rotated_iou(&turned(a), &turned(b))));
    }

    #[test]
    fn the_assignment_is_the_best_of_all(cost in prop::collection::vec(-9i32..9, 12)) {
        let cost: Vec<f64> = cost.into_iter().map(f64::from).collect();
        let got: f64 = hungarian(&cost, 3, 4).unwrap().iter().map(|(r, c)| cost[r * 4 + c]).sum();
        let mut best = f64::INFINITY;
        for a in 0..4 {
            for b in (0..4).filter(|b| *b != a) {
                for c in (0..4).filter(|c| *c != a && *c != b) {
                    best = best.min(cost[a] + cost[4 + b] + cost[8 + c]);
                }
            }
        }
        prop_assert_eq!(got, best);
    }
}

/// One megabyte of trouble through some sixty readers; each alone stays within a third of a second.
#[test]
fn a_megabyte_of_anything_is_read_in_linear_time() {
    let repeated = [
        "{",
        "[",
        "(",
        "\"",
        "\\",
        "{\"a\":",
        "[[",
        "<tool_call>",
        "<tool_call>\n{\n</tool_call>\n",
        "f(a=",
        "[f(",
        "{\"name\": \"f\", \"arguments\": {}}",
        "<answer>",
        "<answer></answer>",
        "<answer>\n",
        "<think>",
        "</think>",
        "```json[",
        "1+",
        "-",
        "2**",
        "'a'+",
        "9",
        "{\"k\":{},",
        "[1,1,1,1],",
        "(1,1),(2,2)",
        "functools[",
        "[TOOL_CALLS]",
        "</think><answer>",
        "{\"name\": \"f\", \"parameters\": {}}\n",
        "a.",
        "f()",
        "f[0]",
        "# ",
        "<function=f><parameter=a>",
        "\n",
        " ",
        "é",
        "{\"bbox_2d\": [1, 2, 3, 4], \"label\": \"cat\"},",
        "[f(a=1), ",
    ];
    for piece in repeated {
        let text = piece.repeat(1_000_000 / piece.len());
        for wrapped in [
            text.clone(),
            format!("<think>t</think><answer>```json\n[{text}"),
            format!("<tool_call>\n{text}\n</tool_call>"),
        ] {
            let start = Instant::now();
            read_all(&wrapped);
            let spent = start.elapsed();
            // Quadratic readers take minutes; a busy machine takes a few seconds.
            assert!(spent < Duration::from_secs(30), "{piece:?} took {spent:?}");
        }
    }
}

#[test]
fn more_than_the_limit_is_an_error_that_says_so() {
    let long = "x".repeat(3 << 20);
    assert!(parse_any(&long).unwrap_err().to_string().contains("limit"));
    assert!(read_boxes(&long).unwrap_err().to_string().contains("limit"));
    let many = format!("<answer>[{}[0, 0, 1, 1]]</answer>", "[0, 0, 1, 1], ".repeat(10_001));
    let gold = [LabeledBox { label: String::new(), bbox: [0.0, 0.0, 1.0, 1.0] }];
    assert!(detection(&many, &gold, &DetectionOptions::default()).unwrap_err().to_string().contains("10000"));
    let boxes = vec![[0.0, 0.0, 1.0, 1.0]; 10_000];
    assert!(match_hungarian(&boxes, &boxes, 0.5).is_err());
    assert!(match_greedy(&boxes, &boxes[..100], 0.5).is_ok());
}
