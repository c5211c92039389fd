//! Chat templates against what transformers and Jinja2 rendered, and against templates that mean harm.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rft_engine::data::template::{ChatTemplate, Moment};
use rft_engine::data::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

/// Root of the fixtures: `RFT_FIXTURES`, else the repository's own.
fn fixtures() -> PathBuf {
    std::env::var_os("RFT_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .unwrap()
}

/// 2025-01-31 12:00, the date that the fixtures were made with.
const MOMENT: Moment = Moment { unix_seconds: 1_738_324_800 };

fn template_of(folder: &Path, tokenizer: &Tokenizer) -> ChatTemplate {
    let config = read_json(&folder.join("tokenizer_config.json"));
    let source = config["chat_template"].as_str().expect("a chat template").to_string();
    ChatTemplate::new(&source, tokenizer.special_tokens()).unwrap().at(MOMENT)
}

fn kwargs_of(case: &Value) -> (Map<String, Value>, bool) {
    let mut kwargs = case["kwargs"].as_object().cloned().unwrap_or_default();
    let prompt = kwargs.shift_remove("add_generation_prompt").and_then(|v| v.as_bool()).unwrap_or(false);
    (kwargs, prompt)
}

fn tools_of(case: &Value) -> Option<&Value> {
    Some(&case["tools"]).filter(|t| !t.is_null())
}

/// Prints the count and fails with the first few differences.
fn conclude(what: &str, total: usize, wrong: &[String]) {
    println!("{what}: {} of {total} agree", total - wrong.len());
    for w in wrong.iter().take(5) {
        println!("{w}");
    }
    assert!(total > 0, "{what}: no cases");
    assert!(wrong.is_empty(), "{what}: {} of {total} differ", wrong.len());
}

#[test]
fn parity_chat_cases_render_and_encode() {
    let cases = read_json(&fixtures().join("chat/chat_cases.json"));
    let mut loaded: HashMap<String, (Tokenizer, ChatTemplate)> = HashMap::new();
    let (mut total, mut wrong) = (0, vec![]);
    for case in cases["cases"].as_array().unwrap() {
        let name = case["tokenizer"].as_str().unwrap();
        let (tokenizer, template) = loaded.entry(name.to_string()).or_insert_with(|| {
            let folder = fixtures().join("tokenizers").join(name);
            let tokenizer = Tokenizer::from_folder(&folder, &[]).unwrap();
            let template = template_of(&folder, &tokenizer);
            (tokenizer, template)
        });
        let (kwargs, prompt) = kwargs_of(case);
        total += 1;
        match template.render(&case["messages"], tools_of(case), &kwargs, prompt) {
            Err(e) => wrong.push(format!("{name} {}: {e}", case["name"])),
            Ok(text) if text != case["text"].as_str().unwrap() => {
                wrong.push(format!(
                    "{name} {}: text\n  want {}\n  got  {}",
                    case["name"],
                    case["text"],
                    json!(text)
                ));
            }
            Ok(text) if json!(tokenizer.encode(&text).unwrap()) != case["ids"] => {
                wrong.push(format!("{name} {}: ids", case["name"]));
            }
            Ok(_) => {}
        }
    }
    conclude("chat cases", total, &wrong);
}

#[test]
fn parity_template_cases_render() {
    let root = fixtures().join("chat");
    if !root.join("template_cases.json").exists() {
        println!("skipped: {} has no template_cases.json (set RFT_FIXTURES)", root.display());
        return;
    }
    let file = read_json(&root.join("template_cases.json"));
    let special: BTreeMap<String, String> = serde_json::from_value(file["special_tokens"].clone()).unwrap();
    let mut compiled: HashMap<String, ChatTemplate> = HashMap::new();
    let (mut total, mut wrong) = (0, vec![]);
    for case in file["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let template = compiled.entry(name.to_string()).or_insert_with(|| {
            let source = std::fs::read_to_string(root.join(format!("templates/{name}.jinja"))).unwrap();
            ChatTemplate::new(&source, &special).unwrap_or_else(|e| panic!("{name}: {e}")).at(MOMENT)
        });
        let conversation = &file["conversations"][case["conversation"].as_str().unwrap()];
        let (kwargs, prompt) = kwargs_of(case);
        total += 1;
        let got = template.render(&conversation["messages"], tools_of(conversation), &kwargs, prompt);
        let label = format!("{name} / {} {}", case["conversation"], case["kwargs"]);
        match (got, case["text"].as_str(), case["error"].as_str()) {
            (Ok(text), Some(want), _) if text == want => {}
            (Ok(text), Some(want), _) => {
                wrong.push(format!("{label}: text\n  want {want:?}\n  got  {text:?}"))
            }
            (Ok(text), None, error) => {
                wrong.push(format!("{label}: should refuse ({error:?}), got {text:?}"))
            }
            (Err(e), Some(_), _) => wrong.push(format!("{label}: {e}")),
            // What raise_exception said must reach the user; Python's own type errors have other words.
            (Err(e), None, Some(error)) => {
                if let Some(said) =
                    error.strip_prefix("TemplateError: ").filter(|s| !e.to_string().contains(s))
                {
                    wrong.push(format!("{label}: expected {said:?} in {e}"));
                }
            }
            (Err(_), None, None) => unreachable!("a case has text or error"),
        }
    }
    conclude("template cases", total, &wrong);
}

