//! Loading and writing models: both layouts of configs, safetensors, GGUF, and what happens to broken files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device};
use proptest::prelude::*;
use rft_engine::model::export::{ModelFiles, write_hf_folder, write_safetensors};
use rft_engine::model::gguf::{Gguf, dequantise};
use rft_engine::model::policy::Policy;
use rft_engine::model::source::ModelSource;
use rft_engine::model::spec::ModelSpec;
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "support/gguf.rs"]
mod gguf;
use gguf::{Meta, gguf_bytes, to_gguf};

/// Root of the fixtures: `RFT_FIXTURES`, else the repository's own.
fn fixtures() -> PathBuf {
    std::env::var_os("RFT_FIXTURES").map_or_else(own_fixtures, PathBuf::from)
}

fn own_fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .unwrap()
}

/// The decoder folders of the fixtures (vision-language ones are named and left out).
fn decoders() -> Vec<PathBuf> {
    let mut found = vec![];
    let mut other = vec![];
    for entry in std::fs::read_dir(fixtures().join("models")).unwrap() {
        let folder = entry.unwrap().path();
        match read_json(&folder.join("config.json")).get("vision_config") {
            None => found.push(folder),
            Some(_) => other.push(folder.file_name().unwrap().to_string_lossy().into_owned()),
        }
    }
    found.sort();
    println!("left out (not decoders): {other:?}");
    assert!(!found.is_empty());
    found
}

/// A copy of a fixture model that a test may damage.
fn copy_of(model: &str) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(own_fixtures().join("models").join(model)).unwrap() {
        let path = entry.unwrap().path();
        if !path.to_string_lossy().contains("golden") {
            std::fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    to
}

/// The error of a call that must fail, as the user sees it.
fn error_of<T>(result: rft_engine::Result<T>) -> String {
    result.err().expect("this must be refused").to_string()
}

fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

#[test]
fn parity_configs_of_both_layouts_give_one_spec() {
    let mut agree = 0;
    for folder in decoders() {
        let config = read_json(&folder.join("config.json"));
        let new =
            ModelSpec::from_config_json(&config).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let old = ModelSpec::from_config_json(&read_json(&folder.join("config_v4.json"))).unwrap();
        assert_eq!(new, old, "{}", folder.display());
        let written = ModelSpec::from_config_json(&new.to_config_json("float32")).unwrap();
        assert_eq!(new, written, "{}: written and read back", folder.display());
        agree += 1;
    }
    println!("configs: {agree} of {agree} agree in both layouts and when written back");
}

#[test]
fn parity_rotary_frequencies() {
    let path = fixtures().join("rope/cases.json");
    let path = if path.exists() { path } else { own_fixtures().join("rope/cases.json") };
    let mut agree = 0;
    for case in read_json(&path)["cases"].as_array().unwrap() {
        let spec = ModelSpec::from_config_json(&case["config"]).unwrap();
        for (positions, wanted) in case["positions"].as_object().unwrap() {
            let wanted = wanted.as_array().unwrap();
            assert_eq!(spec.ropes.len(), wanted.len(), "{}", case["config"]);
            for (rope, want) in spec.ropes.iter().zip(wanted) {
                let (frequencies, factor) = rope.inv_freq(positions.parse().unwrap());
                let want_frequencies: Vec<f64> =
                    want["inv_freq"].as_array().unwrap().iter().map(|f| f.as_f64().unwrap()).collect();
                assert_eq!(frequencies.len(), want_frequencies.len(), "{}", case["config"]);
                let close = |(a, b): (&f64, &f64)| (a / b - 1.0).abs() < 1e-6;
                assert!(
                    frequencies.iter().zip(&want_frequencies).all(close),
                    "{} at {positions}: {frequencies:?} for {want_frequencies:?}",
                    case["config"]
                );
                assert!((factor - want["attention_factor"].as_f64().unwrap()).abs() < 1e-9);
                agree += 1;
            }
        }
    }
    println!("rotary embeddings: {agree} of {agree} agree");
    assert!(agree > 0);
}

#[test]
fn parity_tensors_are_those_of_the_files() {
    let (mut folders, mut tensors) = (0, 0);
    for folder in decoders() {
        let source = ModelSource::open(&folder).unwrap();
        let golden = read_json(&folder.join("golden.json"));
        // in memory, transformers stacks a layer's experts and calls Mixtral's mixture as Qwen3's
        for name in golden["grad_stats"].as_object().unwrap().keys().filter(|n| !n.contains(".experts.")) {
            let in_file = name.replace(".mlp.gate.", ".block_sparse_moe.gate.");
            assert!(source.has(name) || source.has(&in_file), "{}: {name}", folder.display());
        }
        let mut stored = BTreeMap::new();
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with("model") && name.ends_with(".safetensors") {
                stored.extend(candle_core::safetensors::load(&path, &Device::Cpu).unwrap());
            }
        }
        assert_eq!(source.names(), stored.keys().cloned().collect::<Vec<_>>());
        for (name, want) in stored {
            let want_values =
                want.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(source.tensor(&name, want.dims()).unwrap(), want_values, "{name}");
            tensors += 1;
        }
        folders += 1;
    }
    println!("tensors: {tensors} of {tensors} agree in {folders} folders");
}

