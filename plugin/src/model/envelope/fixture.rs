//! Envelopes for tests: with the MAC that they need, and stanzas that no provider opens.

use super::{
    Binding, Envelope, EnvelopeId, Generation, KekId, ObjectKind, ProviderId, Stanza, Verified, VmId,
};
use crate::secret::Dek;

/// The key of all of them.
pub(crate) fn dek() -> Dek {
    Dek::from_bytes(&[7; 32]).unwrap()
}

pub(crate) fn stanza() -> Stanza {
    Stanza {
        provider: ProviderId::random(),
        provider_name: "main".to_owned(),
        kek: KekId("v1:provider".to_owned()),
        mechanism: "A256GCM".to_owned(),
        body: vec![7; 92],
    }
}

/// A new one, of a disk.
pub(crate) fn envelope(vm: VmId) -> Verified {
    let binding = Binding {
        envelope: EnvelopeId::random(),
        vm,
        kind: ObjectKind::Disk,
    };
    Verified::new(&binding, vec![stanza()], &dek()).unwrap()
}

/// `of` after a change by who has the key.
pub(crate) fn changed(of: &Verified, change: impl FnOnce(&mut Envelope)) -> Verified {
    let mut envelope = of.clone().into_envelope();
    change(&mut envelope);
    Verified::of_test(envelope, &dek())
}

/// Another version of `of`.
pub(crate) fn version(of: &Verified, generation: u64, body: u8) -> Verified {
    changed(of, |envelope| {
        envelope.generation = Generation::of_test(generation);
        envelope.stanzas[0].body = vec![body; 92];
    })
}
