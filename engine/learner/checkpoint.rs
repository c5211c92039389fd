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

/// A buffer to write, from where it lies.
#[derive(Debug, Clone)]
pub enum Values<'a> {
    /// Numbers, slice after slice.
    F32(Vec<&'a [f32]>),
    /// Codes.
    U8(&'a [u8]),
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(vec![values])
    }
}

impl<'a> From<Vec<&'a [f32]>> for Values<'a> {
    fn from(values: Vec<&'a [f32]>) -> Self {
        Self::F32(values)
    }
}

impl<'a> From<&'a [u8]> for Values<'a> {
    fn from(codes: &'a [u8]) -> Self {
        Self::U8(codes)
    }
}

#[derive(Debug)]
enum Stored {
    F32(Vec<f32>),
    U8(Vec<u8>),
}

/// Buffers by name, as [`read`] gives them.
#[derive(Debug)]
pub struct Buffers {
    folder: PathBuf,
    stored: BTreeMap<String, Stored>,
}

impl Buffers {
    /// Whether there is a buffer of this name.
    pub fn has(&self, name: &str) -> bool {
        self.stored.contains_key(name)
    }

    /// Takes `len` numbers out.
    ///
    /// # Errors
    /// No such buffer, or one of another length or kind.
    pub fn take(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        match self.stored.remove(name) {
            Some(Stored::F32(found)) if found.len() == len => Ok(found),
            found => Err(self.misfit(name, "numbers", len, found.as_ref())),
        }
    }

    /// Takes `len` codes out.
    ///
    /// # Errors
    /// As [`Buffers::take`].
    pub fn take_codes(&mut self, name: &str, len: usize) -> Result<Vec<u8>> {
        match self.stored.remove(name) {
            Some(Stored::U8(found)) if found.len() == len => Ok(found),
            found => Err(self.misfit(name, "codes", len, found.as_ref())),
        }
    }

    /// Gives a buffer another name; nothing where there is none.
    pub fn rename(&mut self, from: &str, to: &str) {
        if let Some(buffer) = self.stored.remove(from) {
            self.stored.insert(to.to_string(), buffer);
        }
    }

    fn misfit(&self, name: &str, what: &str, len: usize, found: Option<&Stored>) -> EngineError {
        let found = match found {
            None => "nothing".to_string(),
            Some(Stored::F32(found)) => format!("{} numbers", found.len()),
            Some(Stored::U8(found)) => format!("{} codes", found.len()),
        };
        EngineError::malformed(&self.folder, name, format!("{len} {what} expected, {found} found"))
    }
}

fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Writes `root/NAME`, replacing an older one of that name.
///
/// # Errors
/// Any file that cannot be written, by path.
pub fn write(root: &Path, name: &str, state: &impl Serialize, buffers: &[(&str, Values)]) -> Result<PathBuf> {
    let (partial, target) = (root.join(format!("{name}.partial")), root.join(name));
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(EngineError::io(&partial))?;
    }
    fs::create_dir_all(&partial).map_err(EngineError::io(&partial))?;
    let mut manifest = Manifest::new();
    let state = serde_json::to_vec_pretty(state)
        .map_err(|e| EngineError::malformed(&partial, STATE, e.to_string()))?;
    manifest.insert(STATE.into(), write_file(&partial.join(STATE), &[&state])?);
    for (buffer, values) in buffers {
        let (file, parts) = match values {
            Values::F32(parts) => {
                (format!("{buffer}.f32"), parts.iter().map(|part| bytemuck::cast_slice(part)).collect())
            }
            Values::U8(codes) => (format!("{buffer}.u8"), vec![*codes]),
        };
        let entry = write_file(&partial.join(&file), &parts)?;
        manifest.insert(file, entry);
    }
    let text = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain JSON");
    write_file(&partial.join(MANIFEST), &[&text])?;
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
    buffers: &[(&str, Values)],
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
    let mut state = None;
    let mut buffers = Buffers { folder: folder.clone(), stored: BTreeMap::new() };
    for (file, entry) in &manifest {
        let path = folder.join(file);
        let (name, kind) = file.rsplit_once('.').unwrap_or((file, ""));
        let bytes = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
        // the file's length is compared first, so that a manifest cannot ask for memory
        let found = fs::metadata(&path).map_err(EngineError::io(&path))?.len();
        let mut stored = match kind {
            _ if found != entry.bytes => return Err(bad(file, torn(entry.bytes, found))),
            "f32" if bytes % 4 == 0 => Stored::F32(vec![0.0; bytes / 4]),
            _ => Stored::U8(vec![0; bytes]),
        };
        let into: &mut [u8] = match &mut stored {
            Stored::F32(values) => bytemuck::cast_slice_mut(values),
            Stored::U8(codes) => codes,
        };
        File::open(&path).and_then(|mut f| f.read_exact(into)).map_err(EngineError::io(&path))?;
        if blake3::hash(into).to_hex().as_str() != entry.blake3 {
            return Err(bad(file, torn(entry.bytes, found)));
        }
        if file == STATE {
            state = Some(serde_json::from_slice(into).map_err(|e| bad(file, e.to_string()))?);
        } else {
            buffers.stored.insert(name.to_string(), stored);
        }
    }
    Ok((state.ok_or_else(|| bad(MANIFEST, format!("lists no {STATE}")))?, buffers))
}

