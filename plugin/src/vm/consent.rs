//! A word for a loss: the VM's name, typed.

use crate::model::advice::Advice;
use crate::model::problem::Problem;

/// Refuses unless the VM's name was typed, with what would be lost and the command that has the word in it.
pub(crate) fn refuse_unless_typed(
    name: &str,
    typed: Option<&str>,
    loss: &str,
    as_typed: impl FnOnce() -> Advice,
) -> Result<(), Problem> {
    let other = match typed {
        Some(typed) if typed == name => return Ok(()),
        None | Some("") => String::new(),
        Some(other) => format!(", and '{other}' was typed"),
    };
    Err(Problem::would_lose_key(format!("{name} stays as it is: {loss}{other}")).next(as_typed()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::problem::Code;

    #[test]
    fn only_the_name_is_a_word_for_it() {
        let ask = |typed| {
            refuse_unless_typed("web 01", typed, "all would be lost", || {
                Advice::ShredAsTyped("web 01".into())
            })
        };
        assert!(ask(Some("web 01")).is_ok());
        for (typed, told) in [
            (None, "lost. Next"),
            (Some(""), "lost. Next"),
            (Some("web01"), "'web01' was typed"),
        ] {
            let refused = ask(typed).unwrap_err();
            assert_eq!(refused.code, Code::WouldLoseKey);
            assert!(refused.to_string().contains(told), "{refused}");
        }
    }
}
