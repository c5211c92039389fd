//! What a run leaves behind: keys that others rely on, a page that stands alone, event files that TensorBoard reads.

use std::fs;
use std::path::Path;

use rft_engine::report::health::Health;
use rft_engine::report::html;
use rft_engine::report::metrics::{EvalResult, StepMetrics};
use rft_engine::report::progress;
use rft_engine::report::sinks::RunFolder;
use serde_json::{Value, json};

fn metrics(step: u64) -> StepMetrics {
    StepMetrics {
        step,
        reward_mean: 0.25 + 0.05 * step as f64,
        components: vec![("math".into(), 0.2), ("format".into(), 0.9)],
        entropy: 0.5,
        grad_norm: 1.25,
        eval_reward: (step == 10).then_some(0.75),
        health: match step {
            4..=6 => (Health::ZeroVariance, Some("all <equal>".into())),
            _ => Default::default(),
        },
        ..StepMetrics::default()
    }
}

fn sample(step: u64, n: usize) -> Value {
    json!({
        "id": "train-7", "step": step, "sample": n, "prompt": "1+1=<&>", "completion": "two: zwölf",
        "reward": 1.1, "components": {"math": 1.0, "format": null}, "advantage": 0.5, "finish_reason": "stop",
        "errors": [{"script": "mine.lua", "kind": "Timeout", "message": "over 100 ms", "line": 3}],
        "tokens": [5, 6, 7, 8], "token_ends": [3, 7, 8, 11], "logprobs": [-0.1, -2.3, 0.0, -0.69],
    })
}

fn run_folder(root: &Path, steps: u64) -> RunFolder {
    let mut folder = RunFolder::create(root, "name = \"<demo>\"\n").unwrap();
    for step in 1..=steps {
        folder.metrics(step, &metrics(step).to_json()).unwrap();
        folder.samples(&[sample(step, 0), sample(step, 1)]).unwrap();
    }
    folder
}

#[test]
fn a_step_has_every_promised_key_in_order() {
    let line = metrics(10).to_json();
    let keys: Vec<&str> = line.keys().map(String::as_str).collect();
    let promised = [
        "step",
        "reward_mean",
        "reward_std",
        "reward/math",
        "reward/format",
        "kl",
        "entropy",
        "ratio_max_dev",
        "clip_fraction",
        "zero_variance_groups",
        "reward_errors",
        "completion_tokens_mean",
        "truncated_fraction",
        "grad_norm",
        "lr",
        "loss",
        "rollout_s",
        "reward_s",
        "learner_s",
        "rollout_tokens_per_s",
        "learner_tokens_per_s",
        "kv_blocks_peak",
        "rss_peak_bytes",
    ];
    assert_eq!(keys[..promised.len()], promised);
    assert_eq!((&line["health"], &line["health_reason"]), (&json!("learning"), &Value::Null));
    assert_eq!(line["eval_reward"], json!(0.75));
    assert!(!metrics(9).to_json().contains_key("eval_reward"));
}

#[test]
fn the_page_stands_alone_and_shows_every_curve() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("demo");
    let folder = run_folder(&root, 40);
    folder
        .json(
            "summary.json",
            &json!({"steps": 40, "seconds": 12.5, "eval_before": 0.25, "eval_after": 0.75,
        "environment": {"cpu": "Test <CPU>"}}),
        )
        .unwrap();
    html::write(&root).unwrap();
    let page = fs::read_to_string(root.join("report.html")).unwrap();
    for outside in ["http:", "https:", "src=", "href=", "@import", "url("] {
        assert!(!page.contains(outside), "the page reaches out: {outside}");
    }
    for key in metrics(10).to_json().keys().filter(|k| *k != "step" && !k.starts_with("health")) {
        assert!(page.contains(&format!("data-name=\"{key}\"")), "no curve of {key}");
    }
    assert!(page.contains("37 of 40 steps learned"));
    assert!(page.contains("<td>4–6<td>zero_variance<td>all &lt;equal&gt;"));
    assert!(page.contains("from 0.250, +0.500"));
    assert!(
        page.contains("&lt;demo&gt;")
            && page.contains("Test &lt;CPU&gt;")
            && page.contains("1+1=&lt;&amp;&gt;")
    );
    // 8 steps of 40, evenly: 1 + round down of i * 39 / 7
    let shown: Vec<String> =
        [40, 34, 28, 23, 17, 12, 6, 1].iter().map(|s| format!("<summary>step {s},")).collect();
    let at: Vec<Option<usize>> = shown.iter().map(|s| page.find(s.as_str())).collect();
    assert!(at.iter().all(Option::is_some) && at.is_sorted(), "{at:?}");
    assert_eq!(page.matches("<summary>step").count(), 8);
}

