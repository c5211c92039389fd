//! The GGUF container: metadata, tensor table and blockwise dequantisation.
//!
//! Follows the specification in ggml's `docs/gguf.md` (versions 2 and 3, little endian) and the block layouts of
//! `ggml-quants.c`. Every count and offset is checked against the size of the file before anything is allocated,
//! so that memory stays within a small multiple of the file whatever it claims.

use std::collections::BTreeMap;
use std::ops::Range;

use half::f16;

/// Most dimensions of a tensor.
const MAX_DIMS: usize = 4;
/// Most elements of one tensor.
const MAX_ELEMENTS: u64 = 1 << 40;
/// Most items of all metadata lists together (a vocabulary and its merges are below 2^21).
const MAX_ITEMS: usize = 1 << 23;

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Meta {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A flag.
    Bool(bool),
    /// Text.
    Text(String),
    /// A list of scalars of one type.
    List(Vec<Meta>),
}

impl Meta {
    /// As a whole number of at least 0.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(n) => Some(n),
            Self::Signed(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    /// As a number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::Unsigned(n) => Some(n as f64),
            Self::Signed(n) => Some(n as f64),
            Self::Float(x) => Some(x),
            _ => None,
        }
    }

    /// As text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Text(s) = self { Some(s) } else { None }
    }

    /// As a list.
    pub fn as_list(&self) -> Option<&[Meta]> {
        if let Self::List(items) = self { Some(items) } else { None }
    }
}

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, missing_docs)]
pub enum GgmlType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl GgmlType {
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// Elements and bytes of one block.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
        }
    }
}

/// One row of the tensor table.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    /// Storage type; the code of one this engine does not read.
    pub kind: Result<GgmlType, u32>,
    /// Sizes, slowest first (the file has them fastest first).
    pub shape: Vec<usize>,
    /// Where the bytes lie in the file; empty for a type that is not read.
    pub bytes: Range<usize>,
}

/// A parsed header; the data stays in the file.
#[derive(Debug, Clone, Default)]
pub struct Gguf {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Meta>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, GgufTensor>,
}

/// Position in the header; every read is checked.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
    /// List items read so far.
    items: usize,
}

/// What is wrong, and where; the caller adds the path.
type Parsed<T> = Result<T, (String, String)>;

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, place: &str) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.file.len()).ok_or_else(|| {
            let found = self.file.len() - self.at;
            (
                place.to_string(),
                format!("the file ends early: {n} bytes expected at byte {}, {found} found", self.at),
            )
        })?;
        let bytes = &self.file[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, place: &str) -> Parsed<[u8; N]> {
        Ok(self.take(N, place)?.try_into().expect("N bytes"))
    }

    fn u32(&mut self, place: &str) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array(place)?))
    }

    fn u64(&mut self, place: &str) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array(place)?))
    }

    /// A count of things that take at least `least` bytes each.
    fn count(&mut self, least: usize, what: &str) -> Parsed<usize> {
        let n = self.u64(what)?;
        let room = (self.file.len() - self.at) / least;
        if n > room as u64 {
            return Err((what.to_string(), format!("{n} claimed, but the file has room for at most {room}")));
        }
        Ok(n as usize)
    }

    fn text(&mut self, place: &str) -> Parsed<String> {
        let n = self.count(1, place)?;
        let bytes = self.take(n, place)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| (place.to_string(), "text is not UTF-8".into()))
    }

    fn value(&mut self, kind: u32, key: &str) -> Parsed<Meta> {
        Ok(match kind {
            0 => Meta::Unsigned(self.array::<1>(key)?[0].into()),
            1 => Meta::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Meta::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Meta::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Meta::Unsigned(self.u32(key)?.into()),
            5 => Meta::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Meta::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => Meta::Bool(self.array::<1>(key)?[0] != 0),
            8 => Meta::Text(self.text(key)?),
            9 => {
                let item = self.u32(key)?;
                let least = match item {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    other => {
                        return Err((key.to_string(), format!("lists of type {other} are not supported")));
                    }
                };
                let n = self.count(least, key)?;
                self.items += n;
                if self.items > MAX_ITEMS {
                    return Err((key.to_string(), format!("lists hold more than {MAX_ITEMS} items")));
                }
                let mut items = Vec::with_capacity(n);
                for _ in 0..n {
                    items.push(self.value(item, key)?);
                }
                Meta::List(items)
            }
            10 => Meta::Unsigned(self.u64(key)?),
            11 => Meta::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Meta::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err((key.to_string(), format!("unknown value type {other}"))),
        })
    }
}

