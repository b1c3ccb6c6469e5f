//! What a problem or a finding is about.

/// By the name that an admin knows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Subject {
    /// This host: its settings, its keystore.
    Host,
    /// A VM as a whole: name or, where that is all there is, UUID.
    Vm(String),
    /// An object of a VM, as `disk vda`.
    Object {
        vm: String,
        object: String,
    },
    Provider(String),
    /// An image, by its path.
    Image(String),
    Job(i64),
}

impl Subject {
    pub(crate) fn object(vm: &str, object: &str) -> Self {
        let (vm, object) = (vm.to_owned(), object.to_owned());
        Self::Object { vm, object }
    }
}
