//! Boxes and their rewards against the numbers that torchvision, pycocotools, shapely and the peers' code recorded.

mod common;

use common::rows;
use rft_rewards::boxes::*;
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

fn close(a: f64, b: f64, tolerance: f64) -> bool {
    (a - b).abs() <= tolerance * b.abs().max(1.0)
}

/// A number of the row, or None for null and for the name of an exception.
fn same(got: Option<f64>, expected: &Value, tolerance: f64) -> bool {
    match (got, expected.as_f64()) {
        (Some(got), Some(expected)) => close(got, expected, tolerance),
        (None, None) => expected.is_null() || expected.is_string(),
        _ => false,
    }
}

#[test]
fn parity_box_pairs() {
    let measures = [
        ("iou", Measure::Iou),
        ("giou", Measure::Giou),
        ("diou", Measure::Diou),
        ("ciou", Measure::Ciou),
        ("coco_iou", Measure::Coco),
        ("coco_iou_crowd_gold", Measure::CocoCrowd),
        ("visual_rft_iou", Measure::VisualRft),
        ("vlm_r1_iou", Measure::VlmR1),
        ("visual_rft_lisa_giou_plus_1", Measure::LisaGiouPlusOne),
    ];
    let (mut agreeing, mut disagreeing) = (0, Vec::new());
    for row in rows("rewards/iou/box_pairs.jsonl") {
        let pred: Bbox = serde_json::from_value(row["pred"].clone()).unwrap();
        let gold: Bbox = serde_json::from_value(row["gold"].clone()).unwrap();
        let wrong: Vec<String> = measures
            .iter()
            .filter(|(key, measure)| !same(overlap(&pred, &gold, *measure), &row[*key], 1e-9))
            .map(|(key, measure)| format!("{key} {:?}", overlap(&pred, &gold, *measure)))
            .collect();
        if wrong.is_empty() {
            agreeing += 1;
        } else {
            disagreeing.push(format!("{}: {wrong:?}\n  {row}", row["id"]));
        }
    }
    conclude("box_pairs", agreeing, &disagreeing);
}

#[test]
fn parity_rotated_pairs() {
    let (mut agreeing, mut disagreeing) = (0, Vec::new());
    for row in rows("rewards/iou/rotated_pairs.jsonl") {
        let pred: RotatedBox = serde_json::from_value(row["pred"].clone()).unwrap();
        let gold: RotatedBox = serde_json::from_value(row["gold"].clone()).unwrap();
        let (inter, iou) = (rotated_intersection(&pred, &gold), rotated_iou(&pred, &gold));
        if same(Some(inter), &row["intersection"], 1e-9) && same(Some(iou), &row["iou"], 1e-9) {
            agreeing += 1;
        } else {
            disagreeing.push(format!("{}: {inter} {iou}\n  {row}", row["id"]));
        }
    }
    conclude("rotated_pairs", agreeing, &disagreeing);
}

/// Every number of `expected` is in `got`, within tolerance; lists by position, objects by key.
fn covers(got: &Value, expected: &Value, tolerance: f64) -> bool {
    match (got, expected) {
        (Value::Object(got), Value::Object(expected)) => {
            expected.iter().all(|(key, value)| got.get(key).is_some_and(|got| covers(got, value, tolerance)))
        }
        (Value::Array(got), Value::Array(expected)) => {
            got.len() == expected.len() && got.iter().zip(expected).all(|(a, b)| covers(a, b, tolerance))
        }
        _ => same(got.as_f64(), expected, tolerance),
    }
}

#[test]
fn parity_coco_ap() {
    let (mut agreeing, mut disagreeing) = (0, Vec::new());
    for row in rows("rewards/iou/coco_ap.jsonl") {
        let golds: Vec<CocoGold> = serde_json::from_value(row["annotations"].clone()).unwrap();
        let detections: Vec<CocoDetection> = serde_json::from_value(row["detections"].clone()).unwrap();
        let categories: Vec<i64> = serde_json::from_value(row["categories"].clone()).unwrap();
        let result = coco_ap(&golds, &detections, &categories).unwrap();
        let mut got = serde_json::to_value(&result).unwrap();
        // The fixture names thresholds; the result lists them.
        let by_iou = result
            .AP_by_iou
            .iter()
            .enumerate()
            .map(|(t, ap)| (format!("{:.2}", 0.5 + 0.05 * t as f64), (*ap).into()));
        got["AP_by_iou"] = Value::Object(by_iou.collect());
        let agrees = match &row["expected"] {
            Value::Null => result.stats.AP == 0.0,
            expected => covers(&got, expected, 1e-9),
        };
        if agrees {
            agreeing += 1;
        } else {
            disagreeing.push(format!("{}: {got}\n  {}", row["id"], row["expected"]));
        }
    }
    conclude("coco_ap", agreeing, &disagreeing);
}

fn size(row: &Value, key: &str) -> Option<[f64; 2]> {
    serde_json::from_value(row[key].clone()).ok()
}

/// The parts of a peer reward by the names of the fixture.
fn peer_parts(row: &Value) -> Value {
    let completion = text(row, "completion");
    match text(row, "reward") {
        "visual_rft_detection" => {
            serde_json::to_value(visual_rft_detection(completion, text(row, "gold_text")).unwrap()).unwrap()
        }
        "visual_rft_lisa_giou" => {
            serde_json::to_value(visual_rft_grounding(completion, text(row, "gold_text")).unwrap()).unwrap()
        }
        "vlm_r1_detection" => {
            serde_json::to_value(vlm_r1_detection(completion, text(row, "gold_text")).unwrap()).unwrap()
        }
        "vlm_r1_rec" => {
            let options =
                VlmR1RecOptions { input_size: size(row, "input_size"), image_size: size(row, "image_size") };
            serde_json::to_value(vlm_r1_rec(completion, text(row, "gold_text"), &options).unwrap()).unwrap()
        }
        "vision_r1" => {
            let gold: Vec<LabeledBox> = serde_json::from_value(row["gold_boxes"].clone()).unwrap();
            let mut parts = serde_json::Map::new();
            for (key, step) in [("no_step", None), ("step_0", Some(0)), ("step_1500", Some(1500))] {
                let options = VisionR1Options {
                    step,
                    input_size: size(row, "input_size"),
                    image_size: size(row, "image_size"),
                };
                let reward = vision_r1(completion, &gold, &options).unwrap();
                parts.insert("dual_format".into(), reward.dual_format.into());
                parts.insert(key.into(), serde_json::to_value(reward).unwrap());
            }
            Value::Object(parts)
        }
        other => panic!("unknown reward {other}"),
    }
}

#[test]
fn parity_peer_rewards() {
    let (mut agreeing, mut disagreeing) = (0, Vec::new());
    for row in rows("rewards/iou/peer_rewards.jsonl") {
        let expected = row.get("expected_formula").unwrap_or(&row["expected"]);
        // Vision-R1 computes in single precision.
        let tolerance = if text(&row, "reward") == "vision_r1" { 1e-6 } else { 1e-9 };
        let got = peer_parts(&row);
        if covers(&got, expected, tolerance) {
            agreeing += 1;
        } else {
            disagreeing.push(format!("{}: {got}\n  expected {expected}\n  {row}", row["id"]));
        }
    }
    conclude("peer_rewards", agreeing, &disagreeing);
}
