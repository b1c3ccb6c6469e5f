//! `virtseal-hook VM OPERATION SUBOPERATION EXTRA < domain.xml`, as libvirt runs it from
//! `/etc/libvirt/hooks/qemu.d/` (<https://libvirt.org/hooks.html>).
//!
//! libvirt holds the VM's lock meanwhile and has no timeout of its own, so everything here ends at one deadline.
//! The rules:
//!
//! - `prepare begin` of a VM with virtseal metadata exits 0 only after the daemon agreed; any doubt refuses it,
//!   with one line on stderr, which libvirt shows to the user.
//! - A VM without that metadata is refused if the [`index`] knows it as sealed, or knows a secret that it names; the
//!   daemon is not asked. Any other passes without a word to anyone, unless `require_sealed` is set.
//! - Every other operation exits 0 whatever happens: a failure there would kill a running guest.
//! - stdout stays empty: on `migrate` and `restore` libvirt takes it for the new domain XML.

#![forbid(unsafe_code)]

mod conf;
mod deadline;
mod evidence;
mod index;
mod journal;
mod runtime_dir;
mod seen;
mod terminal;
mod varlink;
mod vm;
mod watchdog;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use serde_json::{Value, json};

use conf::{Conf, TmpfsPolicy};
use deadline::Deadline;
use evidence::Evidence;
use index::{Id, Index, Owner};
use runtime_dir::RuntimeDir;
use terminal::{one_line, unadvised, word};
use varlink::CallError;
use vm::{Found, Plain, Vm};
use watchdog::{Ended, IfLate, Reins, guarded};

/// What shows why virtseald does not answer, which works without it.
const LOOK: &str = "systemctl status virtseald; journalctl -u virtseald";

fn main() -> ExitCode {
    // A panic's own message would be a second line.
    std::panic::set_hook(Box::new(|_| {}));
    let argument = |index| std::env::args_os().nth(index).unwrap_or_default();
    let name = argument(1).to_string_lossy().into_owned();
    match (argument(2).to_str(), argument(3).to_str()) {
        (Some("prepare"), Some("begin")) => match prepare(&name) {
            Ok(()) => ExitCode::SUCCESS,
            Err(refusal) => {
                let _ = writeln!(std::io::stderr(), "{}", one_line(&refusal));
                ExitCode::FAILURE
            }
        },
        (Some("started"), Some("begin")) => never_fail(|vm, conf, deadline| {
            tell("Started", named(vm), conf, deadline);
        }),
        (Some("release"), Some("end")) => never_fail(|vm, conf, deadline| {
            RuntimeDir::release(vm, conf);
            tell("Released", named(vm), conf, deadline);
        }),
        // Before `prepare`: the vTPM's state comes with the stream, and need not be here.
        (Some("migrate" | "restore"), Some("begin")) => never_fail(|vm, conf, deadline| {
            let mut parameters = named(vm);
            // With what it is: the message counts for this vTPM alone.
            parameters["xml"] = vm.xml.into();
            tell("Arriving", parameters, conf, deadline);
        }),
        // As `daemon.d/virtseal`, of no VM.
        (Some("start"), Some("-")) | (Some("reload"), Some("begin")) if name == "-" => {
            let _ = seen::note();
            ExitCode::SUCCESS
        }
        _ => ExitCode::SUCCESS,
    }
}

/// A notice about a sealed VM ends in time too: libvirt waits for it, with the VM running or gone.
fn never_fail(notice: fn(&Vm, &Conf, &Deadline)) -> ExitCode {
    let deadline = Deadline::started_now().lasting(deadline::NOTICE);
    let _ = guarded(deadline, move |_: &Reins<()>| {
        let _ = catch_unwind(AssertUnwindSafe(|| {
            let conf = Conf::load();
            if let Found::Sealed(vm) = vm::find(&vm::read_stdin(&deadline, |_| {}).xml) {
                notice(&vm, &conf, &deadline);
            }
        }));
    });
    ExitCode::SUCCESS
}

/// The daemon also finds out by itself what it was not told, so a failure is nobody's business here.
fn tell(method: &str, parameters: Value, conf: &Conf, deadline: &Deadline) {
    let _ = varlink::call(&conf.socket, method, parameters, deadline);
}

fn named(vm: &Vm) -> Value {
    json!({ "vm": vm.uuid, "name": vm.name })
}

/// Whether the VM may start; the error is the line for the user.
fn prepare(name: &str) -> Result<(), String> {
    let deadline = Deadline::started_now().lasting(deadline::START);
    let vm = name.to_owned();
    match guarded(deadline, move |reins| judge(&vm, deadline, reins)) {
        Ended::Done(decided) => decided,
        Ended::Late {
            then: IfLate::LetPass,
            ..
        } => Ok(()),
        Ended::Late {
            then: IfLate::Refuse,
            length,
        } => Err(format!(
            "{} stays off: the hook came to no decision within {length:?}. Next: {LOOK}",
            unadvised(name)
        )),
    }
}

