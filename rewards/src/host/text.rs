//! Plain text measures behind `rft.edit_distance`.

/// Largest product of lengths that is compared.
const MAX_CELLS: usize = 16_000_000;

/// Levenshtein distance in characters; `None` where the texts are too long to compare.
pub(crate) fn edit_distance(a: &str, b: &str) -> Option<usize> {
    let b: Vec<char> = b.chars().collect();
    let rows = a.chars().count();
    if rows.saturating_mul(b.len()) > MAX_CELLS {
        return None;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    Some(row[b.len()])
}