#[test]
fn parity_assistant_masks() {
    let root = fixtures().join("chat");
    let file = read_json(&root.join("assistant_mask.json"));
    let (mut total, mut wrong, mut absent) = (0, vec![], 0);
    let mut tokenizers: HashMap<String, Tokenizer> = HashMap::new();
    for case in file["cases"].as_array().unwrap() {
        let path = root.join(format!("templates/{}.jinja", case["template"].as_str().unwrap()));
        let Ok(source) = std::fs::read_to_string(&path) else {
            absent += 1;
            continue;
        };
        let name = case["tokenizer"].as_str().unwrap();
        let tokenizer = tokenizers.entry(name.to_string()).or_insert_with(|| {
            Tokenizer::from_folder(&fixtures().join("tokenizers").join(name), &[]).unwrap()
        });
        let template = ChatTemplate::new(&source, tokenizer.special_tokens()).unwrap().at(MOMENT);
        let label = format!("{} / {}", case["template"], case["name"]);
        total += 1;
        let (text, _) =
            template.render_marked(&case["messages"], tools_of(case), &Map::new(), false).unwrap();
        if text != case["text"].as_str().unwrap() {
            wrong.push(format!("{label}: text\n  want {}\n  got  {}", case["text"], json!(text)));
            continue;
        }
        let (ids, mask) =
            template.encode_with_mask(tokenizer, &case["messages"], tools_of(case), &Map::new()).unwrap();
        let mask: Vec<u8> = mask.into_iter().map(u8::from).collect();
        if json!(ids) != case["ids"] || json!(mask) != case["assistant_mask"] {
            wrong.push(format!(
                "{label}: ids or mask\n  want {}\n  got  {}",
                case["assistant_mask"],
                json!(mask)
            ));
        }
    }
    if total == 0 {
        println!("skipped: none of the {absent} templates is under {} (set RFT_FIXTURES)", root.display());
        return;
    }
    conclude("assistant masks", total, &wrong);
}

fn compile(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, &BTreeMap::new()).unwrap().at(MOMENT)
}

fn render(source: &str) -> Result<String, String> {
    let messages = json!([{"role": "user", "content": "hi"}]);
    compile(source).render(&messages, None, &Map::new(), true).map_err(|e| e.to_string())
}

#[test]
fn generation_blocks_are_marked_without_a_trace() {
    let source = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}!\n{% endgeneration %}{% endfor %}";
    let messages = json!([{"role": "a", "content": "é\u{FDD0}0\u{FDD1}"}, {"role": "b", "content": ""}]);
    let (text, ranges) = compile(source).render_marked(&messages, None, &Map::new(), false).unwrap();
    assert_eq!(text, "<a>é\u{FDD0}0\u{FDD1}!\n<b>!\n");
    let marked: Vec<&str> = ranges.into_iter().map(|r| &text[r]).collect();
    assert_eq!(marked, ["é\u{FDD0}0\u{FDD1}!\n", "!\n"]);
}

#[test]
fn json_and_dates_are_pythons() {
    let kwargs = |value: Value| Map::from_iter([("x".to_string(), value)]);
    let messages = json!([]);
    let dumps = |source: &str, x: Value| compile(source).render(&messages, None, &kwargs(x), false).unwrap();
    // Expected values are json.dumps' of Python 3.11.
    let x = json!({"b": [1, 2.0, 1e-7, 1e16, 123456789.5, true, null], "a": "é\"\\\n\u{1}<&>"});
    assert_eq!(
        dumps("{{ x | tojson }}", x.clone()),
        r#"{"b": [1, 2.0, 1e-07, 1e+16, 123456789.5, true, null], "a": "é\"\\\n\u0001<&>"}"#
    );
    assert_eq!(
        dumps("{{ x | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}", x),
        r#"{"a":"\u00e9\"\\\n\u0001<&>","b":[1,2.0,1e-07,1e+16,123456789.5,true,null]}"#
    );
    assert_eq!(
        dumps("{{ x | tojson(indent=2) }}", json!({"a": [1], "e": [], "o": {}})),
        "{\n  \"a\": [\n    1\n  ],\n  \"e\": [],\n  \"o\": {}\n}"
    );
    assert_eq!(
        render("{{ strftime_now('%d %b %Y %-d/%m %H:%M %A %j') }}").unwrap(),
        "31 Jan 2025 31/01 12:00 Friday 031"
    );
}

