//! Boxes: overlap, matching, average precision, and the rewards for vision tasks.
//!
//! A [`Bbox`] is `[x1, y1, x2, y2]` unless said otherwise. [`detection`], [`grounding`], [`classification`] and
//! [`yes_no`] are this project's rewards, with the known holes of the published ones closed; `visual_rft_*`,
//! `vlm_r1_*` and [`vision_r1`] are those of the papers, hole for hole. [`check_coordinates`] finds data whose coordinate
//! convention is not the one that was set, the commonest cause of an IoU of zero. No input panics; sizes are capped.

mod answer;
mod classify;
mod coco;
mod coordinates;
mod detection;
mod matching;
mod overlap;
mod read;
mod rotated;
mod rows;
mod vision_r1;
mod visual_rft;
mod vlm_r1;

pub use classify::{ClassificationOptions, classification, visual_rft_classification, vlm_r1_yes_no, yes_no};
pub use coco::{CocoCategory, CocoDetection, CocoGold, CocoResult, CocoStats, coco_ap};
pub use coordinates::{CoordinateSample, CoordinateWarning, Coordinates, check_coordinates};
pub use detection::{
    DetectionOptions, DetectionReward, GroundingOptions, GroundingReward, GroundingScore, Matching,
    SeveralBoxes, detection, grounding,
};
pub use matching::{Match, hungarian, match_greedy, match_hungarian};
pub use overlap::{Measure, giou, iou, overlap};
pub use read::{ReadBox, ReadBoxes, read_boxes};
pub use rotated::{RotatedBox, rotated_intersection, rotated_iou};
pub use rows::check_rows;
pub use vision_r1::{VisionR1Options, VisionR1Reward, vision_r1};
pub use visual_rft::{VisualRftGrounding, VisualRftReward, visual_rft_detection, visual_rft_grounding};
pub use vlm_r1::{
    VlmR1Detection, VlmR1Rec, VlmR1RecOptions, vlm_r1_cosine, vlm_r1_detection, vlm_r1_rec, vlm_r1_repetition,
};

use serde::{Deserialize, Serialize};

/// `[x1, y1, x2, y2]`, x to the right, y down.
pub type Bbox = [f64; 4];

/// Longest text that is looked at, in bytes.
pub const MAX_TEXT: usize = 1 << 21;
/// Most boxes that one side of a comparison may hold.
pub const MAX_BOXES: usize = 10_000;
/// Most box pairs that are compared for one reward.
pub const MAX_PAIRS: usize = 4_000_000;

/// A gold box and its class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabeledBox {
    /// Class name; empty where the task has none.
    #[serde(default)]
    pub label: String,
    /// The box.
    #[serde(alias = "bbox_2d", alias = "box")]
    pub bbox: Bbox,
}

/// Why boxes cannot be judged.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BoxError {
    /// The text is longer than [`MAX_TEXT`].
    #[error(
        "text of {bytes} bytes exceeds the limit of {limit}\nhint: cap the completion length, or score such samples by a fixed value"
    )]
    TooLong {
        /// Length of the text.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// More boxes, or pairs of them, than are compared.
    #[error(
        "{found} {what} exceed the limit of {limit}\nhint: score such samples by a fixed value; no answer needs that many"
    )]
    TooMany {
        /// Boxes or pairs.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// The gold side of the data row cannot be used.
    #[error(
        "{field} of the data row: expected {expected}, found {found}\nhint: fix the data; a reward against a broken gold would train on noise"
    )]
    Gold {
        /// Which part of the row.
        field: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// An option is out of its range.
    #[error("option {option}: expected {expected}, found {found}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
}

/// Whether a box has four finite numbers, x1 < x2 and y1 < y2.
pub fn is_proper(bbox: &Bbox) -> bool {
    bbox.iter().all(|x| x.is_finite()) && bbox[0] < bbox[2] && bbox[1] < bbox[3]
}

fn check_length(text: &str) -> Result<(), BoxError> {
    if text.len() > MAX_TEXT {
        return Err(BoxError::TooLong { bytes: text.len(), limit: MAX_TEXT });
    }
    Ok(())
}

fn check_counts(a: usize, b: usize) -> Result<(), BoxError> {
    let most = a.max(b);
    if most > MAX_BOXES {
        return Err(BoxError::TooMany { what: "boxes", found: most, limit: MAX_BOXES });
    }
    if a * b > MAX_PAIRS {
        return Err(BoxError::TooMany { what: "pairs of boxes", found: a * b, limit: MAX_PAIRS });
    }
    Ok(())
}

fn check_gold(gold: &[LabeledBox]) -> Result<(), BoxError> {
    match gold.iter().position(|item| !is_proper(&item.bbox)) {
        Some(at) => Err(BoxError::Gold {
            field: format!("gold box {}", at + 1),
            expected: "finite [x1, y1, x2, y2] with x1 < x2 and y1 < y2".into(),
            found: format!("{:?}", gold[at].bbox),
        }),
        None => Ok(()),
    }
}

/// The first characters of a text, for messages.
fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("{short:?}")
}
