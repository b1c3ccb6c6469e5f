//! What needs somebody; and what many VMs have alike, told as one: a host with a thousand VMs has few things that are wrong with it.

use std::collections::{BTreeSet, HashMap};

use uuid::Uuid;

use crate::api::{Severity, SubjectKind};
use crate::model::advice::Advice;

/// How many are named of those that one thing is about.
const MAX_NAMED: usize = 8;
/// So many are told one by one, each with its own next command.
const MAX_APART: usize = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trouble {
    pub(super) severity: Severity,
    pub(super) what: String,
    pub(super) next: Option<String>,
    /// Where there may be others of the same.
    pub(super) about: Option<About>,
}

/// What something is about, of which there may be many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct About {
    kind: SubjectKind,
    name: String,
}

impl About {
    /// An object is its VM's.
    pub(super) fn new(kind: SubjectKind, name: &str) -> Option<Self> {
        let kind = match kind {
            SubjectKind::Vm | SubjectKind::Object => SubjectKind::Vm,
            SubjectKind::Image | SubjectKind::Job => kind,
            SubjectKind::Provider | SubjectKind::Host => return None,
        };
        let name = name.to_owned();
        Some(Self { kind, name })
    }
}

/// In their order; those that are one thing stand where the first of them stood.
pub(super) fn together(troubles: Vec<Trouble>) -> Vec<Trouble> {
    let mut groups: Vec<Vec<Trouble>> = Vec::new();
    let mut known: HashMap<_, usize> = HashMap::new();
    for trouble in troubles {
        let Some(about) = &trouble.about else {
            groups.push(vec![trouble]);
            continue;
        };
        let shape = |text: &str| shape(text, &about.name);
        let alike = (
            about.kind,
            trouble.severity,
            shape(&trouble.what),
            trouble.next.as_deref().map(shape),
        );
        match known.get(&alike) {
            Some(group) => groups[*group].push(trouble),
            None => {
                known.insert(alike, groups.len());
                groups.push(vec![trouble]);
            }
        }
    }
    groups.into_iter().flat_map(as_one).collect()
}

fn as_one(group: Vec<Trouble>) -> Vec<Trouble> {
    let names = group.iter().filter_map(|trouble| trouble.about.as_ref());
    let mut names: BTreeSet<_> = names.map(|about| about.name.clone()).collect();
    let first = &group[0];
    let Some(about) = first.about.as_ref().filter(|_| names.len() > MAX_APART) else {
        return group;
    };
    let (noun, all) = match about.kind {
        SubjectKind::Image => ("images", format!("{} --json", Advice::ShowStatus)),
        SubjectKind::Job => ("jobs", Advice::ListJobs.to_string()),
        _ => ("VMs", Advice::ShowVms.to_string()),
    };
    names.remove(&about.name);
    let (count, others) = (names.len(), named(names.iter().map(String::as_str), names.len()));
    let is_for_all = group.iter().all(|trouble| trouble.next == first.next);
    let next = match &first.next {
        Some(next) if is_for_all => next.clone(),
        Some(next) => format!("{next}; and so for the others: {all}"),
        None => all,
    };
    vec![Trouble {
        what: format!("{}; the same of {count} more {noun}: {others}", first.what),
        next: Some(next),
        ..first.clone()
    }]
}

/// The first of `count`, and how many more there are.
pub(super) fn named<'n>(names: impl Iterator<Item = &'n str>, count: usize) -> String {
    let mut named: Vec<_> = names.take(MAX_NAMED).map(str::to_owned).collect();
    if count > MAX_NAMED {
        named.push(format!("{} more", count - MAX_NAMED));
    }
    named.join(", ")
}

/// A text without what differs from one to the other: the name, paths, UUIDs and times.
fn shape(text: &str, name: &str) -> String {
    let words = without(text, name);
    let words = words.split(' ').map(|word| {
        let is_around = |c: char| "'\"(),;:.".contains(c);
        let bare = word.trim_matches(is_around);
        let is_time = bare.len() > 18 && bare.as_bytes().get(10) == Some(&b'T');
        match bare.starts_with('/') || bare.parse::<Uuid>().is_ok() || is_time {
            true => word.replace(bare, "\u{1}"),
            false => word.to_owned(),
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// The name where it is no part of a longer word.
fn without(text: &str, name: &str) -> String {
    let is_end = |next: Option<char>| !next.is_some_and(char::is_alphanumeric);
    let (mut shape, mut begin) = (String::with_capacity(text.len()), 0);
    for (at, _) in text.match_indices(name).filter(|_| !name.is_empty()) {
        let end = at + name.len();
        if is_end(text[..at].chars().next_back()) && is_end(text[end..].chars().next()) {
            shape.push_str(&text[begin..at]);
            shape.push('\0');
            begin = end;
        }
    }
    shape + &text[begin..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(name: &str, what: &str, next: &str) -> Trouble {
        Trouble {
            severity: Severity::Critical,
            what: what.replace("NAME", name),
            next: Some(next.replace("NAME", name)),
            about: About::new(SubjectKind::Vm, name),
        }
    }

    #[test]
    fn a_thousand_findings_of_the_same_are_one() {
        let (what, next) = (
            "disk vda of sealed VM NAME has a plain overlay, /images/NAME.s1, since 2026-11-29T15:28:41Z",
            "virtseal vm snapshot commit NAME",
        );
        let mut all: Vec<_> = (0..1000)
            .map(|n| trouble(&format!("web{n:04}"), what, next))
            .collect();
        all.insert(1, trouble("db01", "NAME runs on", "virtseal vm seal NAME"));
        let told = together(all);
        assert_eq!(told.len(), 2, "{told:?}");
        assert_eq!(
            told[0].what,
            "disk vda of sealed VM web0000 has a plain overlay, /images/web0000.s1, since 2026-11-29T15:28:41Z; the same of 999 more \
             VMs: web0001, web0002, web0003, web0004, web0005, web0006, web0007, web0008, 991 more"
        );
        assert_eq!(
            told[0].next.as_deref(),
            Some("virtseal vm snapshot commit web0000; and so for the others: virtseal vm status")
        );
        assert_eq!(told[1].what, "db01 runs on");
    }

    #[test]
    fn a_command_for_all_stands_once_and_few_are_told_one_by_one() {
        let of = |count: usize, next: &str| {
            let all = (0..count).map(|n| trouble(&format!("a{n}"), "NAME waits", next));
            together(all.collect())
        };
        let told = of(MAX_APART + 1, "systemctl reload libvirtd");
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].next.as_deref(), Some("systemctl reload libvirtd"));
        assert_eq!(of(MAX_APART, "virtseal vm seal NAME").len(), MAX_APART);
        // Two things of one VM are two.
        let twice = ["/a", "/b", "/c", "/d"].map(|path| trouble("a", &format!("NAME: {path} is gone"), "x"));
        assert_eq!(together(twice.to_vec()).len(), 4);
    }

    #[test]
    fn what_differs_otherwise_is_not_the_same() {
        let names = ["a", "b", "c", "d", "e"];
        let all = names.map(|name| {
            trouble(
                name,
                &format!("NAME has {} disks", name.len() + name.as_bytes()[0] as usize),
                "x",
            )
        });
        assert_eq!(together(all.to_vec()).len(), names.len());
        assert_eq!(
            shape("web01 and web011: (/a/web01) 'web01'", "web01"),
            "\0 and web011: (\u{1}) '\0'"
        );
    }
}
