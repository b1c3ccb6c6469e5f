//! Words of other programs, typed as commands of this one.

/// What other programs call it, the group that it is typed in (none: `""`), and how it is done here.
const OTHER_WORDS: &[(&[&str], &str, &str)] = &[
    (&["list", "ls", "show", "info"], "vm", "virtseal vm status"),
    (
        &["start", "shutdown", "reboot", "destroy", "define", "undefine"],
        "vm",
        "virsh",
    ),
    (
        &["delete", "remove", "rm"],
        "vm",
        "virtseal vm shred VM, which destroys its keys for good; virsh undefine destroys none",
    ),
    (&["encrypt"], "vm", "virtseal vm seal VM"),
    (&["decrypt"], "vm", "virtseal vm unseal VM"),
    (&["list", "ls"], "volume", "virtseal vm status -o wide"),
    (
        &["delete", "remove", "rm"],
        "volume",
        "virtseal volume forget PATH, once its file was deleted",
    ),
    (&["remove", "rm"], "provider", "virtseal provider delete NAME"),
    (
        &["vault", "openbao", "bao"],
        "provider add",
        "virtseal provider add transit NAME --address URL",
    ),
    (
        &["hsm", "softhsm"],
        "provider add",
        "virtseal provider add pkcs11 NAME --module PATH",
    ),
    (
        &["kms"],
        "provider add",
        "virtseal provider add kmip NAME --endpoint HOST",
    ),
    (&["list", "ls"], "", "virtseal status"),
    (
        &["start", "shutdown", "reboot", "destroy", "define", "undefine"],
        "",
        "virsh",
    ),
    (&["encrypt"], "", "virtseal vm seal VM"),
    (&["decrypt"], "", "virtseal vm unseal VM"),
    (&["version"], "", "virtseal --version"),
];

/// How that is done here which the wrong word says in another program.
pub(super) fn otherwise(group: &str, word: &str) -> Option<String> {
    let (words, _, here) = OTHER_WORDS
        .iter()
        .find(|(words, of, _)| *of == group && words.contains(&word))?;
    let verb = words.iter().find(|verb| **verb == word)?;
    Some(match *here {
        "virsh" => format!("as of any other VM: virsh {verb}"),
        here => format!("here that is: {here}"),
    })
}