fn judge(name: &str, deadline: Deadline, reins: &Reins<Result<(), String>>) -> Result<(), String> {
    let conf = Conf::load();
    let deadline = deadline.lasting(conf.deadline);
    reins.set_length(conf.deadline);
    let index = Index::read(&conf.index);
    // While the XML is not known, it may be that of a sealed VM, or of a thief, if there is anything sealed.
    if !conf.require_sealed && index.is_empty() {
        reins.if_late(IfLate::LetPass);
    }
    let mut evidence = Evidence::against(&index);
    let input = vm::read_stdin(&deadline, |bytes| {
        evidence.feed(bytes);
        if evidence.has_namespace() {
            reins.if_late(IfLate::Refuse);
        }
    });
    evidence.finish();
    let may_be_ours = evidence.may_be_ours() || (!input.whole && !index.is_empty());
    if !may_be_ours && !conf.require_sealed {
        return Ok(());
    }
    reins.if_late(IfLate::Refuse);
    if !input.whole {
        return Err(format!(
            "{} stays off: its XML did not come whole within {:?}. Next: virsh start {}",
            unadvised(name),
            deadline.length(),
            word(name)
        ));
    }
    let decided = catch_unwind(AssertUnwindSafe(|| {
        decide(name, &input.xml, may_be_ours, &index, &conf, &deadline)
    }));
    decided.unwrap_or_else(|_| {
        let name = unadvised(name);
        Err(format!("{name} stays off: the hook failed. Next: {LOOK}"))
    })
}

fn decide(
    name: &str,
    xml: &[u8],
    may_be_ours: bool,
    index: &Index,
    conf: &Conf,
    deadline: &Deadline,
) -> Result<(), String> {
    match vm::find(xml) {
        Found::Sealed(vm) => start(&vm, conf, deadline),
        Found::Unreadable(why) if may_be_ours || conf.require_sealed => {
            let refusal = Refusal {
                why: format!("{} stays off: {why}", unadvised(name)),
                next: Next::Alone(format!("virsh dumpxml --inactive {}", word(name))),
            };
            Err(refusal.report(name, None, conf, deadline))
        }
        Found::Unreadable(_) => Ok(()),
        Found::Unsealed(plain) => {
            let refusal = match claims(name, &plain, index) {
                None if conf.require_sealed => not_sealed(name, &plain, conf),
                None => return Ok(()),
                Some(refusal) => refusal,
            };
            Err(refusal.report(name, plain.uuids.first(), conf, deadline))
        }
    }
}

/// What the hook refuses by what it knows itself.
struct Refusal {
    why: String,
    next: Next,
}

/// What leads out of it.
enum Next {
    /// The reason says it.
    Told,
    /// Works with virtseald down.
    Alone(String),
    /// Needs virtseald.
    ByVirtseald(String),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Virtseald {
    Answers,
    IsDown,
}

impl Refusal {
    /// The line for the user. Lets virtseald note it, if it is there to hear of it; the refusal stands either way.
    fn report(self, name: &str, uuid: Option<&Id>, conf: &Conf, deadline: &Deadline) -> String {
        let line = self.line(Virtseald::Answers);
        let Ok(left) = deadline.left() else {
            return line;
        };
        let deadline = Deadline::started_now().lasting(deadline::REPORT.min(left / 2));
        let parameters = json!({ "vm": uuid.map(Id::dashed), "name": name, "reason": line });
        let heard = varlink::call(&conf.socket, "Refused", parameters, &deadline);
        // An older one knows no such method.
        self.line(match heard {
            Ok(()) | Err(CallError::Refused(_) | CallError::Error(_)) => Virtseald::Answers,
            Err(_) => Virtseald::IsDown,
        })
    }

