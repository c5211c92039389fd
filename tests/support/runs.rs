//! Whole runs of the program in a folder of their own, resuming what a kill would have left of them, and reading what they leave.

#![allow(dead_code)]

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

/// A reward that varies from completion to completion.
pub const DIGITS: &str =
    "function reward(sample)\n  local _, n = sample.completion:gsub('%d', '')\n  return n / 8\nend\n";

pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new(recipe: &str) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.write("recipe.toml", recipe);
        folder
    }

    /// A recipe whose `REWARD` is this script.
    pub fn with_reward(recipe: &str, script: &str) -> Self {
        let folder = Self::new("");
        folder.write("reward.lua", script);
        let recipe = recipe.replace("REWARD", &folder.at("reward.lua").display().to_string());
        folder.write("recipe.toml", &recipe);
        folder
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.at(name), text).unwrap();
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

    /// A run that succeeds; its folder.
    pub fn run(&self, run: &str, sets: &[&str]) -> PathBuf {
        let output = self.launch(run, sets);
        assert!(output.status.success(), "{sets:?}: {}", stderr(&output));
        self.at(run)
    }

    /// What a kill after the checkpoint of step `last` would have left of a finished run, taken to its end; its folder.
    pub fn resumed(&self, whole: &Path, name: &str, last: u64) -> PathBuf {
        let run = self.at(name);
        cut(whole, &run, last);
        let output = resume(&run);
        assert!(output.status.success(), "after {last}: {}", stderr(&output));
        run
    }
}

pub fn resume(run: &Path) -> Output {
    program(&["launch", "--run-dir", run.to_str().unwrap(), "--resume"])
}

/// Names of a run's checkpoints, oldest first.
pub fn checkpoints(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("step-")).collect();
    names.sort();
    names
}

/// Copies a finished run to `run` without what came after the checkpoint of step `last`, which must be there.
pub fn cut(whole: &Path, run: &Path, last: u64) {
    assert!(Command::new("cp").arg("-r").arg(whole).arg(run).status().unwrap().success());
    let (last, all) = (format!("step-{last:08}"), checkpoints(run));
    assert!(
        all.contains(&last) && all.last() > Some(&last),
        "{last} is not among the earlier ones of {all:?}"
    );
    for later in all.iter().filter(|name| **name > last) {
        std::fs::remove_dir_all(run.join("checkpoints").join(later)).unwrap();
    }
    std::fs::remove_dir_all(run.join("final")).unwrap();
    std::fs::remove_file(run.join("summary.json")).unwrap();
}

pub fn lines(path: &Path) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Lines without what depends on the machine and the moment.
pub fn timeless(path: &Path) -> Vec<Map<String, Value>> {
    let mut rows = lines(path);
    rows.iter_mut().for_each(|row| row.retain(|key, _| !TIMING_KEYS.contains(&key.as_str())));
    rows
}

pub fn timeless_metrics(run: &Path) -> Vec<Map<String, Value>> {
    timeless(&run.join("metrics.jsonl"))
}

pub fn summary(run: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(run.join("summary.json")).unwrap()).unwrap()
}

pub fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("final/model.safetensors")).unwrap()
}
