//! Boxes and the rewards for vision tasks: `rft.boxes`.

use serde::Deserialize;
use serde_json::json;

use super::bind::{Args, Host, answer};
use crate::boxes::{
    self, Bbox, BoxError, CocoDetection, CocoGold, CoordinateSample, Coordinates, LabeledBox, Matching,
    Measure,
};

pub(crate) const FUNCTIONS: &[(&str, Host)] = &[
    ("iou", |args| Ok(json!(boxes::iou(&bbox(args, 0)?, &bbox(args, 1)?)))),
    ("giou", |args| Ok(json!(boxes::giou(&bbox(args, 0)?, &bbox(args, 1)?)))),
    ("overlap", |args| {
        let measure: Measure = args.read(2, "measure")?;
        Ok(json!(boxes::overlap(&bbox(args, 0)?, &bbox(args, 1)?, measure)))
    }),
    ("rotated_iou", |args| Ok(json!(boxes::rotated_iou(&args.read(0, "box")?, &args.read(1, "other")?)))),
    ("is_proper", |args| Ok(json!(boxes::is_proper(&bbox(args, 0)?)))),
    ("match", |args| {
        let (preds, golds): (Vec<Bbox>, Vec<Bbox>) = (args.read(0, "predicted")?, args.read(1, "gold")?);
        let Pairing { matching, threshold } = args.options(2)?;
        let pairs = match matching {
            Matching::Hungarian => boxes::match_hungarian(&preds, &golds, threshold),
            Matching::Greedy => boxes::match_greedy(&preds, &golds, threshold),
        };
        // Positions count from 1 in Lua.
        let pairs = pairs.map_err(words)?;
        let pairs = pairs.iter().map(|p| json!({"pred": p.pred + 1, "gold": p.gold + 1, "iou": p.iou}));
        Ok(pairs.collect())
    }),
    ("coco_ap", |args| {
        let golds: Vec<CocoGold> = args.read(0, "gold")?;
        let detections: Vec<CocoDetection> = args.read(1, "detections")?;
        let categories: Vec<i64> = if args.given(2) { args.read(2, "categories")? } else { Vec::new() };
        answer(boxes::coco_ap(&golds, &detections, &categories).map_err(words)?)
    }),
    ("read", |args| answer(boxes::read_boxes(&args.text(0, "text")?).map_err(words)?)),
    ("convert", |args| {
        let (from, to): (Coordinates, Coordinates) = (args.read(1, "from")?, args.read(2, "to")?);
        let size: Option<[f64; 2]> = if args.given(3) { Some(args.read(3, "image_size")?) } else { None };
        Ok(json!(from.convert(&bbox(args, 0)?, to, size).map_err(words)?))
    }),
    ("check_coordinates", |args| {
        let samples: Vec<CoordinateSample> = args.read(0, "samples")?;
        answer(boxes::check_coordinates(&samples, args.read(1, "setting")?))
    }),
    ("detection", |args| {
        let gold: Vec<LabeledBox> = args.read(1, "gold")?;
        answer(boxes::detection(&args.text(0, "text")?, &gold, &args.options(2)?).map_err(words)?)
    }),
    ("grounding", |args| {
        answer(boxes::grounding(&args.text(0, "text")?, &bbox(args, 1)?, &args.options(2)?).map_err(words)?)
    }),
    ("classification", |args| {
        let options = args.options(2)?;
        let score = boxes::classification(&args.text(0, "text")?, &args.text(1, "gold")?, &options);
        Ok(json!(score.map_err(words)?))
    }),
    ("yes_no", |args| {
        Ok(json!(boxes::yes_no(&args.text(0, "text")?, &args.text(1, "gold")?).map_err(words)?))
    }),
    ("visual_rft_detection", |args| {
        answer(boxes::visual_rft_detection(&args.text(0, "text")?, &args.text(1, "gold")?).map_err(words)?)
    }),
    ("visual_rft_grounding", |args| {
        answer(boxes::visual_rft_grounding(&args.text(0, "text")?, &args.text(1, "gold")?).map_err(words)?)
    }),
    ("visual_rft_classification", |args| {
        let score = boxes::visual_rft_classification(&args.text(0, "text")?, &args.text(1, "gold")?);
        let (accuracy, format) = score.map_err(words)?;
        Ok(json!({"accuracy": accuracy, "format": format, "total": accuracy + format}))
    }),
    ("vision_r1", |args| {
        let gold: Vec<LabeledBox> = args.read(1, "gold")?;
        answer(boxes::vision_r1(&args.text(0, "text")?, &gold, &args.options(2)?).map_err(words)?)
    }),
    ("vlm_r1_rec", |args| {
        let (text, gold) = (args.text(0, "text")?, args.text(1, "gold")?);
        answer(boxes::vlm_r1_rec(&text, &gold, &args.options(2)?).map_err(words)?)
    }),
    ("vlm_r1_detection", |args| {
        answer(boxes::vlm_r1_detection(&args.text(0, "text")?, &args.text(1, "gold")?).map_err(words)?)
    }),
    ("vlm_r1_cosine", |args| {
        Ok(json!(boxes::vlm_r1_cosine(args.count(0, "tokens")? as usize, args.flag(1, "correct")?)))
    }),
    ("vlm_r1_repetition", |args| Ok(json!(boxes::vlm_r1_repetition(&args.text(0, "text")?).map_err(words)?))),
    ("vlm_r1_yes_no", |args| {
        Ok(json!(boxes::vlm_r1_yes_no(&args.text(0, "text")?, &args.text(1, "gold")?).map_err(words)?))
    }),
];

fn words(error: BoxError) -> String {
    error.to_string()
}

fn bbox(args: &Args, at: usize) -> Result<Bbox, String> {
    args.read(at, "box, {x1, y1, x2, y2}")
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Pairing {
    matching: Matching,
    threshold: f64,
}
