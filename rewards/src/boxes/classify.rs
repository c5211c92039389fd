//! One label for a picture, or yes or no: the published rewards and ones without their holes.

use super::answer::{first_answer, last_answer, think_answer};
use super::{BoxError, check_length, excerpt};
use crate::tools::py::strip;
use serde::Deserialize;

/// How a class name is compared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClassificationOptions {
    /// Other names that count as right.
    pub aliases: Vec<String>,
}

/// Letters and digits in lower case.
fn key(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

fn answer_of(completion: &str) -> &str {
    let after_thought = || completion.rsplit_once("</think>").map(|(_, answer)| answer);
    strip(last_answer(completion).or_else(after_thought).unwrap_or(completion))
}

/// 1 where the answer is the gold class (or an alias), letter for letter; spaces, punctuation and case aside.
///
/// An empty answer and a list of classes earn 0, which in Visual-RFT earn 1.
///
/// # Errors
/// [`BoxError::TooLong`]; [`BoxError::Gold`] for a gold without letters.
pub fn classification(
    completion: &str,
    gold: &str,
    options: &ClassificationOptions,
) -> Result<f64, BoxError> {
    check_length(completion)?;
    let wanted = key(answer_of(gold));
    if wanted.is_empty() {
        return Err(BoxError::Gold {
            field: "gold".into(),
            expected: "a class name".into(),
            found: excerpt(gold),
        });
    }
    let given = key(answer_of(completion));
    let right =
        !given.is_empty() && (given == wanted || options.aliases.iter().any(|alias| key(alias) == given));
    Ok(if right { 1.0 } else { 0.0 })
}

/// Visual-RFT's classification: accuracy and format, 1 each (grpo_classification.py, without math-verify).
///
/// Accuracy is 1 where either name contains the other, so that an empty answer and a list of all classes earn it.
///
/// # Errors
/// [`BoxError::TooLong`].
pub fn visual_rft_classification(completion: &str, gold: &str) -> Result<(f64, f64), BoxError> {
    check_length(completion)?;
    check_length(gold)?;
    let name =
        |text: &str| strip(first_answer(text, true).unwrap_or(text)).replace([' ', '_'], "").to_lowercase();
    let (gold, given) = (name(gold), name(completion));
    let flag = |value: bool| if value { 1.0 } else { 0.0 };
    Ok((flag(given.contains(&gold) || gold.contains(&given)), flag(think_answer(completion))))
}

/// "yes" or "no" as a word of its own; None where the answer has neither or both.
fn yes_or_no(text: &str) -> Option<bool> {
    let mut found = None;
    for word in text.split(|c: char| !c.is_alphanumeric()) {
        let this = match word.to_ascii_lowercase().as_str() {
            "yes" => true,
            "no" => false,
            _ => continue,
        };
        if found.is_some_and(|other| other != this) {
            return None;
        }
        found = Some(this);
    }
    found
}

/// 1 where the answer says what the gold says; an answer that says neither, or both, earns 0.
///
/// # Errors
/// [`BoxError::TooLong`]; [`BoxError::Gold`] for a gold that is neither yes nor no.
pub fn yes_no(completion: &str, gold: &str) -> Result<f64, BoxError> {
    check_length(completion)?;
    let wanted = yes_or_no(answer_of(gold)).ok_or_else(|| BoxError::Gold {
        field: "gold".into(),
        expected: "yes or no".into(),
        found: excerpt(gold),
    })?;
    Ok(if yes_or_no(answer_of(completion)) == Some(wanted) { 1.0 } else { 0.0 })
}

/// VLM-R1's yes/no: the first "yes" or "no" anywhere, inside words too; two missing answers are equal.
///
/// # Errors
/// [`BoxError::TooLong`].
pub fn vlm_r1_yes_no(completion: &str, gold: &str) -> Result<f64, BoxError> {
    check_length(completion)?;
    check_length(gold)?;
    let (completion, gold) = (completion.to_lowercase(), gold.to_lowercase());
    let first = |text: &str| match (text.find("yes"), text.find("no")) {
        (Some(yes), Some(no)) => Some(yes < no),
        (Some(_), None) => Some(true),
        (None, Some(_)) => Some(false),
        (None, None) => None,
    };
    let gold = strip(first_answer(&gold, true).unwrap_or(&gold));
    let given = strip(first_answer(&completion, false).unwrap_or(&completion));
    Ok(if first(gold) == first(given) { 1.0 } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(completion: &str, gold: &str) -> (f64, f64) {
        let ours = classification(completion, gold, &ClassificationOptions::default()).unwrap();
        (ours, visual_rft_classification(completion, gold).unwrap().0)
    }

    #[test]
    fn hole_an_empty_answer_is_no_class() {
        assert_eq!(both("<answer></answer>", "golden retriever"), (0.0, 1.0));
        assert_eq!(both("<answer>Golden_Retriever.</answer>", "golden retriever").0, 1.0);
        assert!(classification("x", " ", &ClassificationOptions::default()).is_err());
    }

    #[test]
    fn hole_a_list_of_all_classes_is_no_class() {
        assert_eq!(both("<answer>cat, dog, bird</answer>", "dog"), (0.0, 1.0));
        assert_eq!(both("<answer>hotdog</answer>", "dog"), (0.0, 1.0));
    }

    #[test]
    fn hole_two_missing_answers_are_not_equal() {
        assert_eq!(vlm_r1_yes_no("I cannot say", "<answer>maybe</answer>").unwrap(), 0.0);
        assert_eq!(vlm_r1_yes_no("it is hard", "<answer>maybe</answer>").unwrap(), 1.0);
        assert!(yes_no("it is hard", "<answer>maybe</answer>").is_err());
        assert_eq!(yes_no("it is hard", "<answer>yes</answer>").unwrap(), 0.0);
        assert_eq!(yes_no("<answer>Yes, it is.</answer>", "yes").unwrap(), 1.0);
        assert_eq!(yes_no("<answer>yes and no</answer>", "yes").unwrap(), 0.0);
        assert_eq!(yes_no("<answer>nothing</answer>", "no").unwrap(), 0.0);
    }
}
