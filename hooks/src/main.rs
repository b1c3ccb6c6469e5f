//! `virtseal-hook VM OPERATION SUBOPERATION EXTRA < domain.xml`, as libvirt runs it from
//! `/etc/libvirt/hooks/qemu.d/` (<https://libvirt.org/hooks.html>).
//!
//! libvirt holds the VM's lock meanwhile and has no timeout of its own, so everything here ends at one deadline.
//! The rules:
//!
//! - `prepare begin` of a VM with virtseal metadata exits 0 only after the daemon agreed; any doubt refuses it,
//!   with one line on stderr, which libvirt shows to the user.
//! - A VM without that metadata passes without a word to anyone, unless `require_sealed` is set.
//! - Every other operation exits 0 whatever happens: a failure there would kill a running guest.
//! - stdout stays empty: on `migrate` and `restore` libvirt takes it for the new domain XML.

#![forbid(unsafe_code)]

mod conf;
mod deadline;
mod runtime_dir;
mod varlink;
mod vm;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use conf::{Conf, TmpfsPolicy};
use deadline::Deadline;
use runtime_dir::RuntimeDir;
use varlink::CallError;
use vm::{Found, Vm};

/// For messages that nothing waits for.
const NOTICE_DEADLINE: Duration = Duration::from_secs(2);

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
        _ => ExitCode::SUCCESS,
    }
}

fn never_fail(notice: fn()) -> ExitCode {
    let _ = catch_unwind(notice);
    ExitCode::SUCCESS
}

/// Whether the VM may start; the error is the line for the user.
fn prepare(name: &str) -> Result<(), String> {
    let deadline = Deadline::started_now();
    let conf = Conf::load();
    let deadline = deadline.lasting(conf.deadline);
    let xml = vm::read_stdin(&deadline);
    let decided = catch_unwind(AssertUnwindSafe(|| decide(name, &xml, &conf, &deadline)));
    decided.unwrap_or_else(|_| {
        if vm::has_marker(&xml) || conf.require_sealed {
            Err(format!(
                "virtseal: VM {name} is refused: the hook failed; next: virtseal doctor"
            ))
        } else {
            Ok(())
        }
    })
}

fn decide(name: &str, xml: &[u8], conf: &Conf, deadline: &Deadline) -> Result<(), String> {
    match vm::find(xml) {
        Found::Sealed(vm) => start(&vm, conf, deadline),
        Found::Unreadable(why) if vm::has_marker(xml) || conf.require_sealed => Err(format!(
            "virtseal: VM {name} is refused: {why}; next: virsh dumpxml --inactive {name}"
        )),
        Found::Unsealed if conf.require_sealed => Err(match &conf.problem {
            Some(problem) => {
                format!("virtseal: VM {name} is not sealed, and whether it must be is unclear: {problem}")
            }
            None => format!(
                "virtseal: VM {name} is not sealed, and {} has require_sealed = true; next: virtseal vm seal {name}",
                conf.path.display()
            ),
        }),
        Found::Unsealed | Found::Unreadable(_) => Ok(()),
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
        &json!({ "xml": vm.xml }),
        deadline,
    );
    answer.map_err(|error| {
        if let Some(mounted) = mounted {
            mounted.undo();
        }
        refusal(vm, conf, deadline, error)
    })
}

fn no_tmpfs(vm: &Vm, conf: &Conf, why: &str) -> String {
    format!(
        "virtseal: VM {} is sealed and can't start: no tmpfs for QEMU's master key: {why}; \
         next: allow it, or set master_key_tmpfs = preferred in {}",
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
        CallError::Error(name) => (format!("virtseald failed: {name}"), "systemctl status virtseald"),
    };
    format!(
        "virtseal: VM {} is sealed and can't start: {why}; next: {next}",
        vm.name
    )
}

fn started() {
    let conf = Conf::load();
    let deadline = Deadline::started_now().lasting(NOTICE_DEADLINE);
    if let Found::Sealed(vm) = vm::find(&vm::read_stdin(&deadline)) {
        notify("io.virtseal.Lifecycle.Started", &vm, &conf, &deadline);
    }
}

fn released() {
    let conf = Conf::load();
    let deadline = Deadline::started_now().lasting(NOTICE_DEADLINE);
    if let Found::Sealed(vm) = vm::find(&vm::read_stdin(&deadline)) {
        RuntimeDir::release(&vm, &conf);
        notify("io.virtseal.Lifecycle.Released", &vm, &conf, &deadline);
    }
}

/// The daemon also finds out by itself what it was not told, so a failure is nobody's business here.
fn notify(method: &str, vm: &Vm, conf: &Conf, deadline: &Deadline) {
    let parameters = json!({ "vm": vm.uuid, "name": vm.name });
    let _ = varlink::call(&conf.socket, method, &parameters, deadline);
}

/// What may stand on a terminal and in a log as one line of bounded length.
fn one_line(text: &str) -> String {
    const MOST: usize = 2000;
    let is_break = |found: char| found.is_control() || matches!(found, '\u{2028}' | '\u{2029}');
    let clean = text
        .trim()
        .chars()
        .map(|found| if is_break(found) { ' ' } else { found });
    clean.take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(one_line(" a\nb\r\tc\u{1b}[1m\u{2028}d\n"), "a b  c [1m d");
        assert_eq!(one_line(&"x".repeat(9000)).len(), 2000);
    }
}
