//! Prompts: rows, templates, tokens.

pub mod arithmetic;
pub mod examples;
pub mod feed;
pub mod prompts;
mod python;
pub mod template;
pub mod tokenizer;
