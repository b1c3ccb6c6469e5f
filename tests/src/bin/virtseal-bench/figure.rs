//! A measured figure, held against its target.

use serde::Serialize;

/// What a figure must reach.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
    Exactly(f64),
    /// It depends on what is bought: to be looked at, not to be reached.
    Nothing,
}

/// One line of the results.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    /// What was measured.
    pub(crate) name: String,
    /// The figure, in `unit`.
    pub(crate) value: f64,
    /// `x` for a ratio, `ms`, `MiB`.
    pub(crate) unit: &'static str,
    /// What it was held against in the same run, with both sides' measured values and the number of samples.
    pub(crate) peer: String,
    /// `<= N`, `>= N` or `= N`, in `unit`; or `none`.
    pub(crate) target: String,
    /// Whether it was reached.
    pub(crate) ok: bool,
}

impl Figure {
    pub(crate) fn new(name: &str, value: f64, unit: &'static str, target: Target, peer: String) -> Self {
        let value = (value * 1000.0).round() / 1000.0;
        let (target, ok) = match target {
            Target::AtMost(most) => (format!("<= {most}"), value <= most),
            Target::AtLeast(least) => (format!(">= {least}"), value >= least),
            Target::Exactly(wanted) => (format!("= {wanted}"), value == wanted),
            Target::Nothing => ("none".to_owned(), true),
        };
        Self {
            name: name.to_owned(),
            value,
            unit,
            peer,
            target,
            ok,
        }
    }
}

/// The figures for people.
pub(crate) fn table(figures: &[Figure]) -> String {
    let header = ["WHAT", "VALUE", "TARGET", "OK", "MEASURED"].map(str::to_owned);
    let rows = figures.iter().map(|figure| {
        [
            figure.name.clone(),
            format!("{:.2} {}", figure.value, figure.unit),
            figure.target.clone(),
            if figure.ok { "yes" } else { "MISSED" }.to_owned(),
            figure.peer.clone(),
        ]
    });
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let [name, value, target, ok] = [0, 1, 2, 3].map(width);
    let lines = rows.iter().map(|row| {
        format!(
            "{:name$}  {:>value$}  {:target$}  {:ok$}  {}",
            row[0], row[1], row[2], row[3], row[4]
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_two_sides() {
        let ok = |value, target| Figure::new("", value, "x", target, String::new()).ok;
        assert!(ok(1.5, Target::AtMost(1.5)) && !ok(1.51, Target::AtMost(1.5)));
        assert!(ok(50.0, Target::AtLeast(50.0)) && !ok(49.9, Target::AtLeast(50.0)));
        assert!(ok(1.0, Target::Exactly(1.0)) && !ok(2.0, Target::Exactly(1.0)) && ok(7.0, Target::Nothing));
    }
}
