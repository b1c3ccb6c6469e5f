//! What libvirt chooses the firmware by, where the XML leaves it the choice.

use roxmltree::Node;

use super::xml::child;

/// The parts of the XML that libvirt compares with a firmware descriptor. `None` is what the XML does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FirmwareWish {
    /// `<type arch=…>`.
    pub arch: Option<String>,
    /// `<type machine=…>`, which libvirt has made a full name when the domain was defined.
    pub machine: Option<String>,
    /// `<firmware><feature name='secure-boot' enabled=…/>`.
    pub secure_boot: Option<bool>,
    /// `<firmware><feature name='enrolled-keys' enabled=…/>`.
    pub enrolled_keys: Option<bool>,
    /// `<smm state=…>`.
    pub smm: Option<bool>,
    /// `<loader secure=…>`.
    pub secure: Option<bool>,
    /// `<loader readonly=…>`.
    pub readonly: Option<bool>,
    pub loader_format: Option<String>,
    /// `<pm><suspend-to-mem enabled='yes'/>`.
    pub suspend_to_mem: bool,
    /// `<pm><suspend-to-disk enabled='yes'/>`.
    pub suspend_to_disk: bool,
    pub launch_security: Option<LaunchSecurity>,
}

/// `<launchSecurity>`, as far as firmware must support it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LaunchSecurity {
    /// AMD SEV.
    Sev,
    /// AMD SEV-ES: bit 2 of the policy.
    SevEs,
    /// Another one, by its name.
    Other(String),
}

pub(super) fn read(root: Node<'_, '_>, os: Node<'_, '_>) -> FirmwareWish {
    let (kind, loader) = (child(os, "type"), child(os, "loader"));
    let of = |node: Option<Node<'_, '_>>, name: &str| node?.attribute(name).map(str::to_owned);
    let switch = |node: Option<Node<'_, '_>>, name: &str| match node?.attribute(name)? {
        "yes" | "on" => Some(true),
        "no" | "off" => Some(false),
        _ => None,
    };
    let features = child(os, "firmware");
    let feature = |name: &str| {
        let mut features = features
            .into_iter()
            .flat_map(|features| super::xml::children(features, "feature"));
        switch(
            features.find(|feature| feature.attribute("name") == Some(name)),
            "enabled",
        )
    };
    let suspend = |name| switch(child(root, "pm").and_then(|pm| child(pm, name)), "enabled") == Some(true);
    // An element without the attribute turns it on.
    let smm = child(root, "features").and_then(|features| child(features, "smm"));
    FirmwareWish {
        arch: of(kind, "arch"),
        machine: of(kind, "machine"),
        secure_boot: feature("secure-boot"),
        enrolled_keys: feature("enrolled-keys"),
        smm: smm.map(|smm| smm.attribute("state") != Some("off")),
        secure: switch(loader, "secure"),
        readonly: switch(loader, "readonly"),
        loader_format: of(loader, "format"),
        suspend_to_mem: suspend("suspend-to-mem"),
        suspend_to_disk: suspend("suspend-to-disk"),
        launch_security: child(root, "launchSecurity").map(launch_security),
    }
}

const SEV_ES: u32 = 1 << 2;

fn launch_security(node: Node<'_, '_>) -> LaunchSecurity {
    let kind = node.attribute("type").unwrap_or_default();
    if kind != "sev" {
        return LaunchSecurity::Other(kind.to_owned());
    }
    let policy = child(node, "policy").map(super::xml::text).unwrap_or_default();
    let policy = policy.trim();
    let number = match policy.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => policy.parse(),
    };
    match number {
        Ok(policy) if policy & SEV_ES == 0 => LaunchSecurity::Sev,
        Ok(_) => LaunchSecurity::SevEs,
        Err(_) => LaunchSecurity::Other(kind.to_owned()),
    }
}