#[test]
fn gguf_blocks_dequantise_as_in_gguf_py() {
    let file = std::fs::read(own_fixtures().join("gguf/blocks.gguf")).unwrap();
    let gguf = Gguf::parse(&file).unwrap();
    let mut kinds = vec![];
    for (name, tensor) in gguf.tensors.iter().filter(|(name, _)| !name.ends_with(".f32")) {
        let numbers = |t: &rft_engine::model::gguf::GgufTensor| {
            let mut out = vec![];
            dequantise(t.kind.unwrap(), &file[t.bytes.clone()], &mut out);
            out
        };
        let want = &gguf.tensors[&format!("{name}.f32")];
        assert_eq!((&tensor.shape, &want.shape), (&vec![3, 512], &vec![3, 512]));
        for (got, want) in numbers(tensor).into_iter().zip(numbers(want)) {
            assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0), "{name}: {got} for {want}");
        }
        kinds.push(name.as_str());
    }
    assert_eq!(kinds.len(), 10, "{kinds:?}");
    println!("gguf blocks: {} kinds agree: {kinds:?}", kinds.len());
}

#[test]
fn gguf_files_are_the_folders_they_were_made_from() {
    for (model, arch) in [
        ("llama_tied", "llama"),
        ("qwen2", "qwen2"),
        ("qwen2_yarn", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma3", "gemma3"),
        ("qwen3_moe", "qwen3moe"),
        ("mixtral", "llama"),
    ] {
        let folder = own_fixtures().join("models").join(model);
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("model.gguf");
        std::fs::write(&path, to_gguf(&folder, arch)).unwrap();
        let (want, got) = (ModelSource::open(&folder).unwrap(), ModelSource::open(place.path()).unwrap());
        let mut expected = want.spec().clone();
        if model == "gemma3" {
            // Files of this kind hold neither the scalar nor the pattern: both are the published models' own.
            expected.attn_scale = (expected.head_dim as f32).powf(-0.5);
            for layer in &mut expected.layer_specs {
                (layer.window, layer.rope) = (Some(24), Some(1));
            }
        }
        assert_eq!(*got.spec(), expected, "{model}");
        assert_eq!(got.names(), want.names(), "{model}");
        for name in want.names() {
            let shape = want.shape(&name).unwrap();
            let (a, b) = (want.tensor(&name, &shape).unwrap(), got.tensor(&name, &shape).unwrap());
            // (w + 1) - 1 of a Gemma norm loses its last bits in f32.
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= if arch == "gemma3" { 1e-6 } else { 0.0 };
            assert!(a.iter().zip(&b).all(close), "{model}: {name}");
        }
        let (a, b) = (want.tokenizer().unwrap(), got.tokenizer().unwrap());
        for text in ["Hello, world! 12345", "naïve €\n\n  x", "<|im_start|>user\nhi<|im_end|>"] {
            assert_eq!(a.encode(text).unwrap(), b.encode(text).unwrap(), "{model}: {text:?}");
        }
        assert_eq!((b.eos(), b.pad()), (&[511][..], Some(509)));
        assert_eq!(got.chat_template_source().unwrap().as_deref(), Some("{{ messages[0].content }}"));
    }
}

#[test]
fn written_folders_load_with_the_same_numbers() {
    for (model, dtype) in
        [("llama_untied_rope3", "float32"), ("qwen3_bf16", "bfloat16"), ("gemma3", "bfloat16")]
    {
        let source = ModelSource::open(own_fixtures().join("models").join(model)).unwrap();
        let out = tempfile::tempdir().unwrap();
        let all = source.names().into_iter().map(|name| {
            let shape = source.shape(&name).unwrap();
            let values = source.tensor(&name, &shape).unwrap();
            (name, shape, values)
        });
        write_hf_folder(out.path(), &source.files().unwrap(), all, dtype).unwrap();
        let again = ModelSource::open(out.path()).unwrap();
        assert_eq!(again.spec(), source.spec());
        assert_eq!(again.config()["dtype"], json!(dtype));
        assert_eq!(again.names(), source.names());
        for name in source.names() {
            let shape = source.shape(&name).unwrap();
            let mut want = source.tensor(&name, &shape).unwrap();
            if dtype == "bfloat16" {
                want.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
            }
            assert_eq!(again.tensor(&name, &shape).unwrap(), want, "{name}");
        }
        let text = "kept <|im_end|>";
        assert_eq!(
            again.tokenizer().unwrap().encode(text).unwrap(),
            source.tokenizer().unwrap().encode(text).unwrap()
        );
        assert_eq!(again.chat_template_source().unwrap(), source.chat_template_source().unwrap());
        let mut names: Vec<_> = std::fs::read_dir(out.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json"
            ],
            "nothing else is left behind"
        );
    }
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("x.safetensors");
    let twice = ["a", "a"].map(|n| (n.to_string(), vec![1], vec![0.0])).into_iter();
    assert_says(&error_of(write_safetensors(&path, twice, "float32")), &["`a`", "twice"]);
    let short = [("a".to_string(), vec![2, 2], vec![0.0; 3])].into_iter();
    assert_says(&error_of(write_safetensors(&path, short, "float32")), &["[2, 2]", "given 3"]);
    assert_says(&error_of(write_safetensors(&path, std::iter::empty(), "int4")), &["int4", "bfloat16"]);
}

