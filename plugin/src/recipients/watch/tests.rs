use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use super::*;
use crate::api::ProviderState;
use crate::model::envelope::{KekId, Payload, Stanza, VmId};
use crate::provider::toolbox::locks::{Locks, LocksNoted};
use crate::provider::{ChangeError, DestroyReceipt, KekScope, ProviderError, SettingsChange};
use crate::secret::SecretBytes;

const PACE: Pace = Pace {
    interval: Duration::from_millis(20),
    patience: Duration::from_millis(40),
};

/// What no real server does on demand: it hangs until told otherwise, and changes its state at once.
struct Moody {
    id: ProviderId,
    status: Mutex<ProviderStatus>,
    probes: AtomicU32,
    within: Option<Duration>,
    /// A probe takes one from here, where there is one.
    release: Option<Mutex<Receiver<()>>>,
}

impl Moody {
    fn ready() -> Arc<Self> {
        Self::made(None)
    }

    fn hanging() -> (Arc<Self>, Sender<()>) {
        let (sender, receiver) = channel();
        (Self::made(Some(Mutex::new(receiver))), sender)
    }

    fn made(release: Option<Mutex<Receiver<()>>>) -> Arc<Self> {
        Arc::new(Self::new(release))
    }

    fn new(release: Option<Mutex<Receiver<()>>>) -> Self {
        Self {
            id: ProviderId::random(),
            status: Mutex::new(ProviderStatus::Ready),
            probes: AtomicU32::new(0),
            within: None,
            release,
        }
    }

    fn probes(&self) -> u32 {
        self.probes.load(Ordering::SeqCst)
    }
}

impl KeyProvider for Moody {
    fn kind(&self) -> &str {
        "moody"
    }

    fn id(&self) -> ProviderId {
        self.id
    }

    fn name(&self) -> &str {
        "moody"
    }

    fn status(&self) -> ProviderStatus {
        self.status.lock().unwrap().clone()
    }

    fn probe(&self) {
        if let Some(release) = &self.release {
            // Ends when the test does.
            let _ = release.lock().unwrap().recv();
        }
        self.probes.fetch_add(1, Ordering::SeqCst);
    }

    fn probe_within(&self) -> Option<Duration> {
        self.within
    }

    fn create_kek(&self, _: &KekScope) -> Result<KekId, ProviderError> {
        Err(ProviderError::Locked)
    }

    fn rotate_kek(&self, _: &KekScope, _: &KekId) -> Result<KekId, ProviderError> {
        Err(ProviderError::Locked)
    }

    fn wrap(&self, _: &KekId, _: &Payload) -> Result<Stanza, ProviderError> {
        Err(ProviderError::Locked)
    }

    fn unwrap_many(&self, _: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        Err(ProviderError::Locked)
    }

    fn destroy_kek(&self, _: &KekId, _: VmId) -> Result<DestroyReceipt, ProviderError> {
        Err(ProviderError::Locked)
    }

    fn lock(&self) {}

    fn change(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError> {
        Ok((change.record)()?)
    }

    fn asks_for(&self) -> Option<crate::api::CredentialKind> {
        None
    }

    fn locks(&self) -> LocksNoted {
        Locks::default().noted()
    }

    fn unlock_since(&self, _: LocksNoted, _: &SecretBytes) -> Result<(), ProviderError> {
        Ok(())
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn added(watches: &Watches, provider: &Arc<Moody>) {
    let provider: Arc<dyn KeyProvider> = Arc::<Moody>::clone(provider);
    watches.add(&provider);
}

#[test]
fn hanging_probe_holds_up_nobody_and_shows() {
    let watches = Watches::new(PACE);
    let (silent, release) = Moody::hanging();
    let well = Moody::ready();
    added(&watches, &silent);
    added(&watches, &well);
    until("the third probe of the other", || well.probes() >= 3);
    until(
        "the silence",
        || matches!(watches.report(silent.as_ref()).status, ProviderStatus::Unreachable(why) if why.contains("no answer for")),
    );
    assert_eq!(silent.probes(), 0);
    assert_eq!(watches.report(well.as_ref()).status, ProviderStatus::Ready);
    release.send(()).unwrap();
    until("the answer", || {
        watches.report(silent.as_ref()).status == ProviderStatus::Ready
    });
}

#[test]
fn change_has_its_time_and_the_same_state_keeps_it() {
    let watches = Watches::new(Pace {
        interval: Duration::from_secs(3600),
        ..PACE
    });
    let provider = Moody::ready();
    added(&watches, &provider);
    let first = watches.report(provider.as_ref());
    *provider.status.lock().unwrap() = ProviderStatus::Unreachable("a".into());
    let (before, changed) = (SystemTime::now(), watches.report(provider.as_ref()));
    assert!(changed.since >= before && changed.since >= first.since);
    *provider.status.lock().unwrap() = ProviderStatus::Unreachable("b".into());
    let same = watches.report(provider.as_ref());
    assert_eq!(
        (same.since, same.status.state()),
        (changed.since, ProviderState::Unreachable)
    );
}

#[test]
fn new_interval_counts_at_once() {
    let watches = Watches::new(Pace {
        interval: Duration::from_secs(3600),
        ..PACE
    });
    let provider = Moody::ready();
    added(&watches, &provider);
    until("the first probe", || provider.probes() == 1);
    watches.set_pace(|pace| pace.interval = PACE.interval);
    until("more probes", || provider.probes() >= 3);
}

/// As after an unlock: nobody waits for the next round, and a token that ends soon has its own pace.
#[test]
fn a_change_wakes_the_watch_and_a_provider_may_want_more() {
    let watches = Watches::new(Pace {
        interval: Duration::from_secs(3600),
        ..PACE
    });
    let provider = Moody::ready();
    added(&watches, &provider);
    until("the first probe", || provider.probes() == 1);
    *provider.status.lock().unwrap() = ProviderStatus::Locked;
    watches.report(provider.as_ref());
    until("the one after the change", || provider.probes() == 2);
    let eager = Arc::new(Moody {
        within: Some(Duration::from_millis(5)),
        ..Moody::new(None)
    });
    added(&watches, &eager);
    until("its own pace", || eager.probes() >= 4);
    assert_eq!(provider.probes(), 2);
}

#[test]
fn thread_ends_with_its_provider_and_with_the_registry() {
    let watches = Watches::new(PACE);
    let gone = Moody::ready();
    added(&watches, &gone);
    until("a probe", || gone.probes() > 0);
    let weak = Arc::downgrade(&gone);
    drop(gone);
    until("the end of the provider", || weak.strong_count() == 0);
    let kept = Moody::ready();
    added(&watches, &kept);
    drop(watches);
    until("the end of the thread", || Arc::weak_count(&kept) == 0);
}

#[test]
fn pauses_double_up_to_the_interval() {
    let pace = Pace {
        interval: Duration::from_secs(60),
        ..PACE
    };
    let pauses = [0, 1, 2, 3, 4, 5, 99].map(|failures| pace.pause(failures).as_secs());
    assert_eq!(pauses, [60, 5, 10, 20, 40, 60, 60]);
    assert_eq!(PACE.pause(1), PACE.interval);
}
