//! The command that an [`Advice`] stands for. Only this file names commands of virtseal, and those of virsh and systemctl that
//! lead out of a problem.

use std::fmt::{self, Display, Formatter};

use crate::model::advice::{Advice, Link};
use crate::model::job::SnapshotAct;
use crate::terminal::{quoted, word};

impl Display for Advice {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Words(words) => f.write_str(words),
            Self::Joined(first, link, second) => write!(f, "{first}{link}{second}"),

            Self::ShowStatus => f.write_str("virtseal status"),
            Self::VerifyAudit => f.write_str("virtseal audit verify"),
            Self::ListJobs => f.write_str("virtseal jobs"),
            Self::WatchJob(id) => write!(f, "virtseal jobs watch {id}"),
            Self::AbortJob(id) => write!(f, "virtseal jobs abort {id}"),
            Self::ResumeJob(id) => write!(f, "virtseal jobs resume {id}"),
            Self::AbortTheJob => f.write_str("virtseal jobs abort"),
            Self::BackUpState => f.write_str("virtseal state backup -o FILE"),
            Self::RestoreState => f.write_str("virtseal state restore -i FILE"),
            Self::RestoreStateOver { host, from } => write!(
                f,
                "virtseal state restore --yes-replace={} -i {}",
                quoted(host),
                quoted(from.display())
            ),
            Self::Journal => f.write_str("journalctl -u virtseald"),
            Self::StartDaemon => f.write_str("systemctl start virtseald"),
            Self::StartAll => f.write_str("systemctl start virtseald.socket virtseald"),
            Self::StopAll => f.write_str("systemctl stop virtseald.socket virtseald"),
            Self::RestartDaemon => f.write_str("systemctl restart virtseald"),
            Self::ReloadDaemon => f.write_str("systemctl reload virtseald"),
            Self::ShowDaemon => f.write_str("systemctl status virtseald"),
            Self::StartAnew => f.write_str("systemctl reset-failed virtseald && systemctl start virtseald"),
            Self::CheckSettings => write!(f, "virtseald --check {}", Self::SETTINGS),
            Self::ReloadLibvirtd(name) => write!(f, "systemctl reload {name}"),
            Self::RestartLibvirtd => f.write_str("systemctl restart libvirtd"),
            Self::Upgrade => f.write_str("upgrade virtseal"),
            Self::RunAsRoot => f.write_str("run it as root, with sudo"),

