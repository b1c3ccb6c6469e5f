//! What somebody meant who has mistyped it.

/// The one of `known` that `word` becomes by the fewest slips of the keyboard, if those are no more than `most`.
pub(crate) fn nearest<'a>(
    word: &str,
    known: impl IntoIterator<Item = &'a str>,
    most: usize,
) -> Option<&'a str> {
    let slips = known
        .into_iter()
        .map(|known| (strsim::damerau_levenshtein(word, known), known));
    let (count, found) = slips.min()?;
    (count <= most).then_some(found)
}

/// The same of names, which may be short: `; perhaps 'web01' is meant`, or nothing.
pub(crate) fn name_hint<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let most = (word.chars().count() / 3).clamp(1, 3);
    match nearest(word, known, most) {
        Some(meant) if meant != word => format!("; perhaps '{meant}' is meant"),
        Some(_) | None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_seen_and_another_word_is_not_taken_for_one() {
        let known = ["main", "spare", "web01", "database"];
        for (typed, meant) in [
            ("mian", "; perhaps 'main' is meant"),
            ("web1", "; perhaps 'web01' is meant"),
            ("datbaes", "; perhaps 'database' is meant"),
            ("nobody", ""),
            ("x", ""),
        ] {
            assert_eq!(name_hint(typed, known), meant, "{typed}");
        }
        assert_eq!(name_hint("main", []), "");
    }
}
