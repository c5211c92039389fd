//! Text to token ids and back.
//!
//! [`Tokenizer`] wraps the `tokenizers` crate and knows which tokens end a text; [`Detokenizer`] turns a stream
//! of ids into text that never ends inside a character and always equals the decoding of the whole.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use serde_json::{Map, Value};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, Model};

use crate::error::{EngineError, Result};
use crate::types::TokenId;

/// A vocabulary with its rules; cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// `bos_token`, `eos_token`, `pad_token`, … as templates see them.
    special_tokens: BTreeMap<String, String>,
    /// Whether each id is a special token; as long as the vocabulary.
    special: Arc<[bool]>,
    eos: Vec<TokenId>,
    vocab_size: usize,
    /// The bytes that no token covers, where printable ASCII is among them.
    gaps: Option<Arc<[bool; 256]>>,
    /// Of a byte-level vocabulary, what each token stands for.
    bytes: Option<Arc<TokenBytes>>,
}

/// The bytes of all tokens one after another, and where each ends.
struct TokenBytes {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl TokenBytes {
    fn new(inner: &tokenizers::Tokenizer, vocab_size: usize) -> Self {
        let mut table = Self { bytes: Vec::new(), ends: Vec::with_capacity(vocab_size) };
        for id in 0..vocab_size as TokenId {
            if let Some(token) = inner.id_to_token(id) {
                push_token_bytes(&token, &mut table.bytes);
            }
            table.ends.push(table.bytes.len() as u32);
        }
        table
    }

    /// Nothing for ids outside the vocabulary.
    fn of(&self, id: TokenId) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = (id as usize).checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size).field("eos", &self.eos).finish()
    }
}

impl Tokenizer {
    /// Wraps a tokenizer; `special_tokens` maps roles such as `eos_token` to tokens, and `eos` adds ids that end
    /// a text beyond the `eos_token`.
    ///
    /// # Errors
    /// An `eos_token` that is not in the vocabulary.
    pub fn new(
        inner: tokenizers::Tokenizer,
        special_tokens: BTreeMap<String, String>,
        eos: &[TokenId],
    ) -> Result<Self> {
        let added = inner.get_added_tokens_decoder();
        let largest = inner.get_vocab(true).values().copied().max();
        let vocab_size = largest.map_or(0, |id| id as usize + 1);
        if vocab_size > 1 << 24 {
            return Err(EngineError::Model(format!("tokenizer: largest id {} is absurd", vocab_size - 1)));
        }
        let mut special = vec![false; vocab_size];
        for (id, token) in &added {
            special[*id as usize] = token.special;
        }
        let mut ends = eos.to_vec();
        if let Some(token) = special_tokens.get("eos_token") {
            let id = inner.token_to_id(token).ok_or_else(|| {
                EngineError::Model(format!(
                    "tokenizer: eos_token `{token}` is not in the vocabulary\nhint: tokenizer.json and tokenizer_config.json belong together; take both from the same model"
                ))
            })?;
            ends.push(id);
        }
        ends.sort_unstable();
        ends.dedup();
        let gaps = byte_gaps(&inner).map(Arc::new);
        let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let bytes = byte_level.then(|| Arc::new(TokenBytes::new(&inner, vocab_size)));
        Ok(Self {
            inner: Arc::new(inner),
            special_tokens,
            special: special.into(),
            eos: ends,
            vocab_size,
            gaps,
            bytes,
        })
    }

    /// Reads a `tokenizer.json` alone: no roles, no end tokens.
    ///
    /// # Errors
    /// An unreadable or malformed file.
    pub fn from_file(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(EngineError::io(path))?;
        let inner = parse(path, &bytes)?;
        Self::new(inner, BTreeMap::new(), &[])
    }

