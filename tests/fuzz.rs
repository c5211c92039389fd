//! Files and texts from strangers, damaged with their structure in mind: every parser answers or refuses, without a
//! panic, within bounded memory and time.
//!
//! `RFT_FUZZ_SECONDS=600 cargo test --release --test fuzz` runs each target for ten minutes; see `support/fuzz.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rft_engine::config::{DEFAULT_RECIPE, Recipe};
use rft_engine::data::prompts::{Renderer, read_placed};
use rft_engine::data::template::ChatTemplate;
use rft_engine::data::tokenizer::Tokenizer;
use rft_engine::model::peft::PeftAdapter;
use rft_engine::model::policy::Policy;
use rft_engine::model::source::ModelSource;
use rft_engine::model::spec::ModelSpec;
use rft_rewards::boxes::{DetectionOptions, LabeledBox, detection, read_boxes};
use rft_rewards::math::{VerifyOptions, extract_choice, parse_number, verify};
use rft_rewards::tools::{BfclOptions, ToolRlOptions, bfcl, parse_any, toolrl};
use rft_rewards::{Context, RewardPool, RewardSpec, Sample, resolve};
use serde_json::{Map, Value, json};

#[path = "support/fuzz.rs"]
mod fuzz;
#[path = "support/gguf.rs"]
mod gguf;
use fuzz::{Limits, Rng, damage_bytes, damage_json, damage_words, fuzz};

#[global_allocator]
static ALLOCATOR: fuzz::Counting = fuzz::Counting;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

