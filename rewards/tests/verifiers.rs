//! The shipped verifiers against the cases that stand beside them.

use std::path::Path;
use std::sync::Arc;

use rft_rewards::{Context, RewardPool, RewardSpec, SHIPPED, Sample, resolve};
use serde_json::Value;

#[test]
fn every_shipped_verifier_passes_its_cases() {
    for (name, _) in SHIPPED {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("lua/{name}.cases.jsonl"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let pool = RewardPool::new(vec![RewardSpec::new(resolve(name).unwrap())], 1).unwrap();
        let mut cases = 0;
        for line in text.lines() {
            let Value::Object(mut row) = serde_json::from_str(line).unwrap() else {
                panic!("{name}: {line}")
            };
            let expected = row.remove("expect").unwrap();
            let completion = row["completion"].as_str().unwrap().to_string();
            let sample = Sample { completion, fields: Arc::new(row), ..Sample::default() };
            pool.submit(0, vec![sample], Context::default());
            let outcome = pool.recv().1.remove(0);
            assert!(outcome.errors.is_empty(), "{name}: {line}: {:?}", outcome.errors);
            match (outcome.reward, expected.as_f64()) {
                (Some(found), Some(expected)) => {
                    assert!((found - expected).abs() < 1e-9, "{name}: {line}: {found}")
                }
                (found, expected) => assert_eq!(found, expected, "{name}: {line}"),
            }
            cases += 1;
        }
        assert!(cases >= 4, "{name} has {cases} cases");
    }
}
