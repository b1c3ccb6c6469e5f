//! What the help of a command shows beside its options: examples, and options of one purpose under one heading.

use clap::{Arg, Command};

/// The words of a command after `virtseal`, and lines to type.
const EXAMPLES: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "virtseal provider add native main",
            "virtseal provider backup main -o /mnt/usb/main.age",
            "virtseal vm seal web01",
            "virtseal status",
        ],
    ),
    ("status", &["virtseal status -o wide"]),
    (
        "provider add native",
        &[
            "virtseal provider add native main",
            "virtseal provider add native main --passphrase-file /run/keys/main",
        ],
    ),
    (
        "provider add transit",
        &[
            "virtseal provider add transit vault --address https://vault.example:8200 --auth approle --role-id ROLE",
            "virtseal provider add transit bao --address https://bao.example:8200 --ca /etc/ssl/bao-ca.pem",
        ],
    ),
    (
        "provider add pkcs11",
        &["virtseal provider add pkcs11 hsm --module /usr/lib/softhsm/libsofthsm2.so --token-label vms"],
    ),
    (
        "provider add kmip",
        &[
            "virtseal provider add kmip kms --endpoint kms1.example --endpoint kms2.example:5697",
            "virtseal provider add kmip kms --endpoint kms1.example --mode server",
        ],
    ),
    ("provider list", &["virtseal provider list --json"]),
    ("provider show", &["virtseal provider show main"]),
    ("provider default", &["virtseal provider default kms"]),
    ("provider lock", &["virtseal provider lock main"]),
    ("provider orphans", &["virtseal provider orphans"]),
    (
        "provider set",
        &[
            "virtseal provider set kms endpoints=kms1.example,kms3.example timeout_ms=3000",
            "virtseal provider set kms description='racks 1 to 4' default=yes",
            "virtseal provider set vault auth=cert cert_role=hosts --passphrase-file host.pem",
            "virtseal provider set main tpm=4,7",
        ],
    ),
    (
        "provider cache",
        &[
            "virtseal provider cache kms 4h",
            "virtseal provider cache kms 24h --persist tpm --persist-for 72h",
        ],
    ),
    (
        "provider unlock",
        &[
            "virtseal provider unlock main",
            "virtseal provider unlock main --passphrase-file /run/keys/main",
            "virtseal provider unlock main --tpm",
        ],
    ),
    (
        "provider tpm",
        &[
            "virtseal provider tpm main --enroll",
            "virtseal provider tpm main --enroll --pcrs 4,7 --pin",
            "virtseal provider tpm hsm --enroll --credential-file /run/keys/pin",
            "virtseal provider tpm main --remove",
        ],
    ),
    (
        "provider identity",
        &[
            "virtseal provider identity kms --cert host.pem --key host.key",
            "virtseal provider identity kms --cert host.pem --key host.key --encrypt tpm",
        ],
    ),
    (
        "provider csr",
        &["virtseal provider csr kms --common-name host1 --new -o host1.csr"],
    ),
    (
        "provider trust",
        &[
            "virtseal provider trust kms",
            "virtseal provider trust kms --ca kms-ca.pem --yes",
        ],
    ),
    (
        "provider backup",
        &["virtseal provider backup main -o /mnt/usb/main.age"],
    ),
    (
        "provider restore",
        &["virtseal provider restore main -i /mnt/usb/main.age"],
    ),
    ("provider rotate", &["virtseal provider rotate main --watch"]),
    ("provider rekey", &["virtseal provider rekey --watch"]),
    (
        "provider move",
        &[
            "virtseal provider move main kms --watch",
            "virtseal provider move main kms --vm web01",
        ],
    ),
    (
        "provider recipients add",
        &["virtseal provider recipients add spare --watch"],
    ),
    (
        "provider recipients remove",
        &["virtseal provider recipients remove spare"],
    ),
    (
        "provider delete",
        &[
            "virtseal provider delete old",
            "virtseal provider delete old --force",
        ],
    ),
    (
        "volume create",
        &[
            "virtseal volume create /var/lib/libvirt/images/web01.qcow2 --size 20G --vm web01",
            "virtseal volume create web01.qcow2 --from debian-13.qcow2 --sums SHA512SUMS --size 20G --vm web01",
        ],
    ),
    (
        "volume share",
        &[
            "virtseal volume share /var/lib/libvirt/images/shared.qcow2 --with web02",
            "virtseal volume share /var/lib/libvirt/images/shared.qcow2 --without web02",
        ],
    ),
    (
        "volume forget",
        &["virtseal volume forget /var/lib/libvirt/images/deleted.qcow2"],
    ),
    (
        "volume adopt",
        &["virtseal volume adopt /var/lib/libvirt/images/web01.qcow2"],
    ),
    (
        "volume check",
        &["virtseal volume check /var/lib/libvirt/images/web01.qcow2"],
    ),
    (
        "volume info",
        &["virtseal volume info /var/lib/libvirt/images/web01.qcow2"],
    ),
    (
        "volume resize",
        &[
            "virtseal volume resize /var/lib/libvirt/images/web01.qcow2 40G",
            "virtseal volume resize --shrink /var/lib/libvirt/images/web01.qcow2 10G",
        ],
    ),
    (
        "vm seal",
        &[
            "virtseal vm seal web01 --dry-run",
            "virtseal vm seal web01",
            "virtseal vm seal web01 --provider kms",
            "virtseal vm seal web01 --replace nvram",
        ],
    ),
    (
        "vm unseal",
        &["virtseal vm unseal web01 --dry-run", "virtseal vm unseal web01"],
    ),
    ("vm rekey", &["virtseal vm rekey web01 --watch"]),
    ("vm shred", &["virtseal vm shred web01"]),
    (
        "vm snapshot commit",
        &[
            "virtseal vm snapshot commit web01 --dry-run",
            "virtseal vm snapshot commit web01",
        ],
    ),
    (
        "vm snapshot delete",
        &[
            "virtseal vm snapshot delete web01 --dry-run",
            "virtseal vm snapshot delete web01",
        ],
    ),
    (
        "vm nvram reset",
        &[
            "virtseal vm nvram reset web01 --dry-run",
            "virtseal vm nvram reset web01",
        ],
    ),
    (
        "vm adopt",
        &[
            "virtseal vm adopt web01",
            "virtseal vm adopt --from /var/lib/virtseal/forgotten/2026-11-29T15-25-52Z.json",
        ],
    ),
    ("vm forget", &["virtseal vm forget web01"]),
    (
        "vm autostart",
        &[
            "virtseal vm autostart web01",
            "virtseal vm autostart web01 --disable",
        ],
    ),
    ("vm status", &["virtseal vm status web01 -o wide"]),
    ("jobs", &["virtseal jobs", "virtseal jobs watch"]),
    ("jobs list", &["virtseal jobs list --json"]),
    ("jobs watch", &["virtseal jobs watch", "virtseal jobs watch 7"]),
    ("jobs abort", &["virtseal jobs abort 7"]),
    ("jobs resume", &["virtseal jobs resume 7 --watch"]),
    ("state backup", &["virtseal state backup -o /mnt/usb/host1.age"]),
    ("state restore", &["virtseal state restore -i /mnt/usb/host1.age"]),
    ("audit show", &["virtseal audit show -n 100"]),
    ("audit verify", &["virtseal audit verify"]),
];