    fn line(&self, virtseald: Virtseald) -> String {
        let next = match &self.next {
            Next::Told => return self.why.clone(),
            Next::Alone(next) => next.clone(),
            Next::ByVirtseald(next) if virtseald == Virtseald::Answers => next.clone(),
            Next::ByVirtseald(next) => format!("systemctl start virtseald, then {next}"),
        };
        format!("{}. Next: {next}", self.why)
    }
}

fn not_sealed(name: &str, plain: &Plain, conf: &Conf) -> Refusal {
    let (path, shown) = (conf.path.display(), unadvised(name));
    match &conf.problem {
        Some(problem) => Refusal {
            why: format!("{shown} stays off: it is not sealed, and whether it must be is unclear: {problem}"),
            next: Next::Told,
        },
        None if !plain.is_uefi => Refusal {
            why: format!(
                "{shown} stays off: it is not sealed, and can't be as long as it boots by BIOS; {path} has require_sealed = true"
            ),
            next: Next::Alone(format!(
                "virsh edit {}: <os firmware='efi'>, if its guest boots by UEFI too, then virtseal vm seal {}; or run it on a \
                 host without require_sealed",
                word(name),
                word(name)
            )),
        },
        None => Refusal {
            why: format!("{shown} stays off: it is not sealed, and {path} has require_sealed = true"),
            next: Next::ByVirtseald(format!("virtseal vm seal {}", word(name))),
        },
    }
}

/// Why a VM without virtseal's metadata must not start: it is a sealed one whose old XML came back, or it names a secret
/// with which it could open another VM's objects while those are starting.
fn claims(name: &str, plain: &Plain, index: &Index) -> Option<Refusal> {
    let refused = |why: String, next: Next| {
        let why = format!("{} stays off: {why}", unadvised(name));
        Some(Refusal { why, next })
    };
    let seal = || Next::ByVirtseald(format!("virtseal vm seal {}, which takes it back", word(name)));
    if plain.uuids.iter().any(|uuid| index.is_sealed(uuid)) {
        let why =
            "it is sealed, and its domain XML does not say so, as if an older one had been defined again";
        return refused(why.into(), seal());
    }
    for secret in &plain.named {
        match index.owner(secret) {
            Some(Owner::Vm(owner)) if plain.uuids.contains(&owner) => {
                let why = format!(
                    "it names its secret {}, and its domain XML has no metadata of virtseal",
                    secret.dashed()
                );
                return refused(why, seal());
            }
            Some(owner) => {
                let why = format!("it names secret {}, which is {}", secret.dashed(), whose(owner));
                let next = format!("virsh edit {}: a VM has secrets of its own", word(name));
                return refused(why, Next::Alone(next));
            }
            None => {}
        }
    }
    let problem = index.problem().filter(|_| plain.has_secrets)?;
    let why = format!("it names a secret, and it is not known whose: {problem}");
    let next = "systemctl restart virtseald, which writes it anew";
    refused(why, Next::Alone(next.into()))
}

fn whose(owner: Owner) -> String {
    match owner {
        Owner::Vm(vm) => format!("that of sealed VM {}", Id::dashed(&vm)),
        Owner::Unknown => "that of a sealed VM".into(),
    }
}

fn start(vm: &Vm, conf: &Conf, deadline: &Deadline) -> Result<(), String> {
    if let Some(problem) = &conf.problem {
        return Err(format!("{} stays off: {problem}", unadvised(&vm.name)));
    }
    let (mounted, exposed) = match (conf.master_key_tmpfs, RuntimeDir::mount_for(vm, conf)) {
        (TmpfsPolicy::Required, Err(why)) => return Err(no_tmpfs(vm, conf, &why)),
        (_, Err(why)) => (None, Some(why)),
        (_, Ok(mounted)) => (mounted, None),
    };
    let request = request(vm, conf, exposed.as_deref());
    let answer = varlink::call(&conf.socket, "Prepare", request, deadline);
    if let Err(error) = answer {
        if let Some(mounted) = mounted {
            mounted.undo();
        }
        return Err(refusal(vm, conf, deadline, error));
    }
    if let Some(why) = exposed {
        journal::warn(&format!(
            "virtseal: VM {} starts with QEMU's master key on the disk, as {} allows: no tmpfs for it: {why}. \
             Next: virtseal vm status {}",
            unadvised(&vm.name),
            conf.path.display(),
            word(&vm.name)
        ));
    }
    Ok(())
}

/// The policy goes along where it is set: whether anything of the VM is sealed is seen only by who opens it. So does why QEMU's
/// master key comes to be on a disk, for the status.
fn request(vm: &Vm, conf: &Conf, exposed: Option<&str>) -> Value {
    let mut request = json!({ "xml": vm.xml });
    if conf.require_sealed {
        request["require_sealed"] = true.into();
    }
    if let Some(why) = exposed {
        request["master_key_on_disk"] = why.into();
    }
    request
}

fn no_tmpfs(vm: &Vm, conf: &Conf, why: &str) -> String {
    format!(
        "{} stays off: no tmpfs for QEMU's master key: {why}. \
         Next: allow it, or set master_key_tmpfs = preferred in {}",
        unadvised(&vm.name),
        conf.path.display()
    )
}

fn refusal(vm: &Vm, conf: &Conf, deadline: &Deadline, error: CallError) -> String {
    let (socket, name) = (conf.socket.display(), unadvised(&vm.name));
    let (why, next) = match error {
        // What the daemon says before it knows the VM, or without: that time was up, that the XML is no good.
        CallError::Refused(message) if !message.starts_with(&name) => {
            return format!("{name} stays off: {message}");
        }
        CallError::Refused(message) => return message,
        CallError::Connect(error) => (
            format!("virtseald does not listen at {socket} ({error})"),
            "systemctl start virtseald",
        ),
        CallError::Denied => (
            format!("the hook may not open {socket}"),
            "see the SELinux or AppArmor log",
        ),
        CallError::Deadline(stage) => (
            format!("virtseald did not {stage} within {:?}", deadline.length()),
            LOOK,
        ),
        CallError::Closed(detail) => (format!("virtseald hung up before it answered{detail}"), LOOK),
        CallError::Garbage(what) => (
            format!("what answers at {socket} is not virtseald: {what}"),
            "systemctl restart virtseald",
        ),
        CallError::NotRoot(uid) => (
            format!("what listens at {socket} is not root's, but of user id {uid}"),
            "systemctl restart virtseald.socket virtseald",
        ),
        CallError::Error(name) => (format!("virtseald failed: {name}"), LOOK),
    };
    format!("{name} stays off: {why}. Next: {next}")
}
