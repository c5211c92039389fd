//! The shape of the source tree: who may know whom, and lists that must tell the same story.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules of the engine with the modules and crates that each may name. `train`, `eval`, `bench` and `cli` stand above all six
/// steps of the path and are checked for what must not name them.
const MAY_KNOW: [(&str, &[&str]); 13] = [
    ("types", &[]),
    ("error", &[]),
    ("rng", &[]),
    ("config", &["advantage", "data", "error", "learner", "loss"]),
    ("data", &["error", "rng", "types"]),
    ("model", &["config", "data", "error", "rng", "rollout", "types", "rft_kernels"]),
    ("memory", &["config", "error", "learner", "model", "rollout", "rft_kernels"]),
    ("rollout", &["data", "error", "rng", "types", "rft_kernels"]),
    ("reward", &["config", "data", "error", "types", "rft_rewards"]),
    ("advantage", &[]),
    ("loss", &["advantage"]),
    ("learner", &["config", "error", "model", "types", "rft_kernels"]),
    ("report", &["error"]),
];

/// Above the path: only each other and `main` may name them.
const ABOVE: [&str; 4] = ["train", "eval", "bench", "cli"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        let mut entries: Vec<PathBuf> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        entries.iter().for_each(|entry| rust_files(entry, found));
    } else if path.extension().is_some_and(|e| e == "rs") {
        found.push(path.to_path_buf());
    }
}

fn files_under(path: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    rust_files(&root().join(path), &mut found);
    assert!(!found.is_empty(), "no source under {path}");
    found
}

/// Files of a top-level module of the engine.
fn module_files(module: &str) -> Vec<PathBuf> {
    let single = format!("engine/{module}.rs");
    if root().join(&single).exists() {
        files_under(&single)
    } else {
        files_under(&format!("engine/{module}"))
    }
}

/// The code of a file that users get: what stands before its tests, comments left out.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Names of modules after `crate::` and of the member crates.
fn known(code: &str) -> BTreeSet<String> {
    let name =
        |text: &str| -> String { text.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect() };
    let mut found: BTreeSet<String> =
        code.split("crate::").skip(1).map(name).filter(|n| !n.is_empty()).collect();
    found.extend(["rft_kernels", "rft_rewards"].into_iter().filter(|n| code.contains(n)).map(String::from));
    found
}

#[test]
fn modules_know_only_what_stands_before_them() {
    let mut wrong = Vec::new();
    for (module, allowed) in MAY_KNOW {
        for file in module_files(module) {
            for name in known(&code(&file)) {
                if name != module && !allowed.contains(&name.as_str()) {
                    wrong.push(format!("{} names {name}", file.strip_prefix(root()).unwrap().display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_module_is_in_the_rules() {
    let listed: BTreeSet<&str> = MAY_KNOW.iter().map(|(m, _)| *m).chain(ABOVE).collect();
    let lib = fs::read_to_string(root().join("engine/lib.rs")).unwrap();
    let modules: BTreeSet<&str> =
        lib.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert_eq!(modules, listed);
}

#[test]
fn rollout_and_learner_meet_only_in_train_and_below_them_is_no_way_up() {
    for (module, allowed) in MAY_KNOW {
        assert!(ABOVE.iter().all(|above| !allowed.contains(above)), "{module}");
        let meets = |a: &str, b: &str| module == a && allowed.contains(&b);
        assert!(!meets("rollout", "learner") && !meets("learner", "rollout"));
    }
}

#[test]
fn unsafe_code_is_in_the_kernels_and_in_one_memory_map() {
    let places: Vec<String> = ["engine", "rewards/src"]
        .into_iter()
        .flat_map(files_under)
        .filter(|file| code(file).contains("unsafe {") || code(file).contains("unsafe fn"))
        .map(|file| file.strip_prefix(root()).unwrap().display().to_string())
        .collect();
    assert_eq!(places, ["engine/model/source.rs"]);
    assert_eq!(code(&root().join("engine/model/source.rs")).matches("unsafe {").count(), 1);
}

#[test]
fn only_the_config_reads_toml_and_only_the_top_prints() {
    for file in files_under("engine") {
        let (code, name) =
            (code(&file), file.strip_prefix(root().join("engine")).unwrap().display().to_string());
        assert!(name.starts_with("config/") || !code.contains("toml::"), "{name} reads TOML");
        let prints = code.contains("println!") || code.contains("print!");
        let may_print = ["cli.rs", "main.rs", "report/progress.rs"].contains(&name.as_str())
            || name.starts_with("train/");
        assert!(may_print || !prints, "{name} prints");
    }
}

#[test]
fn the_trees_in_the_documents_are_the_tree() {
    let lib = fs::read_to_string(root().join("engine/lib.rs")).unwrap();
    let modules = lib.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';'));
    for document in ["README.md", "ARCHITECTURE.md"] {
        let text = fs::read_to_string(root().join(document)).unwrap();
        for module in modules.clone() {
            let named =
                [format!("{module}.rs"), format!("{module}/")].iter().any(|n| text.contains(n.as_str()));
            assert!(named, "{document} leaves {module} out of its tree");
        }
    }
}

#[test]
fn source_files_open_with_what_they_are_for() {
    for file in ["engine", "kernels/src", "rewards/src", "tests"].into_iter().flat_map(files_under) {
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("//! "), "{} has no //! header", file.display());
    }
}
