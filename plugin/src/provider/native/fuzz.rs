//! A target: the document in a backup, once `age` has opened it.

use super::document::RootKeys;
use crate::fuzz_target::Target;
use crate::model::envelope::ProviderId;

pub(crate) const BACKUP: Target = Target {
    name: "backup_document",
    seeds: || {
        let keys = RootKeys::random(ProviderId::random()).expect("a root key");
        vec![keys.to_text("main").expect("a text").to_vec()]
    },
    read: |bytes| {
        let Ok(keys) = RootKeys::from_text(bytes) else {
            return false;
        };
        let text = keys.to_text("again").expect("a text");
        assert!(RootKeys::from_text(&text).is_ok_and(|again| again.are(&keys)));
        true
    },
};
