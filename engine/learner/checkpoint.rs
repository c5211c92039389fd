//! Checkpoints: atomic, checksummed folders from which a run continues bit for bit.
//!
//! A checkpoint is a folder `NAME/` with `state.json`, one little-endian `.f32` file a buffer and `manifest.json`
//! (length and BLAKE3 of each file). It is written as `NAME.partial`, flushed to disk and renamed, so a crash
//! leaves the old one or the new one. A folder that fails its manifest is named and the one before it is used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{EngineError, Result};

#[derive(Debug, Serialize, Deserialize, PartialEq)]
struct FileEntry {
    bytes: u64,
    blake3: String,
}

type Manifest = BTreeMap<String, FileEntry>;

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";

/// Buffers by name, as [`read`] gives them.
pub type Buffers = BTreeMap<String, Vec<f32>>;

fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Writes `root/NAME`, replacing an older one of that name.
///
/// # Errors
/// Any file that cannot be written, by path.
pub fn write(root: &Path, name: &str, state: &impl Serialize, buffers: &[(&str, &[f32])]) -> Result<PathBuf> {
    let (partial, target) = (root.join(format!("{name}.partial")), root.join(name));
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(EngineError::io(&partial))?;
    }
    fs::create_dir_all(&partial).map_err(EngineError::io(&partial))?;
    let mut manifest = Manifest::new();
    let state = serde_json::to_vec_pretty(state)
        .map_err(|e| EngineError::malformed(&partial, STATE, e.to_string()))?;
    manifest.insert(STATE.into(), write_file(&partial.join(STATE), &state)?);
    for (buffer, values) in buffers {
        let file = format!("{buffer}.f32");
        let entry = write_file(&partial.join(&file), bytemuck::cast_slice(values))?;
        manifest.insert(file, entry);
    }
    let text = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain JSON");
    write_file(&partial.join(MANIFEST), &text)?;
    sync_folder(&partial)?;
    if target.exists() {
        fs::remove_dir_all(&target).map_err(EngineError::io(&target))?;
    }
    fs::rename(&partial, &target).map_err(EngineError::io(&target))?;
    sync_folder(root)?;
    Ok(target)
}

/// Writes the checkpoint of `step` and deletes all but the newest `keep`.
///
/// # Errors
/// As [`write()`].
pub fn save(
    root: &Path,
    step: u64,
    state: &impl Serialize,
    buffers: &[(&str, &[f32])],
    keep: usize,
) -> Result<PathBuf> {
    let path = write(root, &step_name(step), state, buffers)?;
    for old in steps(root)?.iter().rev().skip(keep.max(1)) {
        let path = root.join(step_name(*old));
        fs::remove_dir_all(&path).map_err(EngineError::io(&path))?;
    }
    Ok(path)
}

/// Reads `root/NAME`, checking every file against the manifest.
///
/// # Errors
/// A missing, torn or altered file, by name.
pub fn read<S: DeserializeOwned>(root: &Path, name: &str) -> Result<(S, Buffers)> {
    let folder = root.join(name);
    let bad = |place: &str, message: String| EngineError::malformed(&folder, place, message);
    let text = fs::read(folder.join(MANIFEST)).map_err(EngineError::io(folder.join(MANIFEST)))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| bad(MANIFEST, e.to_string()))?;
    let (mut state, mut buffers) = (None, Buffers::new());
    for (file, entry) in &manifest {
        let path = folder.join(file);
        let mut bytes = Vec::new();
        File::open(&path).and_then(|mut f| f.read_to_end(&mut bytes)).map_err(EngineError::io(&path))?;
        if describe(&bytes) != *entry {
            return Err(bad(
                file,
                format!(
                    "torn or altered: {} bytes expected, {} found, or another checksum",
                    entry.bytes,
                    bytes.len()
                ),
            ));
        }
        match file.strip_suffix(".f32") {
            Some(name) => {
                buffers.insert(name.to_string(), bytemuck::allocation::pod_collect_to_vec(&bytes));
            }
            None => state = Some(serde_json::from_slice(&bytes).map_err(|e| bad(file, e.to_string()))?),
        }
    }
    Ok((state.ok_or_else(|| bad(MANIFEST, format!("lists no {STATE}")))?, buffers))
}

/// The newest checkpoint that passes its manifest, and a line about each newer one that does not.
///
/// # Errors
/// A folder that cannot be listed.
#[allow(clippy::type_complexity)]
pub fn latest<S: DeserializeOwned>(root: &Path) -> Result<(Option<(u64, S, Buffers)>, Vec<String>)> {
    let mut skipped = Vec::new();
    for step in steps(root)?.into_iter().rev() {
        match read(root, &step_name(step)) {
            Ok((state, buffers)) => return Ok((Some((step, state, buffers)), skipped)),
            Err(error) => skipped.push(format!("checkpoint skipped: {error}")),
        }
    }
    Ok((None, skipped))
}

fn steps(root: &Path) -> Result<Vec<u64>> {
    let mut steps = Vec::new();
    if !root.exists() {
        return Ok(steps);
    }
    for entry in fs::read_dir(root).map_err(EngineError::io(root))? {
        let name = entry.map_err(EngineError::io(root))?.file_name();
        steps.extend(name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse::<u64>().ok()));
    }
    steps.sort_unstable();
    Ok(steps)
}

fn describe(bytes: &[u8]) -> FileEntry {
    FileEntry { bytes: bytes.len() as u64, blake3: blake3::hash(bytes).to_hex().to_string() }
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<FileEntry> {
    let mut file = File::create(path).map_err(EngineError::io(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(EngineError::io(path))?;
    Ok(describe(bytes))
}

/// Makes a rename or a new file in `folder` durable (a folder can be opened and synced on Unix only).
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(EngineError::io(folder))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_checkpoint_is_named_and_the_one_before_it_is_used() {
        let root = tempfile::tempdir().unwrap();
        for step in 1..=3u64 {
            save(root.path(), step, &step, &[("weights", &[step as f32, 0.5])], 2).unwrap();
        }
        assert_eq!(steps(root.path()).unwrap(), [2, 3]);
        let weights = root.path().join("step-00000003/weights.f32");
        fs::write(&weights, [0u8; 7]).unwrap();
        let (found, skipped) = latest::<u64>(root.path()).unwrap();
        let (step, state, buffers) = found.unwrap();
        assert_eq!((step, state, buffers["weights"].as_slice()), (2, 2, &[2.0, 0.5][..]));
        assert!(skipped[0].contains("step-00000003") && skipped[0].contains("weights.f32"), "{skipped:?}");
    }

    #[test]
    fn a_flipped_bit_is_detected() {
        let root = tempfile::tempdir().unwrap();
        save(root.path(), 1, &7u64, &[("m", &[1.0, 2.0, 3.0])], 1).unwrap();
        let path = root.path().join("step-00000001/m.f32");
        let mut bytes = fs::read(&path).unwrap();
        bytes[5] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(latest::<u64>(root.path()).unwrap().0.is_none());
    }
}
