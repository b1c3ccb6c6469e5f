//! What XML tells of overlays: that of a running VM of one that is being merged, that of a snapshot of those that it has made.

use std::path::PathBuf;

use roxmltree::Node;

use super::xml::{child, children, disk_nodes, parse_document, root, text};
use super::{Domain, DomainError};

/// A block job that writes what a disk has to another image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mirror {
    /// Down into an image of its own chain, and not to a copy.
    pub is_commit: bool,
    /// All is there, and follows what the guest writes.
    pub is_ready: bool,
}

/// The block job of the disk `target`, by the VM's XML of now.
pub(crate) fn mirror_of(live: &str, target: &str) -> Result<Option<Mirror>, DomainError> {
    let document = parse_document(live)?;
    let disks = disk_nodes(root(&document)?)?;
    let disk = disks.into_iter().find(|(name, _)| *name == target);
    let mirror = disk.and_then(|(_, disk)| child(disk, "mirror"));
    Ok(mirror.map(|mirror| Mirror {
        is_commit: mirror.attribute("job") == Some("active-commit"),
        is_ready: mirror.attribute("ready") == Some("yes"),
    }))
}

/// What a snapshot has outside of libvirt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ExternalSnapshot {
    pub name: String,
    /// What it has laid over disks.
    pub overlays: Vec<PathBuf>,
    /// The memory of the VM as it was then.
    pub memory: Option<PathBuf>,
}

/// Reads `<domainsnapshot>`.
pub(crate) fn external_snapshot(xml: &str) -> Result<ExternalSnapshot, DomainError> {
    let document = parse_document(xml)?;
    let snapshot = document.root_element();
    let is_external = |node: &Node<'_, '_>| node.attribute("snapshot") == Some("external");
    let disks = children(snapshot, "disks").flat_map(|disks| children(disks, "disk"));
    let sources = disks.filter(is_external).filter_map(|disk| child(disk, "source"));
    let paths = sources.filter_map(|source| source.attribute("file").or(source.attribute("dev")));
    let memory = child(snapshot, "memory").filter(is_external);
    Ok(ExternalSnapshot {
        name: child(snapshot, "name").map(text).unwrap_or_default(),
        overlays: paths.map(PathBuf::from).collect(),
        memory: memory
            .and_then(|memory| memory.attribute("file"))
            .map(PathBuf::from),
    })
}

/// The VM as it was when a snapshot was made, and as it would have started then.
pub(crate) fn domains_of_snapshot(xml: &str) -> Result<Vec<Domain>, DomainError> {
    let document = parse_document(xml)?;
    let snapshot = document.root_element();
    let domains = ["domain", "inactiveDomain"]
        .into_iter()
        .filter_map(|name| child(snapshot, name));
    // The second is a domain by another name.
    let text = |node: Node<'_, '_>| xml[node.range()].replace("inactiveDomain", "domain");
    domains.map(|node| Domain::parse(&text(node))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_is_told_from_a_copy_and_is_ready_when_it_says_so() {
        let xml = |mirror: &str| {
            format!(
                "<domain type='kvm'><name>a</name><devices><disk type='file'><source file='/o'/>{mirror}<target dev='vda'/></disk>\
                 <disk type='file'><source file='/p'/><target dev='vdb'/></disk></devices></domain>"
            )
        };
        let of = |mirror: &str, disk: &str| mirror_of(&xml(mirror), disk).unwrap();
        let commit = "<mirror type='file' job='active-commit'><source file='/b'/></mirror>";
        assert_eq!(of("", "vda"), None);
        assert_eq!(of(commit, "vdb"), None);
        let found = |is_commit, is_ready| Some(Mirror { is_commit, is_ready });
        assert_eq!(of(commit, "vda"), found(true, false));
        assert_eq!(
            of(&commit.replace("commit'", "commit' ready='yes'"), "vda"),
            found(true, true)
        );
        assert_eq!(
            of("<mirror type='file' job='copy' ready='abort'/>", "vda"),
            found(false, false)
        );
    }

    #[test]
    fn a_snapshot_has_the_domain_twice() {
        let domain = |name: &str, disk: &str| {
            format!(
                "<{name} type='kvm'><name>a</name><uuid>{}</uuid><os><nvram template='/t'>/v</nvram></os><devices><disk type='file'>\
                 <source file='{disk}'/><target dev='vda'/></disk></devices></{name}>",
                uuid::Uuid::from_u128(1)
            )
        };
        let (now, next) = (domain("domain", "/now"), domain("inactiveDomain", "/next"));
        let read = domains_of_snapshot(&format!("<domainsnapshot>{now}{next}</domainsnapshot>")).unwrap();
        let disks: Vec<_> = read
            .iter()
            .map(|domain| domain.disks[0].source.path().unwrap())
            .collect();
        assert_eq!(
            disks,
            [std::path::Path::new("/now"), std::path::Path::new("/next")]
        );
        assert!(domains_of_snapshot("<domainsnapshot><domain/></domainsnapshot>").is_err());
    }

    #[test]
    fn a_snapshot_tells_what_it_has_outside_of_libvirt() {
        let xml = "<domainsnapshot><name>s 1</name><memory snapshot='external' file='/m'/><disks>\
                   <disk name='vda' snapshot='external' type='file'><driver type='qcow2'/><source file='/o'/></disk>\
                   <disk name='vdb' snapshot='no'/><disk name='vdc' snapshot='internal'><source file='/i'/></disk>\
                   <disk name='vdd' snapshot='external' type='block'><source dev='/dev/o'/></disk></disks>\
                   <domain><devices><disk><source file='/base'/></disk></devices></domain></domainsnapshot>";
        let found = external_snapshot(xml).unwrap();
        assert_eq!(found.name, "s 1");
        assert_eq!(found.overlays, [PathBuf::from("/o"), "/dev/o".into()]);
        assert_eq!(found.memory, Some("/m".into()));
        let internal = "<domainsnapshot><name>i</name><memory snapshot='internal'/></domainsnapshot>";
        assert_eq!(external_snapshot(internal).unwrap().memory, None);
        assert!(external_snapshot("<domainsnapshot>").is_err());
    }
}
