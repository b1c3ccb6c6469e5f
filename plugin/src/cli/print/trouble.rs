//! What of a host needs somebody, the worst first, each with its next command. VMs that stay off for the same reason are one thing, and
//! so is what many have alike.

use std::collections::{BTreeMap, BTreeSet};

use super::alike::{About, Trouble, named, together};
use crate::api::{
    FindingView, HostStatus, ProviderView, Severity, StartOutlook, SubjectKind, VmPower, VmView,
};
use crate::model::advice::Advice;

/// All of it.
pub(super) fn of(status: &HostStatus) -> Vec<Trouble> {
    let audit = status.audit.iter().map(|problem| Trouble {
        severity: Severity::Critical,
        what: format!("the audit log: {problem}"),
        next: Some(Advice::VerifyAudit.to_string()),
        about: None,
    });
    let of_vms = status.vms.iter().flat_map(|vm| &vm.warnings);
    let mut all: Vec<_> = status.warnings.iter().chain(of_vms).map(found).collect();
    all.extend(audit);
    all.extend(kept_off(&status.vms));
    all.extend(status.providers.iter().flat_map(of_provider));
    let mut all = together(all);
    // Those of one severity stay in their order.
    all.sort_by_key(|trouble| std::cmp::Reverse(trouble.severity));
    all
}

fn found(finding: &FindingView) -> Trouble {
    let subject = &finding.object;
    let name = subject.vm.as_deref().or(subject.name.as_deref());
    let about = subject.kind.known().zip(name);
    Trouble {
        severity: finding.severity.known().unwrap_or(Severity::Warning),
        what: finding.what.clone(),
        next: finding.next.clone(),
        about: about.and_then(|(kind, name)| About::new(kind, name)),
    }
}

fn of_provider(provider: &ProviderView) -> impl Iterator<Item = Trouble> {
    provider.warnings.iter().map(|warning| Trouble {
        what: format!("provider '{}': {}", provider.name, warning.what),
        about: None,
        ..found(warning)
    })
}

/// Of VMs that are defined here, unless a finding leads out of the same already.
fn kept_off(vms: &[VmView]) -> Vec<Trouble> {
    let mut reasons: BTreeMap<(&str, Option<&str>), Vec<&VmView>> = BTreeMap::new();
    for vm in vms {
        let starts = &vm.starts;
        let is_defined = ![Some(VmPower::Undefined), Some(VmPower::Unknown)].contains(&vm.power.known());
        let is_found = vm
            .warnings
            .iter()
            .any(|finding| finding.next.is_some() && finding.next == starts.next);
        if starts.outlook.known() == Some(StartOutlook::No) && is_defined && !is_found {
            let why = starts.why.as_deref().unwrap_or_default();
            reasons.entry((why, starts.next.as_deref())).or_default().push(vm);
        }
    }
    let reasons = reasons.into_iter();
    reasons
        .map(|((why, next), vms)| Trouble {
            severity: Severity::Critical,
            what: will_not_start(&vms, why),
            next: next.map(str::to_owned),
            about: match &vms[..] {
                [vm] => About::new(SubjectKind::Vm, &vm.name),
                _ => None,
            },
        })
        .collect()
}

/// Those that run go on running.
fn will_not_start(vms: &[&VmView], why: &str) -> String {
    let run = vms.iter().all(|vm| vm.power.known() == Some(VmPower::Running));
    let can_not = if run {
        "would not start again"
    } else {
        "can't start"
    };
    if let [vm] = vms {
        let name = &vm.name;
        // Refusals name the VM where they don't name its object.
        let why = why.strip_prefix(&format!("{name}: ")).unwrap_or(why);
        return format!("{name} {can_not}: {why}");
    }
    let names: BTreeSet<_> = vms.iter().map(|vm| vm.name.as_str()).collect();
    let named = named(names.iter().copied(), names.len());
    format!("{} VMs {can_not}: {why} ({named})", vms.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::StartView;
    use crate::model::finding::{Finding, FindingCode, Subject};

    fn off(name: &str, why: &str, next: &Advice) -> VmView {
        VmView {
            starts: StartView::no(why, Some(next)),
            ..VmView::fixture(name, 1)
        }
    }

    #[test]
    fn vms_that_one_thing_keeps_off_are_told_together() {
        let unlock = Advice::UnlockProvider("main".into());
        let mut vms: Vec<_> = (0..12)
            .map(|n| off(&format!("web{n:02}"), "provider 'main' is locked", &unlock))
            .collect();
        vms.push(off("db01", "disk vda: /d does not exist", &Advice::ListOrphans));
        vms.push(VmView::fixture("fine", 1));
        let told = kept_off(&vms);
        assert_eq!(told.len(), 2);
        assert_eq!(told[0].what, "db01 can't start: disk vda: /d does not exist");
        assert_eq!(
            told[1].what,
            "12 VMs can't start: provider 'main' is locked (web00, web01, web02, web03, web04, web05, web06, web07, 4 more)"
        );
        assert_eq!(told[1].next.as_deref(), Some("virtseal provider unlock main"));
    }

    #[test]
    fn one_that_runs_goes_on_and_one_that_is_elsewhere_is_no_trouble() {
        let unlock = Advice::UnlockProvider("main".into());
        let mut vm = off("web01", "provider 'main' is locked", &unlock);
        vm.power = VmPower::Running.into();
        assert_eq!(
            kept_off(&[vm.clone()])[0].what,
            "web01 would not start again: provider 'main' is locked"
        );
        for power in [VmPower::Undefined, VmPower::Unknown] {
            vm.power = power.into();
            assert!(kept_off(&[vm.clone()]).is_empty());
        }
    }

    #[test]
    fn what_a_finding_leads_out_of_is_told_once() {
        let seal = Advice::SealVm("web01".into());
        let mut vm = off("web01", "it is sealed, and its XML does not say so", &seal);
        let finding = Finding::critical(
            FindingCode::NotInXml,
            Subject::Vm("web01".into()),
            "web01 was sealed",
        )
        .next(seal);
        vm.warnings = FindingView::all(&[finding]);
        assert!(kept_off(&[vm]).is_empty());
    }
}