    /// Reads a model folder: `tokenizer.json`, and roles and end tokens from `tokenizer_config.json`,
    /// `special_tokens_map.json` and `generation_config.json`; `config_eos` serves where the last names none.
    ///
    /// # Errors
    /// An unreadable or malformed file, or roles that are not in the vocabulary.
    pub fn from_folder(folder: &Path, config_eos: &[TokenId]) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.exists() && folder.join("tokenizer.model").exists() {
            return Err(EngineError::malformed(
                folder,
                "tokenizer.json",
                "missing; tokenizer.model alone is not supported\nhint: convert it once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            ));
        }
        let bytes = std::fs::read(&path).map_err(EngineError::io(&path))?;
        let inner = parse(&path, &bytes)?;
        let mut roles = BTreeMap::new();
        for name in ["special_tokens_map.json", "tokenizer_config.json"] {
            if let Some(map) = read_object(&folder.join(name))? {
                roles.extend(named_tokens(&map));
            }
        }
        let generation = folder.join("generation_config.json");
        let eos = match read_object(&generation)?.as_ref().and_then(|g| g.get("eos_token_id")) {
            None | Some(Value::Null) => config_eos.to_vec(),
            Some(value) => {
                let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
                let ids: Option<Vec<TokenId>> =
                    list.iter().map(|v| v.as_u64().and_then(|n| TokenId::try_from(n).ok())).collect();
                ids.ok_or_else(|| {
                    EngineError::malformed(
                        &generation,
                        "eos_token_id",
                        format!("expected token ids, found {value}"),
                    )
                })?
            }
        };
        Self::new(inner, roles, &eos)
    }

    /// A byte-per-token vocabulary of just the bytes of `characters` (in order of first appearance), then `added`
    /// tokens that stay visible in decoded text, then `special` ones that do not; the text ends with `eos`.
    ///
    /// # Errors
    /// An `eos` that is among neither.
    pub fn from_characters(characters: &str, added: &[&str], special: &[&str], eos: &str) -> Result<Self> {
        let mut vocab = tokenizers::models::bpe::Vocab::default();
        for byte in characters.bytes() {
            let next = vocab.len() as u32;
            vocab.entry(BYTE_CHARS[byte as usize].to_string()).or_insert(next);
        }
        let fail = |e: tokenizers::Error| EngineError::Model(format!("tokenizer: {e}"));
        let mut inner =
            tokenizers::Tokenizer::new(BPE::builder().vocab_and_merges(vocab, vec![]).build().map_err(fail)?);
        let bytes = ByteLevel::new(false, true, false);
        inner.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
        let token = |special: bool| move |t: &&str| AddedToken::from(*t, special).normalized(false);
        inner.add_tokens(added.iter().map(token(false))).map_err(fail)?;
        inner.add_special_tokens(special.iter().map(token(true))).map_err(fail)?;
        let roles = [("eos_token", eos), ("pad_token", eos)].map(|(k, v)| (k.to_string(), v.to_string()));
        Self::new(inner, roles.into(), &[])
    }

    /// Token ids of `text`; nothing is added, and special tokens that the text spells out are recognised.
    ///
    /// # Errors
    /// Characters that the vocabulary cannot express.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>> {
        let fail = |e: tokenizers::Error| EngineError::Model(format!("tokenizer: {e}"));
        let ids = self.inner.encode_fast(text, false).map_err(fail)?.get_ids().to_vec();
        if let Some(gaps) = &self.gaps {
            let lost = text
                .char_indices()
                .find(|(at, c)| (*at..at + c.len_utf8()).any(|i| gaps[text.as_bytes()[i] as usize]));
            // Added tokens may spell what the bytes cannot.
            if let Some((at, c)) = lost.filter(|_| self.decode(&ids, false) != text) {
                return Err(EngineError::Model(format!(
                    "tokenizer: no token for {c:?} at byte {at} of the text\nhint: use a tokenizer whose vocabulary covers the data"
                )));
            }
        }
        Ok(ids)
    }

    /// Token ids of `text`, and whether each token touches one of the byte `ranges` (in order), by the rule of
    /// transformers' `return_assistant_tokens_mask`: from the token of a range's first character to that of its
    /// last.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_marked(&self, text: &str, ranges: &[Range<usize>]) -> Result<(Vec<TokenId>, Vec<bool>)> {
        let fail = |e: tokenizers::Error| EngineError::Model(format!("tokenizer: {e}"));
        let encoding = self.inner.encode_char_offsets(text, false).map_err(fail)?;
        let ids = encoding.get_ids().to_vec();
        let mut mask = vec![false; ids.len()];
        for range in ranges.iter().filter(|r| !r.is_empty()) {
            let start = text[..range.start].chars().count();
            let end = start + text[range.clone()].chars().count();
            let Some(first) = encoding.char_to_token(start, 0) else { break };
            // A last character without a token (one that normalisation removed) leaves the range open.
            let last = encoding.char_to_token(end - 1, 0).filter(|t| *t > 0);
            let last = last.map_or(ids.len(), |t| t + 1).max(first);
            mask[first..last].fill(true);
        }
        Ok((ids, mask))
    }

    /// Text of `ids`; incomplete UTF-8 shows as U+FFFD, ids outside the vocabulary as nothing.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_else(|_| {
            // No decoder of a known model fails; one that did would still show its tokens.
            ids.iter().filter_map(|&id| self.inner.id_to_token(id)).collect()
        })
    }

    /// Id of a token, exactly as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token)
    }

    /// The vocabulary's spelling of an id.
    pub fn id_to_token(&self, id: TokenId) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Largest id plus one; a model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Ids that end a text, ascending.
    pub fn eos(&self) -> &[TokenId] {
        &self.eos
    }

    /// The padding token where one is named.
    pub fn pad(&self) -> Option<TokenId> {
        self.special_tokens.get("pad_token").and_then(|t| self.token_to_id(t))
    }

    /// Whether `decode` with `skip_special` leaves this id out.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Roles (`bos_token`, `eos_token`, …) and their tokens.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// The `tokenizer.json` of this tokenizer.
    ///
    /// # Errors
    /// None in practice; the serialiser's message if it fails.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|e| EngineError::Model(format!("tokenizer: {e}")))
    }
}

