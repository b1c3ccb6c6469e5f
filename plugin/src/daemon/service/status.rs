//! What `virtseal status` and `virtseal vm status` answer.

use super::provider_view;
use crate::api::pages;
use crate::api::{FindingView, HostStatus, Vms};
use crate::daemon::glance::Age;
use crate::daemon::{Daemon, lock, look, paths};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem};
use crate::vm::names::{self, KnownVm};
use crate::vm::status::view;

/// Everything at a glance; never waits for a provider.
pub(super) fn status(daemon: &Daemon, age: Age, after: Option<&str>) -> Result<HostStatus, Problem> {
    let glance = daemon.glances.take(age)?;
    let providers = provider_view::list(daemon)?.providers;
    let mut warnings = daemon.warnings();
    warnings.extend(glance.damaged.iter().cloned());
    let warnings = pages::cut(FindingView::all(&warnings), pages::PAGE / 8);
    let others = pages::size_of(&providers) + pages::size_of(&warnings);
    let (vms, next_vms) = pages::of_vms(&glance.vms, after, others);
    Ok(HostStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        libvirt: glance.libvirt.err().unwrap_or_else(|| "connected".to_owned()),
        libvirt_uri: daemon.config().libvirt_uri,
        providers,
        vms,
        next_vms,
        armed: lock(&daemon.armed).len() as i64,
        audit: daemon.audit.problem(),
        warnings,
    })
}

/// One VM, sealed or not; or all sealed ones.
pub(super) fn vm_status(
    daemon: &Daemon,
    vm: Option<&str>,
    age: Age,
    after: Option<&str>,
) -> Result<Vms, Problem> {
    let Some(vm) = vm else {
        let glance = daemon.glances.take(age)?;
        if let Err(why) = glance.libvirt {
            return Err(Problem::new(Code::Unreachable, why).next(Advice::ShowStatus));
        }
        let (vms, next) = pages::of_vms(&glance.vms, after, 0);
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