            Self::ListProviders => f.write_str("virtseal provider list"),
            Self::AddNative => f.write_str("virtseal provider add native main"),
            Self::AddProviderHelp(None) => f.write_str("virtseal provider add --help"),
            Self::AddProviderHelp(Some(kind)) => write!(f, "virtseal provider add {kind} --help"),
            Self::ShowProvider(name) => provider(f, "show", name),
            Self::SetUntried(name) => {
                write!(f, "virtseal provider set {} KEY=VALUE --no-probe", word(name))
            }
            Self::UnlockProvider(name) => provider(f, "unlock", name),
            Self::UnlockByTpm(name) => provider(f, "unlock --tpm", name),
            Self::UnlockByFile(name) => provider(f, "unlock --passphrase-file FILE", name),
            Self::UnlockByPin(name) => {
                Self::UnlockByTpm(name.clone()).fmt(f)?;
                f.write_str(", with its PIN, or without --tpm, with its passphrase")
            }
            Self::LockProvider(name) => provider(f, "lock", name),
            Self::BackUpProvider(name) => provider(f, "backup --output FILE", name),
            Self::RestoreProvider(name) => provider(f, "restore --input FILE", name),
            Self::RestoreProviderFrom(name, file) => {
                write!(
                    f,
                    "virtseal provider restore {} -i {}",
                    word(name),
                    quoted(file.display())
                )
            }
            Self::AddAgain { kind, name, id } => {
                write!(f, "virtseal provider add {kind} {} --id {id} …", word(name))
            }
            Self::BringBack { name, id } => write!(
                f,
                "{} (native) or virtseal provider add KIND {} --id {id} … (others)",
                Self::RestoreProvider(name.clone()),
                word(name)
            ),
            Self::RotateProvider(name) => provider(f, "rotate", name),
            Self::MoveProvider { from, to } => {
                write!(f, "virtseal provider move {} {}", word(from), word(to))
            }
            Self::MakeDefault(name) => provider(f, "default", name),
            Self::DeleteProvider(name) => provider(f, "delete", name),
            Self::ForceDelete(name) => provider(f, "delete --force", name),
            Self::AddRecipient(name) => provider(f, "recipients add", name),
            Self::RemoveRecipient(name) => provider(f, "recipients remove", name),
            Self::ListOrphans => f.write_str("virtseal provider orphans"),
            Self::CacheInMemory(name) => {
                write!(
                    f,
                    "virtseal provider cache {} POLICY, without --persist",
                    word(name)
                )
            }
            Self::CacheOnDisk {
                name,
                policy,
                options,
            } => {
                write!(f, "virtseal provider cache {} {policy} --persist tpm", word(name))?;
                match options.as_str() {
                    "" => Ok(()),
                    options => write!(f, " {options}"),
                }
            }
            Self::EnrollTpm { name, options } => {
                write!(f, "virtseal provider tpm {} --enroll", word(name))?;
                match options.as_ref() {
                    "" => Ok(()),
                    options => write!(f, " {options}"),
                }
            }
            Self::TrustProvider(name) => provider(f, "trust", name),
            Self::TrustCa(name) => provider(f, "trust --ca FILE", name),
            Self::SetIdentity(name) => provider(f, "identity --cert FILE", name),
            Self::EncryptIdentity(name) => provider(f, "identity --cert FILE --encrypt", name),
            Self::BindIdentity(name) => provider(f, "identity --cert FILE --encrypt tpm", name),
            Self::RequestCertificate(name) => provider(f, "csr", name),
            Self::RequestNewCertificate(name) => provider(f, "csr --new", name),
            Self::TrustSigner(name) => write!(
                f,
                "put the certificate of who signed the server's into the file of --ca (without one: among the CAs of this \
                 host, update-ca-certificates), then virtseal provider unlock {0}; virtseal provider show {0}, which names the \
                 server",
                word(name)
            ),
            Self::OtherCertificate(name) => write!(
                f,
                "virtseal provider unlock {} --passphrase-file FILE, with a client certificate and key in it that the \
                 server accepts",
                word(name)
            ),
            Self::LogInByCertificate(name) => write!(
                f,
                "let the server ask this host for no client certificate, then virtseal provider show {0}; or log in by \
                 one (virtseal provider set {0} auth=cert --passphrase-file FILE)",
                word(name)
            ),
            Self::TransitTrust(name) => write!(
                f,
                "virtseal provider unlock {} --passphrase-file FILE, for what this host logs in with; the file of --ca for \
                 whom it trusts",
                word(name)
            ),
            Self::NewPin(name) => write!(
                f,
                "let the token's security officer set a new PIN (pkcs11-tool --login --login-type so --init-pin), then \
                 virtseal provider unlock {}",
                word(name)
            ),
            Self::LogInElsewhere(name) => write!(
                f,
                "log in once with the right PIN by another tool (pkcs11-tool --login --list-objects), then virtseal \
                 provider unlock {}",
                word(name)
            ),
            Self::UnsealServer => {
                f.write_str("unseal the server (bao operator unseal, vault operator unseal)")
            }
            Self::RestoreKek(name) => write!(
                f,
                "restore that key at '{name}' from a backup, if there is one; virtseal provider show {}",
                word(name)
            ),

