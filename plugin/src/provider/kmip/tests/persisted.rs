//! What still opens after a restart while the KMS does not answer: what the host's TPM keeps, as long as the KMS has said
//! nothing against it.

use std::time::{Duration, Instant};

use super::super::fixture::{Kept, Kmip, secret};
use super::{KmipProvider, Wrapped};
use crate::host::tpm::{PcrList, Tpm};
use crate::model::cache_policy::{CachePolicy, KeepTime};
use crate::provider::cache::persist;
use crate::provider::kmip::{KmipProviderError, KmipSettings, Mode, SettingsError};
use crate::provider::{KeyProvider, ProviderError, ProviderStatus};
use crate::store::Stores;
use virtseal_testkit::Swtpm;
use virtseal_testkit::servers::Authority;

const PRE_ACTIVE: u32 = 1;

/// A provider at a real KMS, with the TPM of its host.
struct Rig {
    kmip: Kmip,
    stores: Stores,
    stand: Swtpm,
    tpm: Tpm,
}

impl Rig {
    fn new() -> Self {
        let kmip = Kmip::with(false, |settings| settings.cache = None);
        let stand = Swtpm::start().unwrap();
        Self {
            stores: kmip.stores(),
            tpm: Tpm::of(&stand),
            stand,
            kmip,
        }
    }

    fn persisting() -> Self {
        let rig = Self::new();
        rig.persist(CachePolicy::default()).unwrap();
        rig
    }

    fn persist(&self, policy: CachePolicy) -> Result<(), KmipProviderError> {
        let persist = persist::Request {
            tpm: &self.tpm,
            keep: KeepTime::default(),
            pcrs: PcrList::default(),
        };
        self.provider().set_cache(policy, Some(&persist))
    }

    fn provider(&self) -> &KmipProvider {
        self.kmip.provider()
    }

    /// Wrapped, fetched, and on disk.
    fn fetched(&self) -> Wrapped {
        let before = self.kept();
        let wrapped = Wrapped::by(self.provider());
        wrapped.assert_opened_by(self.provider());
        let until = Instant::now() + Duration::from_secs(20);
        while self.kept() == before {
            assert!(Instant::now() < until, "it is not on disk");
            std::thread::sleep(Duration::from_millis(1));
        }
        wrapped
    }

    fn kept(&self) -> usize {
        self.provider().cache.persistence().map_or(0, |kept| kept.keks)
    }

    fn kill(&mut self) {
        self.kmip.server.kill();
        self.provider().probe();
    }

    fn bring_back(&mut self) {
        self.kmip.server.run().unwrap();
        self.provider().probe();
    }

    /// As the end of the daemon and the start of the next one.
    fn restart(&mut self) {
        self.provider().end();
        let record = self
            .stores
            .keystore
            .providers()
            .unwrap()
            .whole()
            .unwrap()
            .remove(0);
        let provider = KmipProvider::open(&self.stores.providers(), &record).unwrap();
        self.kmip.replace(provider);
        self.provider().probe();
    }

    fn load(&self) {
        assert!(self.provider().wants_tpm());
        self.provider().load_cache(&self.tpm).unwrap();
    }

