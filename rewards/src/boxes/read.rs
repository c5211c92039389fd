//! Reading boxes from an answer, however it writes them.

use super::answer::{fences, last_answer};
use super::{Bbox, BoxError, MAX_BOXES, check_length};
use crate::tools::py::{self, Py, strip};
use crate::tools::pyexpr::{self, Names};
use regex::Regex;
use serde::Serialize;
use std::sync::LazyLock;

/// Starts at which a list or object is tried amid prose.
const MAX_STARTS: usize = 20_000;

/// One predicted box.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReadBox {
    /// Four numbers as written, in whatever order; None where they are not four numbers.
    pub bbox: Option<Bbox>,
    /// Class name, if stated.
    pub label: Option<String>,
    /// Confidence, if stated.
    pub confidence: Option<f64>,
}

/// What an answer says about boxes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ReadBoxes {
    /// The boxes in order, malformed ones included.
    pub boxes: Vec<ReadBox>,
    /// The answer states that there is none (`[]` or "none"), as opposed to saying nothing.
    pub none_stated: bool,
}

/// Reads boxes from the last `<answer>`, or else from what follows `</think>`, or else from the whole text.
///
/// Knows JSON and Python lists of objects (`bbox_2d`, `bbox`, `box` or `position`; `label`, `category` or `class`; `confidence` or `score`, in
/// any case), lists of four numbers, a single object, fenced or amid prose, and `(x1,y1),(x2,y2)`.
///
/// # Errors
/// [`BoxError::TooLong`], [`BoxError::TooMany`].
pub fn read_boxes(text: &str) -> Result<ReadBoxes, BoxError> {
    check_length(text)?;
    let answer =
        last_answer(text).or_else(|| text.rsplit_once("</think>").map(|(_, answer)| answer)).unwrap_or(text);
    let fenced = fences(answer, "```").last().map(|body| body.strip_prefix("json").unwrap_or(body));
    let body = strip(fenced.unwrap_or(answer));
    let none_stated = body == "[]" || body.trim_end_matches('.').eq_ignore_ascii_case("none");
    if none_stated {
        return Ok(ReadBoxes { boxes: Vec::new(), none_stated });
    }
    let mut boxes = Vec::new();
    if let Some(value) = value_of(body) {
        boxes_of(&value, &mut boxes);
    } else {
        amid_prose(body, &mut boxes);
    }
    if boxes.iter().all(|found| found.bbox.is_none()) {
        let pairs = point_pairs(body);
        if !pairs.is_empty() {
            boxes = pairs;
        }
    }
    if boxes.len() > MAX_BOXES {
        return Err(BoxError::TooMany { what: "boxes", found: boxes.len(), limit: MAX_BOXES });
    }
    Ok(ReadBoxes { boxes, none_stated })
}

fn value_of(text: &str) -> Option<Py> {
    py::loads(text).or_else(|| pyexpr::literal(&pyexpr::parse(text)?, Names::JsonWords))
}

fn amid_prose(text: &str, boxes: &mut Vec<ReadBox>) {
    let mut at = 0;
    for _ in 0..MAX_STARTS {
        let Some(start) = text[at..].find(['[', '{']) else { break };
        at += start;
        match py::raw_decode(&text[at..]) {
            Some((value, length)) => {
                boxes_of(&value, boxes);
                at += length;
            }
            None => at += 1,
        }
    }
}

/// Four numbers are a box, an object is one, a list holds some.
fn boxes_of(value: &Py, boxes: &mut Vec<ReadBox>) {
    match value {
        Py::Dict(_) => boxes.push(read_box(value)),
        Py::List(items) | Py::Tuple(items) => {
            let first_is_number = items.first().is_some_and(|item| item.as_number().is_some());
            if first_is_number {
                boxes.push(read_box(value));
            } else {
                boxes.extend(items.iter().map(read_box));
            }
        }
        _ => {}
    }
}

fn read_box(item: &Py) -> ReadBox {
    let Some(dict) = item.as_dict() else {
        return ReadBox { bbox: four_numbers(item), label: None, confidence: None };
    };
    let field = |names: &[&str]| {
        dict.iter()
            .find(|(key, _)| names.iter().any(|name| name.eq_ignore_ascii_case(key)))
            .map(|(_, value)| value)
    };
    ReadBox {
        bbox: field(&["bbox_2d", "bbox", "box", "position"]).and_then(four_numbers),
        label: field(&["label", "category", "class"])
            .and_then(Py::as_str)
            .map(|label| strip(label).to_lowercase()),
        confidence: field(&["confidence", "score"]).and_then(Py::as_number),
    }
}

fn four_numbers(value: &Py) -> Option<Bbox> {
    let (Py::List(items) | Py::Tuple(items)) = value else { return None };
    let numbers: Vec<f64> = items.iter().map(Py::as_number).collect::<Option<_>>()?;
    numbers.try_into().ok()
}

/// Every `(x1,y1),(x2,y2)`, corners kept with their box.
fn point_pairs(text: &str) -> Vec<ReadBox> {
    static PAIR: LazyLock<Regex> = LazyLock::new(|| {
        let point = r"\(\s*([0-9.]+)\s*,\s*([0-9.]+)\s*\)";
        Regex::new(&format!(r"{point}\s*,\s*{point}")).expect("a constant pattern")
    });
    PAIR.captures_iter(text)
        .map(|found| {
            let numbers: Vec<f64> = (1..5).filter_map(|i| found[i].parse().ok()).collect();
            ReadBox { bbox: numbers.try_into().ok(), label: None, confidence: None }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bboxes(text: &str) -> Vec<Option<Bbox>> {
        read_boxes(text).unwrap().boxes.into_iter().map(|b| b.bbox).collect()
    }

    #[test]
    fn boxes_are_read_in_every_usual_form() {
        let one = vec![Some([1.0, 2.0, 3.0, 4.0])];
        for text in [
            "<think>[9, 9, 9, 9]</think><answer>[1, 2, 3, 4]</answer>",
            "<answer>{\"bbox_2d\": [1, 2, 3, 4], \"label\": \"cat\"}</answer>",
            "<answer>[{'Position': [1, 2, 3, 4], 'Confidence': 0.5}]</answer>",
            "<answer>```json\n[{\"bbox\": [1, 2, 3, 4]}]\n```</answer>",
            "The box is [1, 2, 3, 4].",
            "<answer> (1,2),(3,4) </answer>",
        ] {
            assert_eq!(bboxes(text), one, "{text}");
        }
        assert_eq!(bboxes("(1,2),(3,4) and (5,6),(7,8)").len(), 2);
        assert_eq!(bboxes("[[1, 2, 3, 4], [5, 6, 7]]"), [one[0], None]);
        assert!(read_boxes("<answer>None</answer>").unwrap().none_stated);
        assert!(!read_boxes("I see nothing").unwrap().none_stated);
    }
}
