//! `rft.prefix_logprob`: what the policy thought of a completion, or of its beginning.

use mlua::{Error as LuaError, Function, Lua, Table, Value};

/// Tokens of a completion that are looked at.
const MAX_TOKENS: usize = 1 << 20;

/// `rft.prefix_logprob(sample, position?)`: the sum of the natural-log probabilities of the sample's tokens that end at
/// or before byte `position` (1-based and included, as `string.find` gives), or of all of them.
///
/// The function fails where the sample has no logprobs, and with a position where it is unknown where tokens end.
pub(crate) fn prefix_logprob(lua: &Lua) -> Result<Function, LuaError> {
    lua.create_function(|_, (sample, position): (Table, Option<f64>)| {
        let list = |name: &str, hint: &str| -> Result<Vec<f64>, LuaError> {
            let Value::Table(list) = sample.raw_get(name)? else {
                return Err(fail(&format!("the sample has no `{name}`; hint: {hint}")));
            };
            list.sequence_values().take(MAX_TOKENS).collect()
        };
        let logprobs = list("logprobs", "stored rows need the field, as `generate` writes it")?;
        let count = match position {
            None => logprobs.len(),
            Some(position) if position >= 0.0 => {
                let hint =
                    "stored rows need the byte at which each token ends; without a position it is not needed";
                let ends = list("token_ends", hint)?;
                if ends.len() != logprobs.len() {
                    let lengths = format!("{} token_ends and {} logprobs", ends.len(), logprobs.len());
                    return Err(fail(&format!("the sample has {lengths}")));
                }
                ends.partition_point(|end| *end <= position)
            }
            Some(position) => return Err(fail(&format!("position must be 0 or more, got {position}"))),
        };
        Ok(logprobs[..count].iter().sum::<f64>())
    })
}

fn fail(message: &str) -> LuaError {
    LuaError::runtime(format!("rft.prefix_logprob: {message}"))
}
