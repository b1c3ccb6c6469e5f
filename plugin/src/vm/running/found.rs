//! What was found of one VM while it ran: each thing is told once, and only so many of them.

use std::collections::BTreeSet;
use std::time::SystemTime;

use openssl::sha::sha256;

use crate::host::local_time::rfc3339;
use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::terminal::visible;

/// More of one VM are in the audit log alone.
const MAX_LISTED: usize = 64;
/// Of one VM, in the audit log: who may change a VM can have it filled.
const MAX_NOTED: usize = 1024;
/// Of one finding as it is listed, and of its advice, in bytes.
const MAX_WORDS: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Found {
    listed: Vec<Listed>,
    /// The digests of all that was found.
    noted: BTreeSet<[u8; 32]>,
}

#[derive(Debug)]
struct Listed {
    code: FindingCode,
    what: String,
    advice: Option<Advice>,
    since: SystemTime,
}

impl Found {
    pub(super) fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    /// When the first of them was found.
    pub(super) fn since(&self) -> Option<SystemTime> {
        self.listed.first().map(|listed| listed.since)
    }

    /// As a status shows them of the VM that is called `name` now.
    pub(super) fn findings(&self, name: &str) -> impl Iterator<Item = Finding> {
        self.listed.iter().map(move |listed| {
            let Listed {
                code, what, advice, ..
            } = listed;
            let since = rfc3339(listed.since);
            let what = format!("{what}; seen first at {since}, and listed until virtseald restarts");
            Finding {
                advice: advice.clone(),
                ..Finding::critical(*code, Subject::Vm(name.to_owned()), what)
            }
        })
    }

    /// Those of `found` that are new, in words.
    pub(super) fn note(&mut self, name: &str, found: Vec<Finding>, now: SystemTime) -> Vec<String> {
        let mut new = Vec::new();
        for finding in found {
            let words = finding.to_string();
            if self.noted.len() > MAX_NOTED || !self.noted.insert(sha256(words.as_bytes())) {
                continue;
            }
            if self.noted.len() > MAX_NOTED {
                let words = format!(
                    "{}: more was found than {MAX_NOTED} things, and no more of it is noted until virtseald restarts",
                    visible(name)
                );
                self.list(FindingCode::Shortened, &words, None, now);
                new.push(words);
                continue;
            }
            if self.listed.len() < MAX_LISTED {
                self.list(finding.code, &finding.what, finding.advice, now);
            }
            new.push(words);
        }
        new
    }

    fn list(&mut self, code: FindingCode, what: &str, advice: Option<Advice>, since: SystemTime) {
        self.listed.push(Listed {
            code,
            what: shortened(what),
            advice: advice.filter(|advice| advice.to_string().len() <= MAX_WORDS),
            since,
        });
    }
}

fn shortened(words: &str) -> String {
    if words.len() <= MAX_WORDS {
        return words.to_owned();
    }
    let end = (0..=MAX_WORDS).rfind(|at| words.is_char_boundary(*at));
    format!("{}… (the audit log has all of it)", &words[..end.unwrap_or(0)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_told_once_and_bounded() {
        let finding = |what: String| Finding::warning(FindingCode::Plaintext, Subject::Host, what);
        let note = |found: &mut Found, what: Vec<String>| {
            let what = what.into_iter().map(finding).collect();
            found.note("web", what, SystemTime::UNIX_EPOCH)
        };
        let mut found = Found::default();
        assert_eq!(
            note(&mut found, vec!["a".into(), "a".into(), "b".into()]),
            ["a", "b"]
        );
        assert!(note(&mut found, vec!["a".into()]).is_empty());
        let new = note(&mut found, (0..2 * MAX_LISTED).map(|n| n.to_string()).collect());
        assert_eq!(
            new.len(),
            2 * MAX_LISTED,
            "what is not listed is in the audit log"
        );
        assert_eq!(found.findings("web").count(), MAX_LISTED);
        // Whoever fills that up can't hide that he did.
        let new = note(&mut found, (0..2 * MAX_NOTED).map(|n| format!("x{n}")).collect());
        assert!(
            new.len() < MAX_NOTED && new.last().unwrap().contains("no more"),
            "{new:?}"
        );
        assert!(found.findings("web").last().unwrap().what.contains("no more"));
        assert!(note(&mut found, vec!["y".into()]).is_empty());

        let long = "ä".repeat(MAX_WORDS);
        let mut found = Found::default();
        let with_advice = finding(long.clone()).next(long.clone());
        let new = found.note("web", vec![with_advice], SystemTime::UNIX_EPOCH);
        assert!(new[0].len() > 2 * long.len());
        let listed = found.findings("web").next().unwrap();
        assert!(listed.what.len() < MAX_WORDS + 128 && listed.advice.is_none());
    }

    #[test]
    fn what_leads_out_is_listed_with_it() {
        let mut found = Found::default();
        let finding = Finding::warning(FindingCode::Plaintext, Subject::Host, "a")
            .next(Advice::AbortDomainJob("web".into()));
        let new = found.note("web", vec![finding], SystemTime::UNIX_EPOCH);
        assert_eq!(new, ["a. Next: virsh domjobabort web"]);
        assert_eq!(
            found.findings("web").next().unwrap().advice,
            Some(Advice::AbortDomainJob("web".into()))
        );
    }
}
