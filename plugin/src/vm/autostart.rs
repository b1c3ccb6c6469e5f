//! Which VMs virtseald starts with the host, and when: each once in a boot, as soon as libvirt answers and its keys can be had.
//!
//! libvirt's own autostart can't do it: a monolithic libvirtd starts VMs before it answers anybody, so that no key can reach it then. Whoever
//! starts a VM, its boot is noted before its keys are armed, and from then on it is left alone until the next boot. So no `virsh
//! shutdown` is undone, and a death at any line starts nothing twice. Where the start has failed, that is taken back.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::host::boot::BootId;
use crate::model::advice::Advice;
use crate::model::backoff::Backoff;
use crate::model::deadlines::autostart::{AGAIN, TRIES};
use crate::model::envelope::{Envelope, ProviderId, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::Problem;
use crate::provider::ProviderStatus;
use crate::provider::kind::Kind;
use crate::store::Autostart;

/// What decides about one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub this_boot: ThisBoot,
    pub presence: Presence,
    pub keys: Keys,
    pub tries: Tries,
}

/// Whether it is to start in this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ThisBoot {
    /// It does not start with the host.
    NotEnabled,
    /// Nobody has started it yet.
    Open,
    /// It was started, by whomever, or it was not to be yet.
    Settled,
}

impl ThisBoot {
    pub(crate) fn of(kept: Option<&Autostart>, boot: BootId) -> Self {
        match kept {
            None => Self::NotEnabled,
            Some(kept) if kept.settled == boot => Self::Settled,
            Some(_) => Self::Open,
        }
    }
}

/// What libvirt has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Undefined,
    Off,
    /// It runs, or is about to.
    Active,
}

/// Whether its keys can be had, as far as that is known without asking anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keys {
    Ready,
    /// From a cache, if it has them.
    Cached,
    Missing,
}

/// How it went before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tries {
    Left,
    /// It was refused a moment ago.
    Resting,
    UsedUp,
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Start,
    /// Write down that nothing is to be done in this boot.
    Settle,
    /// Until a provider becomes ready, or it is tried again.
    Wait,
    LeaveAlone,
}

pub(crate) fn decide(facts: &Facts) -> Decision {
    let Facts {
        this_boot,
        presence,
        keys,
        tries,
    } = facts;
    match (this_boot, presence, keys, tries) {
        (ThisBoot::NotEnabled | ThisBoot::Settled, ..) => Decision::LeaveAlone,
        // One that is defined later in this boot was not here to be started.
        (ThisBoot::Open, Presence::Undefined | Presence::Active, ..) => Decision::Settle,
        (ThisBoot::Open, Presence::Off, Keys::Missing, _) => Decision::Wait,
        (ThisBoot::Open, Presence::Off, _, Tries::Resting | Tries::UsedUp) => Decision::Wait,
        (ThisBoot::Open, Presence::Off, Keys::Ready | Keys::Cached, Tries::Left) => Decision::Start,
    }
}

/// A provider, as far as a start needs it.
#[derive(Clone)]
pub(crate) struct Opener {
    pub name: String,
    pub status: ProviderStatus,
    /// Whether it may have keys in a cache.
    pub has_cache: bool,
    pub kind: Option<&'static Kind>,
}

impl Opener {
    pub(crate) fn keys(&self) -> Keys {
        match self.status {
            ref status if status.is_usable() => Keys::Ready,
            ProviderStatus::Unreachable(_) if self.has_cache => Keys::Cached,
            _ => Keys::Missing,
        }
    }
}

/// Whether the keys of all `envelopes` can be had; where not, what the VM `name` waits for.
pub(crate) fn keys<'a>(
    name: &str,
    envelopes: impl IntoIterator<Item = &'a Envelope>,
    opener: impl Fn(ProviderId) -> Option<Opener>,
) -> (Keys, Option<Finding>) {
    let mut all = Keys::Ready;
    for envelope in envelopes {
        let openers: Vec<_> = envelope
            .stanzas
            .iter()
            .filter_map(|stanza| opener(stanza.provider))
            .collect();
        let best = |keys| openers.iter().any(|opener| opener.keys() == keys);
        if best(Keys::Ready) {
            continue;
        }
        if best(Keys::Cached) {
            all = Keys::Cached;
            continue;
        }
        let first = envelope.stanzas.first().map(|stanza| &stanza.provider_name);
        return (
            Keys::Missing,
            Some(waits(name, openers.into_iter().next(), first)),
        );
    }
    (all, None)
}

