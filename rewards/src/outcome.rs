//! From the answers of all scripts to one outcome a sample: weights, policies for failures, dense rewards on tokens.

use crate::returned::{Component, DenseSpan, Returned};
use crate::types::{ErrorKind, OnError, Outcome, RewardError, RewardSpec, Sample};

/// Adds one script's answer for a sample.
pub(crate) fn add(
    outcome: &mut Outcome,
    spec: &RewardSpec,
    sample: &Sample,
    answer: Result<Returned, RewardError>,
) {
    let name = spec.script.name();
    match answer {
        Ok(Returned::Abstain) => outcome.components.push((name.to_string(), None)),
        Ok(Returned::One(component)) => component_value(outcome, spec, sample, name, &component),
        Ok(Returned::Named(components)) => {
            for (name, component) in &components {
                component_value(outcome, spec, sample, name, component);
            }
        }
        Err(error) => fail(outcome, spec, error),
    }
}

fn fail(outcome: &mut Outcome, spec: &RewardSpec, error: RewardError) {
    let name = spec.script.name().to_string();
    outcome.errors.push(error);
    match spec.on_error {
        OnError::Abstain => outcome.components.push((name, None)),
        OnError::Fail => {
            outcome.fatal = true;
            outcome.components.push((name, None));
        }
        OnError::Score(score) => {
            *outcome.reward.get_or_insert(0.0) += spec.weight * score;
            outcome.components.push((name, Some(score)));
        }
    }
}

fn component_value(
    outcome: &mut Outcome,
    spec: &RewardSpec,
    sample: &Sample,
    name: &str,
    component: &Component,
) {
    if outcome.components.iter().any(|(n, _)| n == name) {
        let message = format!("component `{name}` is already given by another script; rename one of them");
        return fail(outcome, spec, spec.script.error(ErrorKind::WrongType, message, None));
    }
    let weight = spec.weight * spec.component_weights.get(name).copied().unwrap_or(1.0);
    let value = match component {
        Component::Number(value) => *value,
        Component::Dense(spans) => {
            let length = sample.completion.len();
            if let Some(span) = spans.iter().find(|span| span.to as usize > length) {
                let message =
                    format!("a span of `{name}` ends at byte {}, the completion has {length}", span.to);
                return fail(outcome, spec, spec.script.error(ErrorKind::WrongType, message, None));
            }
            outcome.token_rewards.resize(sample.tokens.len(), 0.0);
            for span in spans {
                if let Some(token) = last_token(span, &sample.token_text_ends) {
                    outcome.token_rewards[token] += (weight * span.value) as f32;
                    outcome.steps.push((token as u32, weight * span.value));
                }
            }
            spans.iter().map(|s| s.value).sum()
        }
    };
    *outcome.reward.get_or_insert(0.0) += weight * value;
    outcome.components.push((name.to_string(), Some(value)));
}

/// The token that writes the span's last byte: a span is decided when it is complete.
fn last_token(span: &DenseSpan, ends: &[u32]) -> Option<usize> {
    let token = ends.partition_point(|end| *end < span.to);
    (token < ends.len()).then_some(token)
}
