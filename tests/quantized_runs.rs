//! Whole runs of adapters over a frozen base, plain and quantised, through the program: exactly on-policy, and merged into the
//! source's own weights.

#[path = "support/runs.rs"]
mod runs;

use std::path::Path;

use candle_core::{Device, Tensor};
use runs::{Folder, lines, program, stderr};

fn folder() -> Folder {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/llama_tied");
    let rows: String = (0..6).map(|i| format!("{{\"prompt\": \"Count to {i}\"}}\n")).collect();
    let recipe = format!(
        r#"
name = "test"
[model]
path = {base:?}
[data]
path = "ROWS"
heldout = 1
chat = false
[[reward]]
script = "REWARD"
[rollout]
prompts_per_step = 2
group_size = 4
max_new_tokens = 12
[optimizer]
lr = 1e-2
warmup_updates = 0
[train]
steps = 3
"#
    );
    let folder = Folder::with_reward(&recipe, "function reward(s) return #s.completion % 7 end");
    folder.write("rows.jsonl", &rows);
    let recipe = std::fs::read_to_string(folder.at("recipe.toml")).unwrap();
    folder.write("recipe.toml", &recipe.replace("ROWS", &folder.at("rows.jsonl").display().to_string()));
    folder
}

fn export(run: &Path, out: &Path, merge: bool) {
    let mut args = vec!["export", "--run", run.to_str().unwrap(), "--out", out.to_str().unwrap()];
    args.extend(merge.then_some("--merge-lora"));
    let output = program(&args);
    assert!(output.status.success(), "{}", stderr(&output));
}

fn ratios(run: &Path) -> Vec<f64> {
    lines(&run.join("metrics.jsonl")).iter().filter_map(|row| row["ratio_max_dev"].as_f64()).collect()
}

fn tensors(path: &Path) -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn rows_of(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_dtype(candle_core::DType::F32).unwrap().to_vec2().unwrap()
}

/// Runs with each setting: the first ratio is exactly 1, the adapter moved, and the merge is `merged(W, s B A, m)`, row by row.
fn check(lora: &str, scaling: f32, dora: bool, bases: &[&str]) {
    let place = folder();
    let source =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/llama_tied/model.safetensors");
    let source = tensors(&source);
    for (i, base) in bases.iter().enumerate() {
        let lora = format!("model.lora={lora}");
        let sets: Vec<&str> =
            [lora.as_str()].into_iter().chain((!base.is_empty()).then_some(*base)).collect();
        let run = place.run(&format!("run{i}"), &sets);
        let ratios = ratios(&run);
        assert!(ratios.len() == 3 && ratios.iter().all(|r| *r == 0.0), "{base}: {ratios:?}");

        let (adapter, merged) = (place.at(&format!("a{i}")), place.at(&format!("m{i}")));
        export(&run, &adapter, false);
        export(&run, &merged, true);
        let (adapter, merged) =
            (tensors(&adapter.join("adapter_model.safetensors")), tensors(&merged.join("model.safetensors")));
        let (mut moved, mut compared) = (0f32, 0);
        for (name, weight) in &source {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let part = |which: &str| adapter.get(&format!("base_model.model.{module}.{which}"));
            let got = &merged[name];
            let (Some(a), Some(b)) = (part("lora_A.weight"), part("lora_B.weight")) else {
                let equal = got.sub(weight).unwrap().abs().unwrap().max_all().unwrap();
                assert_eq!(equal.to_vec0::<f32>().unwrap(), 0.0, "{name} changed");
                continue;
            };
            let delta = rows_of(&b.matmul(a).unwrap());
            let magnitudes = part("lora_magnitude_vector").map(|m| m.to_vec1::<f32>().unwrap());
            assert_eq!(magnitudes.is_some(), dora);
            for (i, ((got, w), delta)) in rows_of(got).iter().zip(rows_of(weight)).zip(delta).enumerate() {
                let mut want: Vec<f32> = w.iter().zip(&delta).map(|(w, d)| w + scaling * d).collect();
                if let Some(m) = &magnitudes {
                    let norm = want.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt() as f32;
                    want.iter_mut().for_each(|w| *w *= m[i] / norm);
                }
                for ((got, want), delta) in got.iter().zip(&want).zip(&delta) {
                    assert!((got - want).abs() <= 2e-6 * (1.0 + want.abs()), "{name}: {got} for {want}");
                    moved = moved.max(delta.abs());
                }
            }
            compared += 1;
        }
        println!(
            "{lora} {base}: ratio_max_dev 0 in {} steps, {compared} merged matrices, moved by up to {moved:.1e}",
            ratios.len()
        );
        assert!(compared == 14 && moved > 1e-4);
    }
}

#[test]
fn adapters_over_quantised_bases_are_on_policy_and_merge_into_the_source() {
    let bases = ["", "model.quantize=\"int8\"", "model.quantize=\"nf4\""];
    check("{rank=4, alpha=8.0}", 2.0, false, &bases);
}

#[test]
fn dora_is_on_policy_in_f32_in_bf16_and_over_four_bits() {
    let bases = ["", "model.precision=\"bf16\"", "model.quantize=\"nf4\""];
    check("{rank=4, alpha=8.0, dora=true}", 2.0, true, &bases);
}