fn torn(expected: u64, found: u64) -> String {
    format!("torn or altered: {expected} bytes expected, {found} found, or another checksum")
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

/// Writes the parts one after another, with no copy of them.
fn write_file(path: &Path, parts: &[&[u8]]) -> Result<FileEntry> {
    let mut file = File::create(path).map_err(EngineError::io(path))?;
    let (mut hash, mut bytes) = (blake3::Hasher::new(), 0);
    for part in parts {
        file.write_all(part).map_err(EngineError::io(path))?;
        hash.update(part);
        bytes += part.len() as u64;
    }
    file.sync_all().map_err(EngineError::io(path))?;
    Ok(FileEntry { bytes, blake3: hash.finalize().to_hex().to_string() })
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
            save(root.path(), step, &step, &[("weights", [step as f32, 0.5][..].into())], 2).unwrap();
        }
        assert_eq!(steps(root.path()).unwrap(), [2, 3]);
        let weights = root.path().join("step-00000003/weights.f32");
        fs::write(&weights, [0u8; 7]).unwrap();
        let (found, skipped) = latest::<u64>(root.path()).unwrap();
        let (step, state, mut buffers) = found.unwrap();
        assert_eq!((step, state, buffers.take("weights", 2).unwrap()), (2, 2, vec![2.0, 0.5]));
        assert!(skipped[0].contains("step-00000003") && skipped[0].contains("weights.f32"), "{skipped:?}");
    }

    #[test]
    fn parts_are_one_buffer_and_codes_stay_codes() {
        let root = tempfile::tempdir().unwrap();
        let parts = Values::F32(vec![&[1.0, 2.0], &[3.0]]);
        write(root.path(), "now", &(), &[("w", parts), ("m", [7u8, 8][..].into())]).unwrap();
        let ((), mut buffers) = read::<()>(root.path(), "now").unwrap();
        assert_eq!(buffers.take("w", 3).unwrap(), [1.0, 2.0, 3.0]);
        let error = buffers.take("m", 2).unwrap_err().to_string();
        assert!(error.contains("2 numbers expected, 2 codes found"), "{error}");
        let ((), mut buffers) = read::<()>(root.path(), "now").unwrap();
        assert_eq!(buffers.take_codes("m", 2).unwrap(), [7, 8]);
        assert!(!buffers.has("m") && buffers.take("v", 2).is_err());
    }

    #[test]
    fn a_flipped_bit_is_detected() {
        let root = tempfile::tempdir().unwrap();
        save(root.path(), 1, &7u64, &[("m", [1.0, 2.0, 3.0][..].into())], 1).unwrap();
        let path = root.path().join("step-00000001/m.f32");
        let mut bytes = fs::read(&path).unwrap();
        bytes[5] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(latest::<u64>(root.path()).unwrap().0.is_none());
    }
}
