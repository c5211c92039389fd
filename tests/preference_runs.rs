//! Whole runs with supervised and preference stages: what they learn, write, resume to, and refuse.

#[path = "support/runs.rs"]
mod runs;

use std::path::Path;

use runs::{Folder, lines, stderr, timeless, weights};
use serde_json::{Map, Value, json};

const MODEL: &str = r#"
name = "test"
[model.new]
hidden = 64
layers = 2
heads = 2
kv_heads = 1
head_dim = 32
ffn = 128
[rollout]
prompts_per_step = 6
group_size = 6
max_new_tokens = 24
[optimizer]
lr = 5e-4
[train]
checkpoint_every = 2
"#;

const TASK: &str = r#"
[data]
heldout = 8
[data.arithmetic]
max_operand = 9
problems = 60
demo_noise = 0.3
[[reward]]
script = "math"
[[reward]]
script = "format"
weight = 0.2
"#;

/// A warm-up, then every source of pairs.
const STAGES: &str = r#"
[algorithm.reference]
kind = "stage"
[[stage]]
kind = "sft"
epochs = 10
lr = 3e-3
batch = 16
[[stage]]
kind = "preference"
steps = 3
batch = 8
path = "PAIRS"
[stage.preference]
losses = { sigmoid = 1.0, sft = 0.1 }
[[stage]]
kind = "preference"
steps = 3
[stage.preference]
pairs = "groups"
select = "all_ranked"
component_margins = { format = 0.1 }
[[stage]]
kind = "preference"
steps = 2
batch = 8
path = "PAIRS"
[stage.preference]
unpaired = "kto"
[[stage]]
kind = "preference"
steps = 3
[stage.preference]
pairs = "demonstrations"
"#;

/// A recipe whose `PAIRS` are sums of two digits: the right answer against one that is off by one.
fn folder(recipe: &str) -> Folder {
    let folder = Folder::new("");
    let pairs: Vec<String> = (0..40u64)
        .map(|i| {
            let (a, b) = (i % 10, i / 10);
            let says = |sum: u64| format!("<think>{a}+{b}={}</think><answer>{sum}</answer>", sum % 10);
            json!({"prompt": format!("{a}+{b}="), "chosen": says(a + b), "rejected": says(a + b + 1)})
                .to_string()
        })
        .collect();
    folder.write("pairs.jsonl", &pairs.join("\n"));
    write_recipe(&folder, recipe);
    folder
}

fn write_recipe(folder: &Folder, text: &str) {
    let pairs = folder.at("pairs.jsonl").display().to_string();
    folder.write("recipe.toml", &text.replace("PAIRS", &pairs));
}

