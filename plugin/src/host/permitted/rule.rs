//! What is permitted: the directories, and how a path is judged by them.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::pool::{self, QemuIds};
use super::walk::{Ground, Known, Reach, Trail, Walk, is_plain, physical, walk_anywhere};
use super::{PathError, PermittedPath};
use crate::host::libvirt::StoragePool;
use crate::host::storage;
use crate::model::deadlines::image::GROUND;

/// Where firmware comes with its templates.
const FIRMWARE: [&str; 3] = ["/usr/share", "/usr/local/share", "/usr/lib"];

/// Where root acts at paths that others have written.
#[derive(Clone, Debug, Default)]
pub(crate) struct PathRule {
    /// libvirt's own.
    own: Vec<PathBuf>,
    image_dirs: Vec<PathBuf>,
    pools: Vec<StoragePool>,
    /// Nothing in it belongs to a VM.
    state_dir: PathBuf,
    /// What all of that is on this host: looked at once, when it is first asked for.
    grounds: OnceLock<Vec<Ground>>,
    /// Where the state directory really is, looked at once too.
    state: OnceLock<Option<PathBuf>>,
    trail: Option<Trail>,
}

impl PathRule {
    /// Where libvirt keeps images that nobody has put elsewhere.
    pub(crate) const IMAGES: &str = "/var/lib/libvirt/images";

    /// Permits what is in the directories of `own`, which are libvirt's, and of `image_dirs`, and never `state_dir`.
    pub(crate) fn new(own: &[&Path], image_dirs: &[PathBuf], state_dir: &Path) -> Self {
        Self {
            own: own.iter().copied().map(Path::to_owned).collect(),
            image_dirs: image_dirs.to_owned(),
            state_dir: state_dir.to_owned(),
            ..Self::default()
        }
    }

    /// And the volumes of active storage pools.
    #[must_use]
    pub(crate) fn with_pools(mut self, pools: Vec<StoragePool>) -> Self {
        self.pools = pools;
        self.grounds = OnceLock::new();
        self
    }

    /// For one look at many files, which acts at none: each directory is walked to once.
    #[must_use]
    pub(crate) fn for_one_look(self) -> Self {
        let trail = Some(Trail::default());
        Self { trail, ..self }
    }

    /// A path in one of the directories.
    ///
    /// # Errors
    /// [`PathError`]; one outside of them is told which setting permits it.
    pub(crate) fn permit(&self, path: &Path) -> Result<PermittedPath, PathError> {
        self.judge(path, Known::No)
    }

    /// A path in one of the directories, or one that the keystore has for an object of the same VM. Who replaces what is there must
    /// have opened it with that object's key.
    pub(crate) fn permit_known(
        &self,
        path: &Path,
        mut known: impl Iterator<Item = impl AsRef<Path>>,
    ) -> Result<PermittedPath, PathError> {
        let is_known = known.any(|known| known.as_ref() == path);
        self.judge(path, if is_known { Known::ToTheKeystore } else { Known::No })
    }

    /// A template of UEFI variables, which root puts into a VM: one that came with the host's firmware or that the host's settings
    /// name, one that anybody may read, or one in a directory of `image_dirs`.
    pub(crate) fn permit_template(
        &self,
        path: &Path,
        of_host: &[PathBuf],
    ) -> Result<PermittedPath, PathError> {
        if of_host.iter().any(|named| named == path) {
            return walk_anywhere(path)?.into_permitted(path);
        }
        let firmware = Self {
            own: FIRMWARE.iter().map(PathBuf::from).collect(),
            ..Self::default()
        };
        let is_public = |place: &PermittedPath| place.metadata().is_ok_and(|found| found.mode() & 0o004 != 0);
        let is_harmless = |place: &PermittedPath| !place.exists() || is_public(place);
        if let Some(place) = firmware.permit(path).ok().filter(is_harmless) {
            return Ok(place);
        }
        let place = self.permit(path)?;
        let named = Self {
            image_dirs: self.image_dirs.clone(),
            ..Self::default()
        };
        if is_harmless(&place) || named.permit(path).is_ok() {
            return Ok(place);
        }
        Err(PathError::Private {
            path: path.to_owned(),
            image_dirs: self.image_dirs.clone(),
        })
    }