fn bytes_of(path: &str) -> Vec<u8> {
    std::fs::read(fixture(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn json_of(path: &str) -> Value {
    serde_json::from_slice(&bytes_of(path)).unwrap()
}

/// A copy of a fixture folder that a target may damage.
fn copy_of(folder: &str) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(folder)).unwrap() {
        let path = entry.unwrap().path();
        if !path.to_string_lossy().contains("golden") {
            std::fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    to
}

/// Damages a JSON document as a tree, or now and then as bytes.
fn damaged_json(rng: &mut Rng, document: &Value) -> Vec<u8> {
    let mut document = document.clone();
    if !rng.once_in(8) {
        damage_json(rng, &mut document);
        return serde_json::to_vec(&document).unwrap();
    }
    let mut bytes = serde_json::to_vec(&document).unwrap();
    let length = bytes.len();
    damage_bytes(rng, &mut bytes, length);
    bytes
}

/// Damages a safetensors file: its header's fields, the header's length, or bytes.
fn damaged_safetensors(rng: &mut Rng, file: &[u8]) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let mut data = file[8 + length..].to_vec();
    if rng.once_in(4) {
        let mut bytes = file.to_vec();
        let front = if rng.once_in(3) { 8 } else { 8 + length };
        damage_bytes(rng, &mut bytes, front);
        return bytes;
    }
    // half of the time only what a tensor says of itself, which the top-level tree rarely hits
    let name = header.as_object().unwrap().keys().nth(rng.below(10)).cloned().unwrap_or_default();
    match header.get_mut(&name).filter(|_| rng.once_in(2)) {
        Some(tensor) if rng.once_in(2) => {
            let types = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "F128"];
            tensor["dtype"] = json!(rng.pick(&types));
        }
        Some(tensor) => damage_json(rng, tensor),
        None => damage_json(rng, &mut header),
    }
    if rng.once_in(8) {
        data.truncate(rng.below(data.len() + 1));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut stated = header.len() as u64;
    if rng.once_in(8) {
        stated = rng.hostile_number();
    }
    [&stated.to_le_bytes()[..], &header, &data].concat()
}

/// Opens a model and reads all that a run reads.
fn open_all(path: &Path) -> bool {
    let Ok(source) = ModelSource::open(path) else { return false };
    let mut good = true;
    for name in source.names() {
        let shape = source.shape(&name).unwrap_or_default();
        good &= source.tensor(&name, &shape).is_ok();
    }
    good &= Policy::load(&source, None, 0).is_ok();
    match source.tokenizer() {
        Ok(tokenizer) => {
            let _ = tokenizer.encode("Hello <|im_end|> 12");
            good & source.chat_template(&tokenizer).is_ok()
        }
        Err(_) => false,
    }
}

#[test]
fn fuzz_safetensors() {
    let folder = copy_of("models/qwen2_yarn");
    let (path, whole) =
        (folder.path().join("model.safetensors"), bytes_of("models/qwen2_yarn/model.safetensors"));
    fuzz(
        "safetensors",
        Limits::default(),
        |rng| damaged_safetensors(rng, &whole),
        |bytes| {
            std::fs::write(&path, bytes).unwrap();
            open_all(folder.path())
        },
    );
}

#[test]
fn fuzz_safetensors_index() {
    let folder = copy_of("models/qwen2_yarn");
    let names = ModelSource::open(folder.path()).unwrap().names();
    let shard = |i: usize| format!("model-{i:05}-of-00002.safetensors");
    // the second shard holds one tensor that nothing needs
    let header = br#"{"model.rotary_emb.inv_freq":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let second = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 4]].concat();
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join(shard(1))).unwrap();
    std::fs::write(folder.path().join(shard(2)), second).unwrap();
    let mut map: Map<String, Value> = names.iter().map(|n| (n.clone(), json!(shard(1)))).collect();
    map.insert("model.rotary_emb.inv_freq".into(), json!(shard(2)));
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    let path = folder.path().join("model.safetensors.index.json");
    fuzz(
        "safetensors index",
        Limits::default(),
        |rng| damaged_json(rng, &index),
        |bytes| {
            std::fs::write(&path, bytes).unwrap();
            open_all(folder.path())
        },
    );
}

#[test]
fn fuzz_gguf() {
    let whole = gguf::to_gguf(&fixture("models/qwen2_yarn"), "qwen2");
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("m.gguf");
    // all before the tensors' data: counts, metadata, names, shapes, types, offsets
    let data = json_of("models/qwen2_yarn/config.json")["vocab_size"].as_u64().unwrap() as usize * 32 * 4;
    let front = whole.len() - data.min(whole.len() / 2);
    let make = |rng: &mut Rng| {
        let mut bytes = whole.clone();
        match rng.below(3) {
            // the counts
            0 => damage_bytes(rng, &mut bytes, 24),
            // one hostile length, count, type or offset somewhere in the header
            1 => {
                let at = 8 + rng.below(front - 16);
                let width = *rng.pick(&[4, 8]);
                bytes[at..at + width].copy_from_slice(&rng.hostile_number().to_le_bytes()[..width]);
            }
            _ => damage_bytes(rng, &mut bytes, front),
        }
        bytes
    };
    fuzz("gguf", Limits::default(), make, |bytes| {
        std::fs::write(&path, bytes).unwrap();
        open_all(&path)
    });
}

#[test]
fn fuzz_config() {
    let families = [
        "gemma",
        "gemma2",
        "gemma3",
        "llama_untied_rope3",
        "mistral_swa",
        "mixtral",
        "phi3",
        "qwen2_yarn",
        "qwen3_moe",
        "smollm3",
    ];
    let configs: Vec<(tempfile::TempDir, Value)> = families
        .iter()
        .flat_map(|f| ["config.json", "config_v4.json"].map(|c| format!("models/{f}/{c}")))
        .map(|path| (copy_of(Path::new(&path).parent().unwrap().to_str().unwrap()), json_of(&path)))
        .collect();
    // the first byte says which folder
    let make = |rng: &mut Rng| {
        let at = rng.below(configs.len());
        [vec![at as u8], damaged_json(rng, &configs[at].1)].concat()
    };
    fuzz("config.json", Limits::default(), make, |bytes| {
        let folder = configs[bytes[0] as usize].0.path();
        if let Ok(config) = serde_json::from_slice::<Value>(&bytes[1..])
            && let Ok(spec) = ModelSpec::from_config_json(&config)
        {
            spec.ropes.iter().for_each(|r| drop(r.inv_freq(512)));
            let written = ModelSpec::from_config_json(&spec.to_config_json("float32"));
            assert!(written.is_ok(), "written and not read back: {:?}", written.err());
        }
        std::fs::write(folder.join("config.json"), &bytes[1..]).unwrap();
        open_all(folder)
    });
}

#[test]
fn fuzz_tokenizer() {
    let folders: Vec<(tempfile::TempDir, Vec<(&str, Value)>)> =
        ["models/qwen2_yarn", "tokenizers/tiny-text", "tokenizers/tiny-vl"]
            .iter()
            .map(|f| {
                let files = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
                let present = files.into_iter().filter(|n| fixture(f).join(n).exists());
                (copy_of(f), present.map(|n| (n, json_of(&format!("{f}/{n}")))).collect())
            })
            .collect();
    let make = |rng: &mut Rng| {
        let at = rng.below(folders.len());
        let which = rng.below(folders[at].1.len());
        let mut document = folders[at].1[which].1.clone();
        // the vocabulary is most of the tree: half of the time damage what stands around it
        if let Some(model) = document.get_mut("model").filter(|_| rng.once_in(2)) {
            let vocab = model.as_object_mut().unwrap().shift_remove("vocab");
            let merges = model.as_object_mut().unwrap().shift_remove("merges");
            damage_json(rng, &mut document);
            if let Some(model) = document.get_mut("model").and_then(Value::as_object_mut) {
                model.extend(vocab.map(|v| ("vocab".to_string(), v)));
                model.extend(merges.map(|v| ("merges".to_string(), v)));
            }
            return [vec![at as u8, which as u8], serde_json::to_vec(&document).unwrap()].concat();
        }
        [vec![at as u8, which as u8], damaged_json(rng, &document)].concat()
    };
    // a vocabulary is a map of strings, forwards and backwards, beside the tree it was read from
    let limits = Limits { bytes: 96 << 20, ..Limits::default() };
    fuzz("tokenizer.json", limits, make, |bytes| {
        let (folder, files) = &folders[bytes[0] as usize];
        let (name, whole) = &files[bytes[1] as usize];
        std::fs::write(folder.path().join(name), &bytes[2..]).unwrap();
        let read = Tokenizer::from_folder(folder.path(), &[]);
        let good = read.is_ok();
        if let Ok(tokenizer) = read {
            let ids = tokenizer.encode("Hello <|im_end|>\n 12 é").unwrap_or_default();
            let _ = tokenizer.decode(&ids, false);
            let _ = tokenizer.decode(&[0, 1, u32::MAX], true);
            let _ = tokenizer.encode_marked("Hello 12", std::slice::from_ref(&(0..5)));
        }
        std::fs::write(folder.path().join(name), serde_json::to_vec(whole).unwrap()).unwrap();
        good
    });
}

#[test]
fn fuzz_adapter() {
    let source = ModelSource::open(fixture("models/qwen2")).unwrap();
    let folder = copy_of("adapters/qwen2_lora");
    let (config, weights) = (
        json_of("adapters/qwen2_lora/adapter_config.json"),
        bytes_of("adapters/qwen2_lora/adapter_model.safetensors"),
    );
    let make = |rng: &mut Rng| match rng.once_in(2) {
        true => [vec![0], damaged_json(rng, &config)].concat(),
        false => [vec![1], damaged_safetensors(rng, &weights)].concat(),
    };
    fuzz("adapter", Limits::default(), make, |bytes| {
        let (name, whole) = match bytes[0] {
            0 => ("adapter_config.json", serde_json::to_vec(&config).unwrap()),
            _ => ("adapter_model.safetensors", weights.clone()),
        };
        std::fs::write(folder.path().join(name), &bytes[1..]).unwrap();
        let good = PeftAdapter::open(folder.path()).is_ok_and(|adapter| {
            let policy = Policy::load(&source, Some(adapter.config()), 0);
            policy.is_ok_and(|mut policy| adapter.load_into(&mut policy, 0).is_ok())
        });
        std::fs::write(folder.path().join(name), whole).unwrap();
        good
    });
}

/// What templates of strangers are made of, and what would hurt.
const PIECES: &[&str] = &[
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if m.role == 'user' %}",
    "{% else %}",
    "{% endif %}",
    "{{ m.content }}",
    "{{ a }}",
    "{% set a = a + a %}",
    "{% set a = [1, 2, 3] %}",
    "{% set a = 'xxxxxxxx' %}",
    "{% set a = a * 1000 %}",
    "{% set a = [a, a] %}",
    "{% set a = {'k': a, 'l': a} %}",
    "{% set a = a ~ a %}",
    "{% set ns = namespace(x=[1]) %}",
    "{% set ns.x = ns.x + ns.x %}",
    "{% set ns.x = [ns.x] %}",
    "{% for i in range(100000) %}",
    "{% for i in range(60) %}",
    "{% for i in range(1000000000) %}",
    "{% for i in a %}",
    "{{ a | tojson }}",
    "{{ a | tojson(indent=40) }}",
    "{{ a | join('x' * 1000) }}",
    "{{ a | length }}",
    "{{ a | list }}",
    "{{ a | sort }}",
    "{{ a | unique | list }}",
    "{{ a | reverse | list }}",
    "{{ a | batch(1) | list }}",
    "{{ a | string | upper }}",
    "{{ a | replace('x', 'x' * 1000) }}",
    "{{ a[::2] }}",
    "{{ a[0] }}",
    "{{ a | last }}",
    "{{ a | center(999999999) }}",
    "{{ a | indent(99999999) }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ 'x' * 999999999 }}",
    "{{ 9 ** 999999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ -9 // 0 }}",
    "{{ 1 % 0 }}",
    "{{ 9223372036854775807 + 1 }}",
    "{{ a.split('') }}",
    "{{ a.split('x') | list }}",
    "{{ a.zfill(99999999) }}",
    "{{ a.ljust(99999999) }}",
    "{{ a.join(['x'] * 99999) }}",
    "{{ a.replace('', a) }}",
    "{{ a.items() | list }}",
    "{{ a == a }}",
    "{{ a in a }}",
    "{{ a < a }}",
    "{% macro f(x) %}",
    "{{ f(a) }}",
    "{{ f(f(a)) }}",
    "{% endmacro %}",
    "{% call f(1) %}",
    "{% endcall %}",
    "{{ caller() }}",
    "{% include 'chat' %}",
    "{% extends 'chat' %}",
    "{% import 'chat' as c %}",
    "{% block b %}",
    "{% endblock %}",
    "{{ self.b() }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% filter upper %}",
    "{% endfilter %}",
    "{% raw %}",
    "{% endraw %}",
    "{{ strftime_now('%Y-%m-%d') }}",
    "{{ strftime_now('%9999999d') }}",
    "{{ raise_exception('no') }}",
    "{{ range(99999999) | list }}",
    "{{ range(10) | map('string') | join }}",
    "{{ a | groupby('x') }}",
    "{{ lipsum(99999) }}",
    "{{ cycler(1, 2) }}",
    "{{ a | pprint }}",
    "{{ a | selectattr('x') | list }}",
    "{{ a | zip(a) | list }}",
    "{{ a | chain(a) | list }}",
    "{{ debug() }}",
    "{{ loop(a) }}",
    "{% for i in a recursive %}",
    "{{ loop([i]) }}",
    "{{ a | sum }}",
    "{{ a | dictsort }}",
    "{{ a | urlencode }}",
    "{{ a | escape }}",
    "x",
    " ",
    "\n",
    "{#",
    "#}",
    "{{",
    "}}",
    "{%",
    "%}",
    "(",
    "[",
];

