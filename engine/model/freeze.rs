//! Which tensors train: globs over Hugging Face names, and the drawn halves of half fine-tuning.
//!
//! The answer is a set of names for [`super::params::Arena::train_only`]; nothing else knows why a tensor is frozen.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::ModelConfig;
use crate::error::{EngineError, Result};
use crate::rng::{Purpose, Stream};

/// A tensor that a mask is drawn over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Hugging Face name.
    pub name: String,
    /// A matrix, not a norm or a bias.
    pub matrix: bool,
}

/// The names that train in a stage.
///
/// # Errors
/// A malformed pattern, one that matches no tensor, and patterns that leave nothing to train.
pub fn trained_names(
    candidates: &[Candidate],
    config: &ModelConfig,
    seed: u64,
    stage: usize,
) -> Result<BTreeSet<String>> {
    let train = matches(candidates, &config.train, "train")?;
    let freeze = matches(candidates, &config.freeze, "freeze")?;
    let resting = if config.half { resting_half(candidates, seed, stage) } else { BTreeSet::new() };
    let names: BTreeSet<String> = candidates
        .iter()
        .map(|c| c.name.as_str())
        .filter(|name| config.train.is_empty() || train.contains(name))
        .filter(|name| !freeze.contains(name) && !resting.contains(name))
        .map(String::from)
        .collect();
    if names.is_empty() {
        return Err(EngineError::Config(
            "model: `train` and `freeze` leave nothing to train. hint: `train` names what trains, `freeze` takes away \
             from it"
                .into(),
        ));
    }
    Ok(names)
}

fn matches<'a>(candidates: &'a [Candidate], patterns: &[String], key: &str) -> Result<BTreeSet<&'a str>> {
    let mut found = BTreeSet::new();
    for pattern in patterns {
        let fail = |why: String| EngineError::Config(format!("model.{key}: pattern `{pattern}` {why}"));
        let alternatives = expand(pattern).map_err(fail)?;
        let mut hit = false;
        for candidate in candidates {
            if alternatives.iter().any(|glob| glob_matches(glob.as_bytes(), candidate.name.as_bytes())) {
                hit = true;
                found.insert(candidate.name.as_str());
            }
        }
        if !hit {
            let example = candidates.get(candidates.len() / 2).map_or("", |c| c.name.as_str());
            return Err(fail(format!(
                "matches no tensor. hint: names look like `{example}`; `*` is any text"
            )));
        }
    }
    Ok(found)
}

/// Most alternatives that the braces of one pattern may stand for.
const MOST_ALTERNATIVES: usize = 4096;

/// Writes out `{a,b}` and `{3..7}`.
fn expand(pattern: &str) -> std::result::Result<Vec<String>, String> {
    let Some(open) = pattern.find('{') else { return Ok(vec![pattern.to_string()]) };
    let close = open + pattern[open..].find('}').ok_or("has a `{` without a `}`")?;
    let (before, inside) = (&pattern[..open], &pattern[open + 1..close]);
    let choices: Vec<String> = match inside.split_once("..") {
        Some((from, to)) => match (from.parse::<usize>(), to.parse::<usize>()) {
            (Ok(from), Ok(to)) if from <= to && to - from < MOST_ALTERNATIVES => {
                (from..=to).map(|n| n.to_string()).collect()
            }
            _ => return Err(format!("has `{{{inside}}}`, which is no range of whole numbers")),
        },
        None => inside.split(',').map(String::from).collect(),
    };
    let rest = expand(&pattern[close + 1..])?;
    if choices.len() * rest.len() > MOST_ALTERNATIVES {
        return Err(format!("stands for more than {MOST_ALTERNATIVES} alternatives"));
    }
    Ok(choices.iter().flat_map(|c| rest.iter().map(move |r| format!("{before}{c}{r}"))).collect())
}