#[test]
fn a_new_model_gets_every_file() {
    use rft_engine::data::tokenizer::Tokenizer;
    let tokenizer = Tokenizer::from_characters("01+", &["<think>"], &["<eos>"], "<eos>").unwrap();
    let config = read_json(&own_fixtures().join("models/qwen3/config.json"));
    let files = ModelFiles::new(config, &tokenizer, Some("{{ messages }}")).unwrap();
    let out = tempfile::tempdir().unwrap();
    write_hf_folder(out.path(), &files, std::iter::empty(), "float32").unwrap();
    let again = ModelSource::open(out.path()).unwrap();
    assert_eq!(again.tokenizer().unwrap().eos(), [4], "the tokenizer's own end token, not the old config's");
    assert_eq!(again.chat_template_source().unwrap().as_deref(), Some("{{ messages }}"));
}

#[test]
fn unsupported_configs_are_named() {
    let base = read_json(&own_fixtures().join("models/qwen3/config.json"));
    let refuse = |changes: Value| {
        let mut config = base.clone();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        error_of(ModelSpec::from_config_json(&config))
    };
    let cases = [
        (json!({"architectures": ["MambaForCausalLM"]}), vec!["MambaForCausalLM", "Qwen3ForCausalLM"]),
        (json!({"model_type": "llama"}), vec!["model_type", "llama", "qwen3"]),
        (json!({"quantization_config": {"bits": 4}}), vec!["quantization_config", "hint:"]),
        (json!({"hidden_act": "relu"}), vec!["hidden_act", "relu", "silu"]),
        (json!({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}), vec!["rope_type", "dynamic"]),
        (json!({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "magic": 1}}), vec!["magic", "yarn"]),
        (json!({"rope_parameters": {"rope_type": "linear"}}), vec!["factor", "missing"]),
        (
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            vec!["layer_types", "linear_attention"],
        ),
        (json!({"layer_types": ["full_attention"]}), vec!["layer_types", "2 kinds"]),
        (json!({"attention_multiplier": 0.5}), vec!["attention_multiplier"]),
        (json!({"residual_multiplier": 0.5}), vec!["residual_multiplier"]),
        (json!({"kv_lora_rank": 512}), vec!["kv_lora_rank"]),
        (json!({"num_kv_shared_layers": 1}), vec!["num_kv_shared_layers"]),
        (json!({"position_embedding_type": "absolute"}), vec!["position_embedding_type"]),
        (json!({"is_encoder_decoder": true}), vec!["is_encoder_decoder"]),
        (json!({"vision_config": {"depth": 2}}), vec!["vision_config"]),
        (json!({"final_logit_softcapping": 30.0}), vec!["final_logit_softcapping"]),
        (json!({"num_key_value_heads": 3}), vec!["num_key_value_heads", "divisor", "3"]),
        (json!({"hidden_size": 0}), vec!["hidden_size", "0"]),
        (json!({"hidden_size": 99_999_999_999u64}), vec!["hidden_size", "99999999999"]),
        (json!({"num_hidden_layers": 1_000_000}), vec!["num_hidden_layers", "1000000"]),
        (json!({"vocab_size": "many"}), vec!["vocab_size", "many"]),
        (json!({"vocab_size": null}), vec!["vocab_size", "missing"]),
        (json!({"head_dim": 1 << 21}), vec!["head_dim", "65536", "2097152"]),
        (json!({"head_dim": 31}), vec!["head_dim", "even", "31"]),
        (json!({"rms_norm_eps": -1.0}), vec!["rms_norm_eps", "-1"]),
        (json!({"eos_token_id": -3}), vec!["eos_token_id", "-3"]),
        (json!({"tie_word_embeddings": "yes"}), vec!["tie_word_embeddings", "yes"]),
    ];
    for (changes, parts) in cases {
        assert_says(&refuse(changes), &parts);
    }
    // What does not change the computation is no reason to refuse.
    let mut config = base.clone();
    for (key, value) in
        [("_name_or_path", json!("x")), ("attention_dropout", json!(0.1)), ("unsloth_version", json!("1"))]
    {
        config[key] = value;
    }
    assert_eq!(ModelSpec::from_config_json(&config).unwrap(), ModelSpec::from_config_json(&base).unwrap());
}