            Self::SealVm(vm) => of_vm(f, "seal", vm),
            Self::SealReplacing { vm, objects } => {
                let objects = objects.join(",");
                write!(f, "virtseal vm seal --replace={} {}", quoted(&objects), word(vm))
            }
            Self::PlanSeal(vm) => of_vm(f, "seal --dry-run", vm),
            Self::SealDeclared { vm, disk } => {
                write!(
                    f,
                    "virtseal vm seal --from-format={}=raw {}",
                    quoted(disk),
                    word(vm)
                )
            }
            Self::UnsealVm(vm) => of_vm(f, "unseal", vm),
            Self::AdoptVm(vm) => of_vm(f, "adopt", vm),
            Self::AdoptFormat1(vm) => of_vm(f, "adopt --format-1", vm),
            Self::AdoptFrom(file) => of_vm(f, "adopt --from", &file.display()),
            Self::ShowVm(vm) => of_vm(f, "status", vm),
            Self::ShowVms => f.write_str("virtseal vm status"),
            Self::RekeyVm(vm) => of_vm(f, "rekey", vm),
            Self::ForgetVm(vm) => of_vm(f, "forget", vm),
            Self::Autostart(vm) => of_vm(f, "autostart", vm),
            Self::ShredVm(vm) => of_vm(f, "shred", vm),
            Self::ShredAsTyped(vm) => {
                write!(f, "virtseal vm shred --yes-shred={} {}", quoted(vm), word(vm))
            }
            Self::CommitSnapshot(vm) => of_vm(f, "snapshot commit", vm),
            Self::DeleteSnapshot { vm, typed: false } => of_vm(f, "snapshot delete", vm),
            Self::DeleteSnapshot { vm, typed: true } => write!(
                f,
                "virtseal vm snapshot delete --yes-delete={} {}",
                quoted(vm),
                word(vm)
            ),
            Self::ForceSnapshot { vm, act } => {
                let verb = match act {
                    SnapshotAct::Commit => "commit",
                    SnapshotAct::Delete => "delete",
                };
                write!(
                    f,
                    "virtseal vm snapshot {verb} --force --yes-{verb}={} {}",
                    quoted(vm),
                    word(vm)
                )
            }
            Self::ResetNvram { vm, typed: false } => of_vm(f, "nvram reset", vm),
            Self::ResetNvram { vm, typed: true } => write!(
                f,
                "virtseal vm nvram reset --yes-reset={} {}",
                quoted(vm),
                word(vm)
            ),
            Self::RestoreEnvelope(vm) => write!(
                f,
                "virtseal vm status {}, then restore the domain XML (virsh define FILE) and the keystore from a backup",
                word(vm)
            ),

            Self::ShowVolume(path) => write!(f, "virtseal volume info {}", word(path.display())),
            Self::ForgetVolume(volume) => write!(f, "virtseal volume forget {}", word(volume)),
            Self::ForceForgetVolume(volume) => write!(f, "virtseal volume forget --force {}", word(volume)),
            Self::CheckVolume(path) => write!(f, "virtseal volume check {}", word(path.display())),
            Self::ResizeVolume { path, size } => {
                write!(f, "virtseal volume resize {} {}", word(path.display()), size)
            }
            Self::ShrinkVolume { path, size } => {
                write!(
                    f,
                    "virtseal volume resize --shrink {} {}",
                    word(path.display()),
                    size
                )
            }
            Self::AdoptVolume(path) => write!(f, "virtseal volume adopt {}", word(path.display())),
            Self::CreateVolume { path, vm } => write!(
                f,
                "virtseal volume create --vm={} --size SIZE {}",
                quoted(vm),
                word(path.display())
            ),
            Self::CreateVolumeFrom { path, from, vm } => {
                write!(
                    f,
                    "virtseal volume create --from={} --vm={} {}",
                    quoted(from.display()),
                    quoted(vm),
                    word(path.display())
                )
            }
            Self::ShareVolume { path, vm } => write!(
                f,
                "virtseal volume share --with={} {}",
                quoted(vm),
                word(path.display())
            ),