fn assert_same(a: &Path, b: &Path) {
    for name in ["metrics.jsonl", "sft.jsonl"] {
        assert_eq!(timeless(&a.join(name)), timeless(&b.join(name)), "{name}");
    }
    for name in ["samples.jsonl", "final/model.safetensors"] {
        assert!(std::fs::read(a.join(name)).unwrap() == std::fs::read(b.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn every_kind_of_stage_gives_equal_bytes_on_one_thread_and_two_and_after_a_cut() {
    let folder = folder(&[MODEL, TASK, STAGES].concat());
    let one = folder.run("one", &["devices.threads=1", "train.keep_checkpoints=99"]);
    assert_same(&one, &folder.run("two", &["devices.threads=2", "train.keep_checkpoints=99"]));

    let rows = lines(&one.join("metrics.jsonl"));
    let steps: Vec<u64> = rows.iter().map(|r| r["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=11).collect::<Vec<_>>());
    let number =
        |row: &Map<String, Value>, key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row:?}"));
    for row in &rows {
        assert_eq!(row["stage"], "preference");
        assert!(number(row, "grad_norm") > 0.0, "{row:?}");
    }
    // policy and reference agree before the first update of a stage
    for first in [0, 3, 6, 8] {
        let row = &rows[first];
        assert_eq!((number(row, "rewards/chosen"), number(row, "rewards/margins")), (0.0, 0.0), "{first}");
    }
    assert_eq!(rows[0]["compared"], 8);
    assert!(number(&rows[3], "reward_mean") > 0.0 && number(&rows[3], "compared") > 6.0);
    assert!(number(&rows[6], "kto_baseline") >= 0.0 && rows[6]["compared"] == 16);
    assert!(rows[10]["compared"].as_u64().unwrap() > 18 && number(&rows[10], "logps/chosen") < 0.0);

    // 60 problems, ten times, 16 a step
    let sft = lines(&one.join("sft.jsonl"));
    assert_eq!(sft.len(), 38);
    assert!(number(&sft[37], "loss") < 0.5 * number(&sft[0], "loss"));
    assert!((number(&sft[37], "epoch") - 10.0).abs() < 0.2);
    let samples = lines(&one.join("samples.jsonl"));
    assert_eq!(samples.len(), 6 * 36);
    let preferred = samples.iter().filter(|s| s["preferred_to"].as_array().is_some_and(|p| !p.is_empty()));
    assert!(preferred.count() > 0);
    let after_spin = samples.iter().filter(|s| s["step"].as_u64() >= Some(9));
    assert!(after_spin.clone().all(|s| s["rejected_for"] == json!([-1]) || s["rejected_for"] == json!([])));

    // what a kill leaves within every stage in turn
    for last in [20, 40, 43, 44, 48] {
        let run = folder.resumed(&one, &format!("cut-{last}"), last);
        assert_same(&one, &run);
    }
}

#[test]
fn stored_pairs_alone_make_a_run_that_tells_them_apart() {
    let stages =
        "[data]\n[[stage]]\nkind = \"preference\"\nepochs = 8\nbatch = 8\nlr = 1e-3\npath = \"PAIRS\"\n";
    let folder = folder(&[MODEL, stages].concat());
    for (name, settings, start) in [
        ("dpo", "[stage.preference]\n", Some(2f64.ln())),
        ("ipo", "[stage.preference]\nlosses = { ipo = 1.0 }\n", Some(25.0)),
        ("hinge", "[stage.preference]\nlosses = { hinge = 1.0 }\n", Some(1.0)),
        ("robust", "[stage.preference]\nlosses = { robust = 1.0 }\nlabel_smoothing = 0.1\n", Some(2f64.ln())),
        ("fdpo", "[stage.preference]\ndivergence = \"jensen_shannon\"\n", Some(2f64.ln())),
        ("kto", "[stage.preference]\nunpaired = \"kto\"\n", Some(0.5)),
        (
            "simpo",
            "[stage.preference]\nreference_free = true\nlength_normalised = true\nbeta = 2.0\nmargin = 0.5\n",
            None,
        ),
        ("cpo", "[stage.preference]\nlosses = { sigmoid = 1.0, sft = 1.0 }\nreference_free = true\n", None),
        (
            "orpo",
            "[stage.preference]\nlosses = { odds_ratio = 0.5, sft = 1.0 }\nreference_free = true\nlength_normalised = true\n",
            None,
        ),
    ] {
        write_recipe(&folder, &[MODEL, stages, settings].concat());
        let rows = lines(&folder.run(name, &[]).join("metrics.jsonl"));
        assert_eq!(rows.len(), 40, "{name}");
        let at = |i: usize, key: &str| rows[i][key].as_f64().unwrap_or_else(|| panic!("{name}: {key}"));
        if let Some(start) = start {
            assert!((at(0, "loss") - start).abs() < 1e-5 * start, "{name} starts at {}", at(0, "loss"));
        }
        assert!(at(39, "loss") < at(0, "loss"), "{name}");
        assert!(at(39, "rewards/margins") > at(0, "rewards/margins"), "{name}");
        if name == "dpo" {
            assert!(at(39, "rewards/accuracies") > 0.9, "{}", at(39, "rewards/accuracies"));
        }
        assert!(folder.at(name).join("report.html").is_file());
    }
}

#[test]
fn reference_logprobs_that_are_kept_between_epochs_are_those_computed_anew() {
    // 40 rows, 16 a step: rows come again from the third step on, and within one
    let stages =
        "[data]\n[[stage]]\nkind = \"preference\"\nepochs = 4\nbatch = 16\nlr = 1e-3\npath = \"PAIRS\"\n";
    let folder = folder(&[MODEL, stages].concat());
    let kept = folder.run("kept", &["algorithm.reference={ kind = \"stage\" }", "train.keep_checkpoints=99"]);
    // the same policy, of which nothing is kept because it might move
    let anew = folder.run("anew", &["algorithm.reference={ kind = \"refreshed\", every = 1000 }"]);
    let same = |a: &Path, b: &Path| {
        assert_eq!(timeless(&a.join("metrics.jsonl")), timeless(&b.join("metrics.jsonl")));
        assert!(weights(a) == weights(b));
    };
    same(&kept, &anew);
    assert!(lines(&kept.join("metrics.jsonl"))[9]["rewards/margins"].as_f64().unwrap() > 0.0);
    same(&kept, &folder.resumed(&kept, "cut", 6));
}

#[test]
fn what_a_stage_cannot_do_is_refused_with_its_remedy() {
    let folder = folder(&[MODEL, TASK].concat());
    let refuse = |stage: &str, words: &[&str]| {
        write_recipe(&folder, &[MODEL, TASK, stage].concat());
        let output = folder.launch("refused", &[]);
        let text = stderr(&output);
        assert!(!output.status.success(), "{stage} was accepted");
        assert!(words.iter().all(|w| text.contains(w)), "{stage}: {text}");
        assert!(!folder.at("refused").exists(), "{stage} left a run folder");
    };
    let stored = "[[stage]]\nkind = \"preference\"\nsteps = 2\npath = \"PAIRS\"\n";
    let with = |settings: &str| format!("{stored}[stage.preference]\n{settings}\n");
    let drawn = |settings: &str| {
        format!(
            "[[stage]]\nkind = \"preference\"\nsteps = 2\n[stage.preference]\npairs = \"groups\"\n{settings}\n"
        )
    };
    refuse(&with("beta = 0.0"), &["stage.0.preference.beta", "positive"]);
    refuse(&with("betta = 0.1"), &["betta", "`beta`"]);
    refuse(&with("losses = { apo_zero = 1.0 }\nreference_free = true"), &["reference_free", "apo_zero"]);
    refuse(&with("losses = { odds_ratio = 1.0 }"), &["odds_ratio", "reference_free = true"]);
    refuse(&with("losses = { sigmoid = 1.0 }\nunpaired = \"kto\""), &["losses", "unpaired"]);
    refuse(&with("losses = { dpo = 1.0 }"), &["dpo", "sigmoid"]);
    refuse(&with("label_smoothing = 0.5"), &["label_smoothing"]);
    refuse(&with("gap_margin = 1.0"), &["gap_margin", "groups"]);
    refuse(&stored.replace("steps = 2", "batch = 0"), &["stage.0.batch", "at least 1"]);
    refuse(&stored.replace("steps = 2", "epochs = 0.0"), &["stage.0.epochs"]);
    refuse(&stored.replace("steps = 2", "epochs = 2.0\nsteps = 1"), &["steps = 1", "remove one"]);
    refuse(&stored.replace("steps = 2", "max_tokens = 3"), &["every one of 40 rows", "max_tokens"]);
    refuse("[[stage]]\nkind = \"preference\"\n", &["stage.0.path", "groups"]);
    refuse(
        &format!("{}batch = 4", drawn("").replace("[stage.preference]\npairs = \"groups\"\n", "")),
        &["path"],
    );
    refuse(&drawn("").replace("steps = 2", "batch = 4"), &["stage.0.batch", "prompts_per_step"]);
    refuse(&with("unpaired = \"kto\"").replace("steps = 2", "batch = 1"), &["unpaired", "raise batch"]);
    refuse("[[stage]]\nkind = \"sft\"\n[stage.preference]\n", &["stage.0.preference", "kind"]);

    let pairs = folder.at("pairs.jsonl");
    let good = std::fs::read_to_string(&pairs).unwrap();
    let bad = |line: &str| std::fs::write(&pairs, format!("{good}\n{line}\n")).unwrap();
    bad("{\"prompt\": \"1+1=\", \"chosen\": \"2\", \"rejected\": \"2\"}");
    refuse(stored, &["pairs.jsonl: line 41", "equals"]);
    bad("{\"prompt\": \"1+1=\", \"completion\": \"2\", \"label\": true}");
    refuse(stored, &["pairs.jsonl: line 41", "kto"]);
    std::fs::write(&pairs, "\n").unwrap();
    refuse(stored, &["pairs.jsonl", "no row"]);
    // demonstrations of the run's own rows
    std::fs::write(&pairs, "{\"prompt\": \"1+1=\", \"demonstration\": \"2\"}\n{\"prompt\": \"1+2=\"}\n")
        .unwrap();
    let rows = TASK
        .split("[data.arithmetic]")
        .next()
        .unwrap()
        .replace("heldout = 8", "heldout = 0\npath = \"PAIRS\"");
    write_recipe(&folder, &[MODEL, &rows, "[[stage]]\nkind = \"sft\"\n"].concat());
    let text = stderr(&folder.launch("refused", &[]));
    assert!(text.contains("pairs.jsonl: line 2") && text.contains("demonstration"), "{text}");
}

#[test]
fn a_group_whose_rewards_are_equal_is_counted_and_teaches_nothing() {
    let stage = "[[stage]]\nkind = \"preference\"\nsteps = 2\n[stage.preference]\npairs = \"groups\"\nmin_gap = 50.0\n";
    let folder = folder(&[MODEL, TASK, stage].concat());
    let output = folder.launch("run", &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stderr(&output);
    assert_eq!(
        text.matches("not learning (no_pair): no group gave a pair: 6 groups were drawn").count(),
        1,
        "{text}"
    );
    for row in lines(&folder.at("run").join("metrics.jsonl")) {
        assert_eq!(
            (&row["groups_without_pair"], &row["compared"], &row["grad_norm"]),
            (&json!(6), &json!(0), &json!(0.0))
        );
        assert_eq!(row["health"], "no_pair");
    }
    let unknown = [MODEL, TASK, &stage.replace("min_gap = 50.0", "rank_by = \"nothing\"")].concat();
    write_recipe(&folder, &unknown);
    let text = stderr(&folder.launch("unknown", &[]));
    assert!(text.contains("no reward has a component `nothing`"), "{text}");
}