#[test]
fn fuzz_chat_templates() {
    let ours = "{%- macro show(m) %}{{ m.role | upper ~ ': ' }}{% endmacro %}\n{% set ns = namespace(i=0) %}{% for m in messages if m.content is string %}{% set ns.i = ns.i + 1 %}<|{{ show(m) }}|>{% generation %}{{ m.content.strip().split('x')[0] | trim | tojson(indent=1) }}{% endgeneration %}{% if loop.last and add_generation_prompt %}{{ '<|a|>' * ns.i }}{% endif %}{% endfor %}{# note #}";
    let make = |rng: &mut Rng| {
        if rng.once_in(3) {
            return damage_words(rng, ours, PIECES);
        }
        let (mut source, mut open) = (String::from("{% set a = [1, 'x'] %}"), vec![]);
        for _ in 0..1 + rng.below(14) {
            let piece = rng.pick(PIECES);
            // most blocks are closed, or nearly nothing would compile
            if let Some(name) = piece.strip_prefix("{% ").and_then(|p| p.split(' ').next()) {
                if ["for", "if", "macro", "call", "block", "filter", "generation"].contains(&name) {
                    open.push(name);
                } else if piece.starts_with("{% end") && !rng.once_in(6) {
                    if let Some(name) = open.pop() {
                        source.push_str(&format!("{{% end{name} %}}"));
                    }
                    continue;
                }
            }
            source.push_str(piece);
        }
        open.iter().rev().for_each(|name| source.push_str(&format!("{{% end{name} %}}")));
        source
    };
    let limits = Limits { bytes: 256 << 20, time: Duration::from_secs(1) };
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]);
    fuzz("chat template", limits, make, |source| {
        ChatTemplate::new(source, &BTreeMap::new())
            .and_then(|t| t.render(&messages, None, &Map::new(), true))
            .is_ok()
    });
}

