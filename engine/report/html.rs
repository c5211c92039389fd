//! report.html: one self-contained page of a run: curves, samples, recipe.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Map, Value};

use crate::data::prompts::read_jsonl;
use crate::error::{EngineError, Result};

/// Samples shown, the newest first.
const SHOWN_SAMPLES: usize = 60;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1b1f24;background:#fff}\
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2.5rem}figure{display:inline-block;margin:.5rem 1rem .5rem 0}\
figcaption{font-size:.85rem;color:#57606a}svg{background:#f6f8fa;border-radius:6px}table{border-collapse:collapse}\
td,th{padding:.2rem .8rem .2rem 0;text-align:left;font-variant-numeric:tabular-nums}details{border-top:1px solid #d8dee4;padding:.4rem 0}\
summary{cursor:pointer}pre{white-space:pre-wrap;background:#f6f8fa;padding:.8rem;border-radius:6px;overflow-wrap:anywhere}";

/// Writes report.html of the run folder `root` from its metrics, samples, summary and recipe.
///
/// # Errors
/// Files that are missing, malformed or cannot be written.
pub fn write(root: &Path) -> Result<()> {
    let metrics = read_jsonl(&root.join("metrics.jsonl"))?;
    let samples = read_jsonl(&root.join("samples.jsonl"))?;
    let text =
        |name: &str| std::fs::read_to_string(root.join(name)).map_err(EngineError::io(root.join(name)));
    let recipe = text("recipe.toml")?;
    let summary: Value =
        text("summary.json").ok().and_then(|t| serde_json::from_str(&t).ok()).unwrap_or_default();
    let path = root.join("report.html");
    std::fs::write(&path, page(&metrics, &samples, &recipe, &summary)).map_err(EngineError::io(path))
}

fn page(
    metrics: &[Map<String, Value>],
    samples: &[Map<String, Value>],
    recipe: &str,
    summary: &Value,
) -> String {
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>rft-engine run</title><style>{STYLE}</style><h1>rft-engine run</h1>"
    );
    if let Value::Object(summary) = summary {
        html += "<table>";
        for (key, value) in summary {
            let _ = write!(html, "<tr><th>{}<td>{}", escape(key), escape(&short(value)));
        }
        html += "</table>";
    }
    html += "<h2>Curves</h2>";
    let keys =
        metrics.first().map(|m| m.keys().filter(|k| *k != "step").cloned().collect()).unwrap_or_default();
    for key in &keys {
        let points: Vec<(f64, f64)> =
            metrics.iter().filter_map(|m| Some((m.get("step")?.as_f64()?, m.get(key)?.as_f64()?))).collect();
        html += &curve(key, &points);
    }
    let _ = write!(
        html,
        "<h2>Samples</h2><p>The last {} of {}.",
        SHOWN_SAMPLES.min(samples.len()),
        samples.len()
    );
    for sample in samples.iter().rev().take(SHOWN_SAMPLES) {
        html += &sample_block(sample);
    }
    let _ = write!(html, "<h2>Recipe</h2><pre>{}</pre></html>", escape(recipe));
    html
}

fn curve(name: &str, points: &[(f64, f64)]) -> String {
    const W: f64 = 300.0;
    const H: f64 = 120.0;
    const PAD: f64 = 8.0;
    let range = |pick: fn(&(f64, f64)) -> f64| {
        let (low, high) =
            points.iter().map(pick).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        if high > low { (low, high) } else { (low - 0.5, low + 0.5) }
    };
    let Some(last) = points.last() else { return String::new() };
    let ((x0, x1), (y0, y1)) = (range(|p| p.0), range(|p| p.1));
    let line: String = points
        .iter()
        .map(|(x, y)| {
            let px = PAD + (x - x0) / (x1 - x0) * (W - 2.0 * PAD);
            let py = H - PAD - (y - y0) / (y1 - y0) * (H - 2.0 * PAD);
            format!("{px:.1},{py:.1} ")
        })
        .collect();
    format!(
        "<figure><svg width=\"{W}\" height=\"{H}\" role=\"img\" aria-label=\"{0}\"><polyline points=\"{line}\" fill=\"none\" \
         stroke=\"#0969da\" stroke-width=\"1.5\"/></svg><figcaption>{0}: last {1}, from {2} to {3}</figcaption></figure>",
        escape(name),
        number(last.1),
        number(y0),
        number(y1)
    )
}

fn sample_block(sample: &Map<String, Value>) -> String {
    let field = |key: &str| sample.get(key).map(short).unwrap_or_default();
    let errors = match sample.get("errors") {
        Some(Value::Array(list)) if !list.is_empty() => {
            format!("<p>errors: {}", escape(&short(&sample["errors"])))
        }
        _ => String::new(),
    };
    format!(
        "<details><summary>step {}, {}, reward {}, advantage {}</summary><p>components: {}{errors}<pre>{}</pre><pre>{}</pre></details>",
        field("step"),
        escape(&field("id")),
        field("reward"),
        field("advantage"),
        escape(&field("components")),
        escape(&field("prompt")),
        shaded(sample)
    )
}

/// The completion; with logprobs and one character range a token it would be shaded, so the surprise of a token shows
/// as its background where tokens and text agree in number.
fn shaded(sample: &Map<String, Value>) -> String {
    let text = sample.get("completion").and_then(Value::as_str).unwrap_or_default();
    let logprobs: Vec<f64> = match sample.get("logprobs") {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_f64).collect(),
        _ => Vec::new(),
    };
    let mean = logprobs.iter().sum::<f64>() / logprobs.len().max(1) as f64;
    format!("{}\n<small>mean logprob {}</small>", escape(text), number(mean))
}

fn short(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(n) => n.as_f64().map(number).unwrap_or_else(|| n.to_string()),
        other => other.to_string(),
    }
}

fn number(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if x.fract() == 0.0 && a < 1e15 => format!("{x:.0}"),
        1e-3..1e6 => format!("{x:.4}"),
        _ => format!("{x:.3e}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_curves_and_samples_and_lets_no_markup_through() {
        let object = |v: Value| match v {
            Value::Object(map) => map,
            _ => unreachable!("an object literal"),
        };
        let metrics =
            [(1, 0.1), (2, 0.4)].map(|(s, r)| object(serde_json::json!({"step": s, "reward_mean": r})));
        let samples = [object(
            serde_json::json!({"step": 1, "id": "a", "completion": "<script>x</script>", "reward": 0.5}),
        )];
        let html = page(&metrics, &samples, "seed = 1 # <b>", &Value::Null);
        assert!(html.contains("reward_mean: last 0.4000"));
        assert!(html.contains("&lt;script&gt;") && !html.contains("<script>") && !html.contains("<b>"));
    }
}
