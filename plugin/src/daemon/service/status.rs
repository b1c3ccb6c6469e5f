//! What `virtseal status` and `virtseal vm status` answer.

use super::provider_view;
use crate::api::pages;
use crate::api::{FindingView, HostStatus, LibvirtState, ProviderState, ProviderView, Vms};
use crate::daemon::glance::Age;
use crate::daemon::{Daemon, hook_seen, look, paths};
use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::Problem;
use crate::terminal::visible;
use crate::vm::names::{self, KnownVm};
use crate::vm::status::view;

pub(super) fn status(
    daemon: &Daemon,
    age: Age,
    after: Option<&str>,
    room: usize,
) -> Result<HostStatus, Problem> {
    let glance = daemon.glances.take(age)?;
    let providers = provider_view::with_uses(daemon, &glance.uses)?;
    let mut warnings: Vec<_> = glance
        .libvirt
        .as_ref()
        .err()
        .map(unreachable)
        .into_iter()
        .collect();
    warnings.extend(daemon.warnings());
    warnings.extend(not_backed_up(daemon, &providers));
    warnings.extend(hook_seen::finding(daemon));
    warnings.extend(glance.damaged.iter().cloned());
    let warnings = pages::cut(FindingView::all(&warnings), pages::PAGE / 8);
    let others = pages::size_of(&providers) + pages::size_of(&warnings);
    let (vms, next_vms) = pages::of_vms(&glance.vms, after, room.saturating_sub(others));
    Ok(HostStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        libvirt: match glance.libvirt {
            Ok(()) => LibvirtState::Connected.into(),
            Err(_) => LibvirtState::NotConnected.into(),
        },
        libvirt_problem: glance.libvirt.err(),
        libvirt_uri: daemon.config().libvirt_uri,
        providers,
        vms,
        next_vms,
        armed: daemon.armed.len() as i64,
        audit: daemon.audit.problem(),
        warnings,
    })
}

/// Of those that new keys go to: seals are refused, and jobs wait.
fn not_backed_up(daemon: &Daemon, providers: &[ProviderView]) -> Vec<Finding> {
    let policy = daemon.recipients.policy().unwrap_or_default();
    let policy: Vec<_> = policy.iter().map(|one| one.provider().id().to_string()).collect();
    let idle = providers
        .iter()
        .filter(|view| view.state.known() == Some(ProviderState::NotBackedUp) && policy.contains(&view.id));
    idle.map(|ProviderView { name, .. }| {
        let what = format!("provider '{}' wraps no key until it is backed up", visible(name));
        Finding::warning(FindingCode::NotBackedUp, Subject::Provider(name.clone()), what)
            .next(Advice::BackUpProvider(name.clone()))
    })
    .collect()
}

pub(super) fn vm_status(
    daemon: &Daemon,
    vm: Option<&str>,
    age: Age,
    after: Option<&str>,
    room: usize,
) -> Result<Vms, Problem> {
    let Some(vm) = vm else {
        let glance = daemon.glances.take(age)?;
        if let Err(why) = glance.libvirt {
            return Err(Problem::unreachable(why).next(Advice::ShowStatus));
        }
        let (vms, next) = pages::of_vms(&glance.vms, after, room);
        return Ok(Vms { vms, next });
    };
    let view = match names::find_vm(&daemon.background, daemon.keystore.as_ref(), vm)? {
        KnownVm::Defined(defined) => look::at_one(daemon, &defined)?,
        KnownVm::Undefined(record) => {
            let known = look::known(daemon, paths::rule_of_settings(daemon))?;
            view::undefined(
                record.vm,
                &record.name,
                daemon.running.findings(record.vm),
                &known,
            )
        }
    };
    Ok(Vms {
        vms: vec![view],
        next: None,
    })
}

fn unreachable(why: &String) -> Finding {
    let what = format!("nothing is known of VMs: {why}");
    Finding::critical(FindingCode::LibvirtUnreachable, Subject::Host, what).next(Advice::ShowLibvirtd)
}