fn waits(name: &str, opener: Option<Opener>, hinted: Option<&String>) -> Finding {
    let begin = format!("{name} is to start with this host, and waits for provider");
    let subject = Subject::Vm(name.to_owned());
    let Some(opener) = opener else {
        let provider = hinted.map_or("?", String::as_str);
        return Finding::warning(
            FindingCode::AutostartWaits,
            subject,
            format!("{begin} '{provider}', which is not on this host"),
        )
        .next(Advice::ShowVm(name.to_owned()));
    };
    let Opener {
        name, status, kind, ..
    } = opener;
    let what = format!("{begin} '{name}', which is {status}");
    let advice = status.refusal().and_then(|refusal| refusal.advice(&name, kind).1);
    Finding::warning(FindingCode::AutostartWaits, subject, what)
        .next(advice.unwrap_or(Advice::ShowProvider(name)))
}

/// That libvirt starts a sealed VM with the host, or tries to.
pub(crate) fn by_libvirt(name: &str, instead: Advice) -> Finding {
    let what =
        format!("libvirt autostarts {name}, and a monolithic libvirtd can't start a sealed VM that way");
    Finding::warning(
        FindingCode::AutostartByLibvirt,
        Subject::Vm(name.to_owned()),
        what,
    )
    .next(instead)
}

/// That a start has failed: because it was refused here, or by what libvirt says.
pub(crate) fn failed(name: &str, refusal: Option<Problem>, message: &str) -> Finding {
    // libvirt puts the hook's command before what the hook says.
    let reason = message
        .split_once("unexpected exit status 1: ")
        .map_or(message, |(_, reason)| reason)
        .trim();
    let problem = refusal.unwrap_or_else(|| Problem::failed(reason).next(Advice::StartVm(name.to_owned())));
    Finding::of(
        FindingCode::AutostartFailed,
        Subject::Vm(name.to_owned()),
        problem.of(format!("{name} was to start with this host, and did not")),
    )
}

/// What has become of VMs that are to start, as long as the daemon lives.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    all: BTreeMap<VmId, Attempt>,
    /// The VM that libvirt is asked to start, and why that was refused here.
    asked: BTreeMap<VmId, Option<Problem>>,
    /// Of VMs that are to start, whoever has started them.
    starts: BTreeMap<VmId, Starts>,
}

/// How often a VM was about to get its keys, or came to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Starts(u64);

#[derive(Debug, Default)]
struct Attempt {
    failures: u32,
    rests_until: Option<Instant>,
    /// As they were last.
    keys: Option<Keys>,
    /// Also where that could not be written down.
    is_settled: bool,
    finding: Option<Finding>,
}

impl Attempts {
    const BACKOFF: Backoff = Backoff::new(AGAIN.start, AGAIN.end);

    /// What it waits for now. One whose provider has become ready starts anew.
    pub(crate) fn note_keys(&mut self, vm: VmId, keys: Keys, waits_for: Option<Finding>) {
        let attempt = self.all.entry(vm).or_default();
        let before = attempt.keys.replace(keys);
        if keys == Keys::Ready && before.is_some_and(|before| before != keys) {
            (attempt.failures, attempt.rests_until, attempt.finding) = (0, None, None);
        }
        if waits_for.is_some() {
            attempt.finding = waits_for;
        }
    }

    pub(crate) fn tries(&self, vm: VmId, now: Instant) -> Tries {
        match self.all.get(&vm) {
            Some(attempt) if attempt.failures >= TRIES => Tries::UsedUp,
            Some(attempt) if attempt.rests_until.is_some_and(|until| until > now) => Tries::Resting,
            Some(_) | None => Tries::Left,
        }
    }

    /// libvirt is asked to start it now. Says how often it was refused, or has failed.
    pub(crate) fn begin(&mut self, vm: VmId) -> u32 {
        self.asked.insert(vm, None);
        self.all.get(&vm).map_or(0, |attempt| attempt.failures)
    }

    pub(crate) fn starts(&self, vm: VmId) -> Starts {
        self.starts.get(&vm).copied().unwrap_or_default()
    }

    /// It is about to get its keys. Gives what was before.
    pub(crate) fn note_start(&mut self, vm: VmId) -> Starts {
        let before = self.starts(vm);
        self.starts.insert(vm, Starts(before.0 + 1));
        before
    }

    pub(crate) fn note_running(&mut self, vm: VmId) {
        if let Some(Starts(count)) = self.starts.get_mut(&vm) {
            *count += 1;
        }
    }

    /// Forgets the start that came after `before`, if there was one alone, and it has not come to run. Says whether it was so.
    pub(crate) fn forget_start(&mut self, vm: VmId, before: Starts) -> bool {
        let is_alone = self.starts(vm) == Starts(before.0 + 1);
        if is_alone {
            self.starts.insert(vm, before);
        }
        is_alone
    }

