//! That each advice is a command that there is, and one that its kind of provider has.
//!
//! Every case of `Advice` stands here once, as a test of the sources makes sure; what its text tells to run is parsed as this program
//! would parse it.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::Parser;
use clap::error::ErrorKind;

use super::provider::ProviderCommand;
use super::provider_add::AddCommand;
use super::{Cli, Command};
use crate::model::advice::Advice;
use crate::model::cache_policy::CachePolicy;
use crate::model::envelope::{KekId, ProviderId};
use crate::model::job::SnapshotAct;
use crate::provider::kind::{KINDS, KeysAt, Kind, TrustBy};
use crate::provider::{PinRefusal, ProviderError};

/// Each case with whatever it holds. Those in two texts stand here twice.
pub(super) fn every_advice() -> Vec<Advice> {
    use Advice as A;
    let name = || "main".to_owned();
    let vm = || "web01".to_owned();
    let path = || PathBuf::from("/images/a b.qcow2");
    let id = ProviderId::random();
    vec![
        A::Words("restore it".into()),
        A::ShowStatus.then(A::ListJobs),
        A::ShowStatus,
        A::ListJobs,
        A::VerifyAudit,
        A::ReloadLibvirtd("libvirtd.service"),
        A::RestoreSaved,
        A::ShowLibvirtd,
        A::WatchJob(1),
        A::AbortJob(1),
        A::AbortTheJob,
        A::ResumeJob(1),
        A::BackUpState,
        A::RestoreState,
        A::RestoreStateOver {
            host: "host".into(),
            from: path(),
        },
        A::Journal,
        A::StartDaemon,
        A::StartAll,
        A::StopAll,
        A::RestartDaemon,
        A::ReloadDaemon,
        A::StartAnew,
        A::CheckSettings,
        A::ShowDaemon,
        A::StartAnew,
        A::CheckSettings,
        A::RestartLibvirtd,
        A::Upgrade,
        A::RunAsRoot,
        A::ListProviders,
        A::AddNative,
        A::AddProviderHelp(None),
        A::AddProviderHelp(Some("kmip")),
        A::AddProviderHelp(Some("pkcs11")),
        A::AddProviderHelp(Some("transit")),
        A::ShowProvider(name()),
        A::SetUntried(name()),
        A::UnlockProvider(name()),
        A::UnlockByTpm(name()),
        A::UnlockByFile(name()),
        A::UnlockByPin(name()),
        A::LockProvider(name()),
        A::BackUpProvider(name()),
        A::RestoreProvider(name()),
        A::RestoreProviderFrom(name(), path()),
        A::AddAgain {
            kind: "kmip".into(),
            name: name(),
            id,
        },
        A::AddAgain {
            kind: "transit".into(),
            name: name(),
            id,
        },
        A::AddAgain {
            kind: "pkcs11".into(),
            name: name(),
            id,
        },
        A::BringBack { name: name(), id },
        A::RotateProvider(name()),
        A::MoveProvider {
            from: name(),
            to: "other".into(),
        },
        A::MakeDefault(name()),
        A::DeleteProvider(name()),
        A::ForceDelete(name()),
        A::AddRecipient(name()),
        A::RemoveRecipient(name()),
        A::ListOrphans,
        A::CacheInMemory(name()),
        A::CacheOnDisk {
            name: name(),
            policy: CachePolicy::default(),
            options: "--persist-for 72h --pcrs 7".into(),
        },
        A::EnrollTpm {
            name: name(),
            options: "".into(),
        },
        A::EnrollTpm {
            name: name(),
            options: "--pcrs 7,11 --pcr-public-key FILE".into(),
        },
        A::TrustProvider(name()),
        A::TrustCa(name()),
        A::SetIdentity(name()),
        A::EncryptIdentity(name()),
        A::BindIdentity(name()),
        A::RequestCertificate(name()),
        A::RequestNewCertificate(name()),
        A::TrustSigner(name()),
        A::OtherCertificate(name()),
        A::LogInByCertificate(name()),
        A::TransitTrust(name()),
        A::NewPin(name()),
        A::LogInElsewhere(name()),
        A::UnsealServer,
        A::RestoreKek(name()),
        A::SealVm(vm()),
        A::PlanSeal(vm()),
        A::SealReplacing {
            vm: vm(),
            objects: vec!["nvram".into(), "vda".into()],
        },
        A::SealDeclared {
            vm: vm(),
            disk: "vda".into(),
        },
        A::UnsealVm(vm()),
        A::AdoptVm(vm()),
        A::AdoptFormat1(vm()),
        A::AdoptFrom(path()),
        A::ShowVm(vm()),
        A::ShowVms,
        A::RekeyVm(vm()),
        A::ForgetVm(vm()),
        A::Autostart(vm()),
        A::ShredVm(vm()),
        A::ShredAsTyped(vm()),
        A::CommitSnapshot(vm()),
        A::DeleteSnapshot {
            vm: vm(),
            typed: false,
        },
        A::DeleteSnapshot {
            vm: vm(),
            typed: true,
        },
        A::ForceSnapshot {
            vm: vm(),
            act: SnapshotAct::Commit,
        },
        A::ForceSnapshot {
            vm: vm(),
            act: SnapshotAct::Delete,
        },
        A::ResetNvram {
            vm: vm(),
            typed: false,
        },
        A::ResetNvram {
            vm: vm(),
            typed: true,
        },
        A::RestoreEnvelope(vm()),
        A::ShowVolume(path()),
        A::ForgetVolume("/images/a b.qcow2".into()),
        A::ForceForgetVolume("/images/a b.qcow2".into()),
        A::AdoptVolume(path()),
        A::CheckVolume(path()),
        A::ResizeVolume {
            path: path(),
            size: 1 << 30,
        },
        A::ShrinkVolume {
            path: path(),
            size: 1 << 30,
        },
        A::CreateVolume {
            path: path(),
            vm: vm(),
        },
        A::CreateVolumeFrom {
            path: path(),
            from: path(),
            vm: vm(),
        },
        A::ShareVolume {
            path: path(),
            vm: vm(),
        },
        A::ListDomains,
        A::EditXml(vm()),
        A::DefineXml,
        A::DefineSealedXml(None),
        A::DefineSealedXml(Some(vm())),
        A::StartVm(vm()),
        A::ShutDownVm(vm()),
        A::ResumeVm(vm()),
        A::UndefineVm(vm()),
        A::RenameVm(vm()),
        A::AutostartByLibvirt(vm()),
        A::DropSavedState(vm()),
        A::DetachDisk {
            vm: vm(),
            disk: "vda".into(),
        },
        A::ListSnapshots(vm()),
        A::ForgetSnapshot {
            vm: vm(),
            snapshot: "before".into(),
        },
        A::StartPool("images".into()),
        A::RefreshPool("images".into()),
        A::AbortBlockJob {
            vm: vm(),
            disk: "vda".into(),
        },
        A::AbortDomainJob(vm()),
    ]
}