#[test]
fn stored_weights_that_the_config_has_no_use_for_are_named() {
    use rft_engine::model::policy::Policy;

    let folder = copy_of("qwen3");
    let source = ModelSource::open(folder.path()).unwrap();
    let all: Vec<_> = source
        .names()
        .into_iter()
        .map(|name| {
            let shape = source.shape(&name).unwrap();
            let values = source.tensor(&name, &shape).unwrap();
            (name, shape, values)
        })
        .collect();
    let file = folder.path().join("model.safetensors");
    let load_with = |extra: &str| {
        let extra = (extra.to_string(), vec![2], vec![0.0; 2]);
        write_safetensors(&file, all.iter().cloned().chain([extra]), "float32").unwrap();
        Policy::load(&ModelSource::open(folder.path()).unwrap(), None, 0)
    };
    let bias = "model.layers.1.self_attn.q_proj.bias";
    assert_says(&error_of(load_with(bias)), &[bias, "Qwen3ForCausalLM", "hint:"]);
    assert!(load_with("model.layers.1.self_attn.rotary_emb.inv_freq").is_ok());

    // a GGUF file that says Llama and holds the norms of Qwen3's heads
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("llama.gguf");
    std::fs::write(&path, to_gguf(&own_fixtures().join("models/qwen3"), "llama")).unwrap();
    let error = error_of(Policy::load(&ModelSource::open(&path).unwrap(), None, 0));
    assert_says(&error, &["blk.0.attn_k_norm.weight", "LlamaForCausalLM", "hint:"]);
}