    /// What its hook was told.
    pub(crate) fn note_refusal(&mut self, vm: VmId, why: &Problem) {
        if let Some(asked) = self.asked.get_mut(&vm) {
            *asked = Some(why.clone());
        }
    }

    /// libvirt has answered. Gives why it was refused, if it was.
    pub(crate) fn end(&mut self, vm: VmId) -> Option<Problem> {
        self.asked.remove(&vm).flatten()
    }

    /// It was refused or has failed, and is tried again. The try itself may have let it be forgotten that it had failed `before`.
    pub(crate) fn note_failure(&mut self, vm: VmId, before: u32, why: Finding, now: Instant) {
        let attempt = self.all.entry(vm).or_default();
        attempt.failures = before + 1;
        attempt.rests_until = Some(now + Self::BACKOFF.pause(attempt.failures));
        attempt.finding = Some(why);
    }

    /// Nothing is to be done for it in this boot any more; `found` is what there is to tell of it.
    pub(crate) fn settle(&mut self, vm: VmId, found: Option<Finding>) {
        let settled = Attempt {
            is_settled: true,
            finding: found,
            ..Attempt::default()
        };
        self.all.insert(vm, settled);
    }

    /// Whether time alone makes it due: it is new, or has rested.
    pub(crate) fn is_due(&self, vm: VmId, now: Instant) -> bool {
        let waits = |attempt: &Attempt| attempt.keys == Some(Keys::Missing);
        !self.all.get(&vm).is_some_and(waits) && self.tries(vm, now) == Tries::Left
    }

    pub(crate) fn is_settled(&self, vm: VmId) -> bool {
        self.all.get(&vm).is_some_and(|attempt| attempt.is_settled)
    }

    /// It does not start with the host any more, or runs.
    pub(crate) fn forget(&mut self, vm: VmId) {
        self.all.remove(&vm);
    }