#[test]
fn fuzz_recipe() {
    let recipes = [
        DEFAULT_RECIPE.to_string(),
        std::fs::read_to_string(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/recipes/smollm2-math.toml"),
        )
        .unwrap(),
        Recipe::load(None, &["algorithm.preset=\"dapo\"".into()]).unwrap().to_toml(),
    ];
    let foreign = [
        "0",
        "-1",
        "1e999",
        "nan",
        "inf",
        "9223372036854775807",
        "99999999999999999999",
        "\"",
        "\"\"\"",
        "[",
        "]]",
        "[[stage]]\n",
        "{",
        "}",
        "true",
        "'x'",
        "\n",
        "#",
        "a.b.c = 1\n",
        "[a.b]\n",
        "1979-05-27",
        "0x7fff",
        "\\u0000",
        "é",
        "= = ",
        "steps = 0\n",
        "kind = \"sft\"\n",
    ];
    fuzz(
        "recipe",
        Limits::default(),
        |rng| {
            let text = rng.pick(&recipes).clone();
            damage_words(rng, &text, &foreign)
        },
        |text| {
            let overrides: Vec<String> =
                text.lines().rev().take(text.len() % 3).map(|l| l.replace(' ', "")).collect();
            let _ = Recipe::parse(text, "fuzzed.toml", &overrides);
            let Ok(recipe) = Recipe::parse(text, "fuzzed.toml", &[]) else { return false };
            let again = Recipe::parse(&recipe.to_toml(), "again", &[]).expect("a resolved recipe reads back");
            assert_eq!(again, recipe);
            true
        },
    );
}