/// `command`, which is `virtseal` with all below it, with examples and headings.
pub(super) fn add_to(command: Command) -> Command {
    below(command, "")
}

fn below(command: Command, path: &str) -> Command {
    let found = EXAMPLES.iter().find(|(of, _)| *of == path);
    let command = match found {
        Some((_, lines)) => command.after_help(format!("Examples:\n  {}", lines.join("\n  "))),
        None => command,
    };
    let deeper = |sub: Command| {
        let path = format!("{path} {}", sub.get_name());
        below(sub, path.trim_start())
    };
    command.mut_args(under_heading).mut_subcommands(deeper)
}

fn under_heading(option: Arg) -> Arg {
    let heading = match option.get_id().as_str() {
        "socket" | "json" | "timeout" => "Options of every command",
        "passphrase_file" | "passphrase_fd" | "passphrase_credential" => "Passphrase, instead of a prompt",
        "no_backup_passphrase" | "backup_passphrase_file" | "backup_passphrase_fd" => {
            "Passphrase of the backup, instead of a prompt"
        }
        "sha256" | "sums" | "keyring" => "What the image of --from must be",
        "auth" | "role_id" | "cert_role" | "auth_mount" => "Login",
        "yes_delete" | "yes_forget" | "yes_shrink" | "yes_shred" | "yes_destroy_keks" | "yes_reset"
        | "yes_replace" | "yes_commit" => "For scripts, instead of a question",
        _ => return option,
    };
    option.help_heading(heading)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Cli, commands};
    use super::*;

    #[test]
    fn every_example_is_one_of_its_command() {
        for (path, lines) in EXAMPLES {
            for line in *lines {
                assert!(line.starts_with(format!("virtseal {path}").trim_end()), "{line}");
                let words = line.replace("'racks 1 to 4'", "racks");
                if let Err(error) = Cli::try_parse_from(words.split(' ')) {
                    panic!("{line}: {error}");
                }
            }
        }
    }

    #[test]
    fn each_command_has_an_example() {
        let mut left = vec![(String::new(), commands())];
        while let Some((path, command)) = left.pop() {
            if !command.has_subcommands() {
                assert!(EXAMPLES.iter().any(|(of, _)| *of == path), "{path}");
            }
            let deeper = command.get_subcommands().filter(|sub| sub.get_name() != "help");
            left.extend(deeper.map(|sub| {
                let path = format!("{path} {}", sub.get_name());
                (path.trim_start().to_owned(), sub.clone())
            }));
        }
    }

    #[test]
    fn help_fits_the_terminal_and_has_both() {
        let mut program = commands().term_width(72);
        let create = program.find_subcommand_mut("volume").unwrap();
        let create = create.find_subcommand_mut("create").unwrap();
        let help = create.clone().term_width(72).render_long_help().to_string();
        let wide: Vec<_> = help
            .split("Examples:")
            .next()
            .unwrap()
            .lines()
            .filter(|line| line.len() > 72)
            .collect();
        assert!(wide.is_empty(), "{wide:?}");
        for part in [
            "What the image of --from must be:",
            "Examples:\n  virtseal volume create",
        ] {
            assert!(help.contains(part), "{part}: {help}");
        }
    }
}