    fn judge(&self, path: &Path, known: Known) -> Result<PermittedPath, PathError> {
        if !is_plain(path) || path.file_name().is_none() {
            return Err(PathError::Odd(path.to_owned()));
        }
        let has_state = self.state_dir.is_absolute();
        if has_state && path.starts_with(&self.state_dir) {
            return Err(PathError::OfVirtseal(path.to_owned()));
        }
        // What the keystore knows needs no directory that permits it, so a start does not wait for one to be looked at.
        let grounds = match known {
            Known::ToTheKeystore => &[],
            Known::No => self.grounds(),
        };
        let walk = Walk::new(grounds, known).along(self.trail.as_ref());
        let walked = match walk.to(path) {
            Ok(walked) if known == Known::ToTheKeystore || walked.is_granted() => walked,
            Err(stopped) if known == Known::ToTheKeystore || stopped.is_granted => return Err(stopped.why),
            Ok(_) | Err(_) => return Err(self.outside(path)),
        };
        let state = self.state.get_or_init(|| physical(&self.state_dir).ok());
        let in_state = |dir: &PathBuf| walked.directory().path.starts_with(dir);
        if has_state && state.as_ref().is_some_and(in_state) {
            return Err(PathError::OfVirtseal(path.to_owned()));
        }
        walked.into_permitted(path)
    }

    /// The same for whatever is there or is not. Only of a directory that root has named itself it is told why that permits nothing.
    fn outside(&self, path: &Path) -> PathError {
        let mut named = self.own.iter().chain(&self.image_dirs);
        let unusable = named.find_map(|dir| path.starts_with(dir).then(|| physical(dir).err()).flatten());
        unusable.unwrap_or_else(|| PathError::Outside {
            path: path.to_owned(),
            directory: path.parent().unwrap_or(path).to_owned(),
            image_dirs: self.image_dirs.clone(),
        })
    }

    /// Where the directories really are; one that is not there, does not answer, or is reached through a link that others can change,
    /// permits nothing.
    pub(super) fn grounds(&self) -> &[Ground] {
        self.grounds.get_or_init(|| {
            let dirs = self.own.iter().chain(&self.image_dirs);
            let dirs = dirs.chain(self.pools.iter().map(|pool| &pool.path));
            let found = storage::in_time(dirs.cloned().collect(), GROUND, |dir| physical(dir).ok());
            let found: BTreeMap<_, _> = found.into_iter().collect();
            let ground = |dir: &PathBuf, reach| {
                let path = found.get(dir).cloned().flatten().flatten()?;
                Some(Ground { path, reach })
            };
            let named = self.own.iter().chain(&self.image_dirs);
            let mut grounds: Vec<_> = named.filter_map(|dir| ground(dir, Reach::Below)).collect();
            if !self.pools.is_empty() {
                let qemu = QemuIds::of_this_host();
                let answers = |pool: &&StoragePool| matches!(found.get(&pool.path), Some(Some(_)));
                let pools = self.pools.iter().filter(answers);
                let pools = pools.filter(|pool| pool::opens(pool, &qemu));
                grounds.extend(pools.filter_map(|pool| ground(&pool.path, Reach::Directly)));
            }
            grounds
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_keystore_knows_waits_for_no_other_storage() {
        let (rule, known) = (
            PathRule::new(&[Path::new("/etc")], &[], Path::new("")),
            Path::new("/etc/passwd"),
        );
        rule.permit_known(known, [known].into_iter()).unwrap();
        assert!(rule.grounds.get().is_none());
        rule.permit(known).unwrap();
        assert!(rule.grounds.get().is_some());
    }
}