#[test]
fn tokens_are_shaded_by_surprise_at_character_boundaries() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("demo");
    run_folder(&root, 1);
    html::write(&root).unwrap();
    let page = fs::read_to_string(root.join("report.html")).unwrap();
    // p = exp(-2.3) = 0.1003, so the background is (1 - p) of the darkest, 70 %
    assert!(
        page.contains("<span style=\"--p:63%\" title=\"token 6, p 0.1003, logprob -2.3\">: zw"),
        "{page}"
    );
    // token 7 ends inside the two bytes of ö: its text belongs to the next token
    assert!(
        !page.contains("title=\"token 7,") && page.contains("title=\"token 8, p 0.5016, logprob -0.69\">ölf"),
        "{page}"
    );
    assert!(page.contains("Timeout") && page.contains("over 100 ms"));
}

#[test]
fn the_page_of_a_run_in_progress_leaves_the_unfinished_line_out() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("demo");
    run_folder(&root, 2);
    let path = root.join("metrics.jsonl");
    fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"step\":3,\"rew").unwrap();
    html::write(&root).unwrap();
    let page = fs::read_to_string(root.join("report.html")).unwrap();
    assert!(page.contains("in progress") && page.contains("data-points=\"1,0.3 2,0.35\""));
    fs::write(&path, "{\"step\":1}\n{\"reward\":\n").unwrap();
    let error = html::write(&root).unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl") && error.contains("line 2"), "{error}");
    assert!(html::write(&dir.path().join("none")).unwrap_err().to_string().contains("recipe.toml"));
}

/// CRC-32C by a table, written apart from the engine's bitwise one.
fn crc32c(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256u32)
        .map(|i| (0..8).fold(i, |c, _| if c & 1 == 1 { (c >> 1) ^ 0x82f6_3b78 } else { c >> 1 }))
        .collect();
    !bytes.iter().fold(!0u32, |crc, b| table[((crc ^ u32::from(*b)) & 0xff) as usize] ^ (crc >> 8))
}

fn masked(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c(bytes);
    crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Payloads of the records of a TFRecord file, both checksums held against the bytes.
fn records(bytes: &[u8]) -> Vec<&[u8]> {
    let (mut found, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        assert_eq!(rest[8..12], masked(&rest[..8]));
        let payload = &rest[12..12 + length];
        assert_eq!(rest[12 + length..16 + length], masked(payload));
        found.push(payload);
        rest = &rest[16 + length..];
    }
    found
}

#[test]
fn every_step_is_a_sound_record_of_the_event_file() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("demo");
    run_folder(&root, 3);
    let events: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.file_name().unwrap().to_string_lossy().contains("tfevents"))
        .collect();
    assert_eq!(events.len(), 1);
    let bytes = fs::read(&events[0]).unwrap();
    let records = records(&bytes);
    let holds = |record: &[u8], text: &str| record.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(holds(records[0], "brain.Event:2"));
    assert_eq!(records.iter().filter(|r| holds(r, "reward/math")).count(), 3);
}

#[test]
fn the_last_table_sets_before_against_after() {
    let before = EvalResult { reward: 0.4465, components: vec![("math".into(), 0.35)], ..Default::default() };
    let after = EvalResult { reward: 0.9225, components: vec![("math".into(), 0.825)], ..Default::default() };
    let table = progress::before_after(&before, &after);
    let rows: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["held-out", "before", "after", "change"]);
    assert_eq!(rows[2], ["math", "0.350", "0.825", "+0.475"]);
}
