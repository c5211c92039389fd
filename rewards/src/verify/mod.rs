//! Trying a reward before a run does: a look at its text, then hundreds of calls on right, wrong and hostile completions.
//!
//! A reward that pays for nothing, that never pays, that differs from call to call or that fails on odd text is found here
//! in a second; in a run it costs hours. What is reported is what was seen: each finding names an input.

mod inputs;
mod lint;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::outcome;
use crate::returned::Returned;
use crate::sandbox::Sandbox;
use crate::types::{Context, ErrorKind, Outcome, RewardError, RewardSpec, Sample};
use inputs::{Input, Role};

/// Rows that are tried; more would only repeat what these show.
const MAX_ROWS: usize = 32;
/// Rows that are tried with completions of a megabyte.
const LONG_ROWS: usize = 2;
/// Microseconds a call above which the cost is warned of: 1,000 completions a step are then 20 s on one core.
const SLOW_US: f64 = 20_000.0;
/// Times that a script may ask for a field only after it has found another.
const PROBES: usize = 4;
/// Rewards closer than this pay the same.
const SAME: f64 = 1e-9;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Probably not meant.
    Warning,
    /// Would spoil a run.
    Error,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// Name of the check, such as `exploitable`.
    pub check: &'static str,
    /// What was seen and what to do.
    pub message: String,
    /// Line of the script, where known.
    pub line: Option<u32>,
    /// The row (from 1) and the input that show it.
    pub example: Option<(usize, String)>,
}

impl Finding {
    fn new(severity: Severity, check: &'static str, message: String) -> Finding {
        Finding { severity, check, message, line: None, example: None }
    }
}

/// Smallest and largest value seen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Range {
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

/// What a call costs, in microseconds, over all but the long inputs; `max_us` over all.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// The slowest call.
    pub max_us: f64,
    /// Its input.
    pub slowest: String,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Name of the script.
    pub script: String,
    /// Rows tried.
    pub rows: usize,
    /// Calls made.
    pub calls: usize,
    /// Range of the reward; None where the script never scored.
    pub reward: Option<Range>,
    /// Range of each component.
    pub components: BTreeMap<String, Range>,
    /// Calls that abstained.
    pub abstained: usize,
    /// Cost of a call.
    pub cost: Cost,
    /// The findings, worst first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether there is no finding of [`Severity::Error`].
    pub fn passed(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity != Severity::Error)
    }
}

/// One call and its answer.
struct Call {
    row: usize,
    input: Input,
    answer: Result<Returned, RewardError>,
    outcome: Outcome,
    micros: f64,
}

/// Lints and fuzzes a reward on `rows` (data rows or stored completions; a row with `expect` is a case: its `options` are
/// the script's and its reward must be `expect`). Without rows some are made up of the fields that the script names.
pub fn verify(spec: &RewardSpec, rows: &[Map<String, Value>]) -> Report {
    let mut findings = lint::lint(&spec.script, crate::sandbox::knows);
    let made_up = rows.is_empty().then(|| made_up_rows(spec));
    if made_up.is_some() {
        let message =
            "there is no data to try it on, so rows were made up; give real ones with --data".into();
        findings.push(Finding::new(Severity::Warning, "no_data", message));
    }
    let cases: Vec<Case> =
        made_up.as_deref().unwrap_or(rows).iter().take(MAX_ROWS).map(|row| Case::new(row, spec)).collect();
    for warning in
        crate::boxes::check_rows(spec.script.name(), &spec.options, made_up.as_deref().unwrap_or(rows))
    {
        let example = warning.rows.first().map(|row| (row + 1, "its boxes".to_string()));
        findings.push(Finding { example, ..Finding::new(Severity::Warning, "coordinates", warning.message) });
    }
    let mut calls: Vec<Call> = Vec::new();
    let mut watched = Watched::default();
    for (row, case) in cases.iter().enumerate() {
        let sandbox = Sandbox::watching(spec.script.clone(), spec.limits, case.options.clone());
        for input in inputs::inputs(&cases, row, row < LONG_ROWS) {
            calls.push(call(spec, &sandbox, case, row, input));
        }
        watched.add(&sandbox);
    }
    findings.extend(watched.findings());
    findings.extend(expectations(&calls, &cases));
    findings.extend(failures(&calls));
    findings.extend(repeat(spec, &cases, &calls));
    let reward = range(calls.iter().filter_map(|call| call.outcome.reward));
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, value) in calls.iter().flat_map(|call| &call.outcome.components) {
        values.entry(name.clone()).or_default().extend(value);
    }
    let components: BTreeMap<String, Range> =
        values.into_iter().filter_map(|(name, values)| Some((name, range(values.into_iter())?))).collect();
    findings.extend(spread(reward, &components));
    if reward.is_some_and(|r| r.max > r.min) {
        findings.extend(payments(&calls, cases.len()));
    }
    let cost = cost(&calls);
    if cost.p99_us > SLOW_US {
        let message = format!("one call in a hundred takes {:.0} ms or more", cost.p99_us / 1000.0);
        findings.push(Finding::new(Severity::Warning, "slow", message));
    }
    findings.sort_by_key(|finding| (std::cmp::Reverse(finding.severity), finding.line));
    Report {
        script: spec.script.name().to_string(),
        rows: cases.len(),
        calls: calls.len(),
        reward,
        components,
        abstained: calls.iter().filter(|c| c.answer.is_ok() && c.outcome.reward.is_none()).count(),
        cost,
        findings,
    }
}

