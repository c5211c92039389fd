//! report.html: one self-contained page of a run: results, curves, samples, recipe, environment.
//!
//! It reads the run folder alone and can be written again at any time, also while the run goes on. Files are read line
//! by line and only the samples that are shown are kept, so the page of a long run costs little memory.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{EngineError, Result};
use crate::report::chart::{Series, chart, escape, number};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Steps whose samples are shown, spread evenly, the first and the last among them.
const SHOWN_STEPS: usize = 8;
/// Samples shown of such a step.
const SHOWN_SAMPLES: usize = 16;
/// Stretches of steps without learning that are listed.
const SHOWN_STRETCHES: usize = 30;
/// Tokens of a completion that are shaded; the rest follows as plain text.
const SHADED_TOKENS: usize = 600;

/// Charts by section; keys that none of them names follow under "Other".
const SECTIONS: [(&str, &[&str]); 4] = [
    (
        "Policy",
        &["kl", "entropy", "ratio_max_dev", "clip_fraction", "loss", "grad_norm", "lr", "kl_coefficient"],
    ),
    (
        "Completions",
        &[
            "completion_tokens_mean",
            "truncated_fraction",
            "reward_std",
            "zero_variance_groups",
            "reward_errors",
        ],
    ),
    ("Speed", &["rollout_tokens_per_s", "learner_tokens_per_s", "rollout_s", "reward_s", "learner_s"]),
    ("Memory", &["kv_blocks_peak", "rss_peak_bytes"]),
];

/// Charts of preference stages.
const PREFERENCE: [&str; 9] = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "log_ratio",
    "compared",
    "groups_without_pair",
];

/// A line of metrics.jsonl or samples.jsonl.
type Line = Map<String, Value>;

/// Writes report.html of the run folder `root` from its metrics, samples, summary and recipe.
///
/// # Errors
/// A folder that is no run; files that are malformed or cannot be written.
pub fn write(root: &Path) -> Result<()> {
    let recipe_path = root.join("recipe.toml");
    let recipe = std::fs::read_to_string(&recipe_path).map_err(EngineError::io(recipe_path))?;
    // a run in progress has no summary yet
    let summary = std::fs::read_to_string(root.join("summary.json")).ok();
    let summary: Line = summary.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let metrics = read_lines(&root.join("metrics.jsonl"), |_| true)?;
    let sft = root.join("sft.jsonl");
    let sft = if sft.exists() { read_lines(&sft, |_| true)? } else { Vec::new() };
    let steps = shown_steps(&metrics);
    let samples = read_lines(&root.join("samples.jsonl"), |step| steps.contains(&step))?;
    let name = root.canonicalize().ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
    let path = root.join("report.html");
    let text = page(name.as_deref().unwrap_or("run"), &metrics, &sft, &samples, &recipe, &summary);
    std::fs::write(&path, text).map_err(EngineError::io(path))
}

/// The lines of the steps that `keep` chooses. A last line without its end is one that a run is writing: left out.
fn read_lines(path: &Path, keep: impl Fn(u64) -> bool) -> Result<Vec<Line>> {
    #[derive(Deserialize)]
    struct StepOnly {
        step: u64,
    }
    let mut reader = BufReader::new(File::open(path).map_err(EngineError::io(path))?);
    let (mut lines, mut text) = (Vec::new(), String::new());
    for number in 1.. {
        text.clear();
        reader.read_line(&mut text).map_err(EngineError::io(path))?;
        if !text.ends_with('\n') {
            break;
        }
        let bad =
            |e: serde_json::Error| EngineError::malformed(path, format!("line {number}"), e.to_string());
        if keep(serde_json::from_str::<StepOnly>(&text).map_err(bad)?.step) {
            lines.push(serde_json::from_str(&text).map_err(bad)?);
        }
    }
    Ok(lines)
}

fn shown_steps(metrics: &[Line]) -> BTreeSet<u64> {
    let steps: Vec<u64> = metrics.iter().filter_map(|m| m.get("step")?.as_u64()).collect();
    let last = steps.len().saturating_sub(1);
    (0..SHOWN_STEPS).filter_map(|i| steps.get(i * last / (SHOWN_STEPS - 1)).copied()).collect()
}

fn page(
    name: &str,
    metrics: &[Line],
    sft: &[Line],
    samples: &[Line],
    recipe: &str,
    summary: &Line,
) -> String {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{0} · rft-engine</title><style>{STYLE}</style>\n<h1>{0}</h1>",
        escape(name)
    );
    html += &overview(metrics, summary);
    html += &super::forgetting::html(summary);
    html += &rewards(metrics);
    html += &health("Health", metrics, "metrics.jsonl");
    for (title, keys) in SECTIONS {
        html += &section(title, keys, metrics);
    }
    html += &section("Preference", &PREFERENCE, metrics);
    html += &section("Other", &other_keys(metrics), metrics);
    html += &section("Supervised stages", &["loss", "entropy", "grad_norm", "lr"], sft);
    html += &health("Health of supervised steps", sft, "sft.jsonl");
    html += "<h2>Samples</h2>";
    if samples.is_empty() {
        html += "<p>No samples yet.";
    } else {
        html += "<p class=\"note\">The darker a token, the less likely it was under the distribution that drew it; point at one for its numbers.";
    }
    html += &by_step(samples);
    if let Some(Value::Object(environment)) = summary.get("environment") {
        html += "<h2>Environment</h2><table>";
        for (key, value) in environment {
            let _ = write!(html, "<tr><th>{}<td>{}", escape(key), escape(&plain(value)));
        }
        html += "</table>";
    }
    let _ = writeln!(html, "<h2>Recipe</h2><pre>{}</pre><script>{SCRIPT}</script></html>", escape(recipe));
    html
}

