//! The run folder: what is where in it, and appending to it without losing or repeating a step.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::error::{EngineError, Result};
use crate::report::tensorboard::EventWriter;

/// An open run folder.
#[derive(Debug)]
pub struct RunFolder {
    root: PathBuf,
    metrics: File,
    samples: File,
    /// Opened by the first supervised step.
    sft: Option<File>,
    events: EventWriter,
    _lock: File,
}

/// Keeps other processes from writing into a run folder, as long as the file that it returns is open.
///
/// # Errors
/// A folder that another process is at work in; a recipe that cannot be opened.
pub fn lock(root: &Path) -> Result<File> {
    let path = root.join("recipe.toml");
    let file = File::open(&path).map_err(EngineError::io(&path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(EngineError::Config(format!(
            "another process is at work in {}. hint: wait until it ends, or stop it",
            root.display()
        ))),
        // a file system without locks
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// Lines of supervised steps, apart from metrics.jsonl because they count steps of their own.
const SFT: &str = "sft.jsonl";

impl RunFolder {
    /// Makes a new run folder holding the resolved recipe.
    ///
    /// # Errors
    /// A folder that exists already: a run is never overwritten.
    pub fn create(root: &Path, recipe: &str) -> Result<Self> {
        if root.exists() {
            return Err(EngineError::Config(format!(
                "{} exists already and a run is never overwritten. hint: choose another --run-dir, or --resume to go on with it",
                root.display()
            )));
        }
        fs::create_dir_all(root).map_err(EngineError::io(root))?;
        let path = root.join("recipe.toml");
        fs::write(&path, recipe).map_err(EngineError::io(&path))?;
        Self::open(root, 0, lock(root)?)
    }

    /// Opens a run folder to go on after `step`, and `sft_step` of the supervised ones: later lines are dropped. `lock` is
    /// [`lock`]'s.
    ///
    /// # Errors
    /// Files that cannot be read or written.
    pub fn resume(root: &Path, step: u64, sft_step: u64, lock: File) -> Result<Self> {
        for (name, step) in [("metrics.jsonl", step), ("samples.jsonl", step), (SFT, sft_step)] {
            keep_steps(&root.join(name), step)?;
        }
        Self::open(root, step, lock)
    }

    fn open(root: &Path, step: u64, lock: File) -> Result<Self> {
        let append = |name: &str| {
            let path = root.join(name);
            OpenOptions::new().create(true).append(true).open(&path).map_err(EngineError::io(path))
        };
        let (metrics, samples) = (append("metrics.jsonl")?, append("samples.jsonl")?);
        let events = EventWriter::create(root, step)?;
        Ok(Self { root: root.to_path_buf(), metrics, samples, sft: None, events, _lock: lock })
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Appends a step's metrics to metrics.jsonl and to the TensorBoard events.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn metrics(&mut self, step: u64, line: &serde_json::Map<String, Value>) -> Result<()> {
        let path = self.root.join("metrics.jsonl");
        let text = serde_json::to_string(line).expect("metrics are plain JSON") + "\n";
        self.metrics.write_all(text.as_bytes()).map_err(EngineError::io(path))?;
        self.events.scalars(step, line)
    }

    /// Appends a supervised step's metrics to sft.jsonl and, as `sft/NAME`, to the TensorBoard events.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn sft(&mut self, step: u64, line: &serde_json::Map<String, Value>) -> Result<()> {
        let path = self.root.join(SFT);
        if self.sft.is_none() {
            let file = OpenOptions::new().create(true).append(true).open(&path);
            self.sft = Some(file.map_err(EngineError::io(&path))?);
        }
        let text = serde_json::to_string(line).expect("metrics are plain JSON") + "\n";
        let file = self.sft.as_mut().expect("opened above");
        file.write_all(text.as_bytes()).map_err(EngineError::io(path))?;
        let tagged = line.iter().filter(|(key, _)| *key != "step");
        let tagged = tagged.map(|(key, value)| (format!("sft/{key}"), value.clone())).collect();
        self.events.scalars(step, &tagged)
    }

    /// Appends rows to samples.jsonl.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn samples(&mut self, rows: &[Value]) -> Result<()> {
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        self.samples.write_all(text.as_bytes()).map_err(EngineError::io(self.root.join("samples.jsonl")))
    }

    /// Writes a JSONL file of the folder whole, or not at all.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn lines(&self, name: &str, lines: &[Value]) -> Result<()> {
        let (partial, path) = (self.root.join(format!("{name}.partial")), self.root.join(name));
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(&partial, text).map_err(EngineError::io(&partial))?;
        fs::rename(&partial, &path).map_err(EngineError::io(&path))
    }

    /// Writes a JSON file of the folder whole, or not at all.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        let (partial, path) = (self.root.join(format!("{name}.partial")), self.root.join(name));
        let text = serde_json::to_string_pretty(value).expect("reports are plain JSON") + "\n";
        fs::write(&partial, text).map_err(EngineError::io(&partial))?;
        fs::rename(&partial, &path).map_err(EngineError::io(&path))
    }
}

/// Rewrites a JSONL file without the lines of steps after `step`, and without a torn last line.
fn keep_steps(path: &Path, step: u64) -> Result<()> {
    let Ok(file) = File::open(path) else { return Ok(()) };
    let partial = path.with_extension("partial");
    let mut out = File::create(&partial).map_err(EngineError::io(&partial))?;
    for line in BufReader::new(file).lines() {
        let line = line.map_err(EngineError::io(path))?;
        let row: Option<Value> = serde_json::from_str(&line).ok();
        if row.and_then(|r| r["step"].as_u64()).is_some_and(|s| s <= step) {
            writeln!(out, "{line}").map_err(EngineError::io(&partial))?;
        }
    }
    fs::rename(&partial, path).map_err(EngineError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_never_overwritten_and_resuming_drops_later_and_torn_lines() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("run");
        let mut run = RunFolder::create(&root, "seed = 1\n").unwrap();
        for step in 1..=3u64 {
            let Value::Object(line) = serde_json::json!({"step": step, "loss": 0.5}) else { unreachable!() };
            run.metrics(step, &line).unwrap();
        }
        drop(run);
        assert!(RunFolder::create(&root, "").unwrap_err().to_string().contains("--resume"));
        let path = root.join("metrics.jsonl");
        let torn = fs::read_to_string(&path).unwrap() + "{\"step\": 2, \"lo";
        fs::write(&path, torn).unwrap();
        RunFolder::resume(&root, 2, 0, lock(&root).unwrap()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2);
    }
}
