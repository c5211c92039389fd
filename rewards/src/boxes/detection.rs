//! Detection and grounding rewards with the known holes of the published ones closed.
//!
//! Every predicted box counts in the denominator (redundant and malformed ones too), labels have to agree, confidence
//! without a match earns nothing, an answer that says nothing earns nothing, corners in the wrong order are no box, and
//! one pixel of overlap is an overlap.

use super::answer::think_answer;
use super::matching::{Match, match_greedy, match_hungarian};
use super::read::{ReadBox, read_boxes};
use super::{Bbox, BoxError, Coordinates, LabeledBox, check_counts, check_gold, giou, iou, is_proper};
use serde::{Deserialize, Serialize};

/// How predictions and gold are paired.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matching {
    /// The pairing with the greatest sum of IoUs.
    #[default]
    Hungarian,
    /// By falling IoU.
    Greedy,
}

/// How a detection answer is judged.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DetectionOptions {
    /// A pair counts from this IoU on.
    pub iou_threshold: f64,
    /// Pairs need equal labels (case and outer spaces aside); off where gold has one class only.
    pub match_labels: bool,
    /// How pairs are found.
    pub matching: Matching,
    /// Unit of the predicted boxes; None: that of the gold.
    pub coordinates: Option<Coordinates>,
    /// Unit of the gold boxes.
    pub gold_coordinates: Coordinates,
    /// `[width, height]` of the picture in pixels, where a conversion needs it.
    pub image_size: Option<[f64; 2]>,
}

impl Default for DetectionOptions {
    fn default() -> Self {
        DetectionOptions {
            iou_threshold: 0.5,
            match_labels: true,
            matching: Matching::Hungarian,
            coordinates: None,
            gold_coordinates: Coordinates::Pixels,
            image_size: None,
        }
    }
}

/// Parts of a detection reward, all within [0, 1]; a reward picks and weighs them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct DetectionReward {
    /// Sum of the IoUs of the pairs over max(#gold, #predicted).
    pub iou: f64,
    /// Pairs over predictions.
    pub precision: f64,
    /// Pairs over gold boxes.
    pub recall: f64,
    /// Harmonic mean of precision and recall.
    pub f1: f64,
    /// Confidence of paired minus that of other boxes (at least 0) over max(#gold, #predicted); unstated is 1.
    pub confidence: f64,
    /// 1 for `<think>…</think><answer>…</answer>` and nothing else.
    pub format: f64,
    /// Predicted boxes, malformed ones included.
    pub predicted: usize,
    /// Pairs.
    pub matched: usize,
}

/// Scores the boxes of a completion against gold boxes.
///
/// Without gold, an answer that states that there is nothing (`[]`, "none") earns 1, any box and any silence 0.
///
/// # Errors
/// [`BoxError::TooLong`], [`BoxError::TooMany`]; [`BoxError::Gold`] for a gold box without area;
/// [`BoxError::Option`] where a conversion lacks the size of the picture.
pub fn detection(
    completion: &str,
    gold: &[LabeledBox],
    options: &DetectionOptions,
) -> Result<DetectionReward, BoxError> {
    check_gold(gold)?;
    let read = read_boxes(completion)?;
    check_counts(read.boxes.len(), gold.len())?;
    let format = if think_answer(completion) { 1.0 } else { 0.0 };
    let reward = DetectionReward { format, predicted: read.boxes.len(), ..Default::default() };
    if gold.is_empty() || read.boxes.is_empty() {
        let right = if gold.is_empty() && read.boxes.is_empty() && read.none_stated { 1.0 } else { 0.0 };
        return Ok(DetectionReward {
            iou: right,
            precision: right,
            recall: right,
            f1: right,
            confidence: right,
            ..reward
        });
    }
    let preds = read
        .boxes
        .iter()
        .map(|pred| converted(pred, options.coordinates, options.gold_coordinates, options.image_size))
        .collect::<Result<Vec<Bbox>, BoxError>>()?;
    let pairs = pair(&read.boxes, &preds, gold, options)?;
    let confidence = |pred: &ReadBox| {
        let stated = pred.confidence.unwrap_or(1.0);
        if stated.is_nan() { 0.0 } else { stated.clamp(0.0, 1.0) }
    };
    let all: f64 = read.boxes.iter().map(confidence).sum();
    let paired: f64 = pairs.iter().map(|pair| confidence(&read.boxes[pair.pred])).sum();
    let most = preds.len().max(gold.len()) as f64;
    let matched = pairs.len() as f64;
    let (precision, recall) = (matched / preds.len() as f64, matched / gold.len() as f64);
    Ok(DetectionReward {
        iou: pairs.iter().map(|pair| pair.iou).sum::<f64>() / most,
        precision,
        recall,
        f1: if matched == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) },
        confidence: (2.0 * paired - all).max(0.0) / most,
        matched: pairs.len(),
        ..reward
    })
}

