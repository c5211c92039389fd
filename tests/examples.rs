//! Rows with completions to tokens: strings, conversations with and without marked turns, pairs, labels, refusals.

use std::collections::BTreeMap;
use std::path::Path;

use rft_engine::data::examples::{Reader, read_rows};
use rft_engine::data::prompts::{Renderer, Row};
use rft_engine::data::template::{ChatTemplate, Moment};
use rft_engine::data::tokenizer::Tokenizer;
use serde_json::{Value, json};

const PLAIN: &str = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}\
                     {% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}";
const MARKED: &str = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}\
                      {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\
                      {% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}";
/// Shows only the last answer, as templates do that hide earlier reasoning.
const FORGETFUL: &str = "{% for m in messages %}{{ m.role }}:{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% endif %};\
                         {% endfor %}";

fn tokenizer() -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/smollm2");
    Tokenizer::from_folder(&folder, &[]).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, &BTreeMap::new()).unwrap().at(Moment::RUN)
}

fn reader<'a>(tokenizer: &'a Tokenizer, chat: Option<&'a ChatTemplate>) -> Reader<'a> {
    Reader { renderer: Renderer { template: None, system: None, chat, tokenizer, places: None } }
}

fn row(value: Value) -> Row {
    value.as_object().unwrap().clone()
}

fn conversation() -> Row {
    row(json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Name a prime."},
        {"role": "assistant", "content": "7 is one."},
        {"role": "user", "content": "Thanks."},
    ]}))
}

#[test]
fn of_a_conversation_the_assistants_turns_are_learned_with_their_end_token() {
    let (tokenizer, plain, marked) = (tokenizer(), template(PLAIN), template(MARKED));
    let by_prefix = reader(&tokenizer, Some(&plain)).demonstration(0, &conversation(), None).unwrap();
    let by_marks = reader(&tokenizer, Some(&marked)).demonstration(0, &conversation(), None).unwrap();
    assert_eq!(by_prefix, by_marks);
    let prompt = tokenizer.decode(&by_marks.prompt, false);
    assert!(prompt.ends_with("Hi<|im_end|>\n<|im_start|>assistant\n"), "{prompt:?}");
    let text = |learned: bool| -> String {
        let kept: Vec<u32> = by_marks
            .completion
            .iter()
            .zip(&by_marks.mask)
            .filter(|(_, m)| **m == learned)
            .map(|(t, _)| *t)
            .collect();
        tokenizer.decode(&kept, false)
    };
    assert_eq!(text(true), "Hello!<|im_end|>7 is one.<|im_end|>");
    assert_eq!(text(false), "\n<|im_start|>user\nName a prime.<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn a_turn_that_changes_later_is_refused_by_its_number() {
    let (tokenizer, chat) = (tokenizer(), template(FORGETFUL));
    let error = reader(&tokenizer, Some(&chat)).demonstration(0, &conversation(), None).unwrap_err();
    assert!(error.contains("message 2") && error.contains("generation"), "{error}");
}

#[test]
fn a_demonstration_follows_its_prompt_as_a_rollout_would() {
    let (tokenizer, chat) = (tokenizer(), template(PLAIN));
    let said = row(json!({"prompt": "2+2?", "demonstration": "4"}));
    let one = reader(&tokenizer, Some(&chat)).demonstration(0, &said, None).unwrap();
    assert_eq!(
        tokenizer.decode(&one.prompt, false),
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(tokenizer.decode(&one.completion, false), "4<|im_end|>");
    assert!(one.mask.iter().all(|m| *m));
    for (wrong, word) in [
        (json!({"prompt": "2+2?"}), "no `demonstration`"),
        (json!({"prompt": "2+2?", "demonstration": 4}), "must be a string"),
        (json!({"messages": [{"role": "user", "content": "2+2?"}]}), "assistant"),
        (json!({"demonstration": "4"}), "no `prompt`"),
    ] {
        let error = reader(&tokenizer, Some(&chat)).demonstration(0, &row(wrong), None).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    let error = reader(&tokenizer, None).demonstration(0, &conversation(), None).unwrap_err();
    assert!(error.contains("no chat template"), "{error}");
}

#[test]
fn pairs_of_text_of_turns_and_of_whole_conversations_are_the_same_tokens() {
    let (tokenizer, chat) = (tokenizer(), template(PLAIN));
    let reader = reader(&tokenizer, Some(&chat));
    let user = json!({"role": "user", "content": "2+2?"});
    let says = |text: &str| json!({"role": "assistant", "content": text});
    let rows = [
        json!({"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
        json!({"prompt": [user], "chosen": [says("4")], "rejected": [says("5")]}),
        json!({"messages": [user], "chosen": [says("4")], "rejected": "5"}),
        json!({"chosen": [user, says("4")], "rejected": [user, says("5")]}),
    ];
    let read = rows.map(|r| reader.judged(0, &row(r)).unwrap());
    for one in &read {
        assert_eq!(one.prompt.tokens, read[0].prompt.tokens);
        assert_eq!(one.completions, read[0].completions);
        assert_eq!(one.desirable, [true, false]);
    }
    assert_eq!(tokenizer.decode(&read[0].completions[1], false), "5<|im_end|>");
    let labelled = row(json!({"prompt": "2+2?", "completion": "5", "label": false, "margin": 0.5}));
    let one = reader.judged(0, &labelled).unwrap();
    assert_eq!((one.completions.len(), one.desirable, one.margin), (1, vec![false], 0.5));
}

#[test]
fn rows_that_prefer_nothing_are_refused_by_file_and_line() {
    let (tokenizer, chat) = (tokenizer(), template(PLAIN));
    let reader = reader(&tokenizer, Some(&chat));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.jsonl");
    for (wrong, word) in [
        (json!({"prompt": "a", "chosen": "b", "rejected": "b"}), "equals"),
        (
            json!({"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "b"}),
            "same tokens",
        ),
        (json!({"prompt": "a", "chosen": "b"}), "expected `chosen` and `rejected`"),
        (json!({"prompt": "a", "completion": "b"}), "label"),
        (json!({"prompt": "a", "chosen": 1, "rejected": "b"}), "`chosen` must be"),
        (json!({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}), "`margin`"),
        (
            json!({"chosen": [{"role": "user", "content": "x"}], "rejected": [{"role": "user", "content": "y"}]}),
            "share no first",
        ),
    ] {
        let good = json!({"prompt": "a", "chosen": "b", "rejected": "c"});
        std::fs::write(&path, format!("{good}\n\n{wrong}\n")).unwrap();
        let error = read_rows(&path, |i, row| reader.judged(i, row)).unwrap_err().to_string();
        assert!(error.contains("pairs.jsonl: line 3") && error.contains(word), "{error}");
    }
}