/// The tiles at the top: what came out, and what it cost.
fn overview(metrics: &[Line], summary: &Line) -> String {
    let last = |key: &str| metrics.last().and_then(|m| m.get(key)?.as_f64());
    let of = |key: &str| summary.get(key).and_then(Value::as_f64);
    let mut html = String::from("<div class=\"tiles\">");
    let mut tile = |label: &str, value: String, note: String| {
        let _ = write!(html, "<div><b>{}</b><span>{label}</span><i>{note}</i></div>", escape(&value));
    };
    match (of("eval_before"), of("eval_after")) {
        (Some(before), Some(after)) => {
            let note = format!("from {before:.3}, {:+.3}", after - before);
            tile("held-out reward", format!("{after:.3}"), note);
        }
        _ => {
            if let Some(reward) = last("reward_mean") {
                tile("reward, last step", format!("{reward:.3}"), String::new());
            }
        }
    }
    let steps = of("steps").or_else(|| last("step")).unwrap_or(0.0);
    tile(
        "steps",
        number(steps),
        of("seconds").map(|s| format!("in {s:.0} s")).unwrap_or("in progress".into()),
    );
    for (label, key) in
        [("rollout tokens/s", "rollout_tokens_per_s"), ("learner tokens/s", "learner_tokens_per_s")]
    {
        if let Some(rate) = of(key).or_else(|| last(key)) {
            tile(label, number(rate), String::new());
        }
    }
    if let Some(bytes) = of("rss_peak_bytes").or_else(|| last("rss_peak_bytes")) {
        tile("peak memory", format!("{:.0} MiB", bytes / f64::from(1 << 20)), String::new());
    }
    let ratios = || metrics.iter().filter_map(|m| m.get("ratio_max_dev")?.as_f64());
    if ratios().next().is_some() {
        tile("greatest |ratio − 1|", number(ratios().fold(0.0, f64::max)), "at first updates".into());
    }
    html + "</div>"
}

fn series(metrics: &[Line], key: &str) -> Series {
    let point = |m: &Line| {
        let (step, value) = (m.get("step")?.as_f64()?, m.get(key)?.as_f64()?);
        value.is_finite().then_some((step, value))
    };
    Series { name: key.to_string(), points: metrics.iter().filter_map(point).collect() }
}

fn keys(metrics: &[Line]) -> Vec<&str> {
    let mut keys: Vec<&str> = Vec::new();
    for key in metrics.iter().flat_map(Map::keys) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    keys
}

fn is_reward(key: &str) -> bool {
    key == "reward_mean" || key == "eval_reward" || key.starts_with("reward/")
}

fn other_keys(metrics: &[Line]) -> Vec<&str> {
    let charted =
        |key: &&str| PREFERENCE.contains(key) || SECTIONS.iter().any(|(_, keys)| keys.contains(key));
    let known = |key: &&str| *key == "step" || is_reward(key) || charted(key);
    keys(metrics).into_iter().filter(|key| !known(key)).collect()
}

/// The mean reward, its components and the held-out reward in one wide chart.
fn rewards(metrics: &[Line]) -> String {
    let shown: Vec<Series> =
        keys(metrics).into_iter().filter(|key| is_reward(key)).map(|key| series(metrics, key)).collect();
    if metrics.is_empty() {
        return "<p>No step is done yet.".into();
    }
    if shown.is_empty() {
        return String::new();
    }
    let legend: String = shown
        .iter()
        .enumerate()
        .map(|(i, s)| format!("<span class=\"s{i}\">{}</span>", escape(&s.name)))
        .collect();
    format!(
        "<h2>Reward</h2><figure class=\"wide\">{}<figcaption>{legend}<output></output></figcaption></figure>",
        chart("reward", &shown)
    )
}