/// Reads a `tokenizer.json`.
fn parse(path: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    // The tokenizers crate panics on some malformed files (found by mutation): what is known is refused before it, the
    // rest is caught around it.
    let file: Value = serde_json::from_slice(bytes)
        .map_err(|e| EngineError::malformed(path, format!("line {}", e.line()), e.to_string()))?;
    check_merges(&file).map_err(|why| EngineError::malformed(path, "model.merges", why))?;
    drop(file);
    let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes));
    parsed
        .map_err(|_| EngineError::malformed(path, "tokenizer", "some part is not what its type needs"))?
        .map_err(|e| EngineError::malformed(path, "tokenizer", e.to_string()))
}

/// Refuses merges that the crate would cut out of bounds or inside a character: a second half without the
/// `continuing_subword_prefix`, a result longer than every token.
fn check_merges(file: &Value) -> std::result::Result<(), String> {
    let model = &file["model"];
    let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array()) else {
        return Ok(());
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    for merge in merges {
        let halves = match merge {
            Value::String(text) => text.split_once(' '),
            Value::Array(pair) => {
                pair.first().and_then(Value::as_str).zip(pair.get(1).and_then(Value::as_str))
            }
            _ => None,
        };
        let Some((left, right)) = halves else { continue };
        let Some(rest) = right.strip_prefix(prefix) else {
            return Err(format!("{merge} does not go on with the continuing_subword_prefix {prefix:?}"));
        };
        if left.len() + rest.len() > longest {
            return Err(format!("{merge} makes a token that is longer than any of the vocabulary"));
        }
    }
    Ok(())
}

/// The bytes without a token in a byte-level vocabulary that lacks some of printable ASCII, such as those of
/// [`Tokenizer::from_characters`]. Published vocabularies lack at most control and never-valid bytes, and drop them
/// as every other reader of their files does.
fn byte_gaps(inner: &tokenizers::Tokenizer) -> Option<[bool; 256]> {
    let ModelWrapper::BPE(bpe) = inner.get_model() else { return None };
    let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
    if bpe.get_unk_token().is_some() || bpe.byte_fallback || !byte_level {
        return None;
    }
    let gaps: [bool; 256] =
        std::array::from_fn(|byte| bpe.token_to_id(&BYTE_CHARS[byte].to_string()).is_none());
    gaps[0x20..0x7f].contains(&true).then_some(gaps)
}

/// The object in a JSON file, or `None` where there is no file.
pub(crate) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(EngineError::io(path)(e)),
    };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(EngineError::malformed(path, "top level", "expected an object")),
        Err(e) => Err(EngineError::malformed(path, format!("line {}", e.line()), e.to_string())),
    }
}

/// The `*_token` entries, written as text or as `{"content": text, …}`.
fn named_tokens(map: &Map<String, Value>) -> impl Iterator<Item = (String, String)> + '_ {
    map.iter().filter(|(key, _)| key.ends_with("_token")).filter_map(|(key, value)| {
        let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str))?;
        Some((key.clone(), text.to_string()))
    })
}

/// The printable character that byte-level vocabularies write for each byte (GPT-2's `bytes_to_unicode`).
static BYTE_CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 256;
    std::array::from_fn(|byte| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte as u8),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("below the surrogates")
        }
    })
});

/// Byte of each such character, by code point.
static CHAR_BYTES: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut bytes = vec![None; 512];
    for (byte, c) in BYTE_CHARS.iter().enumerate() {
        bytes[*c as usize] = Some(byte as u8);
    }
    bytes
});

/// Appends the bytes that a byte-level token stands for; a token outside the byte alphabet stands for itself.
fn push_token_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        match CHAR_BYTES.get(c as usize).copied().flatten() {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// Decodes ids one at a time.
///
/// The text so far always ends at a whole character; bytes of an unfinished one wait for the next token (or
/// for [`Detokenizer::finish`], which shows them as U+FFFD like [`Tokenizer::decode`]).
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    ids: Vec<TokenId>,
    text: String,
    /// Byte end of each pushed token in `text`; a token that ends inside a character ends before it.
    ends: Vec<u32>,
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    /// Byte-level vocabularies: the bytes of an unfinished character.
    Bytes(Vec<u8>),
    /// Any other decoder: it sees the tokens from `anchor` on, of whose text `known` bytes are out already.
    Window { anchor: usize, known: usize },
}

