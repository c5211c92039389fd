//! The shipped verifiers against the cases that stand beside them.

use std::sync::Arc;

use rft_rewards::{Context, RewardPool, RewardSpec, SHIPPED, Sample, resolve, shipped_cases};
use serde_json::Value;

#[test]
fn every_shipped_verifier_passes_its_cases() {
    let mut wrong = Vec::new();
    for (name, _) in SHIPPED {
        let mut cases = 0;
        for mut row in shipped_cases(name) {
            let line = Value::Object(row.clone());
            let expected = row.remove("expect").unwrap();
            let completion = row["completion"].as_str().unwrap().to_string();
            let options = match row.remove("options") {
                Some(Value::Object(options)) => options,
                _ => Default::default(),
            };
            let tokens =
                row.get("tokens").map_or_else(Vec::new, |t| serde_json::from_value(t.clone()).unwrap());
            let sample = Sample { completion, tokens, fields: Arc::new(row), ..Sample::default() };
            let spec = RewardSpec { options, ..RewardSpec::new(resolve(name).unwrap()) };
            let pool = RewardPool::new(vec![spec], 1).unwrap();
            pool.submit(0, vec![sample], Context::default());
            let outcome = pool.recv().1.remove(0);
            let agree = match (outcome.reward, expected.as_f64()) {
                (Some(found), Some(expected)) => (found - expected).abs() < 1e-9,
                (found, expected) => found.is_none() && expected.is_none(),
            };
            if !agree || !outcome.errors.is_empty() {
                wrong.push(format!("{name}: {line}\n  found {outcome:?}"));
            }
            cases += 1;
        }
        assert!(cases >= 4, "{name} has {cases} cases");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
