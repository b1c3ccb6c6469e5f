//! What the host lets a sealed VM do beside its sealed objects. Nothing, unless virtseald.yaml says otherwise.

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Permission {
    #[default]
    No,
    Yes,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    /// Guest memory in a file of a disk.
    pub memory_on_disk: Permission,
    /// Plain disks beside sealed ones.
    pub mixed_disks: Permission,
    /// Plain layers below sealed disks, without a warning.
    pub plain_backing: Permission,
    /// A demand, where the others are leave: it runs only where libvirt lets no VM leave without TLS (docs/adr/0019).
    pub migration_tls: Permission,
}

/// What the policy can allow to a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PolicyKey {
    MemoryOnDisk,
    MixedDisks,
}

impl PolicyKey {
    /// The key in `policy:` of virtseald.yaml.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::MemoryOnDisk => "memory_on_disk",
            Self::MixedDisks => "mixed_disks",
        }
    }
}

impl Policy {
    pub(crate) fn allows(&self, key: PolicyKey) -> bool {
        let permission = match key {
            PolicyKey::MemoryOnDisk => self.memory_on_disk,
            PolicyKey::MixedDisks => self.mixed_disks,
        };
        permission == Permission::Yes
    }
}