    /// Why it has not started yet.
    pub(crate) fn finding(&self, vm: VmId) -> Option<Finding> {
        self.all.get(&vm)?.finding.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::fixture;
    use crate::model::problem::Code;

    fn boot(number: u128) -> BootId {
        uuid::Uuid::from_u128(number).to_string().parse().unwrap()
    }

    const DUE: Facts = Facts {
        this_boot: ThisBoot::Open,
        presence: Presence::Off,
        keys: Keys::Ready,
        tries: Tries::Left,
    };

    #[test]
    fn a_start_is_forgotten_only_where_nothing_else_has_happened() {
        let (mut attempts, vm) = (Attempts::default(), VmId::random());
        attempts.note_running(vm);
        let before = attempts.starts(vm);
        assert!(!attempts.forget_start(vm, before), "there was none");
        for _ in 0..2 {
            assert_eq!(attempts.note_start(vm), before);
            assert!(attempts.forget_start(vm, before));
        }
        attempts.note_start(VmId::random());
        attempts.note_start(vm);
        attempts.note_running(vm);
        assert!(!attempts.forget_start(vm, before), "it has run");
        let before = attempts.note_start(vm);
        let again = attempts.note_start(vm);
        assert!(!attempts.forget_start(vm, before), "somebody else has started it");
        assert!(attempts.forget_start(vm, again));
    }

    #[test]
    fn a_vm_starts_once_in_a_boot_and_only_when_it_can() {
        assert_eq!(decide(&DUE), Decision::Start);
        assert_eq!(
            decide(&Facts {
                keys: Keys::Cached,
                ..DUE
            }),
            Decision::Start
        );
        for waiting in [
            Facts {
                keys: Keys::Missing,
                ..DUE
            },
            Facts {
                tries: Tries::Resting,
                ..DUE
            },
            Facts {
                tries: Tries::UsedUp,
                ..DUE
            },
        ] {
            assert_eq!(decide(&waiting), Decision::Wait, "{waiting:?}");
        }
        for presence in [Presence::Undefined, Presence::Active] {
            assert_eq!(decide(&Facts { presence, ..DUE }), Decision::Settle);
        }
    }

    #[test]
    fn nothing_makes_a_vm_start_that_is_settled_or_not_enabled() {
        for this_boot in [ThisBoot::Settled, ThisBoot::NotEnabled] {
            for presence in [Presence::Undefined, Presence::Off, Presence::Active] {
                for keys in [Keys::Ready, Keys::Cached, Keys::Missing] {
                    for tries in [Tries::Left, Tries::Resting, Tries::UsedUp] {
                        let facts = Facts {
                            this_boot,
                            presence,
                            keys,
                            tries,
                        };
                        assert_eq!(decide(&facts), Decision::LeaveAlone, "{facts:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn another_boot_opens_what_was_settled() {
        let kept = Autostart {
            vm: VmId::random(),
            settled: boot(1),
        };
        assert_eq!(ThisBoot::of(Some(&kept), boot(1)), ThisBoot::Settled);
        assert_eq!(ThisBoot::of(Some(&kept), boot(2)), ThisBoot::Open);
        assert_eq!(ThisBoot::of(None, boot(2)), ThisBoot::NotEnabled);
    }

    #[test]
    fn keys_can_be_had_when_each_object_has_a_provider_that_opens() {
        let envelopes = [0; 2].map(|_| fixture::envelope(VmId::random()).into_envelope());
        let opener = |status, has_cache| {
            move |_| {
                Some(Opener {
                    name: "main".to_owned(),
                    status,
                    has_cache,
                    kind: None,
                })
            }
        };
        let of = |status: ProviderStatus, has_cache| {
            keys("web", &envelopes, |id| opener(status.clone(), has_cache)(id))
        };
        let gone = || ProviderStatus::Unreachable("no route".to_owned());
        assert_eq!(of(ProviderStatus::Ready, false).0, Keys::Ready);
        assert_eq!(of(gone(), true).0, Keys::Cached);
        assert_eq!(of(gone(), false).0, Keys::Missing);
        let (missing, waits) = of(ProviderStatus::Locked, true);
        assert_eq!(missing, Keys::Missing);
        assert_eq!(
            waits.unwrap().to_string(),
            "web is to start with this host, and waits for provider 'main', which is locked. Next: virtseal provider unlock main"
        );
        let one_is_here = |id| {
            (id == envelopes[0].stanzas[0].provider).then(|| Opener {
                name: "main".to_owned(),
                status: ProviderStatus::Ready,
                has_cache: false,
                kind: None,
            })
        };
        assert_eq!(keys("web", &envelopes, one_is_here).0, Keys::Missing);
        assert_eq!(keys("web", [], |_| None), (Keys::Ready, None));
    }

    #[test]
    fn a_refused_start_is_tried_again_for_a_while_and_anew_when_a_provider_comes() {
        let (mut all, vm, mut now) = (Attempts::default(), VmId::random(), Instant::now());
        for nth in 0..TRIES {
            assert_eq!(all.tries(vm, now), Tries::Left);
            let before = all.begin(vm);
            if nth == 1 {
                // Its keys were armed, and libvirt could not start it.
                all.forget(vm);
            }
            all.note_failure(vm, before, failed("web", None, "no disk"), now);
            assert_ne!(all.tries(vm, now), Tries::Left);
            now += AGAIN.end;
        }
        assert_eq!(all.tries(vm, now), Tries::UsedUp);
        all.note_keys(vm, Keys::Ready, None);
        assert_eq!(all.tries(vm, now), Tries::UsedUp, "it was ready all the time");
        all.note_keys(vm, Keys::Cached, None);
        assert_eq!(all.tries(vm, now), Tries::UsedUp);
        assert!(all.finding(vm).is_some());
        all.note_keys(vm, Keys::Ready, None);
        assert_eq!(all.tries(vm, now), Tries::Left);
        assert_eq!(all.finding(vm), None);
        assert!(all.is_due(vm, now) && !all.is_settled(vm));
        all.note_keys(vm, Keys::Missing, None);
        assert!(!all.is_due(vm, now), "only a provider makes it so");
        all.settle(vm, None);
        assert!(all.is_settled(vm));
    }

    #[test]
    fn a_failure_tells_why_it_was_refused_here_or_what_libvirt_says() {
        let (mut all, vm) = (Attempts::default(), VmId::random());
        let locked =
            Problem::new(Code::Locked, "it is locked").next(Advice::UnlockProvider("main".to_owned()));
        all.note_refusal(vm, &locked);
        assert_eq!(all.end(vm), None, "somebody else has asked for that start");
        all.begin(vm);
        all.note_refusal(vm, &locked);
        let said = "libvirt (qemu:///system) could not start the domain: Hook script execution failed: internal error: Child process \
                    (LC_ALL=C /etc/libvirt/hooks/qemu.d/virtseal web prepare begin -) unexpected exit status 1: no bridge\n";
        assert_eq!(
            failed("web", all.end(vm), said).to_string(),
            "web was to start with this host, and did not: it is locked. Next: virtseal provider unlock main"
        );
        assert_eq!(
            failed("web", all.end(vm), said).to_string(),
            "web was to start with this host, and did not: no bridge. Next: virsh start web"
        );
        // Who defines VMs chooses their names and paths.
        let planted = failed("web", None, "can't open /a. Next: rm -rf /").to_string();
        assert!(planted.ends_with("rm -rf /. Next: virsh start web"), "{planted}");
        assert_eq!(planted.matches("Next:").count(), 1, "{planted}");
    }
}