#[test]
fn fuzz_prompt_rows() {
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizers/tiny-text"), &[]).unwrap();
    let chat = ChatTemplate::new(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}",
        &BTreeMap::new(),
    )
    .unwrap();
    let rows = [
        json!({"id": 7, "prompt": "2 + 2?", "answer": "4", "n": [1, 2.5, null]}),
        json!({"id": "b", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "tools": [{"name": "f"}], "prompt": null}),
        json!({"question": "{a} é \u{1F600}", "prompt": "x", "messages": []}),
    ];
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("rows.jsonl");
    let make = |rng: &mut Rng| {
        let mut file = vec![];
        for _ in 0..1 + rng.below(4) {
            let row = rng.pick(&rows).clone();
            file.extend(if rng.once_in(2) {
                damaged_json(rng, &row)
            } else {
                serde_json::to_vec(&row).unwrap()
            });
            file.push(b'\n');
        }
        // not the reader's work
        std::fs::write(&path, &file).unwrap();
        file
    };
    // the tokenizers crate takes some 400 bytes for each byte of a text, of which a prompt may have 512 KiB
    fuzz("prompt rows", Limits { bytes: 256 << 20, ..Limits::default() }, make, |_| {
        let Ok((rows, places)) = read_placed(&path) else { return false };
        let mut good = true;
        for (i, row) in rows.iter().enumerate() {
            for (template, chat) in
                [(None, None), (None, Some(&chat)), (Some("{question} {{n}} {n}"), Some(&chat))]
            {
                let renderer = Renderer {
                    template,
                    system: Some("s"),
                    chat,
                    tokenizer: &tokenizer,
                    places: Some(&places),
                };
                good &= renderer.prompt(i, row).is_ok() || template.is_some() || chat.is_none();
            }
        }
        good
    });
}

