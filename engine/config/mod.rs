//! The recipe: everything a run depends on, in one TOML file, fully resolved and printed back.
//!
//! This is the only module that reads TOML; the others receive the small typed structs below. Unknown keys
//! are errors that name the file, the line and the nearest valid key. `--set a.b=value` changes one key.

mod amft;
mod critic;
mod preference;
mod reference;
mod sections;
mod tasks;
mod validate;

pub use amft::{AmftConfig, Validation};
pub use preference::*;
pub use reference::ReferenceConfig;
pub use sections::*;
pub use tasks::*;

use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::error::{EngineError, Result};
use crate::loss::presets;

/// The recipe that `launch` runs when none is named.
pub const DEFAULT_RECIPE: &str = include_str!("../../scripts/recipes/default.toml");

/// A complete, validated run description.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Shown in reports and used for the run folder's name.
    #[serde(default = "default_name")]
    pub name: String,
    /// Key of all randomness.
    #[serde(default)]
    pub seed: u64,
    /// The policy.
    pub model: ModelConfig,
    /// The prompts, or what its `[[task]]`s have in common.
    #[serde(default)]
    pub data: DataConfig,
    /// Named tasks instead of the one of `[data]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub task: Vec<TaskConfig>,
    /// Verifiers, summed by weight.
    #[serde(default)]
    pub reward: Vec<RewardConfig>,
    /// How completions are drawn.
    #[serde(default)]
    pub rollout: RolloutConfig,
    /// How rewards become a gradient.
    #[serde(default)]
    pub algorithm: AlgorithmConfig,
    /// How the gradient becomes an update.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// How long, and what is kept.
    #[serde(default)]
    pub train: TrainConfig,
    /// Held-out measurement.
    #[serde(default)]
    pub eval: EvalConfig,
    /// What the run may use of this machine.
    #[serde(default)]
    pub devices: DevicesConfig,
    /// Stages run in order; none means one `grpo` stage of `train.steps`.
    #[serde(default)]
    pub stage: Vec<StageConfig>,
}

fn default_name() -> String {
    "run".into()
}
impl Recipe {
    /// Reads `path` (or the built-in default), applies `--set` overrides and validates.
    ///
    /// # Errors
    /// Names the file, the line and the nearest valid key of an unknown one, or the override at fault.
    pub fn load(path: Option<&Path>, overrides: &[String]) -> Result<Self> {
        let (origin, text) = match path {
            Some(p) => (p.display().to_string(), std::fs::read_to_string(p).map_err(EngineError::io(p))?),
            None => ("built-in default recipe".to_string(), DEFAULT_RECIPE.to_string()),
        };
        Self::parse(&text, &origin, overrides)
    }

    /// Parses recipe text; `origin` is how errors call it.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self> {
        let from_file: Self = toml::from_str(text).map_err(|e| located(&e, text, origin))?;
        let layered =
            from_file.algorithm.preset.is_some() || from_file.stage.iter().any(|s| s.algorithm.is_some());
        let recipe = if overrides.is_empty() && !layered {
            from_file
        } else {
            let mut table: Table = text.parse().map_err(|e| located(&e, text, origin))?;
            let mut read = layered_recipe(table.clone());
            let mut source = origin.to_string();
            for item in overrides {
                apply_override(&mut table, item)?;
                let was_good = read.is_ok();
                read = layered_recipe(table.clone());
                if was_good {
                    source = format!("--set {item}");
                }
            }
            read.map_err(|message| EngineError::Config(format!("{source}: {message}")))?
        };
        recipe.validate()?;
        let written: Table =
            recipe.to_toml().parse().map_err(|e: toml::de::Error| EngineError::Config(e.to_string()))?;
        match nan_in(&Value::Table(written)) {
            Some(key) => Err(EngineError::Config(format!("{origin}: {} is not a number", &key[1..]))),
            None => Ok(recipe),
        }
    }

    /// The recipe as TOML, every default written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe holds only TOML types")
    }

    /// The stages with their steps filled in.
    pub fn stages(&self) -> Vec<StageConfig> {
        let mut stages = match self.stage.is_empty() {
            true => vec![StageConfig::new(StageKind::Grpo)],
            false => self.stage.clone(),
        };
        for stage in &mut stages {
            stage.steps.get_or_insert(self.train.steps);
            if stage.kind == StageKind::Amft {
                stage.amft.get_or_insert_default();
            }
        }
        stages
    }
}