/// No box: overlaps nothing.
const NOWHERE: Bbox = [f64::NAN; 4];

fn converted(
    pred: &ReadBox,
    from: Option<Coordinates>,
    to: Coordinates,
    image_size: Option<[f64; 2]>,
) -> Result<Bbox, BoxError> {
    match (pred.bbox.filter(is_proper), from) {
        (Some(bbox), Some(from)) => from.convert(&bbox, to, image_size),
        (Some(bbox), None) => Ok(bbox),
        (None, _) => Ok(NOWHERE),
    }
}

/// Pairs within each label, so that a box of the wrong class blocks no gold box.
fn pair(
    read: &[ReadBox],
    preds: &[Bbox],
    gold: &[LabeledBox],
    options: &DetectionOptions,
) -> Result<Vec<Match>, BoxError> {
    let gold_label = |item: &LabeledBox| item.label.trim().to_lowercase();
    let mut labels: Vec<Option<String>> = vec![None];
    if options.match_labels {
        labels = gold.iter().map(|item| Some(gold_label(item))).collect();
        labels.sort();
        labels.dedup();
    }
    let mut pairs = Vec::new();
    for label in labels {
        let fits = |given: &str| label.as_deref().is_none_or(|label| label == given);
        let of_label: Vec<usize> =
            (0..preds.len()).filter(|&i| fits(read[i].label.as_deref().unwrap_or_default())).collect();
        let gold_of_label: Vec<usize> = (0..gold.len()).filter(|&i| fits(&gold_label(&gold[i]))).collect();
        let some_preds: Vec<Bbox> = of_label.iter().map(|&i| preds[i]).collect();
        let some_golds: Vec<Bbox> = gold_of_label.iter().map(|&i| gold[i].bbox).collect();
        let found = match options.matching {
            Matching::Hungarian => match_hungarian(&some_preds, &some_golds, options.iou_threshold)?,
            Matching::Greedy => match_greedy(&some_preds, &some_golds, options.iou_threshold)?,
        };
        pairs.extend(found.into_iter().map(|pair| Match {
            pred: of_label[pair.pred],
            gold: gold_of_label[pair.gold],
            iou: pair.iou,
        }));
    }
    Ok(pairs)
}

/// What a grounding answer with several boxes earns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeveralBoxes {
    /// Nothing: one box was asked for.
    #[default]
    Reject,
    /// What its first box earns.
    First,
}

/// How close a box has to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroundingScore {
    /// IoU.
    #[default]
    Iou,
    /// (GIoU + 1) / 2, which still rises where the boxes are apart.
    Giou,
}

/// How a grounding answer is judged.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GroundingOptions {
    /// What is scored.
    pub score: GroundingScore,
    /// Below this score the accuracy is 0.
    pub threshold: f64,
    /// What several boxes earn.
    pub several: SeveralBoxes,
    /// Unit of the predicted box; None: that of the gold.
    pub coordinates: Option<Coordinates>,
    /// Unit of the gold box.
    pub gold_coordinates: Coordinates,
    /// `[width, height]` of the picture in pixels, where a conversion needs it.
    pub image_size: Option<[f64; 2]>,
}

impl Default for GroundingOptions {
    fn default() -> Self {
        GroundingOptions {
            score: GroundingScore::Iou,
            threshold: 0.0,
            several: SeveralBoxes::Reject,
            coordinates: None,
            gold_coordinates: Coordinates::Pixels,
            image_size: None,
        }
    }
}