            Self::ListDomains => f.write_str("virsh list --all"),
            Self::EditXml(vm) => virsh(f, "edit", vm),
            Self::DefineXml => f.write_str("virsh define FILE"),
            Self::DefineSealedXml(None) => {
                f.write_str("virsh define FILE, where FILE is a dumpxml with its <virtseal:vm> metadata")
            }
            Self::DefineSealedXml(Some(vm)) => write!(
                f,
                "virsh define FILE, where FILE is a dumpxml of {} with its <virtseal:vm> metadata",
                quoted(vm)
            ),
            Self::StartVm(vm) => virsh(f, "start", vm),
            Self::ShutDownVm(vm) => virsh(f, "shutdown", vm),
            Self::ResumeVm(vm) => virsh(f, "resume", vm),
            Self::UndefineVm(vm) => virsh(f, "undefine --keep-nvram --keep-tpm", vm),
            Self::RenameVm(vm) => write!(f, "virsh domrename {} NEW", word(vm)),
            Self::AutostartByLibvirt(vm) => virsh(f, "autostart", vm),
            Self::DropSavedState(vm) => virsh(f, "managedsave-remove", vm),
            Self::DetachDisk { vm, disk } => {
                write!(f, "virsh detach-disk --config {} {}", word(vm), word(disk))
            }
            Self::ListSnapshots(vm) => virsh(f, "snapshot-list", vm),
            Self::ForgetSnapshot { vm, snapshot } => write!(
                f,
                "virsh snapshot-delete --metadata --snapshotname={} {}",
                quoted(snapshot),
                word(vm)
            ),
            Self::StartPool(pool) => virsh(f, "pool-start", pool),
            Self::RefreshPool(pool) => virsh(f, "pool-refresh", pool),
            Self::RestoreSaved => f.write_str("virsh restore FILE"),
            Self::ShowLibvirtd => f.write_str("systemctl status libvirtd virtqemud"),
            Self::AbortBlockJob { vm, disk } => {
                write!(f, "virsh blockjob --abort {} {}", word(vm), word(disk))
            }
            Self::AbortDomainJob(vm) => virsh(f, "domjobabort", vm),
        }
    }
}

fn provider(f: &mut Formatter<'_>, verb: &str, name: &str) -> fmt::Result {
    // Its options come behind the name, as the documentation has them.
    let (verb, options) = verb.split_once(" --").unwrap_or((verb, ""));
    write!(f, "virtseal provider {verb} {}", word(name))?;
    match options {
        "" => Ok(()),
        options => write!(f, " --{options}"),
    }
}

fn of_vm(f: &mut Formatter<'_>, verb: &str, vm: &dyn Display) -> fmt::Result {
    write!(f, "virtseal vm {verb} {}", word(vm))
}

fn virsh(f: &mut Formatter<'_>, verb: &str, vm: &str) -> fmt::Result {
    write!(f, "virsh {verb} {}", word(vm))
}

impl Display for Link {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Then => ", then ",
            Self::Or => ", or ",
            Self::OrElse => "; or ",
            Self::Also => "; ",
            Self::Within => ": ",
            Self::Note => ", ",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_words_of_the_command() {
        let vm = || "-a b".to_owned();
        for (advice, line) in [
            (Advice::SealVm(vm()), "virtseal vm seal -- '-a b'"),
            (
                Advice::ShredAsTyped(vm()),
                "virtseal vm shred --yes-shred='-a b' -- '-a b'",
            ),
            (Advice::EditXml(vm()), "virsh edit -- '-a b'"),
            (
                Advice::UnlockByTpm("main".into()),
                "virtseal provider unlock main --tpm",
            ),
            (
                Advice::ShareVolume {
                    path: "/a b".into(),
                    vm: vm(),
                },
                "virtseal volume share --with='-a b' '/a b'",
            ),
        ] {
            assert_eq!(advice.to_string(), line);
        }
    }