/// A row as it is tried.
struct Case {
    id: String,
    fields: Map<String, Value>,
    completion: Option<String>,
    options: Map<String, Value>,
    /// What the row's own completion must be paid; `Some(None)` is an abstention.
    expect: Option<Option<f64>>,
}

impl Case {
    fn new(row: &Map<String, Value>, spec: &RewardSpec) -> Case {
        let mut fields = row.clone();
        let mut options = spec.options.clone();
        let expect = fields.remove("expect").map(|expect| expect.as_f64());
        if expect.is_some()
            && let Some(Value::Object(own)) = fields.remove("options")
        {
            options.extend(own);
        }
        let completion = fields.get("completion").and_then(Value::as_str).map(str::to_string);
        let id = fields.get("id").map(|id| id.as_str().map_or_else(|| id.to_string(), str::to_string));
        Case { id: id.unwrap_or_default(), fields, completion, options, expect }
    }

    fn sample(&self, text: &str) -> Sample {
        // tokens of the row belong to its own completion
        let own = self.completion.as_deref() == Some(text);
        let tokens = self.fields.get("tokens").filter(|_| own);
        Sample {
            id: self.id.clone(),
            completion: text.to_string(),
            prompt: self.fields.get("prompt").and_then(Value::as_str).unwrap_or_default().to_string(),
            fields: Arc::new(self.fields.clone()),
            tokens: tokens.and_then(|t| serde_json::from_value(t.clone()).ok()).unwrap_or_default(),
            finish_reason: "stop".into(),
            ..Sample::default()
        }
    }
}

/// Rows of the fields that the script asks for, found by giving it rows that lack them.
fn made_up_rows(spec: &RewardSpec) -> Vec<Map<String, Value>> {
    let row = |names: &BTreeSet<String>, answer: &str| {
        let mut row: Map<String, Value> =
            names.iter().map(|name| (name.clone(), Value::from(answer))).collect();
        row.insert("prompt".into(), Value::from("A question."));
        row
    };
    let mut names = BTreeSet::new();
    for _ in 0..PROBES {
        let sandbox = Sandbox::watching(spec.script.clone(), spec.limits, spec.options.clone());
        let case = Case::new(&row(&names, "4"), spec);
        sandbox.score(&[case.sample("4")], &Context::default());
        names.extend(sandbox.watched().absent_fields);
    }
    ["4", "17", "Paris"].iter().map(|answer| row(&names, answer)).collect()
}

fn call(spec: &RewardSpec, sandbox: &Sandbox, case: &Case, row: usize, input: Input) -> Call {
    let sample = case.sample(&input.text);
    let begin = Instant::now();
    let answer = sandbox.score(std::slice::from_ref(&sample), &Context::default()).remove(0);
    let micros = begin.elapsed().as_secs_f64() * 1e6;
    let mut outcome = Outcome::default();
    outcome::add(&mut outcome, spec, &sample, answer.clone());
    Call { row, input, answer, outcome, micros }
}