/// What `text` tells to run of this program. A command ends with the text, or at a comma, a semicolon or a parenthesis.
fn commands(text: &str) -> Vec<String> {
    let starts = text.match_indices("virtseal ").map(|(at, _)| at);
    let is_word = |at: &usize| *at == 0 || text[..*at].ends_with([' ', '(']);
    let end = |at: usize| {
        let ends = [", ", "; ", ")", " (", ": "];
        let found = ends.iter().filter_map(|end| text[at..].find(end)).min();
        found.map_or(text.len(), |length| at + length)
    };
    // Prose says "upgrade virtseal".
    let all = starts
        .filter(is_word)
        .map(|at| text[at..end(at)].trim().to_owned());
    all.collect()
}

/// As a shell would split it, with something in the place of each placeholder.
fn words(command: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut is_word) = (Vec::new(), String::new(), false, false);
    for c in command.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                is_word = true;
            }
            ' ' if !quoted => {
                words.extend(is_word.then(|| std::mem::take(&mut word)));
                is_word = false;
            }
            c => {
                word.push(c);
                is_word = true;
            }
        }
    }
    words.extend(is_word.then_some(word));
    words.iter().map(|word| filled(word)).collect()
}

/// Something in the place of a placeholder.
pub(super) fn filled(word: &str) -> String {
    match word {
        "SIZE" => "1G",
        "POLICY" => "24h",
        "LIST" => "7",
        "ID" => "1",
        _ => word,
    }
    .to_owned()
}

fn parsed(command: &str) -> Option<Cli> {
    let mut words = words(command);
    // "…" stands for options that only the admin knows.
    let is_cut = words.last().is_some_and(|last| last == "…");
    words.retain(|word| word != "…");
    match Cli::try_parse_from(&words) {
        Ok(cli) => Some(cli),
        Err(error) => {
            let is_fine = match error.kind() {
                ErrorKind::MissingRequiredArgument => is_cut,
                kind => kind == ErrorKind::DisplayHelp,
            };
            assert!(is_fine, "{command}: {error}");
            None
        }
    }
}

/// Of every kind where the kind is left open.
fn of_any_kind(command: String) -> Vec<String> {
    match command.contains(" KIND ") {
        false => vec![command],
        true => ["native", "kmip", "pkcs11", "transit"]
            .iter()
            .map(|kind| command.replace(" KIND ", &format!(" {kind} ")))
            .filter(|command| !(command.contains("add native") && command.contains("--id")))
            .collect(),
    }
}

/// The names of the cases of an enum, as its source has them.
pub(super) fn cases(source: &str, of: &str) -> BTreeSet<String> {
    let (_, cases) = source.split_once(&format!("pub(crate) enum {of} {{")).unwrap();
    let (cases, _) = cases.split_once("\n}").unwrap();
    let is_case = |line: &&str| {
        let indented = line.strip_prefix("    ");
        indented.is_some_and(|case| case.starts_with(|c: char| c.is_ascii_uppercase()))
    };
    cases
        .lines()
        .filter(is_case)
        .map(|line| name_of(line.trim()))
        .collect()
}

