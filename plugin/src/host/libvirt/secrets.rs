//! The secret driver, for starts.

use std::sync::Arc;
use std::time::Duration;

use roxmltree::Node;
use virt::connect::Connect;

use super::link::Link;
use super::probe::Probe;
use super::{LibvirtError, absent_is};
use crate::domain::parse_document;
use crate::model::envelope::{EnvelopeId, Form, ObjectKind};
use crate::secret::Passphrase;

/// A DEK on its way to libvirt.
#[derive(Debug)]
pub(crate) struct Arming {
    /// The envelope; its UUID becomes the secret's.
    pub envelope: EnvelopeId,
    /// Decides the usage type that libvirt expects of the secret.
    pub kind: ObjectKind,
    /// For people who run `virsh secret-list` in the wrong millisecond.
    pub description: String,
    pub passphrase: Passphrase,
}

/// The connection that starts wait for.
#[derive(Debug)]
pub(crate) struct StartConnection {
    link: Link,
    probe: Probe,
}

impl StartConnection {
    /// For the libvirt at `uri`; does not connect yet.
    pub(crate) fn new(uri: &str) -> Self {
        Self {
            link: Link::new(uri),
            probe: Probe::default(),
        }
    }

    /// Whether the connection stands, without waiting for anything.
    pub(crate) fn is_connected(&self) -> bool {
        self.link.is_connected()
    }

    /// How often it was connected: another number is another connection.
    pub(crate) fn opened(&self) -> u64 {
        self.link.opened()
    }

    /// Connects where that is needed, and makes sure that libvirt answers at all, within `limit`. A libvirtd that is autostarting
    /// VMs accepts a connection and then says nothing until it is done, and nothing can interrupt a call that waits for it.
    pub(crate) fn reach(self: &Arc<Self>, limit: Duration) -> Result<(), LibvirtError> {
        let libvirt = Arc::clone(self);
        let answered = self.probe.within(limit, move || {
            let asked = || libvirt.link.with("answer", Connect::lib_version).map(drop);
            libvirt.probe.run(asked);
        });
        answered.unwrap_or_else(|| {
            Err(LibvirtError::Silent {
                uri: self.link.uri().to_owned(),
                waited: limit,
            })
        })
    }

    /// Defines each secret as ephemeral and private and sets its value. All or none: what was defined is taken
    /// back when a later one fails.
    pub(crate) fn arm(&self, secrets: &[Arming]) -> Result<(), LibvirtError> {
        for (done, secret) in secrets.iter().enumerate() {
            if let Err(error) = self.arm_one(secret) {
                let defined: Vec<_> = secrets[..=done].iter().map(|secret| secret.envelope).collect();
                return match self.disarm(&defined) {
                    Ok(()) => Err(error),
                    Err(rollback) => Err(LibvirtError::Rollback {
                        source: Box::new(error),
                        rollback: rollback.to_string(),
                    }),
                };
            }
        }
        Ok(())
    }

    /// libvirt has no call that defines a secret with its value, so another client can put a secret of its own in between, and
    /// read what comes. That can't be prevented here, so it is looked for.
    fn arm_one(&self, secret: &Arming) -> Result<(), LibvirtError> {
        self.link
            .with("define a secret", |connection| define(connection, secret))?;
        let xml = self.link.with("read a secret back", |connection| {
            absent_is(
                None,
                connection.lookup_secret_by_uuid(secret.envelope.0).map(Some),
            )?
            .map_or(Ok(None), |found| absent_is(None, found.xml_desc(0).map(Some)))
        })?;
        if xml.is_some_and(|xml| is_as_defined(&xml, secret.envelope)) {
            return Ok(());
        }
        Err(LibvirtError::Usurped {
            envelope: secret.envelope,
        })
    }

    /// Undefines the secrets of `envelopes`; one that is not there is no error.
    pub(crate) fn disarm(&self, envelopes: &[EnvelopeId]) -> Result<(), LibvirtError> {
        for envelope in envelopes {
            self.link.with("undefine a secret", |connection| {
                absent_is(None, connection.lookup_secret_by_uuid(envelope.0).map(Some))?
                    .map_or(Ok(()), |secret| absent_is((), secret.undefine()))
            })?;
        }
        Ok(())
    }

    /// The envelopes whose secrets libvirt holds now.
    pub(crate) fn armed(&self) -> Result<Vec<EnvelopeId>, LibvirtError> {
        // Of any kind: others can have made one of ours persistent meanwhile.
        let secrets = self
            .link
            .with("list the secrets", |connection| connection.list_all_secrets(0))?;
        // One that is gone meanwhile is no longer armed.
        let found = secrets
            .iter()
            .filter_map(|secret| armed_by(&secret.xml_desc(0).ok()?));
        Ok(found.collect())
    }
}