#[test]
fn fuzz_rewards() {
    let texts = [
        "<think>t</think> so $x = \\frac{1}{2}$ and \\boxed{\\left(\\frac{3}{4}, \\sqrt{2}\\right)} #### 1,234.5 The answer is (C).",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, 2.5e3, null], \"b\": \"x\\u00e9\"}}\n</tool_call>",
        "[f(a='x', b=-3, c={'k': (1, [True])}), g.h(d=\"\"\"long\"\"\", e=2**3)]",
        "<answer>```json\n[{\"bbox_2d\": [0, 0, 10, 10], \"label\": \"cat\"}]\n```</answer> {\"a\": [1, {\"b\": null}]}",
    ];
    let foreign = [
        "\\frac",
        "{",
        "}",
        "^{",
        "9^9^9^9",
        "\\sqrt[",
        "1e400",
        "-",
        "!!!!",
        "\\boxed{",
        "[[[[[[[[",
        "]",
        "(",
        "{{\"a\":",
        "\"",
        "\\u0000",
        "<tool_call>",
        "</answer>",
        "999999999999999999999999999999",
        "0.000000000001",
        "\\binom{99999}{5000}",
        "\\sum",
        "NaN",
        "\\text{",
        "é",
        "\u{202E}",
        "%",
        "50\\%",
    ];
    let schema =
        json!({"type": "object", "properties": {"a": {"type": "array", "items": {"pattern": "(a+)+$"}}}});
    let pool = RewardPool::new(vec![RewardSpec::new(resolve("json_schema").unwrap())], 1).unwrap();
    let functions =
        json!([{"name": "f", "parameters": {"required": ["a"], "properties": {"a": {"type": "array"}}}}]);
    let answers = json!([{"f": {"a": [[1]], "b": ["x", ""]}}]);
    let gold = [LabeledBox { label: "cat".into(), bbox: [0.0, 0.0, 10.0, 10.0] }];
    let mut round = 0;
    let make = |rng: &mut Rng| {
        let text = *rng.pick(&texts);
        damage_words(rng, text, &foreign)
    };
    fuzz("rewards", Limits::default(), make, |text| {
        let read = [
            verify("\\frac{1}{2}", text, &VerifyOptions::default()) == rft_rewards::math::Verdict::Equal,
            verify(text, "1/2", &VerifyOptions::default()) == rft_rewards::math::Verdict::Equal,
            extract_choice(text, "ABCDE").is_some(),
            parse_number(text).is_some(),
            parse_any(text).is_ok(),
            toolrl(text, texts[1], &ToolRlOptions::default()).is_ok(),
            bfcl(text, &functions, &answers, &BfclOptions::default()).is_ok_and(|v| v.valid),
            read_boxes(text).is_ok(),
            detection(text, &gold, &DetectionOptions::default()).is_ok(),
        ];
        round += 1;
        let fields = Map::from_iter([("schema".to_string(), schema.clone())]);
        let sample =
            Sample { id: "r".into(), completion: text.clone(), fields: fields.into(), ..Sample::default() };
        pool.submit(round, vec![sample], Context { step: 0, total_steps: 1, seed: 0 });
        let outcome = pool.recv().1;
        assert!(outcome[0].errors.is_empty(), "json_schema fails: {:?}", outcome[0].errors);
        read.iter().filter(|r| **r).count() > 5
    });
}