/// What a text begins with.
pub(super) fn name_of(text: &str) -> String {
    text.chars().take_while(char::is_ascii_alphanumeric).collect()
}

#[test]
fn every_case_is_tried() {
    let (advice, errors) = (
        include_str!("../model/advice.rs"),
        include_str!("../provider/error.rs"),
    );
    let refusals = every_refusal();
    let pins = refusals.iter().filter_map(|refusal| match refusal {
        ProviderError::WrongPin(pin) => Some(format!("{pin:?}")),
        _ => None,
    });
    for (there, tried) in [
        (
            cases(advice, "Advice"),
            every_advice()
                .iter()
                .map(|advice| name_of(&format!("{advice:?}")))
                .collect::<BTreeSet<_>>(),
        ),
        (
            cases(errors, "ProviderError"),
            refusals
                .iter()
                .map(|refusal| name_of(&format!("{refusal:?}")))
                .collect(),
        ),
        (cases(errors, "PinRefusal"), pins.collect()),
    ] {
        assert!(there.len() > 7, "{there:?}");
        let forgotten: Vec<_> = there.difference(&tried).collect();
        assert!(forgotten.is_empty(), "this test has no example of {forgotten:?}");
    }
}

#[test]
pub(super) fn every_advice_is_a_command_that_there_is() {
    let mut seen = 0;
    for advice in every_advice() {
        for command in commands(&advice.to_string()).into_iter().flat_map(of_any_kind) {
            parsed(&command);
            seen += 1;
        }
    }
    assert!(seen > 60, "only {seen} commands were found");
}

/// Whether a provider of this kind has this command.
fn has(kind: &Kind, command: &ProviderCommand) -> bool {
    match command {
        ProviderCommand::Trust(_) | ProviderCommand::Identity(_) | ProviderCommand::Csr(_) => {
            kind.trust == TrustBy::Command
        }
        ProviderCommand::Backup(_) | ProviderCommand::Restore(_) => kind.keys == KeysAt::Host,
        ProviderCommand::Tpm(_) | ProviderCommand::Unlock { tpm: true, .. } => true,
        ProviderCommand::Cache(_) => kind.nothing_to_cache.is_none(),
        ProviderCommand::Add(add) => {
            kind.name
                == match add {
                    AddCommand::Native { .. } => "native",
                    AddCommand::Transit(_) => "transit",
                    AddCommand::Pkcs11(_) => "pkcs11",
                    AddCommand::Kmip(_) => "kmip",
                }
        }
        ProviderCommand::List
        | ProviderCommand::Show { .. }
        | ProviderCommand::Set(_)
        | ProviderCommand::Default { .. }
        | ProviderCommand::Unlock { .. }
        | ProviderCommand::Lock { .. }
        | ProviderCommand::Rotate { .. }
        | ProviderCommand::Rekey { .. }
        | ProviderCommand::Move { .. }
        | ProviderCommand::Recipients(_)
        | ProviderCommand::Delete { .. }
        | ProviderCommand::Orphans => true,
    }
}

/// Whatever a provider can refuse, and whoever does.
fn every_refusal() -> Vec<ProviderError> {
    use ProviderError as E;
    let text = || "x".to_owned();
    let kek = || KekId("7".into());
    let mut all = vec![
        E::Locked,
        E::LockedBecause(text()),
        E::LockedByPin,
        E::IdentityDamaged(text()),
        E::NotBackedUp,
        E::WrongCredential,
        E::UnknownKek(kek()),
        E::Tampered,
        E::UnknownMechanism(text()),
        E::Unreachable(text()),
        E::NotTrusted(text()),
        E::NotSignedByOurs(text()),
        E::ServerSealed,
        E::CredentialRefused(text()),
        E::Trouble(text()),
        E::BesideTheQuestion(text()),
        E::RefusesUs(text()),
        E::TurnedAway(text()),
        E::CertificateRefused(text()),
        E::CertificateWanted(text()),
        E::KekUnusable {
            kek: kek(),
            why: text(),
        },
        E::Refused(text()),
        E::Unusable(text()),
        E::Payload(crate::model::envelope::EnvelopeError::StanzaCount { found: 0 }),
        E::internal("x")("y"),
    ];
    for refusal in [
        PinRefusal::Wrong,
        PinRefusal::FewTries,
        PinRefusal::LastTry,
        PinRefusal::NotTheLastTry,
        PinRefusal::Blocked,
        PinRefusal::NoneIsSet,
        PinRefusal::KnownToBeWrong,
        PinRefusal::UnlockedByAnother,
    ] {
        all.push(E::WrongPin(refusal));
    }
    all
}

#[test]
fn what_a_refusal_advises_is_of_its_kind() {
    let mut seen = 0;
    for kind in KINDS {
        for refusal in every_refusal() {
            let Some(advice) = refusal.advice("main", Some(kind)).1 else {
                continue;
            };
            for command in commands(&advice.to_string()) {
                if let Some(Command::Provider(provider)) = parsed(&command).map(|cli| cli.command) {
                    assert!(has(kind, &provider), "{}: {refusal:?}: {command}", kind.name);
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 60, "only {seen} commands were found");
}
