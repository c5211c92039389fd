//! The knobs of extraction and comparison, and the verdict they lead to.
//!
//! Defaults are ours; [`VerifyOptions::peer`] gives the settings that math-verify's own tests use.

/// What counts as equal when two bare answers are compared.
#[derive(Debug, Clone, PartialEq)]
pub struct EqualOptions {
    /// Decimal places to which a decimal must agree with an irrational or long value; below 1 in
    /// size the places are counted from the leading digit, so tiny numbers never agree by rounding.
    pub float_rounding: u32,
    /// Variables must carry the same names; when false one consistent renaming is allowed.
    pub strict: bool,
    /// A gold set or interval may be answered by the inequality that describes it.
    pub allow_set_relation_comp: bool,
    /// Bare lists (`1, 2`) must agree in order; sets never need to.
    pub ordered_lists: bool,
    /// A percent sign on one side only may be read as the number itself or as a hundredth of it.
    pub percent_either_way: bool,
}

impl Default for EqualOptions {
    fn default() -> Self {
        EqualOptions {
            float_rounding: 6,
            strict: true,
            allow_set_relation_comp: true,
            ordered_lists: false,
            percent_either_way: true,
        }
    }
}

/// Which box of several unrelated ones holds the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhichBox {
    /// The last one: a correction replaces what came before.
    Last,
    /// The first one.
    First,
}

/// Where an answer may be found in a text.
#[derive(Debug, Clone, PartialEq)]
pub struct ExtractOptions {
    /// Look for LaTeX: boxes and `$…$`, `\(…\)`, `$$…$$`, `\[…\]`.
    pub latex: bool,
    /// Look for plain numbers and arithmetic.
    pub expr: bool,
    /// Rank of a box among the other patterns (0 = before all, 50 = with "final answer is").
    pub boxed_priority: u32,
    /// Which box counts when there are several that are not one list.
    pub which_box: WhichBox,
    /// Accept LaTeX or a number that no "answer" announces.
    pub unanchored: bool,
    /// Honour `<answer>…</answer>` and `#### …`.
    pub answer_tags: bool,
    /// Drop everything up to the last `</think>`.
    pub after_think: bool,
}

impl Default for ExtractOptions {
    fn default() -> Self {
        ExtractOptions {
            latex: true,
            expr: true,
            boxed_priority: 0,
            which_box: WhichBox::Last,
            unanchored: true,
            answer_tags: true,
            after_think: true,
        }
    }
}

/// Extraction from both texts, then comparison.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VerifyOptions {
    /// How the gold answer is found.
    pub gold: ExtractOptions,
    /// How the predicted answer is found.
    pub pred: ExtractOptions,
    /// How the two are compared.
    pub equal: EqualOptions,
}

impl VerifyOptions {
    /// math-verify's settings: `latex` and `expr` say which extractors run on both sides.
    pub fn peer(
        latex: bool,
        expr: bool,
        boxed_priority: u32,
        float_rounding: u32,
        strict: bool,
        allow_set_relation_comp: bool,
    ) -> Self {
        let side = ExtractOptions { latex, expr, boxed_priority, ..ExtractOptions::default() };
        VerifyOptions {
            gold: side.clone(),
            pred: side,
            equal: EqualOptions {
                float_rounding,
                strict,
                allow_set_relation_comp,
                ..EqualOptions::default()
            },
        }
    }
}

/// The outcome of [`super::verify`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Both answers were found and agree.
    Equal,
    /// Both answers were found and do not agree, or agreement could not be shown.
    Different,
    /// The gold text holds no answer, so nothing can be judged.
    GoldUnparsable,
    /// The predicted text holds no answer.
    NoAnswer,
}

/// What kind of mark an answer was found by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// `\boxed{…}` (one, or several joined by `,`, "and", "or").
    Boxed,
    /// `<answer>…</answer>` or `#### …`.
    Tag,
    /// "answer is", "answer:", "final answer is".
    Announced,
    /// LaTeX or a number that nothing announces.
    Plain,
}

/// An answer found in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extracted {
    /// The bare answer, ready for [`super::equal`].
    pub text: String,
    /// How it was found.
    pub mark: Mark,
    /// Whether it was written as LaTeX (a box, or between dollars) and not as plain text.
    pub latex: bool,
}
