//! Encoding, decoding and incremental decoding against transformers, and their own laws.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rft_engine::data::tokenizer::{Detokenizer, Tokenizer};
use serde_json::{Value, json};

/// Root of the fixtures: `RFT_FIXTURES`, else the repository's own.
fn fixtures() -> PathBuf {
    std::env::var_os("RFT_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .unwrap()
}

fn load(name: &str) -> Tokenizer {
    Tokenizer::from_folder(&fixtures().join("tokenizers").join(name), &[]).unwrap()
}

#[test]
fn parity_tokenizer_cases() {
    let file = read_json(&fixtures().join("chat/tokenizer_cases.json"));
    let mut loaded: HashMap<String, Tokenizer> = HashMap::new();
    let (mut total, mut prefixes, mut wrong) = (0, 0, vec![]);
    for case in file["cases"].as_array().unwrap() {
        let name = case["tokenizer"].as_str().unwrap();
        let tokenizer = loaded.entry(name.to_string()).or_insert_with(|| load(name));
        let text = case["text"].as_str().unwrap();
        total += 1;
        let ids = tokenizer.encode(text).unwrap();
        let tokens: Vec<String> = ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect();
        let mut same = json!(ids) == case["ids"]
            && json!(tokens) == case["tokens"]
            && json!(tokenizer.decode(&ids, false)) == case["decoded"]
            && json!(tokenizer.decode(&ids, true)) == case["decoded_skip_special"];
        let mut stream = Detokenizer::new(tokenizer, false);
        // Long texts come without prefixes; the whole must still agree.
        let wanted = case["prefix_decodes"].as_array().map_or(&[][..], Vec::as_slice);
        assert!(wanted.is_empty() || wanted.len() == ids.len());
        for (i, id) in ids.iter().enumerate() {
            stream.push(*id);
            let Some(want) = wanted.get(i) else { continue };
            same &= json!(stream.preview()) == *want && want.as_str().unwrap().starts_with(stream.text());
            prefixes += 1;
        }
        same &= json!(stream.finish().0) == case["decoded"];
        if !same {
            wrong.push(format!("{name}: {text:?}"));
        }
    }
    println!("tokenizer cases: {} of {total} agree ({prefixes} prefixes)", total - wrong.len());
    assert!(total > 0 && wrong.is_empty(), "{wrong:?}");
}

/// A Llama-style tokenizer: `▁` for spaces, byte fallback, the first space stripped.
fn sentencepiece_like() -> Tokenizer {
    let mut vocab = json!({"<unk>": 0, "</s>": 1, "▁": 2, "▁a": 3, "b": 4, "▁é": 5, "a": 6});
    for byte in 0..256u32 {
        vocab[format!("<0x{byte:02X}>")] = json!(7 + byte);
    }
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "post_processor": null,
        "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": ["▁ a"]},
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), json!({"eos_token": "</s>"}).to_string())
        .unwrap();
    Tokenizer::from_folder(folder.path(), &[]).unwrap()
}

/// What must hold for any ids: the stream equals the whole, ends are ordered whole characters, the text only grows.
fn check_stream(tokenizer: &Tokenizer, ids: &[u32], skip: bool) {
    let mut stream = Detokenizer::new(tokenizer, skip);
    let mut joined = String::new();
    for (i, &id) in ids.iter().enumerate() {
        let piece = stream.push(id).to_string();
        joined.push_str(&piece);
        assert_eq!(joined, stream.text());
        let whole = tokenizer.decode(&ids[..=i], skip);
        assert!(whole.starts_with(stream.text()), "{ids:?}: {:?} is no start of {whole:?}", stream.text());
        assert_eq!(stream.preview(), whole);
    }
    let (text, ends) = stream.finish();
    assert_eq!(text, tokenizer.decode(ids, skip));
    assert_eq!(ends.len(), ids.len());
    assert!(
        ends.is_sorted() && ends.iter().all(|&e| text.is_char_boundary(e as usize)),
        "{ends:?} in {text:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn streams_equal_the_whole_byte_level(ids in prop::collection::vec(0u32..560, 0..40), skip: bool) {
        thread_local!(static TINY: Tokenizer = load("tiny-text"));
        TINY.with(|t| check_stream(t, &ids, skip));
    }

    #[test]
    fn streams_equal_the_whole_byte_fallback(
        ids in prop::collection::vec(prop_oneof![0u32..7, 7u32..263, prop::sample::select(vec![7 + 0xE2, 7 + 0x82, 7 + 0xAC])], 0..24),
        skip: bool,
    ) {
        thread_local!(static LLAMA: Tokenizer = sentencepiece_like());
        LLAMA.with(|t| check_stream(t, &ids, skip));
    }

    #[test]
    fn text_survives_encoding(text in "\\PC{0,40}") {
        thread_local!(static SMOL: Tokenizer = load("smollm2"));
        SMOL.with(|t| {
            let ids = t.encode(&text).unwrap();
            assert_eq!(t.decode(&ids, false), text);
            check_stream(t, &ids, true);
        });
    }
}

