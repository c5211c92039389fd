//! Text measures and the usual cuts: `rft.text`.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::bind::{Answer, Args, Host};
use crate::math;

/// Largest product of lengths that is compared.
const MAX_CELLS: usize = 16_000_000;

pub(crate) const FUNCTIONS: &[(&str, Host)] = &[
    ("edit_distance", distance),
    ("similarity", similarity),
    ("words", |args| Ok(json!(words(&args.text(0, "text")?)))),
    ("normalize", |args| Ok(json!(words(&args.text(0, "text")?).join(" ")))),
    ("f1", f1),
    ("tag", |args| Ok(tags(args)?.pop().map_or(Json::Null, Json::String))),
    ("tags", |args| Ok(json!(tags(args)?))),
    ("after_think", after_think),
    ("trim", |args| Ok(json!(args.text(0, "text")?.trim()))),
    ("choice", choice),
    ("repetition", repetition),
];

/// Levenshtein distance in characters; `None` where the texts are too long to compare.
pub(crate) fn edit_distance(a: &str, b: &str) -> Option<usize> {
    let b: Vec<char> = b.chars().collect();
    let rows = a.chars().count();
    if rows.saturating_mul(b.len()) > MAX_CELLS {
        return None;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    Some(row[b.len()])
}

fn both(args: &Args) -> Result<(String, String, usize), String> {
    let (a, b) = (args.text(0, "text")?, args.text(1, "other")?);
    let distance = edit_distance(&a, &b)
        .ok_or_else(|| format!("{} by {} bytes are too long to compare; cut them first", a.len(), b.len()))?;
    Ok((a.into_owned(), b.into_owned(), distance))
}

fn distance(args: &Args) -> Answer {
    Ok(json!(both(args)?.2))
}

fn similarity(args: &Args) -> Answer {
    let (a, b, distance) = both(args)?;
    let longest = a.chars().count().max(b.chars().count());
    Ok(json!(if longest == 0 { 1.0 } else { 1.0 - distance as f64 / longest as f64 }))
}

/// Lower case, runs of letters and digits, the articles a, an and the dropped (SQuAD's normalisation).
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let plain: String = lower.chars().filter(|c| !c.is_ascii_punctuation()).collect();
    plain.split_whitespace().filter(|word| !matches!(*word, "a" | "an" | "the")).map(str::to_owned).collect()
}

/// Token F1 as SQuAD's evaluation script computes it; two texts without words agree.
fn f1(args: &Args) -> Answer {
    let (given, gold) = (words(&args.text(0, "text")?), words(&args.text(1, "gold")?));
    if given.is_empty() || gold.is_empty() {
        let same = f64::from(u8::from(given.is_empty() && gold.is_empty()));
        return Ok(json!({"precision": same, "recall": same, "f1": same}));
    }
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for word in &gold {
        *counts.entry(word).or_default() += 1;
    }
    let mut common = 0;
    for word in &given {
        if let Some(left) = counts.get_mut(word.as_str()).filter(|left| **left > 0) {
            *left -= 1;
            common += 1;
        }
    }
    let (precision, recall) = (f64::from(common) / given.len() as f64, f64::from(common) / gold.len() as f64);
    let f1 = if common == 0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) };
    Ok(json!({"precision": precision, "recall": recall, "f1": f1}))
}

fn tags(args: &Args) -> Result<Vec<String>, String> {
    let (text, name) = (args.text(0, "text")?, args.text(1, "name")?);
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let mut found = Vec::new();
    let mut rest = &*text;
    while let Some(start) = rest.find(&open) {
        let body = &rest[start + open.len()..];
        let Some(end) = body.find(&close) else { break };
        found.push(body[..end].to_owned());
        rest = &body[end + close.len()..];
    }
    Ok(found)
}

fn after_think(args: &Args) -> Answer {
    let text = args.text(0, "text")?;
    Ok(json!(text.rsplit_once("</think>").map_or(&*text, |(_, rest)| rest).trim()))
}

fn choice(args: &Args) -> Answer {
    let letters = if args.given(1) { args.text(1, "letters")? } else { "ABCD".into() };
    Ok(json!(math::extract_choice(&args.text(0, "text")?, &letters)))
}

/// Share of repeated runs of `n` words.
fn repetition(args: &Args) -> Answer {
    let (text, n) = (args.text(0, "text")?, args.count(1, "n")?);
    let mut numbers = HashMap::new();
    let ids: Vec<u32> = text
        .split_whitespace()
        .map(|word| {
            let next = numbers.len() as u32;
            *numbers.entry(word.to_lowercase()).or_insert(next)
        })
        .collect();
    Ok(json!(math::repetition(&ids, n as usize, 1.0)))
}
