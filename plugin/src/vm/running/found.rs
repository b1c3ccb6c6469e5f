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
    /// Of its words.
    digest: [u8; 32],
    /// It was seen to go on, and is not any more.
    is_over: bool,
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
            let Listed { code, what, .. } = listed;
            let since = rfc3339(listed.since);
            let (until, advice) = match listed.is_over {
                true => (", and not any more; listed", Some(clean_up())),
                false => (", and listed", listed.advice.clone()),
            };
            let what = format!("{what}; seen first at {since}{until} until virtseald restarts");
            Finding {
                advice,
                ..Finding::critical(*code, Subject::Vm(name.to_owned()), what)
            }
        })
    }

    /// Those of `found` that are new, in words.
    pub(super) fn note(&mut self, name: &str, found: Vec<Finding>, now: SystemTime) -> Vec<String> {
        let mut new = Vec::new();
        for finding in found {
            let words = finding.to_string();
            let digest = sha256(words.as_bytes());
            if self.noted.len() > MAX_NOTED || !self.noted.insert(digest) {
                continue;
            }
            if self.noted.len() > MAX_NOTED {
                let words = format!(
                    "{}: more was found than {MAX_NOTED} things, and no more of it is noted until virtseald restarts",
                    visible(name)
                );
                self.list(FindingCode::Shortened, &words, None, now, digest);
                new.push(words);
                continue;
            }
            if self.listed.len() < MAX_LISTED {
                self.list(finding.code, &finding.what, finding.advice, now, digest);
            }
            new.push(words);
        }
        new
    }

    /// Takes in all that a look has seen: what goes on is listed with what ends it, and what is over with what is left to do.
    pub(super) fn settle(&mut self, seen: &[Finding]) {
        let seen: BTreeSet<_> = seen
            .iter()
            .map(|finding| sha256(finding.to_string().as_bytes()))
            .collect();
        let going_on =
            |listed: &&mut Listed| matches!(listed.code, FindingCode::Plaintext | FindingCode::SealedAsRaw);
        for listed in self.listed.iter_mut().filter(going_on) {
            listed.is_over = !seen.contains(&listed.digest);
        }
    }

    fn list(
        &mut self,
        code: FindingCode,
        what: &str,
        advice: Option<Advice>,
        since: SystemTime,
        digest: [u8; 32],
    ) {
        self.listed.push(Listed {
            code,
            what: shortened(what),
            advice: advice.filter(|advice| advice.to_string().len() <= MAX_WORDS),
            since,
            digest,
            is_over: false,
        });
    }
}

fn clean_up() -> Advice {
    "delete what is left of it, and have the storage below discard its blocks".into()
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
    fn what_is_over_is_told_without_what_would_end_it() {
        let mut found = Found::default();
        let finding =
            |code| Finding::warning(code, Subject::Host, "a").next(Advice::AbortDomainJob("web".into()));
        let seen = [
            finding(FindingCode::Plaintext),
            finding(FindingCode::PlaintextWritten),
        ];
        let _ = found.note("web", seen[..1].to_vec(), SystemTime::UNIX_EPOCH);
        let told = |found: &Found| found.findings("web").next().unwrap().to_string();
        found.settle(&seen[..1]);
        assert!(
            told(&found).ends_with("virsh domjobabort web"),
            "{}",
            told(&found)
        );
        found.settle(&[]);
        assert!(!told(&found).contains("domjobabort"), "{}", told(&found));
        assert!(told(&found).contains("not any more"), "{}", told(&found));
        found.settle(&seen[..1]);
        assert!(!told(&found).contains("not any more"), "it has begun again");
        // What was heard of is no state that a look could miss.
        let mut found = Found::default();
        let _ = found.note("web", seen[1..].to_vec(), SystemTime::UNIX_EPOCH);
        found.settle(&[]);
        assert!(!told(&found).contains("not any more"), "{}", told(&found));
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