/// `*` is any text and `?` any character; the last `*` is retried on a mismatch, so the time is at most the product of
/// the lengths.
fn glob_matches(glob: &[u8], name: &[u8]) -> bool {
    let (mut g, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match glob.get(g) {
            Some(b'*') => {
                star = Some((g, n));
                g += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => (g, n) = (g + 1, n + 1),
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (g, n) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    glob[g..].iter().all(|c| *c == b'*')
}

/// Half of the attention matrices, of the feed-forward matrices and of the norms of every layer. Of an odd number the
/// smaller half rests in even layers and the larger in odd ones. A bias goes with its matrix; what is in no layer
/// (embeddings, last norm, head) trains.
fn resting_half(candidates: &[Candidate], seed: u64, stage: usize) -> BTreeSet<&str> {
    let mut families: BTreeMap<(u64, u64), Vec<&str>> = BTreeMap::new();
    for candidate in candidates {
        let Some((layer, name)) = in_layer(&candidate.name) else { continue };
        let family = match (candidate.matrix, name.starts_with("self_attn.")) {
            (true, true) => 0,
            (true, false) => 1,
            (false, _) if name.ends_with(".bias") => continue,
            (false, _) => 2,
        };
        families.entry((layer, family)).or_default().push(&candidate.name);
    }
    let mut resting = BTreeSet::new();
    for ((layer, family), mut names) in families {
        Stream::new(seed, Purpose::Freeze, &[stage as u64, layer, family]).shuffle(&mut names);
        let half = (names.len() + layer as usize % 2) / 2;
        resting.extend(&names[..half]);
    }
    let with_matrix = |name: &&str| {
        name.strip_suffix(".bias").is_some_and(|stem| resting.contains(format!("{stem}.weight").as_str()))
    };
    let biases: Vec<&str> = candidates.iter().map(|c| c.name.as_str()).filter(with_matrix).collect();
    resting.extend(biases);
    resting
}

/// (layer, name within it) of `model.layers.L.NAME`.
fn in_layer(name: &str) -> Option<(u64, &str)> {
    let (layer, rest) = name.split_once(".layers.")?.1.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matched(pattern: &str, name: &str) -> bool {
        expand(pattern).unwrap().iter().any(|glob| glob_matches(glob.as_bytes(), name.as_bytes()))
    }

    #[test]
    fn globs_match_whole_names() {
        let name = "model.layers.12.self_attn.q_proj.weight";
        for pattern in
            ["*", "*q_proj*", "model.layers.{10..12}.*", "*.{q,k}_proj.weight", "model.layers.?2.*t", name]
        {
            assert!(matched(pattern, name), "{pattern}");
        }
        for pattern in
            ["q_proj", "*q_proj", "model.layers.{0..11}.*", "model.layers.1.*", "*.{k,v}_proj.weight", ""]
        {
            assert!(!matched(pattern, name), "{pattern}");
        }
        assert!(
            expand("{1..").is_err() && expand("{3..1}").is_err() && expand("{0..99}{0..99}{0..99}").is_err()
        );
    }

    #[test]
    fn half_of_every_layer_rests_and_the_halves_change_with_the_stage() {
        let mut candidates = vec![Candidate { name: "model.embed_tokens.weight".into(), matrix: true }];
        for layer in 0..4 {
            let mut add = |name: &str, matrix| {
                candidates.push(Candidate { name: format!("model.layers.{layer}.{name}"), matrix });
            };
            for p in ["q", "k", "v", "o"] {
                add(&format!("self_attn.{p}_proj.weight"), true);
                add(&format!("self_attn.{p}_proj.bias"), false);
            }
            ["gate", "up", "down"].iter().for_each(|p| add(&format!("mlp.{p}_proj.weight"), true));
            ["input", "post_attention"].iter().for_each(|p| add(&format!("{p}_layernorm.weight"), false));
        }
        let resting = resting_half(&candidates, 7, 0);
        let count = |layer: usize, what: &str| {
            let of = |n: &&&str| n.contains(&format!("layers.{layer}.{what}")) && n.ends_with("weight");
            resting.iter().filter(of).count()
        };
        for layer in 0..4 {
            assert_eq!(count(layer, "self_attn"), 2);
            assert_eq!(count(layer, "mlp"), 1 + layer % 2);
            assert_eq!(count(layer, "input") + count(layer, "post"), 1);
        }
        for name in resting.iter().filter(|n| n.ends_with(".bias")) {
            assert!(resting.contains(name.replace("bias", "weight").as_str()));
        }
        assert!(!resting.contains("model.embed_tokens.weight"));
        assert_eq!(resting, resting_half(&candidates, 7, 0));
        assert_ne!(resting, resting_half(&candidates, 7, 1));
        assert_ne!(resting, resting_half(&candidates, 8, 0));
    }
}