    /// What somebody did, not what to do.
    const NO_ADVICE: [&str; 2] = ["MemoryFile::Save =>", "MemoryFile::Dump =>"];

    fn names_a_command(line: &str) -> bool {
        let code = line.trim_start();
        let verbs = ["provider", "volume", "vm", "status", "jobs", "state", "audit"];
        let of_virtseal = code.split("virtseal ").skip(1).any(|rest| {
            let verb = rest.split(|c: char| !c.is_ascii_lowercase()).next();
            verb.is_some_and(|verb| verbs.contains(&verb))
        });
        let is_command = of_virtseal
            || ["virsh ", "systemctl ", "journalctl "]
                .iter()
                .any(|program| code.contains(program));
        is_command && !code.starts_with("//") && !NO_ADVICE.iter().any(|known| code.starts_with(known))
    }

    /// The name and the code of every other file, without its tests.
    fn sources() -> Vec<(String, String)> {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let (mut open, mut read) = (vec![root.clone()], Vec::new());
        while let Some(directory) = open.pop() {
            for entry in std::fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(&root).unwrap().display().to_string();
                let is_other = [
                    "cli/documented",
                    "cli/examples.rs",
                    "cli/other_words.rs",
                    "bin",
                    "advice.rs",
                ]
                .iter()
                .any(|other| name.starts_with(other));
                if is_other || name.contains("test") || name.contains("fixture") {
                    continue;
                }
                if path.is_dir() {
                    open.push(path);
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
                read.push((name, code.to_owned()));
            }
        }
        assert!(read.len() > 150, "{} files", read.len());
        read
    }

    #[test]
    fn no_other_file_names_a_command() {
        let mut found = Vec::new();
        for (name, code) in sources() {
            let lines = code.lines().zip(1..).filter(|(line, _)| names_a_command(line));
            found.extend(lines.map(|(line, number)| format!("{name}:{number}: {line}")));
        }
        assert!(found.is_empty(), "{}", found.join("\n"));
    }

    /// The arguments of each constructor of a problem, up to its closing parenthesis.
    fn messages(code: &str) -> Vec<&str> {
        let begins = [
            "new",
            "failed",
            "usage",
            "unreachable",
            "denied",
            "not_found",
            "would_lose_key",
            "busy",
            "from_error",
        ];
        let of = |name: &str| {
            let begin = format!("Problem::{name}(");
            let found = code.match_indices(&begin).map(|(at, _)| at + begin.len());
            found.collect::<Vec<_>>()
        };
        let argument = |at: usize| {
            let mut depth = 1_usize;
            let end = code[at..].find(|c: char| {
                match c {
                    '(' => depth += 1,
                    ')' => depth -= 1,
                    _ => {}
                }
                depth == 0
            });
            &code[at..end.map_or(code.len(), |end| at + end)]
        };
        begins.iter().flat_map(|name| of(name)).map(argument).collect()
    }

    #[test]
    fn no_message_holds_what_next_is_for() {
        assert_eq!(
            messages(r#"Problem::busy(format!("{name} ({why})")).next(Advice::ListJobs)"#),
            [r#"format!("{name} ({why})")"#]
        );
        let (mut seen, mut found) = (0, Vec::new());
        for (name, code) in sources() {
            let messages = messages(&code);
            seen += messages.len();
            let with = messages
                .into_iter()
                .filter(|message| message.contains("Advice::"));
            found.extend(with.map(|message| format!("{name}: {message}")));
        }
        assert!(seen > 150, "{seen} messages");
        assert!(found.is_empty(), "{}", found.join("\n"));
    }

    #[test]
    fn steps_are_joined() {
        let advice = Advice::EditXml("web".into())
            .within("remove it")
            .then(Advice::SealVm("web".into()))
            .or_else("leave it");
        assert_eq!(
            advice.to_string(),
            "virsh edit web: remove it, then virtseal vm seal web; or leave it"
        );
    }
}
