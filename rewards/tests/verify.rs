//! `verify` finds each planted fault, and finds none in the shipped verifiers.

use rft_rewards::verify::{Report, Severity, verify};
use rft_rewards::{RewardSpec, SHIPPED, Script, resolve, shipped_cases};
use serde_json::{Map, Value, json};

fn rows() -> Vec<Map<String, Value>> {
    ["12", "7", "-3", "250"]
        .iter()
        .enumerate()
        .map(|(i, answer)| {
            let row = json!({"id": format!("r{i}"), "prompt": format!("Question {i}?"), "answer": answer});
            row.as_object().unwrap().clone()
        })
        .collect()
}

fn report(body: &str) -> Report {
    verify(&RewardSpec::new(Script::from_text("mine", body).unwrap()), &rows())
}

/// Checks of a severity that were found.
fn found(report: &Report, severity: Severity) -> Vec<&'static str> {
    report.findings.iter().filter(|f| f.severity == severity).map(|f| f.check).collect()
}

#[test]
fn every_shipped_verifier_passes() {
    for (name, _) in SHIPPED {
        let report = verify(&RewardSpec::new(resolve(name).unwrap()), &shipped_cases(name));
        assert!(report.passed(), "{report}");
        assert!(report.calls > 50 && report.reward.is_some(), "{report}");
    }
}

#[test]
fn a_sound_reward_has_nothing_to_report() {
    let report = report(
        "function reward(s) local a = string.match(s.completion, '<answer>%s*(%-?%d+)%s*</answer>') return a == s.answer and 1 or 0 end",
    );
    assert_eq!(report.findings, [], "{report}");
    assert_eq!(report.reward.map(|r| (r.min, r.max)), Some((0.0, 1.0)));
}

#[test]
fn planted_faults_are_found() {
    use Severity::{Error, Warning};
    for (severity, check, line, body) in [
        (
            Error,
            "exploitable",
            None,
            "function reward(s) if s.completion == '' then return 1 end\nreturn s.completion == s.answer and 1 or 0 end",
        ),
        (
            Error,
            "exploitable",
            None,
            "function reward(s) if #s.completion > 100000 then return 2 end return s.completion == s.answer and 1 or 0 end",
        ),
        (
            Error,
            "exploitable",
            None,
            "function reward(s) return string.find(s.completion, s.answer, 1, true) and 1 or string.find(s.completion, 'sorry') and 1 or 0 end",
        ),
        (
            Warning,
            "exploitable",
            None,
            "function reward(s) return string.find(s.completion, s.answer, 1, true) and 1 or 0 end",
        ),
        (Error, "constant", None, "function reward(s) return 1 end"),
        (Error, "constant", None, "function reward(s) return nil end"),
        (
            Warning,
            "constant",
            None,
            "function reward(s) return {right = s.completion == s.answer and 1 or 0, style = 0.5} end",
        ),
        (
            Error,
            "failure",
            Some(2),
            "function reward(s)\n return #s.completion > 0 and tonumber(s.completion) + 1 or 0 end",
        ),
        (Error, "failure", None, "function reward(s) return tonumber(s.completion) and 0/0 or 0 end"),
        (
            Error,
            "failure",
            Some(1),
            "function reward(s) while s.completion == '' do end return s.completion == s.answer and 1 or 0 end",
        ),
        (
            Error,
            "unreachable",
            Some(2),
            "function reward(s)\n if s.x then io.open('x') end return s.completion == s.answer and 1 or 0 end",
        ),
        (
            Error,
            "unknown_function",
            Some(1),
            "function reward(s) if s.x then rft.math.equals('1', '1') end return s.completion == s.answer and 1 or 0 end",
        ),
        (Warning, "random", Some(1), "function reward(s) return math.random() end"),
        (
            Warning,
            "absent_field",
            None,
            "function reward(s) return s.completion == (s.anwser or s.answer) and 1 or 0 end",
        ),
        (
            Warning,
            "global",
            None,
            "function reward(s) found = s.completion return found == s.answer and 1 or 0 end",
        ),
        (
            Warning,
            "unpaid",
            None,
            "function reward(s) return #s.completion > 50 and s.completion ~= s.answer and not string.find(s.completion, s.answer, 1, true) and 1 or 0 end",
        ),
        (
            Warning,
            "range",
            None,
            "function reward(s) return s.completion == s.answer and 1000 or #s.completion / 1e9 end",
        ),
        (
            Error,
            "nondeterministic",
            None,
            "function reward(s) local t = {} local a = tostring(t) return (s.completion == s.answer and 1 or 0) + tonumber(string.sub(a, -4), 16) / 65536 end",
        ),
    ] {
        let report = report(body);
        assert!(found(&report, severity).contains(&check), "{check}: {body}\n{report}");
        assert_eq!(report.passed(), found(&report, Severity::Error).is_empty());
        if line.is_some() {
            assert!(report.findings.iter().any(|f| f.check == check && f.line == line), "{body}\n{report}");
        }
    }
}

#[test]
fn a_case_that_does_not_hold_is_an_error() {
    let script =
        Script::from_text("mine", "function reward(s) return s.completion == s.answer and 1 or 0 end")
            .unwrap();
    let case = json!({"completion": "4", "answer": "5", "expect": 1});
    let report = verify(&RewardSpec::new(script), &[case.as_object().unwrap().clone()]);
    assert!(found(&report, Severity::Error).contains(&"case"), "{report}");
}

#[test]
fn without_rows_some_are_made_up() {
    let script =
        Script::from_text("mine", "function reward(s) return s.completion == s.answer and 1 or 0 end")
            .unwrap();
    let report = verify(&RewardSpec::new(script), &[]);
    assert!(report.passed() && found(&report, Severity::Warning).contains(&"no_data"), "{report}");
}