impl Gguf {
    /// Reads the header of a whole file in memory (usually mapped).
    ///
    /// # Errors
    /// `(place, message)` for anything that the file claims and does not hold.
    pub fn parse(file: &[u8]) -> Parsed<Self> {
        let mut c = Cursor { file, at: 0, items: 0 };
        let magic: [u8; 4] = c.array("magic")?;
        if &magic != b"GGUF" {
            return Err((
                "magic".into(),
                format!("expected \"GGUF\", found {:?}", String::from_utf8_lossy(&magic)),
            ));
        }
        match c.u32("version")? {
            2 | 3 => {}
            v => {
                return Err(("version".into(), format!("{v} is not supported (2 and 3 are, little endian)")));
            }
        }
        // A tensor entry takes at least 8 + 4 + 4 + 8 bytes, a key with its value at least 8 + 4 + 1.
        let tensors = c.count(24, "tensor count")?;
        let keys = c.count(13, "metadata count")?;
        let mut out = Self::default();
        for i in 0..keys {
            let key = c.text(&format!("metadata key {i}"))?;
            let kind = c.u32(&key)?;
            let value = c.value(kind, &key)?;
            if out.metadata.insert(key.clone(), value).is_some() {
                return Err((key, "this key appears twice".into()));
            }
        }
        let alignment = match out.metadata.get("general.alignment").map(|m| (m, m.as_u64())) {
            None => 32,
            Some((_, Some(n))) if n.is_power_of_two() && n <= 1 << 20 => n as usize,
            Some((m, _)) => {
                return Err((
                    "general.alignment".into(),
                    format!("expected a power of two up to 2^20, found {m:?}"),
                ));
            }
        };
        let mut table = Vec::with_capacity(tensors);
        for i in 0..tensors {
            let name = c.text(&format!("tensor name {i}"))?;
            let dims = c.u32(&name)? as usize;
            if dims == 0 || dims > MAX_DIMS {
                return Err((name, format!("{dims} dimensions; expected 1 to {MAX_DIMS}")));
            }
            let mut shape = vec![];
            for _ in 0..dims {
                shape.push(c.u64(&name)?);
            }
            shape.reverse();
            let code = c.u32(&name)?;
            let offset = c.u64(&name)?;
            table.push((name, shape, code, offset));
        }
        let data = c.at.next_multiple_of(alignment);
        for (name, shape, code, offset) in table {
            let elements =
                shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d).filter(|n| *n <= MAX_ELEMENTS));
            let Some(elements) = elements else {
                return Err((name, format!("shape {shape:?} is absurd")));
            };
            let kind = GgmlType::from_code(code).ok_or(code);
            let bytes = match kind {
                Err(_) => 0..0,
                Ok(kind) => {
                    let (per_block, block_bytes) = kind.block();
                    let row = shape.last().copied().unwrap_or(0);
                    if row % per_block as u64 != 0 {
                        return Err((
                            name,
                            format!("rows of {row} numbers do not fill {kind:?} blocks of {per_block}"),
                        ));
                    }
                    let len = elements / per_block as u64 * block_bytes as u64;
                    let end = (data as u64).checked_add(offset).and_then(|start| start.checked_add(len));
                    match end {
                        Some(end) if end <= file.len() as u64 => (end - len) as usize..end as usize,
                        _ => {
                            return Err((
                                name,
                                format!(
                                    "{len} bytes of data at offset {offset} (from byte {data}) lie outside the file of {} bytes\nhint: the download is incomplete, or the header is corrupt",
                                    file.len()
                                ),
                            ));
                        }
                    }
                }
            };
            let shape = shape.iter().map(|&d| d as usize).collect();
            if out.tensors.insert(name.clone(), GgufTensor { kind, shape, bytes }).is_some() {
                return Err((name, "this tensor appears twice".into()));
            }
        }
        Ok(out)
    }
}

/// Appends the numbers stored in `bytes` (whole blocks) to `out`.
pub fn dequantise(kind: GgmlType, bytes: &[u8], out: &mut Vec<f32>) {
    let (per_block, block_bytes) = kind.block();
    let from = out.len();
    out.resize(from + bytes.len() / block_bytes * per_block, 0.0);
    dequantise_into(kind, bytes, &mut out[from..]);
}