    fn refusal(&self, wrapped: &Wrapped) -> String {
        match self.provider().unwrap_many(&[&wrapped.stanza]) {
            Err(ProviderError::Unreachable(why)) => why,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn it_opens_after_a_restart_and_no_more_after_a_lock() {
    let mut rig = Rig::persisting();
    let wrapped = rig.fetched();
    rig.kill();
    rig.stand.reboot().unwrap();
    rig.restart();
    rig.load();
    wrapped.assert_opened_by(rig.provider());
    let wrap = rig.provider().wrap(&wrapped.stanza.kek, &wrapped.payload);
    assert!(
        matches!(wrap, Err(ProviderError::Unreachable(_))),
        "it wraps nothing"
    );

    rig.provider().lock();
    rig.provider().settle_cache().unwrap();
    rig.provider().unlock(&secret("anything")).unwrap();
    rig.load();
    assert!(rig.refusal(&wrapped).ends_with("; its key is not kept on disk"));
    rig.restart();
    rig.load();
    assert!(rig.refusal(&wrapped).ends_with("; its key is not kept on disk"));
}

#[test]
fn a_start_waits_for_a_tpm_that_is_about_to_answer() {
    let mut rig = Rig::persisting();
    let wrapped = rig.fetched();
    rig.kill();
    rig.restart();
    std::thread::scope(|scope| {
        let rig = &rig;
        let start = scope.spawn(move || wrapped.assert_opened_by(rig.provider()));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!start.is_finished(), "it waits");
        rig.load();
        start.join().unwrap();
    });
}

#[test]
fn what_the_kms_has_said_counts_after_a_restart() {
    let mut rig = Rig::persisting();
    let (refused, destroyed, left) = (rig.fetched(), rig.fetched(), rig.fetched());
    rig.kmip.server.set_state(&refused.stanza.kek, PRE_ACTIVE);
    assert!(rig.provider().unwrap_many(&[&refused.stanza]).is_err());
    assert_eq!(rig.kept(), 2);
    let receipt = rig
        .provider()
        .destroy_kek(&destroyed.stanza.kek, destroyed.vm)
        .unwrap();
    assert!(
        receipt.destroyed && receipt.observed.contains("kept of it for a reboot is removed"),
        "{receipt:?}"
    );
    rig.kill();
    rig.restart();
    rig.load();
    for gone in [&refused, &destroyed] {
        assert!(rig.refusal(gone).ends_with("; its key is not kept on disk"));
    }
    left.assert_opened_by(rig.provider());

    // Turned away, it keeps nothing at all.
    rig.bring_back();
    rig.kill();
    rig.kmip.server.accept(&Authority::new()).unwrap();
    rig.bring_back();
    let asked = rig.provider().unwrap_many(&[&left.stanza]);
    assert!(matches!(asked, Err(ProviderError::RefusesUs(_))), "{asked:?}");
    assert!(
        rig.stores
            .host_store
            .kek_cache(rig.provider().id())
            .all()
            .unwrap()
            .is_empty()
    );
}

#[test]
fn without_the_tpm_a_server_that_answers_is_all_it_takes() {
    let mut rig = Rig::persisting();
    let wrapped = rig.fetched();
    rig.stand.extend(7).unwrap();
    rig.restart();
    assert!(rig.provider().load_cache(&rig.tpm).is_err());
    wrapped.assert_opened_by(rig.provider());
    let ProviderStatus::Degraded(why) = rig.provider().status() else {
        panic!("{:?}", rig.provider().status());
    };
    assert_eq!(
        why,
        "no key is kept for a reboot (PCR 7 differs from when it was enrolled): virtseal provider cache kms 24h --persist tpm \
         --persist-for 24h --pcrs 7 begins anew"
    );
    let warnings = rig.provider().warnings();
    assert_eq!((warnings.len(), &warnings[0].what), (1, &why));
    rig.restart();
    assert!(rig.provider().load_cache(&rig.tpm).is_err());
    rig.kill();
    assert!(
        rig.refusal(&wrapped)
            .ends_with("; its key on disk can't be opened: PCR 7 differs from when it was enrolled")
    );
    rig.persist(CachePolicy::UntilLock).unwrap();
    assert!(rig.provider().warnings().is_empty());
    rig.bring_back();
    wrapped.assert_opened_by(rig.provider());
}

#[test]
fn every_other_policy_ends_it() {
    let rig = Rig::persisting();
    for policy in ["none", "until-lock", "24h"] {
        rig.persist(CachePolicy::default()).unwrap();
        rig.fetched();
        rig.provider().set_cache(policy.parse().unwrap(), None).unwrap();
        assert!(
            rig.stores
                .host_store
                .kek_cache(rig.provider().id())
                .all()
                .unwrap()
                .is_empty()
        );
        assert_eq!(rig.provider().cache.persistence(), None);
    }
    assert!(matches!(
        rig.persist(CachePolicy::None),
        Err(KmipProviderError::PersistNothing)
    ));
    rig.provider().lock();
    assert!(matches!(
        rig.persist(CachePolicy::default()),
        Err(KmipProviderError::Locked)
    ));
}

#[test]
fn it_can_only_be_chosen_where_there_is_something_to_keep() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let mut settings: KmipSettings = super::super::fixture::settings(&[1]);
    (settings.mode, settings.cache) = (Mode::Server, None);
    let provider = KmipProvider::create(&stores.providers(), &"b".parse().unwrap(), settings).unwrap();
    let persist = persist::Request {
        tpm: &Tpm::new("device:/nowhere".parse().unwrap(), Duration::from_secs(1)),
        keep: KeepTime::default(),
        pcrs: PcrList::default(),
    };
    let refused = provider.set_cache(CachePolicy::UntilLock, Some(&persist));
    assert!(
        matches!(refused, Err(KmipProviderError::Settings(SettingsError::Cache(_)))),
        "{refused:?}"
    );
    assert_eq!(
        stores.host_store.kek_cache(provider.id()).enrollment().unwrap(),
        None
    );
}