/// Marks the usage id of our secrets.
const USAGE_PREFIX: &str = "virtseal:";

fn define(connection: &Connect, secret: &Arming) -> Result<(), virt::error::Error> {
    connection
        .define_secret_xml(&secret_xml(secret), 0)?
        .set_value(secret.passphrase.expose(), 0)
}

fn secret_xml(secret: &Arming) -> String {
    let usage = format!("{USAGE_PREFIX}{}", secret.envelope);
    let usage = match secret.kind.form() {
        Form::Image => format!("<usage type='volume'><volume>{usage}</volume></usage>"),
        Form::State => format!("<usage type='vtpm'><name>{usage}</name></usage>"),
    };
    format!(
        "<secret ephemeral='yes' private='yes'><uuid>{}</uuid><description>{}</description>{usage}</secret>",
        secret.envelope,
        escape(&secret.description),
    )
}

/// The envelope of a secret of ours. Read from its XML, because `virt` 0.5 frees the usage id that libvirt owns.
fn armed_by(xml: &str) -> Option<EnvelopeId> {
    let document = parse_document(xml).ok()?;
    let secret = document.root_element();
    let child = |name| secret.children().find(|node| node.has_tag_name(name));
    let id = child("uuid")?.text()?.parse().ok()?;
    let usage = child("usage")?.children().find(Node::is_element)?.text()?;
    (usage == format!("{USAGE_PREFIX}{id}")).then_some(id)
}

/// Whether this is the secret that was defined, of which libvirt tells nobody the value, and keeps it in memory only.
fn is_as_defined(xml: &str, envelope: EnvelopeId) -> bool {
    let says_yes = |name: &str| {
        parse_document(xml).is_ok_and(|document| document.root_element().attribute(name) == Some("yes"))
    };
    armed_by(xml) == Some(envelope) && says_yes("ephemeral") && says_yes("private")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Dek;

    #[test]
    fn secret_xml_is_private_ephemeral_and_escaped() {
        let envelope = EnvelopeId::random();
        let xml = secret_xml(&Arming {
            envelope,
            kind: ObjectKind::Vtpm,
            description: "virtseal: vtpm of <&>".into(),
            passphrase: Dek::random().unwrap().passphrase().unwrap(),
        });
        let document = parse_document(&xml).unwrap();
        let root = document.root_element();
        assert_eq!(
            (root.attribute("ephemeral"), root.attribute("private")),
            (Some("yes"), Some("yes"))
        );
        assert!(xml.contains(&format!(
            "<usage type='vtpm'><name>virtseal:{envelope}</name></usage>"
        )));
        assert!(
            root.children()
                .any(|node| node.text() == Some("virtseal: vtpm of <&>"))
        );
    }

    #[test]
    fn secrets_of_others_are_not_ours() {
        for kind in [ObjectKind::Disk, ObjectKind::Nvram, ObjectKind::Vtpm] {
            let arming = Arming {
                envelope: EnvelopeId::random(),
                kind,
                description: "virtseal:".into(),
                passphrase: Dek::random().unwrap().passphrase().unwrap(),
            };
            let xml = secret_xml(&arming);
            assert_eq!(armed_by(&xml), Some(arming.envelope), "{xml}");
            let others = xml.replace(USAGE_PREFIX, "/var/lib/libvirt/images/");
            assert_eq!(armed_by(&others), None, "{others}");
        }
    }

    #[test]
    fn a_secret_that_others_have_put_in_the_place_of_ours_is_told_from_it() {
        let envelope = EnvelopeId::random();
        let xml = secret_xml(&Arming {
            envelope,
            kind: ObjectKind::Disk,
            description: "virtseal: disk vda of web01".into(),
            passphrase: Dek::random().unwrap().passphrase().unwrap(),
        });
        assert!(is_as_defined(&xml, envelope));
        assert!(!is_as_defined(&xml, EnvelopeId::random()));
        for (from, to) in [
            ("private='yes'", "private='no'"),
            ("private='yes'", ""),
            ("ephemeral='yes'", "ephemeral='no'"),
            (USAGE_PREFIX, "/images/"),
        ] {
            assert!(!is_as_defined(&xml.replace(from, to), envelope), "{from} {to}");
        }
    }

    #[test]
    fn a_libvirt_that_is_not_there_is_named() {
        let libvirt = StartConnection::new("qemu+unix:///system?socket=/nonexistent/libvirt-sock");
        let error = libvirt.armed().unwrap_err().to_string();
        assert!(error.contains("/nonexistent/libvirt-sock"), "{error}");
        assert!(!libvirt.is_connected());
    }
}
