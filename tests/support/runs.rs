//! Whole runs of the program in a folder of their own, and reading what they leave.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rft_engine::report::metrics::TIMING_KEYS;
use serde_json::{Map, Value};

pub fn program(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rft-engine")).args(args).output().expect("the program starts")
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new(recipe: &str) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        std::fs::write(folder.at("recipe.toml"), recipe).unwrap();
        folder
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn launch(&self, run: &str, sets: &[&str]) -> Output {
        let (recipe, run) = (self.at("recipe.toml"), self.at(run));
        let mut args = vec!["launch", recipe.to_str().unwrap(), "--run-dir", run.to_str().unwrap()];
        sets.iter().for_each(|set| args.extend(["--set", set]));
        program(&args)
    }
}

pub fn lines(path: &Path) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// metrics.jsonl without what depends on the machine and the moment.
pub fn timeless_metrics(run: &Path) -> Vec<Map<String, Value>> {
    let mut rows = lines(&run.join("metrics.jsonl"));
    rows.iter_mut().for_each(|row| row.retain(|key, _| !TIMING_KEYS.contains(&key.as_str())));
    rows
}

pub fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("final/model.safetensors")).unwrap()
}