#[test]
fn byte_ends_follow_the_tokens() {
    let tokenizer = load("tiny-text");
    let ids = tokenizer.encode("a€b<|im_end|>").unwrap();
    let mut stream = Detokenizer::new(&tokenizer, true);
    for &id in &ids {
        stream.push(id);
    }
    let (text, ends) = stream.finish();
    assert_eq!(text, "a€b");
    // The euro sign takes several tokens; all but its last end before it, and the special token adds nothing.
    assert_eq!(ends.first(), Some(&1));
    assert_eq!(&ends[ends.len() - 3..], [4, 5, 5]);
}

#[test]
fn a_vocabulary_of_characters_survives_a_round_trip() {
    let tokenizer =
        Tokenizer::from_characters("0123456789+-= \n", &["<think>", "</think>"], &["<eos>"], "<eos>")
            .unwrap();
    assert_eq!(tokenizer.vocab_size(), 18);
    let text = "<think>12+3 = 15\n</think><eos>";
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(ids, [15, 1, 2, 10, 3, 13, 12, 13, 1, 5, 14, 16, 17]);
    assert_eq!(
        tokenizer.decode(&ids, true),
        "<think>12+3 = 15\n</think>",
        "added tokens stay, special ones go"
    );
    assert_eq!(tokenizer.eos(), [17]);
    check_stream(&tokenizer, &ids, true);

    let unknown = tokenizer.encode("12 x 3").unwrap_err().to_string();
    assert!(unknown.contains("'x' at byte 3"), "{unknown}");

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_json().unwrap()).unwrap();
    let again = Tokenizer::from_folder(folder.path(), &[17]).unwrap();
    assert_eq!((again.encode(text).unwrap(), again.eos()), (ids, &[17u32][..]));
    assert!(again.encode("x").is_err());
}

#[test]
fn end_tokens_come_from_every_file_that_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let write =
        |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    let tiny = fixtures().join("tokenizers/tiny-text");
    std::fs::copy(tiny.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let eos = || Tokenizer::from_folder(folder.path(), &[3]).unwrap().eos().to_vec();
    assert_eq!(eos(), [3], "the model's config, where nothing else says");
    write("tokenizer_config.json", &json!({"eos_token": {"content": "<|im_end|>"}}));
    assert_eq!(eos(), [3, 511]);
    write("generation_config.json", &json!({"eos_token_id": [511, 509]}));
    assert_eq!(eos(), [509, 511]);
    write("tokenizer_config.json", &json!({"eos_token": "<|nowhere|>"}));
    let error = Tokenizer::from_folder(folder.path(), &[]).unwrap_err().to_string();
    assert!(error.contains("<|nowhere|>") && error.contains("hint:"), "{error}");
    write("generation_config.json", &json!({"eos_token_id": "two"}));
    let error = Tokenizer::from_folder(folder.path(), &[]).unwrap_err().to_string();
    assert!(error.contains("generation_config.json") && error.contains("eos_token_id"), "{error}");
    std::fs::write(folder.path().join("tokenizer.json"), "{\"version\": ").unwrap();
    let error = Tokenizer::from_folder(folder.path(), &[]).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

#[test]
fn merges_that_fit_no_token_are_refused_by_name() {
    let read = |change: &dyn Fn(&mut Value)| {
        let mut file = read_json(&fixtures().join("tokenizers/tiny-text/tokenizer.json"));
        change(&mut file["model"]);
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("tokenizer.json");
        std::fs::write(&path, file.to_string()).unwrap();
        Tokenizer::from_file(&path).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(read(&|_| {}), Ok(()));
    // the prefix is one byte into a two-byte character of the second half, or longer than it
    for prefix in ["\u{120}", "a prefix longer than any token"] {
        let error = read(&|model| model["continuing_subword_prefix"] = json!(prefix)).unwrap_err();
        assert!(error.contains("model.merges") && error.contains("continuing_subword_prefix"), "{error}");
    }
    let long = "x".repeat(300);
    let error = read(&|model| model["merges"] = json!([[long, "y"]])).unwrap_err();
    assert!(error.contains("longer than any"), "{error}");
}
