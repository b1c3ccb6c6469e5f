//! Destroying a key at the server, and what can truly be said of it afterwards.

use super::engine::{KeyInfo, TransitEngine};
use super::http::Fault;
use super::kek::{KekName, is_of_vm};
use crate::model::envelope::VmId;
use crate::provider::DestroyReceipt;

/// Destroys the KEK if its key is that of `vm`, and says whether it is gone, and what was seen.
pub(super) fn destroy(engine: &TransitEngine, name: &KekName, vm: VmId) -> Result<DestroyReceipt, Fault> {
    let kek = name.id();
    let found = engine.key(&name.key)?.ok_or_else(|| Fault::unknown(&kek))?;
    if name.context.is_none() && !is_of_vm(&name.key, vm) {
        let why = format!("key {} is not this VM's own", name.key);
        return Ok(DestroyReceipt::shared(&kek, &why));
    }
    let (destroyed, observed) = destroy_own(engine, name, &found)?;
    Ok(DestroyReceipt {
        kek,
        destroyed,
        observed,
    })
}

fn destroy_own(engine: &TransitEngine, name: &KekName, found: &KeyInfo) -> Result<(bool, String), Fault> {
    let key = &name.key;
    if let Some(context) = name.context {
        return Ok((
            false,
            format!(
                "the KEK is derived from key {key} and {context}, and can be again for as long as that key exists"
            ),
        ));
    }
    if name.version > found.latest_version {
        return Err(Fault::unknown(&name.id()));
    }
    if name.version < found.latest_version {
        return Ok((
            false,
            format!(
                "version {} of key {key} is not the newest ({}): old versions go at the server, by \
                 min_decryption_version and trim, once nothing needs them",
                name.version, found.latest_version
            ),
        ));
    }
    let allowed = match found.deletion_allowed {
        true => Ok(()),
        false => engine.allow_deletion(key),
    };
    match allowed.and_then(|()| engine.delete(key)) {
        Ok(()) => {}
        Err(Fault::Denied(why) | Fault::Refused(why)) => {
            if !found.deletion_allowed {
                // As it was; where that is denied as well, nothing was changed.
                let _ = engine.forbid_deletion(key);
            }
            return Ok((
                false,
                format!("{why}. An admin of the server must set deletion_allowed on key {key} and delete it"),
            ));
        }
        Err(fault) => return Err(fault),
    }
    Ok(match engine.key(key)? {
        None => (
            true,
            format!(
                "the server deleted key {key} with its {} version(s) and does not know it any more; backups and \
                 snapshots of the server's storage may still hold it",
                found.latest_version
            ),
        ),
        Some(_) => (
            false,
            format!("the server took the deletion of key {key}, and still has it"),
        ),
    })
}