#[test]
fn unfinished_messages_stay_open() {
    let source = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}[end]{% endfor %}";
    let resume = Map::from_iter([("continue_final_message".to_string(), json!(true))]);
    let messages =
        json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is "}]);
    assert_eq!(
        compile(source).render(&messages, None, &resume, false).unwrap(),
        "[user] q[end][assistant] The answer is"
    );
    let dropped = compile("{{ messages[0].content }}").render(&messages, None, &resume, false).unwrap_err();
    assert!(dropped.to_string().contains("drops or rewrites"), "{dropped}");
}

#[test]
fn errors_name_the_line() {
    let syntax = ChatTemplate::new("a\n{% if %}\n", &BTreeMap::new()).unwrap_err().to_string();
    assert!(syntax.contains("line 2"), "{syntax}");
    let refused = render("\n\n{{ raise_exception('no tools here') }}").unwrap_err();
    assert!(refused.contains("line 3") && refused.contains("no tools here"), "{refused}");
    let missing = render("{{ messages[0].nothing.more }}").unwrap_err();
    assert!(missing.contains("line 1"), "{missing}");
    let shape = compile("x").render(&json!("hi"), None, &Map::new(), true).unwrap_err().to_string();
    assert!(shape.contains("list of objects"), "{shape}");
}

#[test]
fn a_run_shows_one_day_whenever_it_is_started() {
    let template = compile("{{ strftime_now('%d %b %Y') }}").at(Moment::RUN);
    assert_eq!(template.render(&json!([]), None, &Map::new(), false).unwrap(), "26 Jul 2024");
}

#[test]
fn hostile_templates_end_in_an_error() {
    let deep_source = format!("{}1{}", "(".repeat(50_000), ")".repeat(50_000));
    let hostile = [
        ("endless loops", "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}".to_string()),
        ("unbounded output", "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}".to_string()),
        ("doubling", "{% set n = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}".to_string()),
        ("recursion", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".to_string()),
        ("nested json", "{% set n = namespace(x=[]) %}{% for a in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}".to_string()),
        ("wide repeats", "{{ ('x' * 99999999) * 99999999 }}".to_string()),
        (
            "margins that no line takes",
            "{% for a in range(99999) %}{{ 'x' | indent(99999999) }}{{ 'x' | indent(width=99999999) }}{% endfor %}".to_string(),
        ),
        ("padding", "{{ '%0999999999d' | format(1) }}".to_string()),
        ("shared doubling json", "{% set n = namespace(x=[1]) %}{% for a in range(100) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}".to_string()),
        ("inclusion", "{% include '/etc/passwd' %}".to_string()),
        ("self-inclusion", "{% include 'chat' %}".to_string()),
    ];
    for (what, source) in hostile {
        let start = Instant::now();
        let error = render(&source).expect_err(what);
        println!("{what}: {:?}: {}", start.elapsed(), error.lines().next().unwrap_or_default());
        assert!(error.starts_with("model: chat template"), "{what}: {error}");
        assert!(start.elapsed() < Duration::from_secs(20), "{what} took {:?}", start.elapsed());
    }
    let refused = ChatTemplate::new(&format!("{{{{ {deep_source} }}}}"), &BTreeMap::new());
    assert!(refused.is_err(), "deep expressions are refused");
    assert!(ChatTemplate::new(&"x".repeat(129 << 10), &BTreeMap::new()).is_err(), "huge sources are refused");
}

/// Damaged templates to try; `RFT_FUZZ_ROUNDS` asks for more.
fn fuzz_rounds() -> u32 {
    std::env::var("RFT_FUZZ_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: fuzz_rounds(), failure_persistence: None, ..ProptestConfig::default() })]
    /// Damaged templates give text or an error, never a panic or a hang.
    #[test]
    fn damaged_templates_never_panic(at in 0usize..600, with in "[-{%}#a-z'|().\\[\\]+*~ ]{0,6}", cut in 0usize..12) {
        let source = "{%- macro show(m) %}{{ m.role | upper ~ ': ' }}{% endmacro %}\n{% set ns = namespace(i=0) %}{% for m in messages if m.content is string %}{% set ns.i = ns.i + 1 %}<|{{ show(m) }}|>{% generation %}{{ m.content.strip().split('x')[0] | trim | tojson(indent=1) }}{% endgeneration %}{% if loop.last and add_generation_prompt %}{{ '<|a|>' * ns.i }}{% endif %}{% endfor %}{# note #}";
        let at = at.min(source.len());
        let end = (at + cut).min(source.len());
        let damaged = format!("{}{with}{}", &source[..at], &source[end..]);
        if let Ok(template) = ChatTemplate::new(&damaged, &BTreeMap::new()) {
            let _ = template.render(&json!([{"role": "user", "content": "hi"}]), None, &Map::new(), true);
        }
    }
}