impl Detokenizer {
    /// Starts an empty text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        let mode = match &tokenizer.bytes {
            Some(_) => Mode::Bytes(vec![]),
            None => Mode::Window { anchor: 0, known: 0 },
        };
        Self {
            tokenizer: tokenizer.clone(),
            skip_special,
            ids: vec![],
            text: String::new(),
            ends: vec![],
            mode,
        }
    }

    /// Makes room for `tokens` more ids, and for their text at four bytes each.
    pub fn reserve(&mut self, tokens: usize) {
        self.ids.reserve_exact(tokens);
        self.ends.reserve_exact(tokens);
        self.text.reserve(4 * tokens);
    }

    /// Takes one more id and returns the text that it completed (often the token, sometimes nothing).
    pub fn push(&mut self, id: TokenId) -> &str {
        let before = self.text.len();
        self.ids.push(id);
        match &mut self.mode {
            Mode::Bytes(pending) => {
                if !(self.skip_special && self.tokenizer.is_special(id)) {
                    pending
                        .extend_from_slice(self.tokenizer.bytes.as_ref().map_or(&[], |bytes| bytes.of(id)));
                    take_complete(pending, &mut self.text);
                }
            }
            Mode::Window { anchor, known } => {
                let hidden = (self.skip_special && self.tokenizer.is_special(id))
                    || self.tokenizer.id_to_token(id).is_none();
                let waits = hidden || is_byte_token(&self.tokenizer, id);
                let window = if waits {
                    String::new()
                } else {
                    self.tokenizer.decode(&self.ids[*anchor..], self.skip_special)
                };
                if !waits
                    && !window.ends_with('\u{FFFD}')
                    && window.is_char_boundary(*known)
                    && window.len() >= *known
                {
                    self.text.push_str(&window[*known..]);
                    // The next window starts at this token: its decoder then sees a left neighbour.
                    *anchor = self.ids.len() - 1;
                    *known = self.tokenizer.decode(&self.ids[*anchor..], self.skip_special).len();
                }
            }
        }
        self.ends.push(self.text.len() as u32);
        &self.text[before..]
    }

    /// The text so far, whole characters only.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What [`Tokenizer::decode`] gives for the ids so far: the text and U+FFFD for what is unfinished.
    pub fn preview(&self) -> String {
        match &self.mode {
            Mode::Bytes(pending) => format!("{}{}", self.text, String::from_utf8_lossy(pending)),
            Mode::Window { .. } => self.tokenizer.decode(&self.ids, self.skip_special),
        }
    }

    /// Byte offset in [`Detokenizer::text`] at which each pushed token ends.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Ids pushed so far.
    pub fn ids(&self) -> &[TokenId] {
        &self.ids
    }

    /// The whole text, equal to [`Tokenizer::decode`], and the byte end of each token in it.
    pub fn finish(mut self) -> (String, Vec<u32>) {
        let whole = self.preview();
        // Tokens that wait at the end finish with the text.
        let settled = self.text.len() as u32;
        let waiting = self.ends.iter().rev().take_while(|e| **e == settled).count();
        if whole.len() > self.text.len()
            && waiting > 0
            && let Some(last) = self.ends.last_mut()
        {
            *last = whole.len() as u32;
        }
        // A decoder that rewrote earlier text can have moved the character boundaries.
        for end in &mut self.ends {
            let mut at = (*end as usize).min(whole.len());
            while !whole.is_char_boundary(at) {
                at -= 1;
            }
            *end = at as u32;
        }
        (whole, self.ends)
    }
}

/// Moves the whole characters (and U+FFFD for bytes that no continuation can save) from `pending` to `text`.
fn take_complete(pending: &mut Vec<u8>, text: &mut String) {
    let mut start = 0;
    loop {
        match std::str::from_utf8(&pending[start..]) {
            Ok(valid) => {
                text.push_str(valid);
                start = pending.len();
                break;
            }
            Err(e) => {
                let valid = &pending[start..start + e.valid_up_to()];
                text.push_str(&String::from_utf8_lossy(valid));
                start += e.valid_up_to();
                match e.error_len() {
                    Some(bad) => {
                        text.push('\u{FFFD}');
                        start += bad;
                    }
                    None => break,
                }
            }
        }
    }
    pending.drain(..start);
}

/// Whether this is a byte-fallback token such as `<0xE2>`: its neighbours decide what it shows.
fn is_byte_token(tokenizer: &Tokenizer, id: TokenId) -> bool {
    tokenizer.id_to_token(id).is_some_and(|t| t.len() == 6 && t.starts_with("<0x") && t.ends_with('>'))
}
