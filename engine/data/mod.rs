//! Prompts: rows, templates, tokens.

pub mod arithmetic;
pub mod prompts;
pub mod template;
pub mod tokenizer;
