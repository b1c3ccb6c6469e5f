//! What libvirt's thread and the one that looks share of running VMs.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::bell::Bell;
use super::locks::lock;
use crate::host::libvirt::events::Heard;
use crate::model::envelope::VmId;
use crate::model::finding::Finding;
use crate::vm::running::{News, Watched};

/// What was heard of VMs, and what was seen of them.
#[derive(Debug, Default)]
pub(super) struct Running {
    pub(super) news: Mutex<BTreeMap<VmId, News>>,
    pub(super) bell: Bell,
    pub(super) seen: Mutex<Watched>,
}

impl Running {
    /// On libvirt's thread: waits for nobody.
    pub(super) fn hear(&self, heard: Heard) {
        lock(&self.news)
            .entry(heard.vm)
            .or_default()
            .add(heard.name, heard.change);
        self.bell.ring();
    }

    pub(super) fn look_at(&self, vms: impl IntoIterator<Item = VmId>) {
        let mut news = lock(&self.news);
        for vm in vms {
            news.entry(vm).or_default();
        }
    }

    /// What was found of a VM since the daemon began.
    pub(super) fn findings(&self, vm: VmId) -> Vec<Finding> {
        lock(&self.seen).findings(vm)
    }

    /// Every VM with findings, with its name.
    pub(super) fn with_findings(&self) -> Vec<(VmId, String)> {
        lock(&self.seen).with_findings()
    }
}
