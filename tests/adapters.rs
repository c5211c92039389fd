//! PEFT adapters against peft: logits on top of the base model, gradients, merged weights, and broken folders.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use rft_engine::config::Precision;
use rft_engine::learner::batch::{GroupTokens, micro_batches, pack};
use rft_engine::model::backprop::Trainer;
use rft_engine::model::peft::PeftAdapter;
use rft_engine::model::policy::Policy;
use rft_engine::model::source::ModelSource;
use rft_kernels::{Pool, Warp};
use serde_json::{Value, json};

/// Root of the fixtures: `RFT_FIXTURES`, else the repository's own.
fn fixtures() -> PathBuf {
    std::env::var_os("RFT_FIXTURES").map_or_else(own_fixtures, PathBuf::from)
}

fn own_fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn floats(golden: &HashMap<String, Tensor>, name: &str) -> Vec<f32> {
    golden.get(name).unwrap_or_else(|| panic!("no {name}")).flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest |got − want| in units of atol + rtol |want|.
fn excess(got: &[f32], want: &[f32], rtol: f32, atol: f32) -> f32 {
    assert_eq!(got.len(), want.len());
    let one = |(g, w): (&f32, &f32)| (g - w).abs() / (atol + rtol * w.abs());
    got.iter().zip(want).map(one).fold(0.0, |a, b| if b.is_nan() { f32::INFINITY } else { a.max(b) })
}

#[test]
fn parity_adapters_agree_with_peft() {
    let pool = Pool::new(1);
    let (mut logprobs, mut gradients, mut merged) = (0, 0, 0);
    let (mut worst_logprob, mut worst_gradient, mut elements, mut strict) = (0f32, 0f32, 0usize, 0usize);
    for entry in std::fs::read_dir(fixtures().join("adapters")).unwrap() {
        let folder = entry.unwrap().path();
        let golden = candle_core::safetensors::load(folder.join("golden.safetensors"), &Device::Cpu).unwrap();
        let notes = read_json(&folder.join("golden.json"));
        let peft = PeftAdapter::open(&folder).unwrap();
        let source = ModelSource::open(folder.join(peft.base().unwrap())).unwrap();
        let mut policy = Policy::load(&source, Some(peft.config()), 0).unwrap();
        peft.load_into(&mut policy, 0).unwrap();
        let scaling = policy.adapter.as_ref().unwrap().scaling;
        assert!(
            (f64::from(scaling) - notes["scaling"].as_f64().unwrap()).abs() < 1e-5,
            "{}",
            folder.display()
        );
        policy.prepare(&pool, 512, Precision::F32);

        let warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
        let (mut trainer, mut grads, mut loss) = (Trainer::default(), policy.new_grads(), 0.0f64);
        for i in 0..notes["sequences"].as_array().unwrap().len() {
            let ids = golden[&format!("seq{i}.input_ids")].to_vec1::<i64>().unwrap();
            let tokens: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
            let groups = [GroupTokens { prompt: &tokens[..1], completions: vec![&tokens[1..]] }];
            let batch = pack(&groups, &micro_batches(&groups, usize::MAX)[0]);
            let scores = trainer.forward(&pool, &policy.weights(), &batch, &warp);
            let want = floats(&golden, &format!("seq{i}.logprobs"));
            worst_logprob = worst_logprob.max(excess(&scores.logprobs, &want, 1e-4, 1e-5));
            logprobs += want.len();
            let weights = floats(&golden, &format!("seq{i}.loss_weights"));
            loss += scores.logprobs.iter().zip(&weights).map(|(l, w)| f64::from(l * w)).sum::<f64>();
            let zeros = vec![0.0; weights.len()];
            trainer.backward(&pool, &policy.weights(), &batch, &warp, &weights, &zeros, &mut grads);
        }
        trainer.finish(&pool, &policy.weights(), &mut grads);
        assert!((loss - notes["loss"].as_f64().unwrap()).abs() < 1e-3 + 1e-5 * loss.abs(), "{loss}");
        assert!(grads.base.is_empty(), "a frozen base has no gradient");

        let arena = &policy.adapter.as_ref().unwrap().arena;
        for id in 0..arena.slots().len() {
            let values = &grads.adapter[arena.grad_range(id).unwrap()];
            for (name, _, got) in arena.tensors_of(id, values) {
                let name = match name.strip_suffix(".weight") {
                    Some(matrix) => format!("{matrix}.default.weight"),
                    None => format!("{name}.default.weight"),
                };
                let stats = &notes["grad_stats"][&name];
                let l2 = got.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                let want = stats["l2"].as_f64().unwrap_or_else(|| panic!("no {name}"));
                assert!((l2 - want).abs() <= 1e-4 * want.abs() + 1e-6, "{name}: l2 {l2} for {want}");
                if let Some(want) = golden.get(&format!("grad.{name}")) {
                    let want = want.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    // An element that cancels to near 0 keeps the rounding of sums as large as the tensor (two correct
                    // f32 implementations differ by 1e-6 of it; the golden values themselves by as much from f64).
                    worst_gradient = worst_gradient.max(excess(&got, &want, 1e-3, 1e-4 + 1e-6 * l2 as f32));
                    for (g, w) in got.iter().zip(&want) {
                        elements += 1;
                        strict += usize::from((g - w).abs() <= 1e-4 + 1e-3 * w.abs());
                    }
                }
                gradients += 1;
            }
        }
        assert_eq!(gradients_of(&notes), arena.slots().len());
        for (name, _, got) in policy.merged_tensors() {
            if let Some(want) = golden.get(&format!("merged.{name}")) {
                let want = want.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert!(excess(&got, &want, 1e-4, 1e-5) <= 1.0, "merged {name}");
                merged += 1;
            }
        }
    }
    println!(
        "adapters: {logprobs} logprobs, {gradients} gradients ({strict} of {elements} elements without the allowance for cancellation), {merged} merged matrices agree; worst in units of the tolerance: logprob {worst_logprob:.3}, gradient {worst_gradient:.3}"
    );
    assert!(logprobs > 0 && worst_logprob <= 1.0 && worst_gradient <= 1.0);
}

fn gradients_of(notes: &Value) -> usize {
    notes["grad_stats"].as_object().unwrap().len()
}

#[test]
fn broken_adapters_are_named() {
    let from = own_fixtures().join("adapters/qwen3_rslora_attn");
    let place = tempfile::tempdir().unwrap();
    let config = read_json(&from.join("adapter_config.json"));
    std::fs::copy(from.join("adapter_model.safetensors"), place.path().join("adapter_model.safetensors"))
        .unwrap();
    let write = |key: &str, value: Value| {
        let mut changed = config.clone();
        changed[key] = value;
        std::fs::write(place.path().join("adapter_config.json"), changed.to_string()).unwrap();
    };
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("use_bdlora", json!(true)),
        ("bias", json!("all")),
        ("rank_pattern", json!({"q_proj": 0})),
        ("alpha_pattern", json!({"q_proj": "two"})),
        ("modules_to_save", json!(["lm_head"])),
        ("r", json!(0)),
        ("lora_alpha", json!("two")),
        ("target_modules", json!("q_proj|v_proj")),
    ] {
        write(key, value);
        let error = PeftAdapter::open(place.path()).err().expect(key).to_string();
        assert!(error.contains("adapter_config.json") && error.contains(key), "{error}");
    }
    let source = ModelSource::open(own_fixtures().join("models/qwen3")).unwrap();
    let load = || {
        let peft = PeftAdapter::open(place.path()).unwrap();
        let mut policy = Policy::load(&source, None, 0).unwrap();
        peft.load_into(&mut policy, 0).unwrap_err().to_string()
    };
    write("r", json!(4));
    let error = load();
    assert!(error.contains("lora_A") && error.contains("[4, 64]") && error.contains("[8, 64]"), "{error}");
    write("r", json!(4096));
    let error = load();
    assert!(error.contains("lora_A") && error.contains("[4096, 64]"), "{error}");
    write("target_modules", json!(["q_proj"]));
    let error = load();
    assert!(error.contains("v_proj") && error.contains("no place"), "{error}");
    write("target_modules", json!(["q_proj", "v_proj", "o_proj"]));
    let error = load();
    assert!(error.contains("o_proj") && error.contains("missing"), "{error}");
    std::fs::remove_file(place.path().join("adapter_config.json")).unwrap();
    let error = PeftAdapter::open(place.path()).err().unwrap().to_string();
    assert!(error.contains("adapter_config.json") && error.contains("missing"), "{error}");
}
