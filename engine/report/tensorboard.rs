//! TensorBoard event files: TFRecord framing with masked CRC-32C around hand-encoded protobuf.
//!
//! Formats: tensorflow/core/lib/io/record_writer.cc (framing), tensorflow/core/util/event.proto and
//! tensorflow/core/framework/summary.proto (fields).

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use crate::error::{EngineError, Result};

/// An open event file.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// Makes a new event file in `folder` whose first step comes after `after`. TensorBoard forgets what older files of the
    /// folder say of later steps: a resumed run takes those again.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn create(folder: &Path, after: u64) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let path =
            folder.join(format!("events.out.tfevents.{}.{:09}.rft", now.as_secs(), now.subsec_nanos()));
        let file = File::create(&path).map_err(EngineError::io(&path))?;
        let mut writer = Self { file, path };
        let mut event = wall_time();
        put_bytes(&mut event, 3, b"brain.Event:2");
        writer.record(&event)?;
        let mut event = wall_time();
        event.push(2 << 3);
        put_varint(&mut event, after + 1);
        // session_log { status: START }
        put_bytes(&mut event, 7, &[1 << 3, 1]);
        writer.record(&event)?;
        Ok(writer)
    }

    /// Writes every number of `line` as a scalar of `step`.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn scalars(&mut self, step: u64, line: &Map<String, Value>) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in line.iter().filter(|(tag, _)| *tag != "step") {
            let Some(number) = value.as_f64() else { continue };
            let mut entry = Vec::new();
            put_bytes(&mut entry, 1, tag.as_bytes());
            entry.push(2 << 3 | 5);
            entry.extend((number as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &entry);
        }
        let mut event = wall_time();
        event.push(2 << 3);
        put_varint(&mut event, step);
        put_bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    fn record(&mut self, payload: &[u8]) -> Result<()> {
        self.file.write_all(&frame(payload)).map_err(EngineError::io(&self.path))
    }
}

fn wall_time() -> Vec<u8> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let mut event = vec![1 << 3 | 1];
    event.extend(seconds.to_le_bytes());
    event
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Length, its masked CRC, payload, its masked CRC.
fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend_from_slice(payload);
    out.extend(masked_crc(payload).to_le_bytes());
    out
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected polynomial 0x82F63B78.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0x82f6_3b78 } else { c >> 1 })
    };
    !bytes.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_of_the_published_vectors() {
        // RFC 3720, appendix B.4
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_scalar_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 299).unwrap();
        let Value::Object(line) = serde_json::json!({"step": 300, "loss": 0.25}) else { unreachable!() };
        writer.scalars(300, &line).unwrap();
        let bytes = std::fs::read(&writer.path).unwrap();
        let (mut events, mut rest) = (Vec::new(), &bytes[..]);
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            events.push(&rest[12..12 + length]);
            rest = &rest[16 + length..];
        }
        assert_eq!(events.len(), 3);
        // wall_time (9 bytes), step 300 as a varint, then session_log { status: START }
        assert_eq!(events[1][9..], [2 << 3, 0xac, 0x02, 58, 2, 8, 1]);
        // the same step, then summary { value { tag, simple_value } }
        assert_eq!(&events[2][9..12], [2 << 3, 0xac, 0x02]);
        let expected = [&[42, 13, 10, 11, 10, 4][..], b"loss", &[21], &0.25f32.to_le_bytes()].concat();
        assert_eq!(&events[2][12..], expected);
    }
}
