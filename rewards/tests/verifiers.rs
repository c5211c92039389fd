//! The shipped verifiers against the cases that stand beside them.

use rft_rewards::{Context, RewardSpec, SHIPPED, Verifiers, cases, resolve};

#[test]
fn every_shipped_verifier_passes_its_cases() {
    let mut wrong = Vec::new();
    for (name, _) in SHIPPED {
        let cases = cases(name);
        assert!(cases.len() >= 4, "{name} has {} cases", cases.len());
        for case in cases {
            let spec = RewardSpec { options: case.options, ..RewardSpec::new(resolve(name).unwrap()) };
            let outcome = Verifiers::new(vec![spec])
                .score(std::slice::from_ref(&case.sample), &Context::default())
                .remove(0);
            let agree = match (outcome.reward, case.expect) {
                (Some(found), Some(expected)) => (found - expected).abs() < 1e-9,
                (found, expected) => found.is_none() && expected.is_none(),
            };
            if !agree || !outcome.errors.is_empty() {
                wrong.push(format!("{name}: {:?}\n  found {outcome:?}", case.sample));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
