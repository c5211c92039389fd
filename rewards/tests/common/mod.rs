//! Rows of recorded numbers.

use std::path::PathBuf;

use serde_json::Value;

/// Rows of a JSONL file below `RFT_FIXTURES`, else below the repository's own fixtures.
pub fn rows(path: &str) -> Vec<Value> {
    let root = std::env::var_os("RFT_FIXTURES")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures")));
    let path = root.join(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines.map(|line| serde_json::from_str(line).expect("a JSON row")).collect()
}
