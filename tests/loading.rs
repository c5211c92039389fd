//! Loading holds nothing twice: peak memory against the packed weights, and the time it takes.
//!
//! `RFT_MODELS` names further models to measure (separated by `:`).

use std::path::Path;
use std::time::Instant;

use rft_engine::config::{NewModelConfig, Precision};
use rft_engine::model::export::{ModelFiles, write_hf_folder};
use rft_engine::model::policy::{Policy, new_model_spec};
use rft_engine::model::source::ModelSource;
use rft_kernels::Pool;

/// A line of `/proc/self/status`, in bytes.
fn status(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

/// Loads a model for rollouts; gives peak memory beyond what was held before, relative to the packed weights.
fn load(path: &Path, precision: Precision) -> (Policy, f64) {
    let pool = Pool::new(2);
    // 5 sets the peak back to what is held now
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, start) = (status("VmRSS"), Instant::now());
    let source = ModelSource::open(path).unwrap();
    let mut policy = Policy::load_on(&pool, &source, None, 0).unwrap();
    policy.prepare(&pool, 512, precision);
    let took = start.elapsed();
    let (peak, packed) = (status("VmHWM") - before, policy.base.bytes());
    let ratio = peak as f64 / packed as f64;
    println!(
        "{} in {precision:?}: {:.2} s, peak {} MiB, packed {} MiB, ratio {ratio:.2}",
        path.file_name().unwrap().to_string_lossy(),
        took.as_secs_f64(),
        peak >> 20,
        packed >> 20
    );
    (policy, ratio)
}

#[test]
#[cfg(target_os = "linux")]
fn loading_takes_little_more_memory_than_the_packed_weights() {
    let shape = NewModelConfig { hidden: 512, layers: 8, heads: 8, kv_heads: 4, head_dim: 64, ffn: 1536 };
    let spec = new_model_spec(&shape, 8192, 1, 512).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for dtype in ["bfloat16", "float32"] {
        let new = Policy::init(spec.clone(), 3);
        let files = ModelFiles { config: spec.to_config_json(dtype), files: Default::default() };
        write_hf_folder(folder.path(), &files, new.merged_tensors(), dtype).unwrap();
        drop(new);
        for precision in [Precision::F32, Precision::Bf16] {
            let (policy, ratio) = load(folder.path(), precision);
            assert!(policy.base.bytes() > 90 << 20, "too small to tell");
            assert!(ratio < 1.3, "{dtype} for {precision:?}: peak of {ratio:.2} times the packed weights");
            // what was packed panel by panel is what the file holds
            let source = ModelSource::open(folder.path()).unwrap();
            for (name, shape, values) in policy.merged_tensors() {
                assert!(source.tensor(&name, &shape).unwrap() == values, "{name}");
            }
        }
    }
    for path in std::env::var("RFT_MODELS").unwrap_or_default().split(':').filter(|p| !p.is_empty()) {
        for precision in [Precision::F32, Precision::Bf16] {
            let (_, ratio) = load(Path::new(path), precision);
            assert!(ratio < 1.3, "{path}: peak of {ratio:.2} times the packed weights");
        }
    }
}
