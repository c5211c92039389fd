//! Coordinate settings against the rows of a data file, before a run trusts them.

use serde_json::{Map, Value};

use super::{Bbox, CoordinateSample, CoordinateWarning, Coordinates, check_coordinates, read_boxes};

/// Fields of a row, or of an object in `boxes`, that hold one box.
const BOX_FIELDS: [&str; 3] = ["box", "bbox", "bbox_2d"];
/// Fields that hold a list of boxes.
const LIST_FIELDS: [&str; 2] = ["boxes", "objects"];

/// Checks a verifier's `gold_coordinates` (what the gold boxes of the rows are in) and `coordinates` (what the model
/// writes; seen in rows that have a `completion`). A verifier with neither setting is taken at its default, pixels, if
/// it is a shipped one that converts boxes, and not checked otherwise. Empty where all agree, as far as one can tell.
pub fn check_rows(
    script: &str,
    options: &Map<String, Value>,
    rows: &[Map<String, Value>],
) -> Vec<CoordinateWarning> {
    let converts = matches!(script, "detection" | "grounding");
    let kind = options.get("kind").and_then(Value::as_str).unwrap_or("default");
    let set = options.contains_key("coordinates") || options.contains_key("gold_coordinates");
    if !(set || converts && kind == "default") {
        return Vec::new();
    }
    let setting = |name: &str| {
        match options.get(name) {
        None => Ok(None),
        Some(value) => serde_json::from_value::<Coordinates>(value.clone()).map(Some).map_err(|error| CoordinateWarning {
            message: format!("options.{name} = {value} is no coordinate convention: {error}\nhint: \"permille\", \"pixels\", \"unit\" or {{model_grid = {{w = .., h = ..}}}}"),
            rows: Vec::new(),
        }),
    }
    };
    let (gold, written) = match (setting("gold_coordinates"), setting("coordinates")) {
        (Ok(gold), Ok(written)) => (gold.unwrap_or(Coordinates::Pixels), written),
        (gold, written) => return gold.err().into_iter().chain(written.err()).collect(),
    };
    let samples = |boxes: &dyn Fn(&Map<String, Value>) -> Vec<Bbox>| -> Vec<CoordinateSample> {
        rows.iter().map(|row| CoordinateSample { boxes: boxes(row), image_size: image_size(row) }).collect()
    };
    let told = |what: &'static str| {
        move |warning: CoordinateWarning| CoordinateWarning {
            message: format!("{what}: {}", warning.message),
            ..warning
        }
    };
    let mut warnings: Vec<CoordinateWarning> =
        check_coordinates(&samples(&gold_boxes), gold).into_iter().map(told("gold boxes")).collect();
    let answers = samples(&|row| {
        let text = row.get("completion").and_then(Value::as_str).unwrap_or_default();
        read_boxes(text)
            .map(|read| read.boxes.into_iter().filter_map(|b| b.bbox).collect())
            .unwrap_or_default()
    });
    // without a setting the model's boxes are taken in the convention of the gold
    let found = check_coordinates(&answers, written.unwrap_or(gold));
    warnings.extend(found.into_iter().map(told("boxes of the completions")));
    warnings
}

fn image_size(row: &Map<String, Value>) -> Option<[f64; 2]> {
    let side = |name: &str| row.get(name).and_then(Value::as_f64);
    match row.get("image_size") {
        Some(size) => serde_json::from_value(size.clone()).ok(),
        None => Some([
            side("image_width").or_else(|| side("width"))?,
            side("image_height").or_else(|| side("height"))?,
        ]),
    }
}

fn gold_boxes(row: &Map<String, Value>) -> Vec<Bbox> {
    let own = |object: &Map<String, Value>| {
        BOX_FIELDS.iter().find_map(|name| serde_json::from_value::<Bbox>(object.get(*name)?.clone()).ok())
    };
    let listed = LIST_FIELDS.iter().filter_map(|name| row.get(*name).and_then(Value::as_array)).flatten();
    let listed = listed.filter_map(|item| match item {
        Value::Object(object) => own(object),
        other => serde_json::from_value(other.clone()).ok(),
    });
    own(row).into_iter().chain(listed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(script: &str, options: Value, row: Value) -> Vec<String> {
        let rows: Vec<_> = (0..10).map(|_| row.as_object().unwrap().clone()).collect();
        let warnings = check_rows(script, options.as_object().unwrap(), &rows);
        warnings.into_iter().map(|w| w.message).collect()
    }

    #[test]
    fn a_setting_is_held_against_gold_and_completions() {
        let row = json!({"boxes": [{"label": "cat", "bbox": [10, 20, 600, 450]}], "image_size": [640, 480],
            "completion": "[{\"bbox_2d\": [100, 200, 900, 980], \"label\": \"cat\"}]"});
        let found = check("detection", json!({"coordinates": "permille"}), row.clone());
        assert!(found.is_empty(), "{found:?}");
        let found = check("detection", json!({}), row.clone());
        assert!(
            found.len() == 1 && found[0].contains("completions") && found[0].contains("outside"),
            "{found:?}"
        );
        let found =
            check("detection", json!({"gold_coordinates": "unit", "coordinates": "permille"}), row.clone());
        assert!(found.len() == 1 && found[0].contains("gold boxes"), "{found:?}");
        let found = check("mine", json!({"gold_coordinates": "percent"}), row.clone());
        assert!(found.len() == 1 && found[0].contains("percent") && found[0].contains("hint"), "{found:?}");
        assert!(check("mine", json!({}), row).is_empty());
    }

    #[test]
    fn single_boxes_and_pairs_of_sides_are_read() {
        let row = json!({"bbox_2d": [0.1, 0.1, 0.4, 0.9], "width": 640, "height": 480});
        let found = check("grounding", json!({}), row);
        assert!(found.len() == 1 && found[0].contains("unit"), "{found:?}");
    }
}
