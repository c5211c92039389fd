//! Tool calls: `rft.tools`.

use serde_json::{Value as Json, json};

use super::bind::{Args, Host, answer};
use crate::tools::{self, Format, ParseOptions, Parsed, ToolError};

pub(crate) const FUNCTIONS: &[(&str, Host)] = &[
    ("parse", |args| answer(read(args)?.1.calls)),
    ("read", |args| {
        let (format, parsed) = read(args)?;
        Ok(
            json!({"calls": parsed.calls, "content": parsed.content, "called": parsed.called, "format": format}),
        )
    }),
    ("toolrl", |args| {
        let (text, gold) = (args.text(0, "text")?, args.text(1, "gold")?);
        answer(tools::toolrl(&text, &gold, &args.options(2)?).map_err(words)?)
    }),
    ("bfcl", |args| {
        let (functions, possible) = (document(args, 1, "functions")?, document(args, 2, "possible_answer")?);
        let options = args.options(3)?;
        answer(tools::bfcl(&args.text(0, "text")?, &functions, &possible, &options).map_err(words)?)
    }),
];

fn words(error: ToolError) -> String {
    error.to_string()
}

/// A table, or JSON text, which keeps 2.0 apart from 2.
fn document(args: &Args, at: usize, what: &str) -> Result<Json, String> {
    match args.json(at) {
        Json::String(text) => {
            serde_json::from_str(text).map_err(|error| format!("argument {} ({what}): {error}", at + 1))
        }
        Json::Object(object) if object.is_empty() => Ok(json!([])),
        other => Ok(other.clone()),
    }
}

fn read(args: &Args) -> Result<(Option<Format>, Parsed), String> {
    let text = args.text(0, "text")?;
    if !args.given(1) {
        return tools::parse_any(&text).map_err(words);
    }
    let format: Format = args.read(1, "format")?;
    let options: ParseOptions = args.options(2)?;
    Ok((Some(format), tools::parse_with(&text, format, &options).map_err(words)?))
}
