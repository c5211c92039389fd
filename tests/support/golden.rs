//! Golden files: where they are, how they are read, and how agreement is counted.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// `RFT_FIXTURES`, else the repository's own copy.
pub fn root() -> PathBuf {
    std::env::var_os("RFT_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from)
}

/// A JSON file below the root.
pub fn json(path: &str) -> Value {
    let path = root().join(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A number; the strings `"NaN"`, `"Infinity"`, `"-Infinity"` too.
pub fn number(v: &Value) -> f64 {
    match v {
        Value::String(s) if s == "NaN" => f64::NAN,
        Value::String(s) if s == "Infinity" => f64::INFINITY,
        Value::String(s) if s == "-Infinity" => f64::NEG_INFINITY,
        v => v.as_f64().unwrap_or_else(|| panic!("not a number: {v}")),
    }
}

/// A number, `None` for null and for what is absent.
pub fn optional(v: &Value) -> Option<f64> {
    (!v.is_null()).then(|| number(v))
}

/// A number, `default` for what is absent or null.
pub fn or(v: &Value, default: f64) -> f64 {
    optional(v).unwrap_or(default)
}

/// A list of numbers.
pub fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().unwrap_or_else(|| panic!("not a list: {v}")).iter().map(number).collect()
}

/// A tensor widened to f32 (ids and masks are exact).
#[derive(Debug, Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl Tensor {
    pub fn mask(&self) -> Vec<bool> {
        self.data.iter().map(|x| *x != 0.0).collect()
    }

    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    pub fn columns(&self) -> usize {
        self.shape[1]
    }
}

/// Every tensor of a file.
pub struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    pub fn open(path: &str) -> Self {
        let path = root().join(path);
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let widen = |dtype: Dtype, data: &[u8]| -> Vec<f32> {
            match dtype {
                Dtype::F32 => {
                    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
                }
                Dtype::I64 => {
                    data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
                }
                Dtype::I32 => {
                    data.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()) as f32).collect()
                }
                Dtype::U8 | Dtype::BOOL => data.iter().map(|b| f32::from(*b)).collect(),
                other => panic!("{other:?} is not used by these files"),
            }
        };
        Self(
            file.iter()
                .map(|(k, v)| {
                    (k.to_string(), Tensor { shape: v.shape().to_vec(), data: widen(v.dtype(), v.data()) })
                })
                .collect(),
        )
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }
}

/// `|got - want| <= atol + rtol |want|`; NaN agrees with NaN, infinities with themselves.
pub fn close(got: f64, want: f64, rtol: f64, atol: f64) -> bool {
    (got.is_nan() && want.is_nan()) || got == want || (got - want).abs() <= atol + rtol * want.abs()
}

/// Counts cases; fails at the end with the first disagreements.
pub struct Tally {
    what: String,
    cases: usize,
    agreeing: usize,
    case: String,
    wrong: Vec<String>,
    wrong_before: usize,
    open: bool,
}

impl Tally {
    pub fn new(what: &str) -> Self {
        Self {
            what: what.into(),
            cases: 0,
            agreeing: 0,
            case: String::new(),
            wrong: Vec::new(),
            wrong_before: 0,
            open: false,
        }
    }

    /// Starts a case; the one before it is counted.
    pub fn case(&mut self, name: impl Into<String>) {
        self.settle();
        self.case = name.into();
        self.open = true;
        self.wrong_before = self.wrong.len();
    }

    fn settle(&mut self) {
        if self.open {
            self.cases += 1;
            self.agreeing += usize::from(self.wrong.len() == self.wrong_before);
        }
        self.open = false;
    }

    pub fn value(&mut self, what: &str, got: f64, want: f64, rtol: f64, atol: f64) {
        if !close(got, want, rtol, atol) {
            self.wrong.push(format!("{} {what}: {got} instead of {want}", self.case));
        }
    }

    pub fn values<G: Into<f64> + Copy, W: Into<f64> + Copy>(
        &mut self,
        what: &str,
        got: &[G],
        want: &[W],
        rtol: f64,
        atol: f64,
    ) {
        if got.len() != want.len() {
            self.wrong.push(format!("{} {what}: {} values instead of {}", self.case, got.len(), want.len()));
            return;
        }
        let bad = |(g, w): &(&G, &W)| !close((**g).into(), (**w).into(), rtol, atol);
        let count = got.iter().zip(want).filter(bad).count();
        if let Some(at) = got.iter().zip(want).position(|p| bad(&p)) {
            let (g, w): (f64, f64) = (got[at].into(), want[at].into());
            self.wrong.push(format!(
                "{} {what}[{at}]: {g} instead of {w} ({count} of {})",
                self.case,
                got.len()
            ));
        }
    }

    pub fn fact(&mut self, what: &str, holds: bool) {
        if !holds {
            self.wrong.push(format!("{} {what}", self.case));
        }
    }

    /// Prints the count; fails unless every case agrees and there was one.
    pub fn finish(mut self) {
        self.settle();
        println!("{}: {} of {} cases agree", self.what, self.agreeing, self.cases);
        assert!(self.cases > 0, "{}: no cases", self.what);
        let shown = self.wrong.iter().take(20).cloned().collect::<Vec<_>>().join("\n");
        assert!(self.wrong.is_empty(), "{}: {} disagreements\n{shown}", self.what, self.wrong.len());
    }
}
