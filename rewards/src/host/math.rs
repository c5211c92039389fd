//! Mathematics and the published shaping rewards: `rft.math` and `rft.shape`.

use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::bind::{Answer, Args, Host};
use crate::math::{
    self, CosineBounds, EqualOptions, ExtractOptions, GymItem, Verdict, VerifyOptions, WhichBox,
};

pub(crate) const MATH: &[(&str, Host)] = &[
    ("equal", |args| {
        Ok(json!(math::equal(&args.text(0, "gold")?, &args.text(1, "answer")?, &equal_options(args, 2)?)))
    }),
    ("extract", |args| {
        Ok(json!(math::extract(&args.text(0, "text")?, &extract_options(args, 1)?).map(|found| found.text)))
    }),
    ("check", |args| {
        let (extraction, equality) = (extract_options(args, 2)?, equal_options(args, 3)?);
        Ok(verdict(math::check(&args.text(0, "gold")?, &args.text(1, "text")?, &extraction, &equality)))
    }),
    ("verify", |args| {
        let options = VerifyOptions::default();
        Ok(verdict(math::verify(&args.text(0, "gold_text")?, &args.text(1, "text")?, &options)))
    }),
    ("number", |args| Ok(json!(math::parse_number(&args.text(0, "text")?)))),
    ("countdown", |args| {
        let numbers: Vec<i64> = args.read(1, "numbers")?;
        Ok(json!(math::countdown(&args.text(0, "expression")?, &numbers, args.number(2, "target")?)))
    }),
    ("gym", gym),
    ("accuracy", |args| Ok(json!(math::accuracy(&args.text(0, "completion")?, &args.text(1, "solution")?)))),
];

pub(crate) const SHAPE: &[(&str, Host)] = &[
    ("think_format", |args| Ok(json!(math::think_format(&args.text(0, "completion")?)))),
    ("soft_overlong", |args| {
        let (max, cache) = (args.count(1, "max")?, args.count(2, "cache")?);
        if cache == 0 || cache > max {
            return Err(format!("the cache must be from 1 to {max}, got {cache}"));
        }
        Ok(json!(math::soft_overlong(args.count(0, "length")?, max, cache)))
    }),
    ("repetition", |args| {
        let ids: Vec<u32> = args.read(0, "tokens")?;
        Ok(json!(math::repetition(&ids, args.count(1, "n")? as usize, args.number(2, "max_penalty")?)))
    }),
    ("cosine", |args| {
        let bounds: Bounds = args.options(3)?;
        let (length, max) = (args.count(0, "length")?, args.count(1, "max")?);
        Ok(json!(math::cosine_scaled(length, max, args.flag(2, "correct")?, &bounds.into())))
    }),
];

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Bounds {
    min_wrong: f64,
    max_wrong: f64,
    min_correct: f64,
    max_correct: f64,
}

impl Default for Bounds {
    fn default() -> Self {
        let CosineBounds { min_wrong, max_wrong, min_correct, max_correct } = CosineBounds::default();
        Bounds { min_wrong, max_wrong, min_correct, max_correct }
    }
}

impl From<Bounds> for CosineBounds {
    fn from(b: Bounds) -> Self {
        let Bounds { min_wrong, max_wrong, min_correct, max_correct } = b;
        CosineBounds { min_wrong, max_wrong, min_correct, max_correct }
    }
}

fn verdict(verdict: Verdict) -> Json {
    json!(match verdict {
        Verdict::Equal => "equal",
        Verdict::Different => "different",
        Verdict::GoldUnparsable => "gold_unparsable",
        Verdict::NoAnswer => "no_answer",
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Equality {
    float_rounding: Option<u32>,
    strict: Option<bool>,
    allow_set_relation_comp: Option<bool>,
    ordered_lists: Option<bool>,
    percent_either_way: Option<bool>,
}

fn equal_options(args: &Args, at: usize) -> Result<EqualOptions, String> {
    let mut options = EqualOptions::default();
    if args.given(at) {
        let given: Equality = args.read(at, "options")?;
        options.float_rounding = given.float_rounding.unwrap_or(options.float_rounding);
        options.strict = given.strict.unwrap_or(options.strict);
        options.allow_set_relation_comp =
            given.allow_set_relation_comp.unwrap_or(options.allow_set_relation_comp);
        options.ordered_lists = given.ordered_lists.unwrap_or(options.ordered_lists);
        options.percent_either_way = given.percent_either_way.unwrap_or(options.percent_either_way);
    }
    Ok(options)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Extraction {
    latex: Option<bool>,
    expr: Option<bool>,
    boxed_priority: Option<u32>,
    first_box: Option<bool>,
    unanchored: Option<bool>,
    answer_tags: Option<bool>,
    after_think: Option<bool>,
}

fn extract_options(args: &Args, at: usize) -> Result<ExtractOptions, String> {
    let mut options = ExtractOptions::default();
    if args.given(at) {
        let given: Extraction = args.read(at, "options")?;
        options.latex = given.latex.unwrap_or(options.latex);
        options.expr = given.expr.unwrap_or(options.expr);
        options.boxed_priority = given.boxed_priority.unwrap_or(options.boxed_priority);
        if given.first_box == Some(true) {
            options.which_box = WhichBox::First;
        }
        options.unanchored = given.unanchored.unwrap_or(options.unanchored);
        options.answer_tags = given.answer_tags.unwrap_or(options.answer_tags);
        options.after_think = given.after_think.unwrap_or(options.after_think);
    }
    Ok(options)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Item {
    task: String,
    #[serde(default)]
    question: String,
    gold: String,
    #[serde(default)]
    numbers: Vec<i64>,
    target: Option<f64>,
}

fn gym(args: &Args) -> Answer {
    let item: Item = args.read(0, "item")?;
    let answer = if args.given(1) { Some(args.text(1, "answer")?) } else { None };
    let item = GymItem {
        task: &item.task,
        question: &item.question,
        gold: &item.gold,
        numbers: &item.numbers,
        target: item.target,
    };
    math::gym_score(&item, answer.as_deref()).map(|score| json!(score)).map_err(|error| error.to_string())
}
