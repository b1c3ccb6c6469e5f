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
mod runtime_dir;
mod terminal;
mod varlink;
mod vm;
mod watchdog;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use conf::{Conf, TmpfsPolicy};
use deadline::Deadline;
use evidence::Evidence;
use index::{Id, Index, Owner};
use runtime_dir::RuntimeDir;
use terminal::{one_line, word};
use varlink::CallError;
use vm::{Found, Plain, Vm};
use watchdog::{Ended, Reins, guarded};

/// For messages that nothing waits for.
const NOTICE_DEADLINE: Duration = Duration::from_secs(2);
/// For the report of a refusal, which the user waits for.
const REPORT_DEADLINE: Duration = Duration::from_millis(500);
/// While hook.conf is not read yet.
const FIRST_DEADLINE: Duration = Duration::from_secs(10);

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
        (Some("started"), Some("begin")) => never_fail(started),
        (Some("release"), Some("end")) => never_fail(released),
        // Before `prepare`: the vTPM's state comes with the stream, and need not be here.
        (Some("migrate" | "restore"), Some("begin")) => never_fail(arriving),
        _ => ExitCode::SUCCESS,
    }
}

/// A notice ends in time too: libvirt waits for it, with the VM running or gone.
fn never_fail(notice: fn(&Deadline)) -> ExitCode {
    let deadline = Deadline::started_now().lasting(NOTICE_DEADLINE);
    let _ = guarded(deadline, move |_: &Reins<()>| {
        let _ = catch_unwind(AssertUnwindSafe(|| notice(&deadline)));
    });
    ExitCode::SUCCESS
}

/// Whether the VM may start; the error is the line for the user.
fn prepare(name: &str) -> Result<(), String> {
    let deadline = Deadline::started_now().lasting(FIRST_DEADLINE);
    let vm = name.to_owned();
    match guarded(deadline, move |reins| judge(&vm, deadline, reins)) {
        Ended::Done(decided) => decided,
        Ended::Late { refuse: false, .. } => Ok(()),
        Ended::Late { refuse: true, length } => Err(format!(
            "virtseal: VM {name} is refused: the hook came to no decision within {length:?}. Next: virtseal status"
        )),
    }
}

fn judge(name: &str, deadline: Deadline, reins: &Reins<Result<(), String>>) -> Result<(), String> {
    let conf = Conf::load();
    let deadline = deadline.lasting(conf.deadline);
    reins.set_length(conf.deadline);
    let index = Index::read(&conf.index);
    // While the XML is not known, it may be that of a sealed VM, or of a thief, if there is anything sealed.
    reins.refuse_if_late(conf.require_sealed || !index.is_empty());
    let mut evidence = Evidence::against(&index);
    let input = vm::read_stdin(&deadline, |bytes| {
        evidence.feed(bytes);
        if evidence.has_namespace() {
            reins.refuse_if_late(true);
        }
    });
    evidence.finish();
    let may_be_ours = evidence.may_be_ours() || (!input.whole && !index.is_empty());
    if !may_be_ours && !conf.require_sealed {
        return Ok(());
    }
    reins.refuse_if_late(true);
    if !input.whole {
        return Err(format!(
            "virtseal: VM {name} is refused: its XML did not come whole within {:?}. Next: virsh start {}",
            deadline.length(),
            word(name)
        ));
    }
    let decided = catch_unwind(AssertUnwindSafe(|| {
        decide(name, &input.xml, may_be_ours, &index, &conf, &deadline)
    }));
    decided.unwrap_or_else(|_| {
        Err(format!(
            "virtseal: VM {name} is refused: the hook failed. Next: virtseal status"
        ))
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
            let refusal = format!(
                "virtseal: VM {name} is refused: {why}. Next: virsh dumpxml --inactive {}",
                word(name)
            );
            Err(report(name, None, refusal, conf, deadline))
        }
        Found::Unreadable(_) => Ok(()),
        Found::Unsealed(plain) => {
            let refusal = match claims(name, &plain, index) {
                None if conf.require_sealed => not_sealed(name, conf),
                None => return Ok(()),
                Some(refusal) => refusal,
            };
            Err(report(name, plain.uuids.first(), refusal, conf, deadline))
        }
    }
}

/// Lets virtseald note what was refused without it, if it is there to hear of it. The refusal stands either way.
fn report(name: &str, uuid: Option<&Id>, refusal: String, conf: &Conf, deadline: &Deadline) -> String {
    if let Ok(left) = deadline.left() {
        let deadline = Deadline::started_now().lasting(REPORT_DEADLINE.min(left / 2));
        let parameters = json!({ "vm": uuid.map(Id::dashed), "name": name, "reason": refusal });
        let _ = varlink::call(
            &conf.socket,
            "io.virtseal.Lifecycle.Refused",
            &parameters,
            &deadline,
        );
    }
    refusal
}

fn not_sealed(name: &str, conf: &Conf) -> String {
    match &conf.problem {
        Some(problem) => {
            format!("virtseal: VM {name} is not sealed, and whether it must be is unclear: {problem}")
        }
        None => format!(
            "virtseal: VM {name} is not sealed, and {} has require_sealed = true. Next: virtseal vm seal {}",
            conf.path.display(),
            word(name)
        ),
    }
}