#[test]
fn families_read_their_own_fields() {
    let base = json!({
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    });
    let spec = |arch: &str, fields: Value| {
        let mut config = base.clone();
        config["architectures"] = json!([arch]);
        for (key, value) in fields.as_object().unwrap() {
            config[key] = value.clone();
        }
        let spec = ModelSpec::from_config_json(&config).unwrap_or_else(|e| panic!("{arch}: {e}"));
        let again = ModelSpec::from_config_json(&spec.to_config_json("bfloat16"));
        assert_eq!(again.unwrap_or_else(|e| panic!("{arch}: {e}")), spec, "{arch}: written and read back");
        spec
    };
    let windows = |s: &ModelSpec| s.layer_specs.iter().map(|l| l.window).collect::<Vec<_>>();
    let ropes = |s: &ModelSpec| s.layer_specs.iter().map(|l| l.rope).collect::<Vec<_>>();

    for scalar in [4e-4, 0.37, 1.0005, 224.0, 1e9] {
        let gemma = spec("Gemma2ForCausalLM", json!({"query_pre_attn_scalar": scalar}));
        assert_eq!(gemma.attn_scale, f64::powf(scalar, -0.5) as f32);
    }

    let smol = spec("SmolLM3ForCausalLM", json!({}));
    assert_eq!(ropes(&smol), [Some(0), Some(0), Some(0), None]);
    assert!(smol.tied && smol.ropes[0].theta == 2e6);
    let smol = spec(
        "SmolLM3ForCausalLM",
        json!({"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": true, "sliding_window": 8}),
    );
    assert_eq!(ropes(&smol), [Some(0), None, Some(0), None]);
    assert_eq!(windows(&smol), [None, Some(8), None, Some(8)]);

    let gemma2 =
        spec("Gemma2ForCausalLM", json!({"sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 144}));
    assert_eq!(windows(&gemma2), [Some(8), None, Some(8), None]);
    assert_eq!((gemma2.attn_softcap, gemma2.final_softcap), (Some(50.0), Some(30.0)));
    assert_eq!((gemma2.attn_scale, gemma2.norm_offset, gemma2.sandwich_norms), (1.0 / 12.0, 1.0, true));
    assert!(spec("Gemma2ForCausalLM", json!({"attn_logit_softcapping": null})).attn_softcap.is_none());
    let capped = json!({"attn_logit_softcapping": 9.0, "final_logit_softcapping": 12.0, "sliding_window": 8});
    let gemma3 = spec("Gemma3ForCausalLM", capped);
    assert_eq!((gemma3.attn_softcap, gemma3.final_softcap), (None, Some(12.0)), "as transformers");

    let qwen = spec(
        "Qwen2ForCausalLM",
        json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2}),
    );
    assert_eq!(windows(&qwen), [None, None, Some(8), Some(8)]);
    assert!(qwen.qkv_bias && !qwen.o_bias);
    assert_eq!(windows(&spec("Qwen2ForCausalLM", json!({"sliding_window": 8}))), [None; 4]);

    let phi = spec("Phi3ForCausalLM", json!({"partial_rotary_factor": 0.75, "sliding_window": 16}));
    assert_eq!((phi.ropes[0].rotary_dim, phi.fused_projections, windows(&phi)[3]), (6, true, Some(16)));
    let long = json!({"rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.0, 3.0, 4.0]}, "original_max_position_embeddings": 64});
    let phi = spec("Phi3ForCausalLM", long);
    let (short, factor) = phi.ropes[0].inv_freq(64);
    // sqrt(1 + ln(128 / 64) / ln 64)
    assert!((factor - 1.080_123_449_734_643_6).abs() < 1e-12);
    // in f32, as torch makes them
    assert_eq!(short[1], f64::from(1.0 / (1.1 * 10000f32.powf(0.25))));
    assert_eq!(phi.ropes[0].inv_freq(65).0[1], f64::from(1.0 / (2.0 * 10000f32.powf(0.25))));

    let moe = spec(
        "Qwen3MoeForCausalLM",
        json!({"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": true, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    );
    assert_eq!(moe.layer_specs.iter().map(|l| l.experts).collect::<Vec<_>>(), [false, true, false, false]);
    assert_eq!(moe.moe.map(|m| (m.experts, m.per_token, m.ffn, m.renormalise)), Some((8, 2, 24, true)));
    let mixtral = spec("MixtralForCausalLM", json!({"num_local_experts": 4, "num_experts_per_tok": 2}));
    assert_eq!(mixtral.moe.map(|m| (m.experts, m.ffn)), Some((4, 48)));

    let llama = spec(
        "LlamaForCausalLM",
        json!({"attention_bias": true, "mlp_bias": true, "num_key_value_heads": null}),
    );
    assert!(llama.qkv_bias && llama.o_bias && llama.mlp_bias && llama.kv_heads == 4);
}

#[test]
fn stacked_experts_and_single_ones_are_the_same_model() {
    use rft_engine::model::policy::Policy;

    for model in ["qwen3_moe", "mixtral"] {
        let folder = copy_of(model);
        let source = ModelSource::open(folder.path()).unwrap();
        let single = Policy::load(&source, None, 0).unwrap();
        let mut names: Vec<String> = single.merged_tensors().map(|(name, ..)| name).collect();
        names.sort();
        assert_eq!(names, source.names(), "exported under the names it came with");
        let mut stacks: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
        for (name, shape, values) in single.merged_tensors() {
            let name = name.replace(".block_sparse_moe.", ".mlp.");
            let Some((block, expert)) = name.split_once(".experts.") else {
                stacks.insert(name, (shape, values));
                continue;
            };
            let down = expert.contains("down_proj") || expert.contains(".w2.");
            let stack = format!("{block}.experts.{}", if down { "down_proj" } else { "gate_up_proj" });
            let empty = || (vec![0, if down { shape[0] } else { 2 * shape[0] }, shape[1]], vec![]);
            let (stacked, all) = stacks.entry(stack).or_insert_with(empty);
            all.extend(values);
            stacked[0] = all.len() / stacked[1] / stacked[2];
        }
        let tensors = stacks.into_iter().map(|(name, (shape, values))| (name, shape, values));
        write_safetensors(&folder.path().join("model.safetensors"), tensors, "float32").unwrap();
        let source = ModelSource::open(folder.path()).unwrap();
        let stacked = Policy::load(&source, None, 0).unwrap();
        for (a, b) in single.merged_tensors().zip(stacked.merged_tensors()) {
            assert_eq!(a, b);
        }
        assert!(!source.has("model.layers.0.mlp.experts.6.gate_proj.weight"), "there are fewer experts");
    }
}

#[test]
fn shared_experts_and_adapters_on_experts_are_refused_by_name() {
    use rft_engine::config::LoraConfig;
    use rft_engine::model::policy::Policy;

    let folder = copy_of("qwen3_moe");
    let all = LoraConfig::default();
    let source = ModelSource::open(folder.path()).unwrap();
    assert_says(&error_of(Policy::load(&source, Some(&all), 0)), &["all-linear", "experts", "hint:"]);
    let attention = LoraConfig { targets: vec!["q_proj".into(), "o_proj".into()], ..all };
    assert!(Policy::load(&source, Some(&attention), 0).is_ok());
    let path = folder.path().join("config.json");
    let mut config = read_json(&path);
    config["shared_expert_intermediate_size"] = json!(32);
    std::fs::write(&path, config.to_string()).unwrap();
    assert_says(&error_of(ModelSource::open(folder.path())), &["shared_expert_intermediate_size"]);
}

#[test]
fn broken_folders_are_named() {
    let folder = copy_of("qwen3");
    let weights = folder.path().join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let open = || ModelSource::open(folder.path());
    let norm = "model.norm.weight";

    let source = open().unwrap();
    assert_says(&error_of(source.tensor(norm, &[65])), &[norm, "[65]", "[64]"]);
    assert_says(
        &error_of(source.tensor("model.norms.weight", &[64])),
        &["model.norms.weight", "missing", "Qwen3ForCausalLM", norm],
    );

    std::fs::write(&weights, &whole[..whole.len() - 100]).unwrap();
    assert_says(&error_of(open()), &["model.safetensors", "truncated"]);
    std::fs::write(&weights, &whole[..5]).unwrap();
    assert_says(&error_of(open()), &["model.safetensors", "5 bytes"]);
    let mut lying = whole.clone();
    lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&weights, &lying).unwrap();
    assert_says(&error_of(open()), &["model.safetensors", "18446744073709551615"]);
    let header = |json: &str, data: usize| {
        let mut out = (json.len() as u64).to_le_bytes().to_vec();
        out.extend(json.as_bytes());
        out.resize(out.len() + data, 0);
        std::fs::write(&weights, out).unwrap();
    };
    header(r#"{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#, 4);
    assert_says(&error_of(open()), &["model.safetensors"]);
    header(r#"{"model.norm.weight":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}"#, 16);
    assert_says(&error_of(open().unwrap().tensor(norm, &[2])), &[norm, "I64", "bf16"]);
    std::fs::remove_file(&weights).unwrap();
    assert_says(&error_of(open()), &["model.safetensors", "missing", "hint:"]);
    std::fs::write(folder.path().join("config.json"), "{\"a\": ").unwrap();
    assert_says(&error_of(open()), &["config.json", "line 1"]);
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    assert_says(&error_of(open()), &["config.json", "missing", "GGUF"]);
    assert_says(&error_of(ModelSource::open(folder.path().join("nowhere"))), &["nowhere"]);
}

#[test]
fn a_config_that_lies_about_sizes_is_refused_before_anything_is_allocated() {
    let folder = copy_of("qwen2");
    let path = folder.path().join("config.json");
    let mut config = read_json(&path);
    // at this width the weights would take gigabytes
    config["intermediate_size"] = json!(1 << 24);
    std::fs::write(&path, config.to_string()).unwrap();
    let before = peak_address_space();
    let source = ModelSource::open(folder.path()).unwrap();
    assert_says(
        &error_of(Policy::load(&source, None, 0)),
        &["gate_proj.weight", "expected shape [16777216, 64]"],
    );
    if let (Some(before), Some(after)) = (before, peak_address_space()) {
        assert!(after - before < 1 << 30, "grew by {} bytes", after - before);
    }
}

#[test]
fn broken_shards_and_tokenizers_are_named() {
    let folder = copy_of("llama_untied_rope3");
    let index = folder.path().join("model.safetensors.index.json");
    let shard = folder.path().join("model-00002-of-00003.safetensors");
    let open = || ModelSource::open(folder.path());
    std::fs::rename(&shard, folder.path().join("aside")).unwrap();
    assert_says(&error_of(open()), &["1 of 3", "model-00002-of-00003.safetensors"]);
    std::fs::copy(folder.path().join("model-00001-of-00003.safetensors"), &shard).unwrap();
    assert_says(&error_of(open()), &["model-00002-of-00003.safetensors", "another file"]);
    std::fs::rename(folder.path().join("aside"), &shard).unwrap();

    let good = read_json(&index);
    let with = |tensor: &str, file: Value| {
        let mut changed = good.clone();
        changed["weight_map"][tensor] = file;
        std::fs::write(&index, changed.to_string()).unwrap();
    };
    with("model.norm.weight", json!("../../etc/passwd.safetensors"));
    assert_says(&error_of(open()), &["model.norm.weight", "passwd", "beside"]);
    with("model.ghost.weight", json!("model-00001-of-00003.safetensors"));
    assert_says(&error_of(open()), &["model.ghost.weight", "does not hold it"]);
    std::fs::remove_file(&index).unwrap();
    assert_says(&error_of(open()), &["model.safetensors.index.json", "missing"]);
    std::fs::write(&index, good.to_string()).unwrap();

    let config = read_json(&folder.path().join("config.json"));
    let set = |key: &str, value: Value| {
        let mut changed = config.clone();
        changed[key] = value;
        std::fs::write(folder.path().join("config.json"), changed.to_string()).unwrap();
    };
    set("vocab_size", json!(500));
    assert_says(&error_of(open().unwrap().tokenizer()), &["511", "500 rows"]);
    set("vocab_size", json!(512));
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [511, 600]}"#).unwrap();
    assert_says(&error_of(open().unwrap().tokenizer()), &["eos_token_id", "600", "512"]);
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    assert_says(&error_of(open().unwrap().tokenizer()), &["tokenizer.json"]);
    std::fs::write(folder.path().join("tokenizer.model"), "").unwrap();
    assert_says(&error_of(open().unwrap().tokenizer()), &["tokenizer.model", "hint:"]);
}

#[test]
fn broken_gguf_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let whole = to_gguf(&own_fixtures().join("models/qwen2_yarn"), "qwen2");
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        error_of(ModelSource::open(&path))
    };
    assert_says(&open(&whole[..whole.len() - 64]), &["m.gguf", "outside the file", "hint:"]);
    assert_says(&open(&whole[..100]), &["m.gguf"]);
    assert_says(&open(b"GGML"), &["magic", "GGML"]);
    assert_says(&open(b"GGUF\x09\0\0\0"), &["version", "9"]);
    let mut many = whole.clone();
    many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_says(&open(&many), &["tensor count", "18446744073709551615"]);
    many[8..16].copy_from_slice(&whole[8..16]);
    many[16..24].copy_from_slice(&(1u64 << 40).to_le_bytes());
    assert_says(&open(&many), &["metadata count"]);
    assert_says(
        &open(&gguf_bytes(&[("general.architecture", Meta::Text("rwkv6"))], &[])),
        &["rwkv6", "llama"],
    );
    assert_says(
        &open(&gguf_bytes(&[("general.architecture", Meta::Text("llama"))], &[])),
        &["llama.attention.head_count", "missing"],
    );
    assert_says(&open(&gguf_bytes(&[("general.alignment", Meta::U32(3))], &[])), &["general.alignment", "3"]);
    let absurd = [("t".to_string(), vec![1 << 40, 1 << 40], vec![])];
    assert_says(&open(&gguf_bytes(&[], &absurd)), &["`t`", "absurd"].map(|s| s.trim_matches('`')));
    let twice = ["t", "t"].map(|n| (n.to_string(), vec![1], vec![0.0]));
    assert_says(&open(&gguf_bytes(&[], &twice)), &["twice"]);
    std::fs::write(folder.path().join("second.gguf"), &whole).unwrap();
    assert_says(&error_of(ModelSource::open(folder.path())), &["several GGUF files"]);
}

/// Peak of the address space of this process in bytes: a huge allocation shows here even if it is never touched.
fn peak_address_space() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmPeak:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Opens a file of bytes as a model and reads all that it claims to hold.
fn read_all(path: &Path) {
    let Ok(source) = ModelSource::open(path) else { return };
    for name in source.names() {
        let shape = source.shape(&name).unwrap_or_default();
        let _ = source.tensor(&name, &shape);
    }
    if let Ok(tokenizer) = source.tokenizer() {
        let _ = tokenizer.encode("Hello <|im_end|> 12");
        let _ = source.chat_template(&tokenizer);
    }
}

#[test]
fn damaged_files_never_panic_or_allocate_hugely() {
    let rounds: u32 = std::env::var("RFT_FUZZ_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    let folder = copy_of("qwen2_yarn");
    let weights = folder.path().join("model.safetensors");
    let place = tempfile::tempdir().unwrap();
    let gguf_path = place.path().join("m.gguf");
    let safetensors = std::fs::read(&weights).unwrap();
    let gguf = to_gguf(folder.path(), "qwen2");
    let config = std::fs::read(folder.path().join("config.json")).unwrap();
    let tokenizer = std::fs::read(folder.path().join("tokenizer.json")).unwrap();
    let before = peak_address_space();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: rounds,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    // Positions lean towards the front, where the headers are.
    let edits = prop::collection::vec((0.0f64..1.0, any::<u8>(), 0usize..9), 1..6);
    runner
        .run(&(0usize..4, edits, any::<bool>()), |(which, edits, cut)| {
            let original = [&safetensors, &gguf, &config, &tokenizer][which];
            let mut bytes = original.clone();
            for (at, value, len) in edits {
                let at = (at * at * at * bytes.len() as f64) as usize;
                for b in bytes.iter_mut().skip(at).take(len) {
                    *b = value;
                }
                if cut && len == 8 {
                    bytes.truncate(at);
                }
            }
            let (target, open) = match which {
                0 => (weights.clone(), folder.path()),
                1 => (gguf_path.clone(), gguf_path.as_path()),
                2 => (folder.path().join("config.json"), folder.path()),
                _ => (folder.path().join("tokenizer.json"), folder.path()),
            };
            std::fs::write(&target, &bytes).unwrap();
            read_all(open);
            std::fs::write(&target, original).unwrap();
            Ok(())
        })
        .unwrap();
    if let (Some(before), Some(after)) = (before, peak_address_space()) {
        println!("{rounds} damaged files; peak address space grew by {} MiB", (after - before) >> 20);
        assert!(after - before < 2 << 30, "grew by {} bytes", after - before);
    }
}

/// Reads SmolLM2 where `scripts/fetch_smollm2` put it, and says how long it took.
#[test]
fn smollm2_loads_in_under_a_second() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2");
    let folder = std::env::var_os("RFT_SMOLLM2").map_or(folder, PathBuf::from);
    if !folder.exists() {
        println!("skipped: {} is not there (scripts/fetch_smollm2 gets it)", folder.display());
        return;
    }
    let start = Instant::now();
    let source = ModelSource::open(&folder).unwrap();
    let mut count = 0;
    for name in source.names() {
        let shape = source.shape(&name).unwrap();
        let values = source.tensor(&name, &shape).unwrap();
        assert!(values.iter().all(|v| v.is_finite()), "{name}");
        count += values.len();
    }
    let weights = start.elapsed();
    let tokenizer = source.tokenizer().unwrap();
    println!("smollm2: {count} weights in {weights:?}, with tokenizer {:?}", start.elapsed());
    assert_eq!(count, 134_515_008);
    assert!(start.elapsed().as_secs_f64() < 5.0, "far beyond the second it should take");
    let reference = own_fixtures().join("tokenizers/smollm2");
    let same = rft_engine::data::tokenizer::Tokenizer::from_folder(&reference, &[]).unwrap();
    for case in read_json(&own_fixtures().join("chat/tokenizer_cases.json"))["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), same.encode(text).unwrap(), "{text:?}");
    }
}