/// A recipe from its table, presets laid below it.
fn layered_recipe(mut table: Table) -> std::result::Result<Recipe, String> {
    lay_algorithms(&mut table).map_err(|e| e.to_string())?;
    let merged = toml::to_string(&table).map_err(|e| e.to_string())?;
    toml::from_str(&merged).map_err(|e| with_nearest(e.message()))
}

/// The path of a number that is none, a dot before every key.
fn nan_in(value: &Value) -> Option<String> {
    match value {
        Value::Float(x) => x.is_nan().then(String::new),
        Value::Table(table) => table.iter().find_map(|(key, v)| Some(format!(".{key}{}", nan_in(v)?))),
        Value::Array(list) => list.iter().enumerate().find_map(|(i, v)| Some(format!(".{i}{}", nan_in(v)?))),
        _ => None,
    }
}

/// Lays the recipe's `[algorithm]` over its preset. Where a stage has one of its own, every stage gets one: the recipe's,
/// with its own preset and settings on top.
fn lay_algorithms(table: &mut Table) -> Result<()> {
    let own = match table.get("algorithm") {
        Some(Value::Table(own)) => own.clone(),
        None => Table::new(),
        // what is no table is refused with its type where the recipe is read
        Some(_) => return Ok(()),
    };
    let base = over_preset(Table::new(), own, "algorithm")?;
    if let Some(Value::Array(stages)) = table.get_mut("stage") {
        let any = stages.iter().any(|s| s.get("algorithm").is_some());
        for (i, stage) in stages.iter_mut().enumerate().filter(|_| any) {
            let Value::Table(stage) = stage else { continue };
            let own = match stage.get("algorithm") {
                Some(Value::Table(own)) => own.clone(),
                None => Table::new(),
                Some(_) => continue,
            };
            let laid = over_preset(base.clone(), own, &format!("stage.{i}.algorithm"))?;
            stage.insert("algorithm".into(), Value::Table(laid));
        }
    }
    table.insert("algorithm".into(), Value::Table(base));
    Ok(())
}

/// `own` over the settings of the preset that it names, these over `base`.
fn over_preset(mut base: Table, own: Table, place: &str) -> Result<Table> {
    if let Some(name) = own.get("preset").and_then(Value::as_str) {
        let Some((objective, advantage)) = presets::preset(name) else {
            return Err(EngineError::Config(format!(
                "{place}.preset: no algorithm is called `{name}`. hint: one of {}",
                presets::NAMES.join(", ")
            )));
        };
        // a named algorithm starts from its own settings, not from those of another
        base.retain(|key, _| !matches!(key, "objective" | "advantage" | "critic"));
        let bad = |e: toml::ser::Error| EngineError::Config(e.to_string());
        let objective = Value::Table(Table::try_from(objective).map_err(bad)?);
        let advantage = Value::Table(Table::try_from(advantage).map_err(bad)?);
        let mut named = Table::from_iter([("objective".into(), objective), ("advantage".into(), advantage)]);
        if let Some(critic) = presets::critic(name) {
            named.insert("critic".into(), Value::Table(Table::try_from(critic).map_err(bad)?));
        }
        lay_over(&mut base, &named);
    }
    lay_over(&mut base, &own);
    Ok(base)
}

