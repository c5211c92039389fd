//! The reference and the editor stubs against the library that scripts see: every example runs, every name exists.

use std::collections::BTreeSet;
use std::sync::Arc;

use rft_rewards::{Context, Outcome, RewardSpec, Sample, Script, Verifiers};
use serde_json::{Map, Value, json};

const REFERENCE: &str = include_str!("../docs/reference.md");
const STUBS: &str = include_str!("../lua/rft.d.luau");

fn run(body: &str, fields: Map<String, Value>) -> Outcome {
    let script = Script::from_text("example", body).unwrap_or_else(|e| panic!("{e}\n{body}"));
    let sample = Sample { completion: "text".into(), fields: Arc::new(fields), ..Sample::default() };
    Verifiers::new(vec![RewardSpec::new(script)]).score(&[sample], &Context::default()).remove(0)
}

/// Lua blocks of a page that state their result: code and result.
fn examples() -> Vec<(String, String)> {
    REFERENCE
        .split("```lua\n")
        .skip(1)
        .filter_map(|rest| rest.split_once("```")?.0.split_once("\n--> "))
        .map(|(code, result)| (code.to_string(), result.trim().to_string()))
        .collect()
}

#[test]
fn every_example_gives_the_stated_result() {
    let examples = examples();
    for (code, stated) in &examples {
        let body = format!(
            "local function example()\n{code}\nend\nfunction reward(sample)\n local value = example()\n local stated = rft.json.decode(sample.stated)\n \
             if sample.stated == 'nil' then return value == nil and 1 or 0 end\n \
             if not rft.json.equal(value, stated) then error(rft.json.encode(value)) end\n return 1\nend"
        );
        let fields = Map::from_iter([("stated".to_string(), json!(stated))]);
        let outcome = run(&body, fields);
        assert_eq!(outcome.reward, Some(1.0), "{code}\nstated {stated}, found {:?}", outcome.errors);
    }
    assert!(examples.len() > 50, "{}", examples.len());
}

/// `group.name` of every function that scripts can call.
fn live() -> BTreeSet<String> {
    // told one by one, as the names of components
    let body = "function reward(sample)\n local names = {}\n for group, functions in rft do\n if type(functions) == 'function' then table.insert(names, group) end\n if type(functions) == 'table' then for name in functions do table.insert(names, group .. '.' .. name) end end\n end\n \
                table.sort(names)\n local part = {}\n for i = sample.first, math.min(sample.first + 49, #names) do part[names[i]] = i end\n if next(part) == nil then return nil end\n return part\nend";
    let mut names = BTreeSet::new();
    for first in (1..).step_by(50) {
        let outcome = run(body, Map::from_iter([("first".to_string(), json!(first))]));
        assert!(outcome.errors.is_empty(), "{:?}", outcome.errors);
        if outcome.reward.is_none() {
            break;
        }
        names.extend(outcome.components.into_iter().map(|(name, _)| name));
    }
    names
}

#[test]
fn reference_and_stubs_name_what_exists_and_nothing_else() {
    let live = live();
    assert!(live.len() > 50 && live.contains("math.equal"), "{live:?}");
    let described: BTreeSet<String> = REFERENCE
        .lines()
        .filter_map(|line| Some(line.strip_prefix("### rft.")?.split_once('(')?.0.to_string()))
        .collect();
    assert_eq!(described, live, "docs/reference.md");
    let mut group = String::new();
    let mut typed = BTreeSet::new();
    for line in STUBS.lines() {
        if line.starts_with("declare rft") {
            group = "rft".to_string();
        } else if let Some(name) = line.strip_prefix("type ").and_then(|rest| rest.split_once("Library = {"))
        {
            group = name.0.to_lowercase();
        } else if let Some((name, _)) = line.trim_start().split_once(": (")
            && !group.is_empty()
        {
            let of_rft = group == "rft";
            typed.insert(if of_rft { name.to_string() } else { format!("{group}.{name}") });
        } else if line == "}" {
            group.clear();
        }
    }
    assert_eq!(typed, live, "lua/rft.d.luau");
    // signatures in both places are the same text
    for line in STUBS.lines().filter(|line| line.starts_with('\t') && line.contains(") -> ")) {
        let (parameters, result) = line.split_once(": (").unwrap().1.rsplit_once(") -> ").unwrap();
        let shown = format!("`{parameters}` → `{}`", result.trim_end_matches(','));
        assert!(REFERENCE.contains(&shown), "{shown}");
    }
}

/// The first block of a kind in the guide.
fn guide(kind: &str) -> &'static str {
    const GUIDE: &str = include_str!("../docs/first-reward.md");
    GUIDE.split(&format!("```{kind}\n")).nth(1).and_then(|rest| rest.split("```").next()).unwrap()
}

#[test]
fn the_guide_happens_as_it_says() {
    let rows: Vec<Map<String, Value>> =
        guide("jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let outcomes = |script: &str| -> Vec<Outcome> {
        let score = |row: &Map<String, Value>| {
            let script = Script::from_text("units", script).unwrap();
            let completion = row["completion"].as_str().unwrap().to_string();
            let sample = Sample { completion, fields: Arc::new(row.clone()), ..Sample::default() };
            Verifiers::new(vec![RewardSpec::new(script)]).score(&[sample], &Context::default()).remove(0)
        };
        rows.iter().map(score).collect()
    };
    let first = outcomes(guide("lua"));
    let rewards: Vec<Option<f64>> = first.iter().map(|o| o.reward).collect();
    assert_eq!(rewards, [Some(1.5), Some(0.5), None, Some(1.5)]);
    let printed: Value = serde_json::from_str(guide("text")).unwrap();
    assert_eq!(serde_json::to_value(&first[2].errors[0]).unwrap(), printed["error"]);

    let wrong = guide("lua").lines().nth(3).unwrap();
    let better =
        guide("lua").replace(wrong, "  local right = found ~= nil and rft.math.equal(sample.answer, found)");
    assert!(outcomes(&better).iter().all(|o| o.errors.is_empty()));
    let spec = |text: &str| RewardSpec::new(Script::from_text("units", text).unwrap());
    assert!(rft_rewards::verify::verify(&spec(&better), &rows).passed());

    let mut percent = rows.clone();
    percent[0].insert("unit".into(), json!("%"));
    let report = rft_rewards::verify::verify(&spec(&better), &percent);
    let failure = report.findings.iter().find(|f| f.check == "failure").unwrap();
    assert_eq!(failure.line, Some(5), "{report}");
    assert!(failure.message.contains("pattern"), "{report}");
    let plain = better.replace("sample.unit) ~=", "sample.unit, 1, true) ~=");
    assert!(rft_rewards::verify::verify(&spec(&plain), &percent).passed());
}