/// Steps that did not learn, by stretches of one cause, each with the reason of its first step.
fn health(title: &str, metrics: &[Line], file: &str) -> String {
    let of = |m: &Line| m.get("health").map(plain);
    let judged: Vec<&Line> = metrics.iter().filter(|m| m.contains_key("health")).collect();
    if judged.is_empty() {
        return String::new();
    }
    let stretches: Vec<&[&Line]> = judged
        .chunk_by(|a, b| of(a) == of(b))
        .filter(|s| of(s[0]).is_some_and(|h| h != "learning"))
        .collect();
    let lost: usize = stretches.iter().map(|s| s.len()).sum();
    let mut html = format!("<h2>{title}</h2><p>{} of {} steps learned.", judged.len() - lost, judged.len());
    if !stretches.is_empty() {
        html += "<table><tr><th>steps<th>health<th>why";
    }
    for stretch in stretches.iter().take(SHOWN_STRETCHES) {
        let (first, last) = (text(stretch[0], "step"), text(stretch[stretch.len() - 1], "step"));
        let steps = if first == last { first } else { format!("{first}–{last}") };
        let (word, why) = (text(stretch[0], "health"), text(stretch[0], "health_reason"));
        let _ = write!(html, "<tr><td>{steps}<td>{}<td>{}", escape(&word), escape(&why));
    }
    if let Some(more) = stretches.len().checked_sub(SHOWN_STRETCHES).filter(|n| *n > 0) {
        let _ = write!(html, "<tr><td>…<td><td>{more} further stretches in {file}");
    }
    if stretches.is_empty() { html } else { html + "</table>" }
}

fn section(title: &str, keys: &[&str], metrics: &[Line]) -> String {
    let charts: String = keys
        .iter()
        .map(|key| series(metrics, key))
        .filter_map(|one| {
            let last = one.points.last()?.1;
            let name = escape(&one.name);
            let drawn = chart(&one.name, std::slice::from_ref(&one));
            Some(format!(
                "<figure>{drawn}<figcaption>{name} <output>{}</output></figcaption></figure>",
                number(last)
            ))
        })
        .collect();
    if charts.is_empty() {
        String::new()
    } else {
        format!("<h2>{title}</h2><div class=\"charts\">{charts}</div>")
    }
}

/// Samples under their steps, the last step first and open.
fn by_step(samples: &[Line]) -> String {
    let step_of = |s: &Line| s.get("step").and_then(Value::as_u64).unwrap_or(0);
    let mut html = String::new();
    for (i, group) in samples.chunk_by(|a, b| step_of(a) == step_of(b)).rev().enumerate() {
        let open = if i == 0 { " open" } else { "" };
        let rewards: Vec<f64> = group.iter().filter_map(|s| s.get("reward")?.as_f64()).collect();
        let mean = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
        let shown = group.len().min(SHOWN_SAMPLES);
        let _ = write!(
            html,
            "<details{open}><summary>step {}, mean reward {}, {shown} of {} samples</summary>",
            step_of(&group[0]),
            number(mean),
            group.len()
        );
        let same = |a: &Line, b: &Line| a.get("id") == b.get("id");
        for prompt in group[..shown].chunk_by(same) {
            let _ =
                write!(html, "<article><pre class=\"prompt\">{}</pre>", escape(&text(&prompt[0], "prompt")));
            html.extend(prompt.iter().map(sample));
            html += "</article>";
        }
        html += "</details>";
    }
    html
}

fn sample(sample: &Line) -> String {
    let value = |v: Option<&Value>| v.map_or("–".into(), plain);
    let mut html =
        format!("<div class=\"sample\"><div class=\"score\"><b>{}</b>", value(sample.get("reward")));
    if let Some(Value::Object(components)) = sample.get("components") {
        for (name, component) in components {
            let _ = write!(html, "<span>{} {}</span>", escape(name), escape(&plain(component)));
        }
    }
    let _ = write!(
        html,
        "<span>advantage {}</span><span>{}</span></div><pre>{}</pre>",
        value(sample.get("advantage")),
        escape(&text(sample, "finish_reason")),
        shaded(sample)
    );
    if let Some(Value::Array(errors)) = sample.get("errors") {
        for error in errors {
            let _ = write!(html, "<p class=\"error\">{}", escape(&plain(error)));
        }
    }
    html + "</div>"
}

/// The completion with every token on a background as dark as the token was unlikely.
fn shaded(sample: &Line) -> String {
    let completion = text(sample, "completion");
    let list = |key: &str| sample.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let (mut html, mut start) = (String::new(), 0);
    let tokens = list("logprobs").iter().zip(list("token_ends")).zip(list("tokens"));
    for ((logprob, end), token) in tokens.take(SHADED_TOKENS) {
        let (Some(logprob), Some(end)) = (logprob.as_f64(), end.as_u64()) else { break };
        // a token that ends inside a character or is not text has no span of its own
        let Some(piece) = completion.get(start..end as usize).filter(|p| !p.is_empty()) else { continue };
        let probability = logprob.exp();
        let _ = write!(
            html,
            "<span style=\"--p:{:.0}%\" title=\"token {token}, p {}, logprob {}\">{}</span>",
            (1.0 - probability) * 70.0,
            number(probability),
            number(logprob),
            escape(piece)
        );
        start = end as usize;
    }
    html + &escape(completion.get(start..).unwrap_or_default())
}

fn text(line: &Line, key: &str) -> String {
    line.get(key).map(plain).unwrap_or_default()
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) => text.clone(),
        Value::Number(n) => n.as_f64().map_or_else(|| n.to_string(), number),
        other => other.to_string(),
    }
}
