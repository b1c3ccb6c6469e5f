//! What the host lets a sealed VM do beside its sealed objects. Nothing, unless virtseald.yaml says otherwise.

/// Whether something is allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Permission {
    /// It is not.
    #[default]
    No,
    /// It is.
    Yes,
}

/// The policy for one VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
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
pub enum PolicyKey {
    /// See [`Policy::memory_on_disk`].
    MemoryOnDisk,
    /// See [`Policy::mixed_disks`].
    MixedDisks,
}

impl PolicyKey {
    /// The key in `policy:` of virtseald.yaml.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MemoryOnDisk => "memory_on_disk",
            Self::MixedDisks => "mixed_disks",
        }
    }
}

impl Policy {
    /// Whether it allows this.
    #[must_use]
    pub fn allows(&self, key: PolicyKey) -> bool {
        let permission = match key {
            PolicyKey::MemoryOnDisk => self.memory_on_disk,
            PolicyKey::MixedDisks => self.mixed_disks,
        };
        permission == Permission::Yes
    }
}