/// What the sandboxes saw a script do beside scoring.
#[derive(Default)]
struct Watched {
    absent: BTreeMap<String, usize>,
    globals: Vec<String>,
    rows: usize,
}

impl Watched {
    fn add(&mut self, sandbox: &Sandbox) {
        self.rows += 1;
        let seen = sandbox.watched();
        for name in &seen.absent_fields {
            *self.absent.entry(name.clone()).or_default() += 1;
        }
        for name in seen.globals {
            if !self.globals.contains(&name) {
                self.globals.push(name);
            }
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let absent = self.absent.iter().filter(|(_, rows)| **rows == self.rows).map(|(name, _)| {
            let message = format!("it reads `sample.{name}`, which no row has");
            Finding::new(Severity::Warning, "absent_field", message)
        });
        let globals = self.globals.iter().map(|name| {
            let message =
                format!("a call writes the global `{name}`; nothing outlives a call, so make it `local`");
            Finding::new(Severity::Warning, "global", message)
        });
        absent.chain(globals).collect()
    }
}

fn expectations(calls: &[Call], cases: &[Case]) -> Vec<Finding> {
    let own = calls.iter().filter(|call| call.input.role == Role::Own);
    own.filter_map(|call| {
        let expected = cases[call.row].expect?;
        let agree = match (call.outcome.reward, expected) {
            (Some(found), Some(expected)) => (found - expected).abs() < SAME,
            (found, expected) => found.is_none() && expected.is_none(),
        };
        let show = |value: Option<f64>| value.map_or("abstain".to_string(), |v| v.to_string());
        (!agree).then(|| Finding {
            example: Some((call.row + 1, clip(&call.input.text))),
            ..Finding::new(
                Severity::Error,
                "case",
                format!("the case expects {}, the reward is {}", show(expected), show(call.outcome.reward)),
            )
        })
    })
    .collect()
}

/// Failed calls, once a place and kind.
fn failures(calls: &[Call]) -> Vec<Finding> {
    let mut seen: BTreeMap<(ErrorKind, Option<u32>), (usize, &Call, &RewardError)> = BTreeMap::new();
    for call in calls {
        for error in &call.outcome.errors {
            seen.entry((error.kind, error.line)).or_insert((0, call, error)).0 += 1;
        }
    }
    let finding = |(count, call, error): (usize, &Call, &RewardError)| {
        let calls = if count == 1 { "1 call".to_string() } else { format!("{count} calls") };
        let source =
            error.source_line.as_ref().map(|line| format!("\n{:>5} | {line}", error.line.unwrap_or(0)));
        Finding {
            line: error.line,
            example: Some((call.row + 1, call.input.name.clone())),
            ..Finding::new(
                Severity::Error,
                "failure",
                format!(
                    "{calls} failed, {}: {}{}",
                    error.kind.as_str(),
                    error.message,
                    source.unwrap_or_default()
                ),
            )
        }
    };
    seen.into_values().map(finding).collect()
}

/// The same calls in another order and in new sandboxes must say the same.
fn repeat(spec: &RewardSpec, cases: &[Case], calls: &[Call]) -> Option<Finding> {
    let sandboxes: Vec<Sandbox> =
        cases.iter().map(|c| Sandbox::new(spec.script.clone(), spec.limits, c.options.clone())).collect();
    calls.iter().rev().filter(|call| call.input.role != Role::Huge).find_map(|first| {
        let sample = cases[first.row].sample(&first.input.text);
        let again = sandboxes[first.row].score(&[sample], &Context::default()).remove(0);
        let same = match (&first.answer, &again) {
            (Ok(a), Ok(b)) => a == b,
            // time and memory may run out in one and not in the other
            (Err(a), Err(b)) => a.kind == b.kind || a.kind == ErrorKind::Timeout || b.kind == ErrorKind::Timeout,
            (Err(a), Ok(_)) | (Ok(_), Err(a)) => a.kind == ErrorKind::Timeout,
        };
        (!same).then(|| Finding {
            example: Some((first.row + 1, first.input.name.clone())),
            ..Finding::new(
                Severity::Error,
                "nondeterministic",
                "the same call gives another answer when it is made again; a reward must follow from sample and ctx alone".into(),
            )
        })
    })
}

fn range(values: impl Iterator<Item = f64>) -> Option<Range> {
    values.fold(None, |range: Option<Range>, value| {
        let range = range.unwrap_or(Range { min: value, max: value });
        Some(Range { min: range.min.min(value), max: range.max.max(value) })
    })
}

fn spread(reward: Option<Range>, components: &BTreeMap<String, Range>) -> Vec<Finding> {
    let Some(reward) = reward else {
        let message = "it scored nothing: every call abstained or failed";
        return vec![Finding::new(Severity::Error, "constant", message.into())];
    };
    if reward.max - reward.min < SAME {
        let message = format!("the reward was {} for every input; a constant teaches nothing", reward.min);
        return vec![Finding::new(Severity::Error, "constant", message)];
    }
    let mut findings = Vec::new();
    for (name, range) in components.iter().filter(|(_, r)| r.max - r.min < SAME) {
        let message = format!("component `{name}` was {} for every input", range.min);
        findings.push(Finding::new(Severity::Warning, "constant", message));
    }
    if reward.min.abs().max(reward.max.abs()) > 100.0 {
        let message =
            format!("rewards reach from {} to {}; is there a missing bound?", reward.min, reward.max);
        findings.push(Finding::new(Severity::Warning, "range", message));
    }
    findings
}

/// Who is paid: golds must be, and what says nothing about the row must not be paid as they are.
fn payments(calls: &[Call], rows: usize) -> Vec<Finding> {
    let best = |row: usize, roles: &[Role]| {
        let paid = calls.iter().filter(|c| c.row == row && roles.contains(&c.input.role));
        paid.filter_map(|c| c.outcome.reward).reduce(f64::max)
    };
    let highest = calls.iter().filter_map(|c| c.outcome.reward).fold(f64::NEG_INFINITY, f64::max);
    if highest <= 0.0 {
        let message = "it never pays more than 0: a penalty, to be used beside a reward".into();
        return vec![Finding::new(Severity::Note, "penalty", message)];
    }
    // a reward that pays another row's answer as its own judges the form, not the answer
    let judges_answers = (0..rows).any(|row| {
        matches!((best(row, &[Role::Own, Role::Gold]), best(row, &[Role::Foreign])), (Some(own), Some(other)) if other < own - SAME)
    });
    let mut findings = Vec::new();
    if !judges_answers {
        let message = "no answer of another row was paid less than the row's own: it judges the form; weigh it below a reward for being right";
        findings.push(Finding::new(Severity::Note, "form", message.into()));
    }
    let mut paid: BTreeMap<&str, Vec<&Call>> = BTreeMap::new();
    let (mut with_gold, mut unpaid) = (0, 0);
    for row in 0..rows {
        let low = calls
            .iter()
            .filter(|c| c.row == row)
            .filter_map(|c| c.outcome.reward)
            .fold(f64::INFINITY, f64::min);
        let Some(gold) = best(row, &[Role::Own, Role::Gold]) else { continue };
        with_gold += 1;
        if gold <= low + SAME || gold <= 0.0 {
            unpaid += 1;
            continue;
        }
        for call in calls.iter().filter(|c| c.row == row) {
            let counts = match call.input.role {
                Role::Junk | Role::Huge => judges_answers || call.input.text.trim().is_empty(),
                Role::Every => judges_answers,
                _ => false,
            };
            if counts && call.outcome.reward.is_some_and(|reward| reward >= gold - SAME) {
                paid.entry(&call.input.name).or_default().push(call);
            }
        }
    }
    findings.extend(exploits(&paid, with_gold - unpaid));
    if with_gold > 0 && unpaid == with_gold {
        let message = "no completion made of a row's own data was paid; does it read the right field?".into();
        findings.push(Finding::new(Severity::Warning, "unpaid", message));
    }
    findings
}

/// Inputs that are paid like answers, one finding for those that work on most rows and one for those that work on some:
/// a row whose right answer is empty pays the empty completion by design.
fn exploits(paid: &BTreeMap<&str, Vec<&Call>>, rows: usize) -> Vec<Finding> {
    // long inputs are tried on fewer rows
    let tried =
        |calls: &Vec<&Call>| if calls[0].input.role == Role::Huge { rows.min(LONG_ROWS) } else { rows };
    let broad = |calls: &Vec<&Call>| calls.len() * 2 > tried(calls);
    let lists = |calls: &Vec<&Call>| calls[0].input.role == Role::Every;
    let mut findings = Vec::new();
    for (severity, what, hit) in [
        (
            Severity::Error,
            "says nothing",
            &(|c: &Vec<&Call>| broad(c) && !lists(c)) as &dyn Fn(&Vec<&Call>) -> bool,
        ),
        (Severity::Warning, "says nothing", &|c| !broad(c) && !lists(c)),
        (Severity::Warning, "lists every row's answer", &|c| lists(c)),
    ] {
        let mut found: Vec<(&str, &Vec<&Call>)> =
            paid.iter().filter(|(_, calls)| hit(calls)).map(|(name, calls)| (*name, calls)).collect();
        found.sort_by_key(|(_, calls)| std::cmp::Reverse(calls.len()));
        let Some((name, calls)) = found.first() else { continue };
        let also = match found.len() {
            1 => String::new(),
            n => format!("; {} more inputs likewise", n - 1),
        };
        let message = format!(
            "a completion that {what} is paid {}, as much as the best: {name} ({} of {} rows{also})",
            calls[0].outcome.reward.unwrap_or_default(),
            calls.len(),
            tried(calls)
        );
        findings.push(Finding {
            example: Some((calls[0].row + 1, clip(&calls[0].input.text))),
            ..Finding::new(severity, "exploitable", message)
        });
    }
    findings
}

fn cost(calls: &[Call]) -> Cost {
    let mut ordinary: Vec<f64> =
        calls.iter().filter(|c| c.input.role != Role::Huge).map(|c| c.micros).collect();
    ordinary.sort_by(f64::total_cmp);
    let at = |share: f64| ordinary.get((ordinary.len() as f64 * share) as usize).copied().unwrap_or(0.0);
    let slowest = calls.iter().max_by(|a, b| a.micros.total_cmp(&b.micros));
    Cost {
        p50_us: at(0.5),
        p99_us: at(0.99),
        max_us: slowest.map_or(0.0, |c| c.micros),
        slowest: slowest.map(|c| c.input.name.clone()).unwrap_or_default(),
    }
}

fn clip(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    if short.len() < text.len() { format!("{short:?}…") } else { format!("{short:?}") }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} calls on {} rows", self.script, self.calls, self.rows)?;
        match self.reward {
            Some(range) => writeln!(f, "  reward      {} to {}", range.min, range.max)?,
            None => writeln!(f, "  reward      none")?,
        }
        for (name, range) in self.components.iter().filter(|(name, _)| **name != self.script) {
            writeln!(f, "    {name:<18} {} to {}", range.min, range.max)?;
        }
        if self.abstained > 0 {
            writeln!(f, "  abstained   {} calls", self.abstained)?;
        }
        let cost = &self.cost;
        writeln!(
            f,
            "  cost        {:.0} µs median, {:.0} µs at 99 %, {:.1} ms at most ({})",
            cost.p50_us,
            cost.p99_us,
            cost.max_us / 1000.0,
            cost.slowest
        )?;
        for finding in &self.findings {
            let severity = match finding.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
                Severity::Note => "note",
            };
            write!(f, "  {severity}: ")?;
            if let Some(line) = finding.line {
                write!(f, "line {line}: ")?;
            }
            write!(f, "{}", finding.message)?;
            if let Some((row, input)) = &finding.example {
                write!(f, "\n         on row {row}: {input}")?;
            }
            writeln!(f)?;
        }
        let count = |severity| self.findings.iter().filter(|finding| finding.severity == severity).count();
        write!(f, "  {} errors, {} warnings", count(Severity::Error), count(Severity::Warning))
    }
}
