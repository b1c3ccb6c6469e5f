//! Whether libvirt knows of the hook: it looks for hooks when it starts and when it reloads, and what was installed after that it does
//! not call.

use std::path::Path;
use std::time::SystemTime;

use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};

/// The daemon of libvirt that runs VMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Libvirtd {
    /// `libvirtd` or `virtqemud`.
    pub name: &'static str,
    pub pid: u32,
    pub started: SystemTime,
}

/// What is known of the hook of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HookFacts {
    /// Since when its file is there.
    pub installed: Option<SystemTime>,
    /// None while none runs.
    pub libvirtd: Option<Libvirtd>,
    /// Which libvirtd was the last to look for hooks after ours for daemons was there.
    pub looked: Option<u32>,
    /// When the hook called virtseald last.
    pub heard: Option<SystemTime>,
}

/// What is wrong, if anything is.
pub(crate) fn finding(hook: &Path, facts: &HookFacts) -> Option<Finding> {
    let Some(installed) = facts.installed else {
        let what = format!(
            "libvirt has no hook of virtseal ({}): sealed VMs can't start",
            hook.display()
        );
        return Some(
            Finding::critical(FindingCode::HookMissing, Subject::Host, what).next("install virtseal again"),
        );
    };
    let libvirtd = facts.libvirtd.as_ref()?;
    let was_there = installed <= libvirtd.started;
    let has_looked = facts.looked == Some(libvirtd.pid);
    let was_heard = facts.heard.is_some_and(|heard| heard >= libvirtd.started);
    if was_there || has_looked || was_heard {
        return None;
    }
    let what = format!(
        "{} was started before virtseal's hook was installed, and does not call it yet: sealed VMs can't start, and nothing keeps \
         an old XML of one from being started",
        libvirtd.name
    );
    Some(
        Finding::critical(FindingCode::HookNotLoaded, Subject::Host, what)
            .next(Advice::ReloadLibvirtd(libvirtd.name)),
    )
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn facts(installed: u64, started: u64) -> HookFacts {
        HookFacts {
            installed: Some(at(installed)),
            libvirtd: Some(Libvirtd {
                name: "libvirtd",
                pid: 7,
                started: at(started),
            }),
            looked: None,
            heard: None,
        }
    }

    fn told(facts: &HookFacts) -> Option<String> {
        finding(Path::new("/hook"), facts).map(|found| found.to_string())
    }

    #[test]
    fn a_hook_that_came_after_libvirtd_is_not_known_until_a_reload_or_a_call() {
        assert_eq!(told(&facts(1, 2)), None);
        let late = facts(2, 1);
        let words = told(&late).unwrap();
        assert!(words.ends_with("Next: systemctl reload libvirtd"), "{words}");
        let looked = |pid| HookFacts {
            looked: Some(pid),
            ..late.clone()
        };
        assert_eq!(told(&looked(7)), None);
        assert!(told(&looked(6)).is_some(), "that was another libvirtd");
        let heard = |seconds| HookFacts {
            heard: Some(at(seconds)),
            ..late.clone()
        };
        assert_eq!(told(&heard(3)), None);
        assert!(told(&heard(0)).is_some(), "it called before this libvirtd");
    }

    #[test]
    fn without_libvirtd_nothing_is_known_and_without_a_hook_nothing_starts() {
        let mut facts = facts(2, 1);
        facts.libvirtd = None;
        assert_eq!(told(&facts), None);
        facts.installed = None;
        assert!(told(&facts).unwrap().contains("/hook"));
    }
}