/// The numbers stored in `bytes` (whole blocks), as many as `out` holds.
pub(super) fn dequantise_into(kind: GgmlType, bytes: &[u8], out: &mut [f32]) {
    let (per_block, block_bytes) = kind.block();
    match kind {
        GgmlType::F32 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*b);
            }
        }
        GgmlType::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f16::from_le_bytes(*b).to_f32();
            }
        }
        GgmlType::Bf16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        _ => {
            for (b, y) in bytes.chunks_exact(block_bytes).zip(out.chunks_exact_mut(per_block)) {
                match kind {
                    GgmlType::Q8_0 => q8_0(b, y),
                    GgmlType::Q4_0 => small(b, y, Small { min: false, high: false }),
                    GgmlType::Q4_1 => small(b, y, Small { min: true, high: false }),
                    GgmlType::Q5_0 => small(b, y, Small { min: false, high: true }),
                    GgmlType::Q5_1 => small(b, y, Small { min: true, high: true }),
                    GgmlType::Q4_K => super_block(b, None, 16, y),
                    GgmlType::Q5_K => super_block(b, Some(16..48), 48, y),
                    _ => q6_k(b, y),
                }
            }
        }
    }
}

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// d · q, 32 signed bytes.
fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    for (y, &q) in y.iter_mut().zip(&b[2..34]) {
        *y = d * f32::from(q as i8);
    }
}

/// Which parts a block of 32 has.
#[derive(Clone, Copy)]
struct Small {
    /// An offset after the scale (`_1` types); else numbers are centred.
    min: bool,
    /// A fifth bit for each number.
    high: bool,
}

/// d · q + m in blocks of 32: low nibbles are the first half, high nibbles the second.
fn small(b: &[u8], y: &mut [f32], parts: Small) {
    let d = half_at(b, 0);
    let (m, mut at) = if parts.min { (half_at(b, 2), 4) } else { (0.0, 2) };
    let mut high = 0;
    if parts.high {
        high = u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        at += 4;
    }
    let centre = match (parts.min, parts.high) {
        (true, _) => 0,
        (false, false) => 8,
        (false, true) => 16,
    };
    for i in 0..16 {
        let q = b[at + i];
        let lo = i32::from(q & 15) | ((high >> i & 1) << 4) as i32;
        let hi = i32::from(q >> 4) | ((high >> (i + 16) & 1) << 4) as i32;
        y[i] = (lo - centre) as f32 * d + m;
        y[i + 16] = (hi - centre) as f32 * d + m;
    }
}

/// Q4_K and Q5_K: 8 sub-blocks of 32 with 6-bit scales and minima; `high` holds the fifth bits, `low` is where the
/// nibbles start.
fn super_block(b: &[u8], high: Option<Range<usize>>, low: usize, y: &mut [f32]) {
    let (d, dmin, s) = (half_at(b, 0), half_at(b, 2), &b[4..16]);
    let scale_min = |j: usize| {
        if j < 4 {
            (s[j] & 63, s[j + 4] & 63)
        } else {
            ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
        }
    };
    for j in 0..8 {
        let (scale, min) = scale_min(j);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        for l in 0..32 {
            let byte = b[low + j / 2 * 32 + l];
            let mut q = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
            if let Some(high) = &high {
                q |= (b[high.start + l] >> j & 1) << 4;
            }
            y[j * 32 + l] = scale * f32::from(q) - min;
        }
    }
}

/// Q6_K: 16 sub-blocks of 16 with 8-bit scales; four low bits and two high bits lie apart.
fn q6_k(b: &[u8], y: &mut [f32]) {
    let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half_at(b, 208));
    for n in 0..2 {
        for part in 0..4 {
            for l in 0..32 {
                let byte = low[n * 64 + part % 2 * 32 + l];
                let nibble = if part < 2 { byte & 15 } else { byte >> 4 };
                let q = i32::from(nibble | ((high[n * 32 + l] >> (2 * part) & 3) << 4)) - 32;
                let scale = d * f32::from(scales[n * 8 + part * 2 + l / 16] as i8);
                y[n * 128 + part * 32 + l] = scale * q as f32;
            }
        }
    }
}
