//! The names that LaTeX and plain mathematics use: tables only.

use super::expr::Fun;

/// Function names, with or without a backslash.
pub(super) const FUNCTIONS: &[(&str, Fun)] = &[
    ("sin", Fun::Sin),
    ("cos", Fun::Cos),
    ("tan", Fun::Tan),
    ("tg", Fun::Tan),
    ("cot", Fun::Cot),
    ("sec", Fun::Sec),
    ("csc", Fun::Csc),
    ("arcsin", Fun::Asin),
    ("arccos", Fun::Acos),
    ("arctan", Fun::Atan),
    ("asin", Fun::Asin),
    ("acos", Fun::Acos),
    ("atan", Fun::Atan),
    ("sinh", Fun::Sinh),
    ("cosh", Fun::Cosh),
    ("tanh", Fun::Tanh),
    ("ln", Fun::Ln),
    ("exp", Fun::Exp),
    ("gcd", Fun::Gcd),
    ("lcm", Fun::Lcm),
    ("max", Fun::Max),
    ("min", Fun::Min),
    ("abs", Fun::Abs),
    ("floor", Fun::Floor),
    ("ceil", Fun::Ceil),
    ("Re", Fun::Re),
    ("Im", Fun::Im),
];

/// Letters that stand for themselves.
pub(super) const GREEK: &[&str] = &[
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu",
    "nu", "xi", "omicron", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta",
    "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega", "ell", "hbar", "aleph",
];

/// Two- and three-letter runs that are words, never products of letters.
pub(super) const WORDS: &[&str] = &[
    "am", "an", "as", "at", "be", "by", "do", "go", "he", "if", "in", "is", "it", "me", "my", "no", "on",
    "so", "to", "up", "us", "we", "No", "On", "yes", "Yes", "YES", "NO", "odd", "one", "two", "six", "ten",
    "the", "for", "not", "all", "any", "are", "was", "has", "can", "may", "she", "you", "day", "Sun", "Mon",
    "Tue", "Wed", "Thu", "Fri", "Sat", "red", "eat", "tea", "ate", "art", "rat", "tar", "top", "pot", "opt",
    "dog", "god", "cat", "act", "now", "won", "own", "nor", "tie", "win", "yet", "via", "per", "non", "new",
    "old",
];

/// Commands that only move or size things.
const LAYOUT: &str = "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr middle displaystyle \
    textstyle scriptstyle limits nolimits quad qquad hfill notag nonumber newline strut mathstrut \
    allowbreak protect bf rm it thinspace medspace thickspace enspace space therefore displaylimits \
    null checkmark blacksquare square Box qed nobreak normalsize large small";

/// Commands whose argument is mathematics in another face.
const STYLING: &str = "mathbf mathrm mathit mathsf mathtt mathcal mathfrak boldsymbol bm boxed fbox ensuremath mathop \
    mathord underline smash pmb mathnormal displaybox underbrace overbrace mathbin mathrel mathopen \
    mathclose framebox";

/// Commands whose argument may be words.
const WORDING: &str = "text textbf textit textrm textsf texttt textnormal mbox hbox emph textup textsc operatorname \
    mathrm mathbf mathit mathsf mathtt operatorname* unit si mathop";

/// Further commands that a doubled backslash may stand before.
const KNOWN: &str = "frac dfrac tfrac cfrac sqrt left right pi infty times cdot div le leq ge geq neq ne lt gt in cup \
    cap pm mp binom begin log overline circ mathbb quad";

fn listed(list: &str, name: &str) -> bool {
    list.split_ascii_whitespace().any(|n| n == name)
}

pub(super) fn layout(name: &str) -> bool {
    listed(LAYOUT, name)
}

pub(super) fn styling(name: &str) -> bool {
    listed(STYLING, name)
}

pub(super) fn wording(name: &str) -> bool {
    listed(WORDING, name)
}

pub(super) fn function(name: &str) -> Option<Fun> {
    FUNCTIONS.iter().find(|f| f.0 == name).map(|f| f.1)
}

/// Whether this is a command at all, and not a short run of letters that happens to look like one.
pub(super) fn known(name: &str) -> bool {
    layout(name) && name.len() > 3
        || styling(name)
        || wording(name)
        || GREEK.contains(&name)
        || function(name).is_some()
        || listed(KNOWN, name)
}

/// Three letters that read as a product: no vowel, or neighbours as in `abc`, `xyz`.
pub(super) fn product_like(run: &str) -> bool {
    let all = |set: &str| run.chars().all(|c| set.contains(c));
    run.bytes().all(|b| b.is_ascii_uppercase())
        || !run.contains(['a', 'e', 'i', 'o', 'u'])
        || ["abc", "xyza", "xyzb", "abx", "aby", "uvw", "ijk", "axy"].iter().any(|s| all(s))
}

/// Whether a run of letters could be a word.
pub(super) fn pronounceable(run: &str) -> bool {
    run.len() > 3
        && run.contains(['a', 'e', 'i', 'o', 'u', 'y'])
        && run.bytes().any(|b| !b"aeiouy".contains(&b))
}