/// Parts of a grounding reward, both within [0, 1].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GroundingReward {
    /// Closeness of the box.
    pub accuracy: f64,
    /// 1 for `<think>…</think><answer>…</answer>` and nothing else.
    pub format: f64,
}

/// Scores the one box of a completion against the gold box.
///
/// # Errors
/// As [`detection`].
pub fn grounding(
    completion: &str,
    gold: &Bbox,
    options: &GroundingOptions,
) -> Result<GroundingReward, BoxError> {
    check_gold(&[LabeledBox { label: String::new(), bbox: *gold }])?;
    let read = read_boxes(completion)?;
    let chosen = match (read.boxes.as_slice(), options.several) {
        ([one], _) => Some(one),
        ([first, ..], SeveralBoxes::First) => Some(first),
        _ => None,
    };
    let accuracy = match chosen {
        Some(pred) => {
            let bbox = converted(pred, options.coordinates, options.gold_coordinates, options.image_size)?;
            match options.score {
                GroundingScore::Iou => iou(&bbox, gold),
                GroundingScore::Giou => (giou(&bbox, gold) + 1.0) / 2.0,
            }
        }
        None => 0.0,
    };
    let format = if think_answer(completion) { 1.0 } else { 0.0 };
    Ok(GroundingReward { accuracy: if accuracy < options.threshold { 0.0 } else { accuracy }, format })
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;

    fn gold() -> Vec<LabeledBox> {
        let item = |label: &str, bbox| LabeledBox { label: label.into(), bbox };
        vec![item("cat", [0.0, 0.0, 10.0, 10.0]), item("dog", [20.0, 20.0, 40.0, 40.0])]
    }

    const RIGHT: &str =
        r#"{"bbox_2d": [0, 0, 10, 10], "label": "cat"}, {"bbox_2d": [20, 20, 40, 40], "label": "Dog"}"#;

    fn judge(list: &str) -> DetectionReward {
        let completion = format!("<think>t</think><answer>[{list}]</answer>");
        detection(&completion, &gold(), &DetectionOptions::default()).unwrap()
    }

    #[test]
    fn the_right_boxes_earn_everything() {
        let reward = judge(RIGHT);
        let parts =
            [reward.iou, reward.precision, reward.recall, reward.f1, reward.confidence, reward.format];
        assert_eq!(parts, [1.0; 6]);
    }

    #[test]
    fn hole_redundant_boxes_cost() {
        let thrice = format!("{RIGHT}, {RIGHT}, {RIGHT}");
        let reward = judge(&thrice);
        assert!((reward.iou - 1.0 / 3.0).abs() < 1e-12 && (reward.precision - 1.0 / 3.0).abs() < 1e-12);
        let solution = format!("<answer>```json\n[{RIGHT}]\n```</answer>").replace("Dog", "dog");
        let completion = format!("<answer>```json\n[{thrice}]\n```</answer>").replace("Dog", "dog");
        assert!(vlm_r1_detection(&completion, &solution).unwrap().od_ap > 0.99);
    }

    #[test]
    fn hole_wrong_labels_earn_nothing() {
        let swapped = RIGHT.replace("cat", "bird").replace("Dog", "cat");
        assert_eq!(judge(&swapped).iou, 0.0);
        let boxes = VisionR1Options::default();
        assert_eq!(vision_r1(&format!("[{swapped}]"), &gold(), &boxes).unwrap().precision, Some(1.0));
    }

    #[test]
    fn hole_inverted_boxes_are_spare_boxes() {
        let reward = judge(
            r#"{"bbox_2d": [10, 10, 0, 0], "label": "cat"}, {"bbox_2d": [20, 20, 40, 40], "label": "dog"}"#,
        );
        assert_eq!((reward.iou, reward.predicted, reward.matched), (0.5, 2, 1));
    }

    #[test]
    fn hole_an_empty_answer_earns_only_where_nothing_is_there_and_it_says_so() {
        let options = DetectionOptions::default();
        let score = |text: &str, gold: &[LabeledBox]| detection(text, gold, &options).unwrap().iou;
        for empty in ["", "<answer></answer>", "<answer>[]</answer>", "<answer>None</answer>", "I see a cat"]
        {
            assert_eq!(score(empty, &gold()), 0.0, "{empty}");
        }
        assert_eq!(score("<answer>[]</answer>", &[]), 1.0);
        assert_eq!(score("<answer></answer>", &[]), 0.0);
        assert_eq!(score("Nothing to report here, really.", &[]), 0.0);
        assert_eq!(score("<answer>[[1, 1, 2, 2]]</answer>", &[]), 0.0);
        // VLM-R1 gives any prose full marks here.
        assert_eq!(vlm_r1_detection("<answer>prose</answer>", "<answer>None</answer>").unwrap().od_ap, 1.0);
    }

    #[test]
    fn hole_far_boxes_without_confidence_earn_nothing() {
        let far = r#"{"bbox_2d": [500, 500, 600, 600], "label": "cat", "confidence": 0.0}"#;
        assert_eq!(judge(far).confidence, 0.0);
        let peer = "<answer>[{'Position': [500, 500, 600, 600], 'Confidence': 0.0}]</answer>";
        let solution = "<answer>[{'Position': [0, 0, 10, 10], 'Confidence': 1.0}]</answer>";
        assert_eq!(visual_rft_detection(peer, solution).unwrap().confidence, 1.0);
    }

    #[test]
    fn hole_points_of_several_boxes_are_not_mixed() {
        let gold = [100.0, 100.0, 200.0, 200.0];
        let permille = GroundingOptions { several: SeveralBoxes::First, ..Default::default() };
        let two = "<answer>(100,100),(200,200) (500,500),(600,600)</answer>";
        assert_eq!(grounding(two, &gold, &permille).unwrap().accuracy, 1.0);
        assert_eq!(grounding(two, &gold, &GroundingOptions::default()).unwrap().accuracy, 0.0);
        let peer = visual_rft_grounding(two, "<answer>(100,100),(200,200)</answer>").unwrap();
        assert!(peer.accuracy < 1.1, "both first corners make one box there");
    }

    #[test]
    fn hole_inverted_grounding_boxes_earn_nothing() {
        let gold = [100.0, 100.0, 200.0, 200.0];
        let swapped = "<answer>(200,200),(100,100)</answer>";
        for score in [GroundingScore::Iou, GroundingScore::Giou] {
            let options = GroundingOptions { score, ..Default::default() };
            assert_eq!(grounding(swapped, &gold, &options).unwrap().accuracy, 0.0);
        }
        assert_eq!(
            visual_rft_grounding(swapped, "<answer>(100,100),(200,200)</answer>").unwrap().accuracy,
            2.0
        );
    }

    #[test]
    fn hole_a_one_pixel_overlap_and_unit_boxes_count() {
        let options = GroundingOptions::default();
        let unit = [0.1, 0.1, 0.9, 0.9];
        assert_eq!(
            grounding("<answer>[0.1, 0.1, 0.9, 0.9]</answer>", &unit, &options).unwrap().accuracy,
            1.0
        );
        let pixel = grounding("<answer>[0, 0, 2, 2]</answer>", &[1.0, 1.0, 3.0, 3.0], &options).unwrap();
        assert!(pixel.accuracy > 0.1);
        let gold = "<answer>[1, 1, 3, 3]</answer>";
        let peer = vlm_r1_rec("<answer>[0, 0, 2, 2]</answer>", gold, &VlmR1RecOptions::default()).unwrap();
        assert_eq!(peer.accuracy, 0.0);
    }

    #[test]
    fn predictions_are_converted_to_the_unit_of_the_gold() {
        let options = DetectionOptions {
            coordinates: Some(Coordinates::Permille),
            image_size: Some([20.0, 10.0]),
            match_labels: false,
            ..Default::default()
        };
        let gold = [LabeledBox { label: String::new(), bbox: [0.0, 0.0, 10.0, 10.0] }];
        assert_eq!(detection("<answer>[0, 0, 500, 1000]</answer>", &gold, &options).unwrap().iou, 1.0);
        let unknown = DetectionOptions { image_size: None, ..options };
        assert!(detection("<answer>[0, 0, 500, 1000]</answer>", &gold, &unknown).is_err());
    }
}
