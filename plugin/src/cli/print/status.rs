//! The host and its VMs.

use std::collections::BTreeMap;

use super::super::document::Answer;
use super::super::out::{columns, fitting_table, line, line_with_state, note, table, wrapped};
use super::one_provider::{because, local, provider_name};
use super::{Printer, Width, trouble};
use crate::api::{HostStatus, LibvirtState, ObjectView, ProviderView, VmAutostart, VmView, Vms, words};
use crate::model::problem::Problem;
use crate::terminal::unadvised;

impl Printer {
    /// Triage: what needs somebody comes first.
    pub(in crate::cli) fn status(&self, status: HostStatus, width: Width) -> Result<(), Problem> {
        if self.json {
            return self.tell(Answer::Status(Box::new(status)));
        }
        let troubles = trouble::of(&status);
        if troubles.is_empty() {
            line("Nothing needs attention")?;
        }
        for trouble in troubles {
            let what = unadvised(&trouble.what);
            wrapped(&format!("{}: ", words(&trouble.severity)), &what, ' ')?;
            if let Some(next) = &trouble.next {
                wrapped("  Next: ", next, ',')?;
            }
        }
        line("")?;
        match width {
            Width::Narrow => providers_at_a_glance(&status.providers)?,
            Width::Wide => self.providers_in_full(&status.providers)?,
        }
        if !status.vms.is_empty() {
            line("")?;
            vms_at_a_glance(&status.vms, width)?;
        }
        line("")?;
        let libvirt = match status.libvirt.known() {
            Some(LibvirtState::NotConnected) => "does not answer".to_owned(),
            _ => status.libvirt.to_string(),
        };
        let daemon = format!("virtseald {}, ", status.version);
        let all = format!(
            "libvirt {libvirt} ({}), {} secrets in libvirt",
            status.libvirt_uri, status.armed
        );
        wrapped(&daemon, &all, ' ')
    }

    /// The objects of VMs.
    pub(in crate::cli) fn vms(&self, shown: Vms, width: Width) -> Result<(), Problem> {
        if self.json {
            return self.tell(Answer::Vms(shown));
        }
        let vms = &shown.vms[..];
        let header = ["VM", "POWER", "OBJECT", "STATE", "GENERATION", "PROVIDERS"];
        let rows = vms
            .iter()
            .flat_map(|vm| vm.objects.iter().map(move |object| object_row(vm, object)));
        match width {
            Width::Narrow => fitting_table(&header, rows)?,
            Width::Wide => {
                let paths = vms.iter().flat_map(|vm| &vm.objects).map(|object| &object.path);
                let rows = rows.zip(paths).map(|(mut row, path)| {
                    row.push(path.clone().unwrap_or_else(|| "-".into()));
                    row
                });
                table(&[&header[..], &["PATH"]].concat(), rows)?;
            }
        }
        if let [vm] = vms {
            wrapped("starts: ", &starts(vm), ' ')?;
        }
        hanging(vms).iter().try_for_each(|text| wrapped("", text, ' '))?;
        autostarted(vms).map_or(Ok(()), |text| wrapped("", &text, ' '))?;
        vms.iter()
            .flat_map(|vm| &vm.warnings)
            .for_each(|warning| note(&warning.to_string()));
        Ok(())
    }
}

fn providers_at_a_glance(providers: &[ProviderView]) -> Result<(), Problem> {
    let rows = providers.iter().map(|provider| {
        vec![
            provider_name(provider),
            provider.kind.to_string(),
            because(&provider.state, provider.reason.as_deref()),
            local(Some(&provider.since)),
            provider.envelopes.to_string(),
        ]
    });
    fitting_table(&["PROVIDER", "KIND", "STATE", "SINCE", "ENVELOPES"], rows)
}

/// A line a VM: what does not fit is in the list of what needs attention.
fn vms_at_a_glance(vms: &[VmView], width: Width) -> Result<(), Problem> {
    let column = |header: &str, of: &dyn Fn(&VmView) -> usize| {
        let widest = vms.iter().map(of).max().unwrap_or_default();
        widest.max(header.chars().count())
    };
    let name = column("VM", &|vm| vm.name.chars().count());
    let power = column("POWER", &|vm| vm.power.to_string().chars().count());
    let row = |vm: &str, is: &str, starts: &str| format!("{vm:name$}  {is:power$}  {starts}");
    let header = row("VM", "POWER", "STARTS");
    match width {
        Width::Narrow => line(&header)?,
        Width::Wide => line(&format!("{header}  UUID"))?,
    }
    vms.iter().try_for_each(|vm| {
        let text = row(&vm.name, &vm.power.to_string(), &starts(vm));
        let text = match (width, columns()) {
            (Width::Narrow, Some(columns)) => shortened(&text, columns),
            (Width::Narrow, None) => text,
            (Width::Wide, _) => format!("{text}  {}", vm.uuid),
        };
        line_with_state(&text, name + power + 4)
    })
}

fn shortened(text: &str, columns: usize) -> String {
    match text.char_indices().nth(columns) {
        None => text.to_owned(),
        Some(_) => text.chars().take(columns - 1).chain(['…']).collect(),
    }
}

/// `yes`, or `no: provider 'main' is locked`.
fn starts(vm: &VmView) -> String {
    let outlook = vm.starts.outlook.to_string();
    match &vm.starts.why {
        Some(why) => format!("{outlook}: {why}"),
        None => outlook,
    }
}

/// Which VMs a single provider can stop.
fn hanging(vms: &[VmView]) -> Vec<String> {
    let mut by_provider: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for vm in vms {
        if let Some(provider) = &vm.depends_on {
            by_provider.entry(provider).or_default().push(&vm.name);
        }
    }
    let text = |(provider, names): (&str, Vec<&str>)| {
        let more = if names.len() > 8 { ", …" } else { "" };
        format!(
            "{} on provider '{provider}' alone: {}{more}",
            if names.len() == 1 {
                "1 VM depends".to_owned()
            } else {
                format!("{} VMs depend", names.len())
            },
            names[..names.len().min(8)].join(", ")
        )
    };
    by_provider.into_iter().map(text).collect()
}

/// Which VMs start with the host.
fn autostarted(vms: &[VmView]) -> Option<String> {
    let names = vms
        .iter()
        .filter(|vm| vm.autostart.known() == Some(VmAutostart::Virtseald));
    let names: Vec<_> = names.map(|vm| vm.name.as_str()).collect();
    let more = if names.len() > 8 { ", …" } else { "" };
    let first = names[..names.len().min(8)].join(", ");
    (!names.is_empty()).then(|| format!("virtseald starts with this host: {first}{more}"))
}

fn object_row(vm: &VmView, object: &ObjectView) -> Vec<String> {
    vec![
        vm.name.clone(),
        vm.power.to_string(),
        object.object.clone(),
        state(object),
        generation(object),
        object.providers.join(", "),
    ]
}

fn state(object: &ObjectView) -> String {
    match &object.shared_with[..] {
        [] => object.words(),
        others => format!("{}, shared with {}", object.words(), others.join(", ")),
    }
}

/// One that only a copy says is not taken for a fact.
fn generation(object: &ObjectView) -> String {
    match object.generation {
        Some(generation) if object.generation_verified => generation.to_string(),
        Some(generation) => format!("{generation} (not verified)"),
        None => "-".into(),
    }
}
