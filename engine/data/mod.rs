//! Prompts: rows, templates, tokens.

pub mod arithmetic;
pub mod examples;
pub mod feed;
pub mod prompts;
mod python;
pub mod template;
mod template_guard;
pub mod tokenizer;
