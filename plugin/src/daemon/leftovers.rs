//! What killed daemons have left behind.

use std::collections::BTreeMap;
use std::path::Path;

use super::paths;
use super::state::Daemon;
use crate::model::problem::chain;
use crate::object::disk;

/// Removes what killed daemons left half-made beside the images that this host knows.
pub(crate) fn sweep_temporaries(daemon: &Daemon) {
    let Ok(records) = daemon.keystore.envelopes() else {
        return;
    };
    let locations = records.sound.iter().map(|record| Path::new(&record.location));
    // One image of each directory.
    let images: BTreeMap<_, _> = locations
        .filter_map(|location| Some((location.parent()?, location)))
        .collect();
    for image in images
        .into_values()
        .filter_map(|image| paths::known_place(daemon, image).ok())
    {
        match disk::sweep_temporaries(&image) {
            Ok(removed) => removed
                .iter()
                .for_each(|path| tracing::info!(path = %path.display(), "removed a leftover")),
            Err(error) => tracing::warn!("{}", chain(&error)),
        }
    }
}
