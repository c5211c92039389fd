//! Loading models: both layouts of configs, safetensors and GGUF, and what happens to broken files.

use std::path::{Path, PathBuf};
use std::time::Instant;

use rft_engine::model::source::ModelSource;
use rft_engine::model::spec::ModelSpec;
use serde_json::Value;

/// Root of the fixtures: `RFT_FIXTURES`, else the repository's own.
fn fixtures() -> PathBuf {
    std::env::var_os("RFT_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn parity_configs_of_both_layouts_give_one_spec() {
    let (mut agree, mut skipped) = (0, vec![]);
    for entry in std::fs::read_dir(fixtures().join("models")).unwrap() {
        let folder = entry.unwrap().path();
        if !folder.join("config_v4.json").exists() {
            continue;
        }
        let new = match ModelSpec::from_config_json(&read_json(&folder.join("config.json"))) {
            Ok(spec) => spec,
            Err(e) => {
                skipped.push(format!("{}: {e}", folder.file_name().unwrap().to_string_lossy()));
                continue;
            }
        };
        let old = ModelSpec::from_config_json(&read_json(&folder.join("config_v4.json"))).unwrap();
        assert_eq!(new, old, "{}", folder.display());
        let written = ModelSpec::from_config_json(&new.to_config_json("float32")).unwrap();
        assert_eq!(new, written, "{}: written and read back", folder.display());
        agree += 1;
    }
    println!("configs: {agree} agree; not decoders: {skipped:?}");
    assert!(agree > 0);
}

#[test]
fn smoke() {
    let Some(model) = std::env::var_os("RFT_SMOLLM2") else { return };
    let start = Instant::now();
    let source = ModelSource::open(Path::new(&model)).unwrap();
    println!("open {:?}", start.elapsed());
    println!("{:?}", source.spec());
    println!("{:?}", &source.names()[..5]);
    for name in source.names() {
        let shape = source.shape(&name).unwrap();
        let values = source.tensor(&name, &shape).unwrap();
        assert!(values.iter().all(|v| v.is_finite()));
    }
    println!("load {:?}", start.elapsed());
    let tokenizer = source.tokenizer().unwrap();
    println!("tokenizer {:?}", start.elapsed());
    println!("{:?}", tokenizer.encode("Hello 123 world<|im_end|>").unwrap());
}