/// Why a VM without virtseal's metadata must not start: it is a sealed one whose old XML came back, or it names a secret
/// with which it could open another VM's objects while those are starting.
fn claims(name: &str, plain: &Plain, index: &Index) -> Option<String> {
    let refused =
        |why: String, next: String| Some(format!("virtseal: VM {name} is refused: {why}. Next: {next}"));
    let seal = format!("virtseal vm seal {}, which takes it back", word(name));
    if plain.uuids.iter().any(|uuid| index.is_sealed(uuid)) {
        let why =
            "it is sealed, and its domain XML does not say so, as if an older one had been defined again";
        return refused(why.into(), seal);
    }
    for secret in &plain.named {
        match index.owner(secret) {
            Some(Owner::Vm(owner)) if plain.uuids.contains(&owner) => {
                let why = format!(
                    "it names its secret {}, and its domain XML has no metadata of virtseal",
                    secret.dashed()
                );
                return refused(why, seal);
            }
            Some(owner) => {
                let why = format!("it names secret {}, which is {}", secret.dashed(), whose(owner));
                let next = format!("virsh edit {}: a VM has secrets of its own", word(name));
                return refused(why, next);
            }
            None => {}
        }
    }
    let problem = index.problem().filter(|_| plain.has_secrets)?;
    let why = format!("it names a secret, and whose that is can't be told: {problem}");
    refused(why, "systemctl restart virtseald, which writes it anew".into())
}

fn whose(owner: Owner) -> String {
    match owner {
        Owner::Vm(vm) => format!("that of sealed VM {}", Id::dashed(&vm)),
        Owner::Unknown => "that of a sealed VM".into(),
    }
}

fn start(vm: &Vm, conf: &Conf, deadline: &Deadline) -> Result<(), String> {
    if let Some(problem) = &conf.problem {
        return Err(format!(
            "virtseal: VM {} is sealed and can't start: {problem}",
            vm.name
        ));
    }
    let mounted = match (conf.master_key_tmpfs, RuntimeDir::mount_for(vm, conf)) {
        (TmpfsPolicy::Required, Err(why)) => return Err(no_tmpfs(vm, conf, &why)),
        (_, Err(_)) => None,
        (_, Ok(mounted)) => mounted,
    };
    let answer = varlink::call(
        &conf.socket,
        "io.virtseal.Lifecycle.Prepare",
        &request(vm, conf),
        deadline,
    );
    answer.map_err(|error| {
        if let Some(mounted) = mounted {
            mounted.undo();
        }
        refusal(vm, conf, deadline, error)
    })
}

/// The policy goes along where it is set: whether anything of the VM is sealed is seen only by who opens it.
fn request(vm: &Vm, conf: &Conf) -> Value {
    if conf.require_sealed {
        json!({ "xml": vm.xml, "require_sealed": true })
    } else {
        json!({ "xml": vm.xml })
    }
}

fn no_tmpfs(vm: &Vm, conf: &Conf, why: &str) -> String {
    format!(
        "virtseal: VM {} is sealed and can't start: no tmpfs for QEMU's master key: {why}. \
         Next: allow it, or set master_key_tmpfs = preferred in {}",
        vm.name,
        conf.path.display()
    )
}

fn refusal(vm: &Vm, conf: &Conf, deadline: &Deadline, error: CallError) -> String {
    let socket = conf.socket.display();
    let (why, next) = match error {
        // What the daemon says before it knows the VM, or without: that time was up, that the XML is no good.
        CallError::Refused(message) if !message.starts_with(&vm.name) => {
            return format!("{} stays off: {message}", vm.name);
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
            "virtseal status",
        ),
        CallError::Closed(detail) => (
            format!("virtseald hung up before it answered{detail}"),
            "systemctl status virtseald",
        ),
        CallError::Garbage(what) => (
            format!("what answers at {socket} is not virtseald: {what}"),
            "systemctl restart virtseald",
        ),
        CallError::NotRoot(uid) => (
            format!("what listens at {socket} is not root's, but of user id {uid}"),
            "systemctl restart virtseald.socket virtseald",
        ),
        CallError::Error(name) => (format!("virtseald failed: {name}"), "systemctl status virtseald"),
    };
    format!(
        "virtseal: VM {} is sealed and can't start: {why}. Next: {next}",
        vm.name
    )
}

fn started(deadline: &Deadline) {
    let conf = Conf::load();
    if let Found::Sealed(vm) = vm::find(&vm::read_notice(deadline)) {
        notify("io.virtseal.Lifecycle.Started", &vm, &conf, deadline);
    }
}

fn arriving(deadline: &Deadline) {
    let conf = Conf::load();
    if let Found::Sealed(vm) = vm::find(&vm::read_notice(deadline)) {
        // With what it is: the message counts for this vTPM alone.
        let parameters = json!({ "vm": vm.uuid, "name": vm.name, "xml": vm.xml });
        let _ = varlink::call(
            &conf.socket,
            "io.virtseal.Lifecycle.Arriving",
            &parameters,
            deadline,
        );
    }
}

fn released(deadline: &Deadline) {
    let conf = Conf::load();
    if let Found::Sealed(vm) = vm::find(&vm::read_notice(deadline)) {
        RuntimeDir::release(&vm, &conf);
        notify("io.virtseal.Lifecycle.Released", &vm, &conf, deadline);
    }
}

/// The daemon also finds out by itself what it was not told, so a failure is nobody's business here.
fn notify(method: &str, vm: &Vm, conf: &Conf, deadline: &Deadline) {
    let parameters = json!({ "vm": vm.uuid, "name": vm.name });
    let _ = varlink::call(&conf.socket, method, &parameters, deadline);
}