/// Copies `own` over `base`, table by table; a table of another `kind` replaces the one below.
fn lay_over(base: &mut Table, own: &Table) {
    for (key, value) in own {
        match (base.get_mut(key), value) {
            (Some(Value::Table(below)), Value::Table(above))
                if above.get("kind").is_none_or(|k| below.get("kind") == Some(k)) =>
            {
                lay_over(below, above);
            }
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}

/// Keys of lists of tables, which `--set` changes but does not make.
const LISTS: [&str; 3] = ["reward", "stage", "task"];

/// `a.b=value`, where value is TOML and a bare word is a string.
fn apply_override(table: &mut Table, item: &str) -> Result<()> {
    let bad = |why: &str| EngineError::Config(format!("--set {item}: {why}"));
    let (key, raw) =
        item.split_once('=').ok_or_else(|| bad("expected key=value, for example train.steps=6"))?;
    let value = format!("v = {raw}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(raw.to_string()));
    let mut path: Vec<&str> = key.trim().split('.').collect();
    let last = path.pop().filter(|k| !k.is_empty()).ok_or_else(|| bad("the key is empty"))?;
    let mut here = Value::Table(std::mem::take(table));
    {
        let mut node = &mut here;
        for part in path {
            node = match node {
                Value::Table(t) if LISTS.contains(&part) && !t.contains_key(part) => {
                    return Err(bad(&format!("the recipe has no [[{part}]]. hint: add one to the file")));
                }
                Value::Table(t) => t.entry(part).or_insert_with(|| Value::Table(Table::new())),
                Value::Array(list) => {
                    let index: usize = part
                        .parse()
                        .map_err(|_| bad("a list takes an index, for example reward.0.weight=2"))?;
                    list.get_mut(index).ok_or_else(|| bad("no such list item"))?
                }
                _ => return Err(bad(&format!("`{part}` is below a plain value"))),
            };
        }
        match node {
            Value::Table(t) => {
                t.insert(last.to_string(), value);
            }
            _ => return Err(bad("the key does not name a table entry")),
        }
    }
    if let Value::Table(t) = here {
        *table = t;
    }
    Ok(())
}

fn located(error: &toml::de::Error, text: &str, origin: &str) -> EngineError {
    let line = error.span().map_or(1, |s| text[..s.start.min(text.len())].matches('\n').count() + 1);
    EngineError::malformed(origin, format!("line {line}"), with_nearest(error.message()))
}

/// Adds "did you mean" to serde's "unknown field `x`, expected one of `a`, `b`".
fn with_nearest(message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown field `") else { return message.to_string() };
    let mut quoted = rest.split('`').step_by(2);
    let Some(unknown) = quoted.next() else { return message.to_string() };
    let valid: Vec<&str> = rest.split('`').skip(2).step_by(2).collect();
    let mut out = format!("unknown key `{unknown}`");
    if let Some(best) = valid.iter().min_by_key(|v| edit_distance(unknown, v)) {
        let _ = write!(out, "; the nearest valid key is `{best}`");
    }
    let _ = write!(out, " (valid here: {})", valid.join(", "));
    out
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_of_known_pairs() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("steps", "steps"), 0);
    }

    #[test]
    fn an_unknown_key_names_file_line_and_neighbour() {
        let text = "[model]\npath = \"m\"\n[data]\npath = \"d\"\n[rollout]\ngroup_sise = 4\n";
        let error = Recipe::parse(text, "r.toml", &[]).unwrap_err().to_string();
        assert!(error.contains("r.toml: line 6") && error.contains("`group_size`"), "{error}");
    }

    #[test]
    fn a_resolved_recipe_reads_back_as_itself() {
        let recipe = Recipe::load(None, &["train.steps=6".into(), "devices.threads=1".into()]).unwrap();
        assert_eq!(recipe.train.steps, 6);
        assert_eq!(Recipe::parse(&recipe.to_toml(), "again", &[]).unwrap(), recipe);
    }

    #[test]
    fn a_preset_lies_under_the_recipes_own_settings() {
        let set = |items: &[&str]| {
            let items: Vec<String> = items.iter().map(|i| i.to_string()).collect();
            Recipe::load(None, &items)
        };
        let recipe = set(&["algorithm.preset=\"cispo\"", "algorithm.objective.clip_low=0.3"]).unwrap();
        let (cispo, _) = crate::loss::presets::preset("cispo").unwrap();
        assert_eq!(recipe.algorithm.objective.surrogate, cispo.surrogate);
        assert_eq!(recipe.algorithm.objective.clip_low, 0.3);
        assert_eq!(Recipe::parse(&recipe.to_toml(), "recipe.toml", &[]).unwrap(), recipe);
        let error = set(&["algorithm.preset=\"gropo\""]).unwrap_err().to_string();
        assert!(error.contains("gropo") && error.contains("dr_grpo"), "{error}");
        assert!(set(&["algorithm.objective.top_entropy=0.0"]).is_err());
        let correction =
            "algorithm.objective.sampler_correction={level=\"token\", out_of_bounds=\"truncate\", max=2.0}";
        let refused = set(&[correction]).unwrap_err().to_string();
        assert!(refused.contains("replay past groups"), "{refused}");
        for key in ["reward.0.weight=nan", "reward.1.error_score=inf"] {
            let error = set(&[key]).unwrap_err().to_string();
            assert!(error.contains("finite"), "{error}");
        }
        let error = set(&["optimizer.weight_decay=nan"]).unwrap_err().to_string();
        assert!(error.contains("optimizer.weight_decay") && error.contains("is not a number"), "{error}");
    }

    #[test]
    fn an_override_reaches_list_items_and_rejects_unknown_keys() {
        let recipe = Recipe::load(None, &["reward.0.weight=0.25".into()]).unwrap();
        assert_eq!(recipe.reward[0].weight, 0.25);
        let error = Recipe::load(None, &["train.stepz=6".into()]).unwrap_err().to_string();
        assert!(error.contains("--set train.stepz=6") && error.contains("`steps`"), "{error}");
    }
}
